"""A board for Grafana over what `koan_ray.runtime.ray.metrics` publishes, and the same panels inside Ray's own board.

Ray's Metrics page shows the board with the uid ``rayDefaultDashboard``, which Ray writes as `RAYS_FILE` into the folder
named by ``RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR``, each time its dashboard starts. `merged` adds a row to that one.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

UID: Final = "koanRayJobs"
ROW_TITLE: Final = "Koan jobs"
RAYS_FILE: Final = "default_grafana_dashboard.json"
OWN_FILE: Final = "koan_grafana_dashboard.json"
_FIRST_ID = 9000  # Ray numbers its panels from 1
_DATASOURCE = "${datasource}"
_WIDTH, _HEIGHT = 12, 8


class _Panel(NamedTuple):
    title: str
    unit: str
    targets: tuple[tuple[str, str], ...]  # what to ask Prometheus, and how to call the answers
    type: str = "timeseries"
    stacked: bool = False
    most: float | None = None


def _sum(metric: str, by: str) -> str:
    return f'sum(ray_koan_{metric}{{engine=~"$engine"}}) by ({by})'


def _most(metric: str, by: str = "engine") -> str:
    return f'max(ray_koan_{metric}{{engine=~"$engine"}}) by ({by})'


def _rate(metric: str, by: str = "engine") -> str:
    return f'sum(rate(ray_koan_{metric}_total{{engine=~"$engine"}}[$__rate_interval])) by ({by})'


def _quantile(share: float, metric: str, by: str = "kind") -> str:
    rate = f'sum(rate(ray_koan_{metric}_bucket{{engine=~"$engine"}}[$__rate_interval])) by (le, {by})'
    return f"histogram_quantile({share}, {rate})"


_PANELS: Final = (
    _Panel("Unfinished jobs", "short", ((_sum("queue_depth", "state"), "{{state}}"),), stacked=True),
    _Panel("Jobs ended per second", "ops", ((_rate("jobs_ended", "status"), "{{status}}"),), stacked=True),
    _Panel("Progress of running root jobs", "percentunit",
           ((_most("root_progress", "kind, slot"), "{{kind}} {{slot}}"),), type="bargauge", most=1.0),
    _Panel("Next in the queue: age of the oldest", "s", ((_most("oldest_queued_seconds"), "{{engine}}"),)),
    _Panel("Run time by kind", "s",
           ((_quantile(0.5, "run_seconds"), "{{kind}} p50"), (_quantile(0.95, "run_seconds"), "{{kind}} p95"))),
    _Panel("Wait from accepted to begun, by kind", "s",
           ((_quantile(0.5, "wait_seconds"), "{{kind}} p50"), (_quantile(0.95, "wait_seconds"), "{{kind}} p95"))),
    _Panel("Failures per second", "ops",
           ((_rate("retries", "kind"), "{{kind}} tried again"),
            ('sum(rate(ray_koan_jobs_ended_total{engine=~"$engine",status="failed"}[$__rate_interval])) by (kind)',
             "{{kind}} failed"))),
    _Panel("Lost executions and poison per second", "ops",
           ((_rate("executions_lost", "cause"), "lost: {{cause}}"), (_rate("poison", "type"), "poison: {{type}}"))),
    _Panel("Unfinished jobs by kind", "short", ((_sum("jobs_live", "kind"), "{{kind}}"),), stacked=True),
    _Panel("Job actors", "short", ((_sum("actors", "state"), "{{state}}"),), stacked=True),
    _Panel("Flush to the store", "s",
           ((_quantile(0.5, "flush_seconds", "source"), "{{source}} p50"),
            (_quantile(0.95, "flush_seconds", "source"), "{{source}} p95"))),
    _Panel("Waiting to be written, and without a class", "short",
           ((_sum("outbox_backlog", "engine"), "to be written"), (_sum("unroutable", "type"), "no class: {{type}}"))),
    _Panel("Lag of the loop, age of the lease's beat", "s",
           ((_most("loop_lag_seconds"), "loop lag"), (_most("beat_age_seconds", "source"), "beat of {{source}}"))),
    _Panel("Takeovers, fenced writes, unknown outcomes per second", "ops",
           ((_rate("takeovers", "reason"), "takeover: {{reason}}"),
            (_rate("fenced_writes", "transition"), "fenced: {{transition}}"),
            (_rate("fenced_reports"), "fenced reports"),
            (_rate("outcome_unknown", "op, resolution"), "unknown {{op}}: {{resolution}}"))),
)  # fmt: skip


def board() -> dict[str, Any]:
    """Return the board, to be imported into Grafana or put where it provisions from."""
    return {
        "uid": UID,
        "title": "Koan jobs",
        "description": "Queue, progress, durations and trouble of koan-ray's engines, from Ray's metrics.",
        "tags": ["ray", "koan-ray"],
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "schemaVersion": 27,
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource_variable(), _engine_variable()]},
        "panels": _panels(0),
    }


def merged(rays: dict[str, Any]) -> dict[str, Any]:
    """Return Ray's board with our panels as its last row; one that has them already gets them anew."""
    kept = [panel for panel in rays.get("panels", []) if not _is_ours(panel)]
    below = max((panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in kept), default=0)
    row = {
        "id": _FIRST_ID, "type": "row", "title": ROW_TITLE, "collapsed": False, "panels": [],
        "gridPos": {"x": 0, "y": below, "w": 24, "h": 1},
    }  # fmt: skip
    variables = [each for each in rays.get("templating", {}).get("list", []) if each.get("name") != "engine"]
    if not any(each.get("name") == "datasource" for each in variables):
        variables.insert(0, _datasource_variable())
    return {
        **rays,
        "panels": [*kept, row, *_panels(below + 1)],
        "templating": {**rays.get("templating", {}), "list": [*variables, _engine_variable()]},
    }


def _is_ours(panel: dict[str, Any]) -> bool:
    return bool(_FIRST_ID <= panel.get("id", 0) <= _FIRST_ID + len(_PANELS))


def _panels(below: int) -> list[dict[str, Any]]:
    return [_drawn(place, panel, below) for place, panel in enumerate(_PANELS)]


def _drawn(place: int, panel: _Panel, below: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    options: dict[str, Any] = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    if panel.type == "bargauge":
        options = {"orientation": "horizontal", "displayMode": "basic", "reduceOptions": {"calcs": ["lastNotNull"]}}
    else:
        fill = 40 if panel.stacked else 8
        stacking = {"mode": "normal" if panel.stacked else "none"}
        defaults["custom"] = {"fillOpacity": fill, "stacking": stacking, "showPoints": "never", "lineWidth": 1}
    return {
        "id": _FIRST_ID + 1 + place,
        "type": panel.type,
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": {"x": place % 2 * _WIDTH, "y": below + place // 2 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "expr": expr, "legendFormat": legend, "refId": chr(ord("A") + number), "datasource": _DATASOURCE,
                "instant": panel.type == "bargauge",
            }
            for number, (expr, legend) in enumerate(panel.targets)
        ],
    }  # fmt: skip


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2, "refresh": 1, "options": []}


def _engine_variable() -> dict[str, Any]:
    query = "label_values(ray_koan_queue_depth, engine)"
    return {
        "name": "engine", "label": "Engine", "type": "query", "datasource": _DATASOURCE, "definition": query,
        "query": {"query": query, "refId": "engine"}, "refresh": 2, "multi": True, "includeAll": True, "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]}, "options": [], "sort": 1,
    }  # fmt: skip
