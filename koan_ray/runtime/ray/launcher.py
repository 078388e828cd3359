"""Starts, talks to and ends job actors on a Ray cluster; see `koan_ray.ports.Launcher`.

Runs in the coordinator's process. What may block (registering an actor with the GCS, killing, looking at the cluster)
runs on one thread of its own, in order; answers come back to the coordinator's loop.

Each job actor has a parked `watch` call: its error is how a death is learned, about 12 ms after it happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayTaskError
from ray.experimental import internal_kv
from ray.util import list_named_actors

from koan_ray.domain.feasibility import Node
from koan_ray.engine.tasks import Failures
from koan_ray.runtime.ray import options, translate
from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.domain.records import ActorSpec, Terms
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import ActorEvents, Log, OrderBatch, Survey
    from koan_ray.runtime.loop import LoopThread

_REWATCH_S = 0.5
_SURVEY_S = 5.0  # a job actor that does not answer for so long is ended
_KILL_TRIES = 5
_ENDINGS = 8  # actors that are being ended at a time
_PROGRAMS_S = 0.5  # for an actor that is killed to end the programs of its bodies; one that holds the GIL cannot
_FLUSH_S = 1.5  # for the last spans of an actor that is not needed any more
_KEEP_TRIES = 5
_KEEP_AGAIN_S = 0.5


class _Actor:
    """A job actor's handle, with the calls that are made often prepared."""

    __slots__ = ("events", "exports", "handle", "is_attended", "labelled", "name")

    def __init__(self, name: str, events: ActorEvents, *, exports: bool) -> None:
        self.name, self.events, self.exports = name, events, exports
        self.handle: Any = None
        self.labelled: dict[str, Any] = {}
        self.is_attended = 0


class RayLauncher:
    """Job actors of one coordinator."""

    def __init__(self, namespace: str, settings: EngineSettings, loop: LoopThread) -> None:
        self._namespace, self._settings, self._loop = namespace, settings, loop
        self._actors: dict[str, _Actor] = {}
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="koan-launcher")
        self._endings = ThreadPoolExecutor(_ENDINGS, thread_name_prefix="koan-endings")
        self._ordered: set[Future[None]] = set()  # ends of actors that are under way
        self._capacity = 1
        self._is_crowded = False
        self._nodes: list[Node] | None = None
        self._is_looking = False
        self._actor_class: Any = None
        self._open_refs: set[Any] = set()
        self._exports = bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))  # as all processes of this cluster, if any does
        self._surveyed: dict[str, Any] = {}  # handles of an earlier coordinator's actors
        self.failures = Failures(cast("Log", logs.get_logger()))  # the coordinator's, once there is one

    def capacity(self) -> int:
        """Return the cluster's CPUs as of a moment ago."""
        if not self._is_looking:
            self._is_looking = True
            self._slow.submit(self._look)
        return self._capacity

    def is_crowded(self) -> bool:
        """Tell whether tasks or actors of anybody wait for resources, as of a moment ago."""
        return self._is_crowded

    def nodes(self) -> list[Node] | None:
        """Return what the nodes have, as of a moment ago; None before the first look."""
        return self._nodes

    def _look(self) -> None:
        try:
            self._capacity = max(1, int(ray.cluster_resources().get("CPU", 1)))
            nodes = (node for node in ray.nodes() if node["Alive"])
            self._nodes = [Node(node["Resources"], node.get("Labels") or {}) for node in nodes]
            self._is_crowded = _has_pending_demand()
        except Exception:  # noqa: BLE001, S110 - the GCS is away for now; what we know stands
            pass
        finally:
            self._is_looking = False

    def start(self, name: str, spec: ActorSpec, events: ActorEvents, *, lent: bool = False) -> None:
        """Begin to start an actor."""
        actor = self._actors[name] = _Actor(name, events, exports=self._exports or "OTEL_" in (spec.runtime_env or ""))
        self._slow.submit(self._create, actor, spec, lent)

    def _create(self, actor: _Actor, spec: ActorSpec, lent: bool) -> None:  # noqa: FBT001 - called through an executor
        try:
            if self._actor_class is None:
                from koan_ray.runtime.ray.actors import JobActor  # the shells import this module

                self._actor_class = options.shell(JobActor, options.JOB_GROUPS)
            chosen = options.job_actor(spec, actor.name, self._namespace, lent=lent)
            actor.handle = self._actor_class.options(**chosen).remote(actor.name, spec, self._settings, self._namespace)
            self._then(actor, actor.handle.info.remote(), lambda info: actor.events.actor_ready(actor.name, info))
        except Exception as error:  # noqa: BLE001 - Ray refuses bad options with whatever it likes
            self._kill(actor)
            self._loop.call(self._dead, actor, f"{type(error).__name__}: {error}"[:500])
            return
        self._watch(actor)

    def _watch(self, actor: _Actor) -> None:
        """Learn of the actor's death: what cannot be asked now is asked again, or nobody ever would."""
        if actor.name not in self._actors or actor.handle is None:
            return
        try:
            future = actor.handle.watch.remote().future()
        except Exception as error:  # noqa: BLE001 - Ray raises what it likes at submission
            self.failures.note("watch of an actor", error)
            self._loop.call(self._loop.loop.call_later, _REWATCH_S, self._watch, actor)
            return
        future.add_done_callback(lambda future: self._watched(actor, future.exception()))

    def _watched(self, actor: _Actor, error: BaseException | None) -> None:
        if error is None or translate.is_unknown(error):
            # It may still live, on a node that does not answer. Only a death that Ray is sure of counts.
            self._loop.call(self._loop.loop.call_later, _REWATCH_S, self._watch, actor)
        else:
            self._loop.call(self._dead, actor, translate.cause_of_death(error))

    def _dead(self, actor: _Actor, cause: str) -> None:
        if self._actors.pop(actor.name, None) is not None:
            actor.events.actor_dead(actor.name, cause)

    def send(self, name: str, batch: int, orders: OrderBatch, *, label: str) -> None:
        """Hand over a batch."""
        actor = self._actors.get(name)
        if actor is None:
            return
        run = actor.labelled.get(label)
        if run is None:  # prepared once: options() on every call costs a tenth of the call
            if len(actor.labelled) >= 100:
                actor.labelled.clear()
            # Calls for brief jobs have no label and are not recorded: they would fill Ray's task table.
            named = {"name": label} if label else {"enable_task_events": False}
            run = actor.labelled[label] = actor.handle.run_batch.options(**named)

        self._then(actor, run.remote(batch, pickle.dumps(orders, protocol=5)), self._answer_of(actor, batch))

    def hurry(self, name: str, batch: int) -> None:
        """Have a batch answered now."""
        actor = self._actors.get(name)
        if actor is None:
            return

        self._then(actor, actor.handle.answer_now.remote(batch), self._answer_of(actor, batch))

    def _answer_of(self, actor: _Actor, batch: int) -> Callable[[bytes], None]:
        def answered(answer: bytes) -> None:
            if (reply := pickle.loads(answer)) is not None:  # noqa: S301 - from this cluster
                actor.events.batch_answered(actor.name, batch, reply)

        return answered

    def cancel(self, name: str, execution_id: str, cause: str) -> None:
        """Ask a body to stop."""
        if (actor := self._actors.get(name)) is not None:
            actor.handle.cancel.remote(execution_id, cause)

    def attend(self, name: str, execution_id: str, label: str) -> None:
        """Let the dashboard show a call in progress under the job's kind."""
        actor = self._actors.get(name)
        if actor is None or actor.is_attended >= options.ATTEND_LIMIT:
            return
        actor.is_attended += 1

        def ended(_future: Any) -> None:
            actor.is_attended -= 1

        actor.handle.attend.options(name=label).remote(execution_id).future().add_done_callback(ended)

    def retire(self, name: str) -> None:
        """End an idle actor, where spans are exported after a moment in which it sends its last ones.

        Programs that its bodies have left running go on.
        """
        actor = self._actors.get(name)
        if actor is None:
            return
        if actor.handle is None or not actor.exports:
            self._order(self._end, actor)
            return
        end = functools.partial(self._order, self._end, actor)
        flushing = actor.handle.flush.remote().future()
        flushing.add_done_callback(lambda _future: self._loop.call(end))
        self._loop.call(self._loop.loop.call_later, _FLUSH_S, end)

    def kill(self, name: str) -> None:
        """End an actor and the programs of its bodies, which do not stop; its `watch` call says when it is gone."""
        if (actor := self._actors.get(name)) is not None:
            self._order(self._kill, actor)

    def _order(self, end: Callable[[_Actor], None], actor: _Actor) -> None:
        """Have an actor ended, beside others that take their time, once it has been asked for: not before it was made."""
        ordered: Future[None] = Future()
        self._ordered.add(ordered)
        ordered.add_done_callback(self._ordered.discard)

        def carry_out() -> None:
            try:
                end(actor)
            finally:
                ordered.set_result(None)

        self._slow.submit(self._endings.submit, carry_out)

    def finish(self, within_s: float) -> None:
        """Return when Ray has been told to end every actor that is to be ended, or after a while."""
        wait(list(self._ordered), within_s)

    def _kill(self, actor: _Actor) -> None:
        if actor.handle is not None:
            with contextlib.suppress(Exception):  # it may hang or be gone, and is ended all the same
                ray.wait([actor.handle.end_programs.remote()], timeout=_PROGRAMS_S)
            self._end(actor)

    def _end(self, actor: _Actor) -> None:
        """Kill an actor, again until Ray has taken the order: nobody else ends it, and its place is not free before."""
        for _ in range(_KILL_TRIES):
            if actor.handle is None:
                return
            try:
                ray.kill(actor.handle, no_restart=True)
            except Exception as error:  # noqa: BLE001 - the GCS is away or busy
                self.failures.note("kill of an actor", error)
                time.sleep(_KEEP_AGAIN_S)
            else:
                return

    def settled(self, name: str, batches: tuple[int, ...]) -> None:
        """Tell an actor that the ends of these batches are stored."""
        if (actor := self._actors.get(name)) is not None:
            actor.handle.settled.remote(batches)

    async def survey(self) -> list[Survey]:
        """Ask the job actors that an earlier coordinator left; those that do not answer in time are ended."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, self._survey)

    def _survey(self) -> list[Survey]:
        self._look()
        left = [
            entry["name"]
            for entry in list_named_actors(all_namespaces=True)
            if entry["namespace"] == self._namespace and entry["name"].startswith(options.JOB_PREFIX)
        ]
        asked: dict[Any, str] = {}
        for name in left:
            try:
                self._surveyed[name] = ray.get_actor(name, namespace=self._namespace)
            except ValueError:  # gone meanwhile
                continue
            asked[self._surveyed[name].survey.remote()] = name
        ray.wait(list(asked), num_returns=len(asked), timeout=_SURVEY_S) if asked else None
        found = []
        for ref, name in asked.items():
            try:
                found.append(pickle.loads(ray.get(ref, timeout=0)))  # noqa: S301 - from this cluster
            except Exception:  # noqa: BLE001 - dead, or stuck: what it runs is lost, and must not go on
                ray.kill(self._surveyed.pop(name), no_restart=True)
        return found

    def adopt(self, name: str, events: ActorEvents) -> None:
        """Make a surveyed actor ours."""
        actor = self._actors[name] = _Actor(name, events, exports=self._exports)
        actor.handle = self._surveyed.pop(name)
        self._watch(actor)

    def keep_code(self, terms: Terms, code: bytes) -> None:
        """Keep a job class in Ray's own key-value store, which outlives this process and ends with the cluster."""
        self._slow.submit(self._keep_code, terms, code)

    def _keep_code(self, terms: Terms, code: bytes) -> None:
        key = f"code/{self._namespace}/{terms.kind}".encode()
        blob = pickle.dumps((terms, code))
        for _ in range(_KEEP_TRIES):
            with contextlib.suppress(Exception):  # the GCS is away or busy
                internal_kv._internal_kv_put(key, blob, overwrite=True, namespace=options.KV)  # noqa: SLF001
                return
            time.sleep(_KEEP_AGAIN_S)
        # Given up: after a restart, a driver introduces the class again.

    async def kept_code(self) -> list[tuple[Terms, bytes]]:
        """Return the job classes that an earlier coordinator of this cluster has kept."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, self._kept_code)

    def _kept_code(self) -> list[tuple[Terms, bytes]]:
        prefix = f"code/{self._namespace}/".encode()
        keys = internal_kv._internal_kv_list(prefix, namespace=options.KV)  # noqa: SLF001 - Ray has no public store
        kept = (internal_kv._internal_kv_get(key, namespace=options.KV) for key in keys)  # noqa: SLF001
        return [pickle.loads(blob) for blob in kept if blob]  # noqa: S301 - written by this cluster's coordinator

    def _then(self, actor: _Actor, ref: Any, tell: Callable[[Any], None]) -> None:
        """Bring an answer to the loop, unless the actor is dead by then.

        That it died is no matter here: `watch` tells of every death. One that lives and has raised is of no use any more,
        and what it was asked is settled with its death.
        """

        def on_loop(answer: Any) -> None:
            if actor.name in self._actors:
                tell(answer)

        # Held until then: an answer above 100 KB is fetched from the object store, and fetching one that nobody has a
        # reference to ends this process ("ObjectUnknownOwner", core_worker.cc, Ray 2.60).
        self._open_refs.add(ref)

        def answered(answer: Any) -> None:
            self._open_refs.discard(ref)
            if isinstance(answer, RayTaskError):
                self.failures.note("job actor", answer)
                self.kill(actor.name)
            elif not isinstance(answer, Exception):
                self._loop.call(on_loop, answer)

        ref._on_completed(answered)  # noqa: SLF001 - a future for each call costs more than the call's answer


def _has_pending_demand() -> bool:
    """Ask what the autoscaler asks. There is no public way; without this one, idle actors just stay for their time."""
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    gcs: Any = global_worker.gcs_client  # type: ignore[attr-defined]  # absent from Ray's annotations
    return bool(get_cluster_resource_state(gcs).pending_resource_requests)
