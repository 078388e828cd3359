"""Whether a cluster has a node on which an actor can run at all, and in words what it lacks.

What is busy is no matter here: that passes by itself. Ray lets an actor that fits no node wait without a word, because a
node may still join; so whoever shows a job says what it waits for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koan_ray.domain.records import ActorSpec

_ONE_OF: Final = re.compile(r"in\((.*)\)")
_MOST_SHOWN: Final = 5  # requirements, and values of a label


class Node(NamedTuple):
    """What one node of a cluster has in all, free or not. Units: ``memory`` in bytes, by the names that Ray uses."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def unmet(spec: ActorSpec, nodes: Sequence[Node]) -> str | None:
    """Return in words what no node has that an actor of this spec needs; None if one could run it, were it free."""
    wanted, labels = _wanted(spec), spec.label_selector
    if not nodes or any(_has(node, wanted, labels) for node in nodes):
        return None
    fitting = [node for node in nodes if _fits(node, labels)]
    lacking = [(name, least) for name, least in wanted if not any(_amount(node, name) >= least for node in nodes)]
    if lacking:
        what = " and ".join(_said(name, least, nodes) for name, least in lacking[:_MOST_SHOWN])
    elif not fitting:
        alone = [pair for pair in labels if not any(_fits(node, (pair,)) for node in nodes)]
        what = " and ".join(_label_said(pair, nodes) for pair in (alone or labels)[:_MOST_SHOWN])
        what += "" if alone else " together"
    else:
        all_wanted = [*(_label(pair) for pair in labels), *(f"{name}: {_number(name, least)}" for name, least in wanted)]
        what = f"{' and '.join(all_wanted[:_MOST_SHOWN])} together"
    return f"no node of the cluster has {what}; waits until one joins"


def _wanted(spec: ActorSpec) -> list[tuple[str, float]]:
    amounts = [("CPU", spec.num_cpus), ("GPU", spec.num_gpus), ("memory", float(spec.memory or 0)), *spec.custom]
    return [(name, amount) for name, amount in amounts if amount > 0]


def _has(node: Node, wanted: Sequence[tuple[str, float]], labels: Sequence[tuple[str, str]]) -> bool:
    return _fits(node, labels) and all(_amount(node, name) >= least for name, least in wanted)


def _amount(node: Node, name: str) -> float:
    return node.resources.get(name, 0.0)


def _fits(node: Node, labels: Sequence[tuple[str, str]]) -> bool:
    return all(_is_met(selector, node.labels.get(name)) for name, selector in labels)


def _is_met(selector: str, value: str | None) -> bool:
    """Tell whether a node whose label has this value is meant; Ray's forms: ``a``, ``!a``, ``in(a, b)``, ``!in(a, b)``."""
    plain = selector.removeprefix("!")
    values = [each.strip() for each in found[1].split(",")] if (found := _ONE_OF.fullmatch(plain)) else [plain]
    return (value in values) is (plain == selector)


def _said(name: str, least: float, nodes: Sequence[Node]) -> str:
    most = max((_amount(node, name) for node in nodes), default=0.0)
    return f"{name}: {_number(name, least)} ({'none has any' if not most else f'the most is {_number(name, most)}'})"


def _label_said(pair: tuple[str, str], nodes: Sequence[Node]) -> str:
    values = sorted({node.labels[pair[0]] for node in nodes if pair[0] in node.labels})
    shown = ", ".join(values[:_MOST_SHOWN]) + (", …" if len(values) > _MOST_SHOWN else "")
    return f"{_label(pair)} ({f'there is {shown}' if values else 'none has this label'})"


def _label(pair: tuple[str, str]) -> str:
    return f"the label {pair[0]}={pair[1]}"


def _number(name: str, amount: float) -> str:
    return f"{amount / 2**30:,.3g} GiB" if name == "memory" else f"{amount:g}"
