"""From a driver, a task or a job actor to coordinator and broker.

Calls are idempotent, so this repeats those whose fate is unknown. Ray itself repeats calls over a restart of the actor
(`max_task_retries`); what arrives here is an actor that is gone for good, for example because somebody ran
``koan-ray down``: then it is created anew, where this process may do that.
"""

from __future__ import annotations

import itertools
import pickle
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from koan_ray import threads
from koan_ray.errors import RuntimeUnavailableError
from koan_ray.runtime.ray import translate

if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[[Any, BaseException | None], None]

_OWN_METHODS = frozenset({"submit", "wait", "note", "checkpoint", "write_documents", "push", "poll", "news"})
_RETRY_S = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
_BLOCKED_LOOK_S = 0.5
_ABSENT_S = 0.5
_MAX_GATHERED = 1000


class RayTransport:
    """See `koan_ray.ports.Transport`.

    Args:
        find: Returns the actor handle of "coordinator" or "broker", creating the actor if this process may.
    """

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find
        self._handles: dict[str, Any] = {}
        self._lock = threads.lock()
        self._outstanding: dict[int, tuple[Any, Done]] = {}
        self._answers: queue.SimpleQueue[tuple[Callable[[Any], None], Any] | None] = queue.SimpleQueue()
        self._bringing: threading.Thread | None = None
        self._finding: dict[str, list[tuple[Callable[[], None], Done]]] = {}
        self._absent_until: dict[str, float] = {}
        self._numbers = itertools.count()
        self._is_closed = False

    def coordinator(self, method: str, args: tuple[Any, ...], done: Done) -> None:
        """Call a method of the coordinator."""
        self._call("coordinator", method, args, done, 0)

    def broker(self, method: str, args: tuple[Any, ...], done: Done) -> None:
        """Call a method of the broker."""
        self._call("broker", method, args, done, 0)

    def close(self) -> None:
        """Answer what is under way, and refuse what comes: Ray may be gone before it answers."""
        self._is_closed = True
        self._answers.put(None)
        with self._lock:
            waiting = [done for calls in self._finding.values() for _, done in calls]
            self._finding.clear()
        while self._outstanding:
            waiting.append(self._outstanding.popitem()[1][1])
        for done in waiting:
            threads.guarded("answer_not_delivered", done, None, _over())

    def block(self, event: threading.Event, timeout: float | None) -> bool:
        """Wait for an event that a call in progress will set, in a way that tells Ray that this task is blocked.

        Ray then gives the CPU of the task to others, such as the jobs that it waits for.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not event.is_set():
            left = _BLOCKED_LOOK_S if until is None else min(_BLOCKED_LOOK_S, until - time.monotonic())
            if left <= 0:
                return event.is_set()
            refs = [ref for ref, _ in list(self._outstanding.values())]
            if refs:
                ray.wait(refs, num_returns=1, timeout=left, fetch_local=False)
                event.wait(0.002)  # the callback of the ref that became ready runs in another thread
            else:
                event.wait(min(left, 0.05))
        return True

    def _call(self, whom: str, method: str, args: tuple[Any, ...], done: Done, turn: int) -> None:
        if self._is_closed:
            done(None, _over())
            return
        handle = self._handles.get(whom)
        if handle is None:
            self._find_first(whom, lambda: self._call(whom, method, args, done, turn), done)
            return
        try:
            request = pickle.dumps(args, protocol=5)
            # Those that are called often have a concurrency group of their own.
            own = method in _OWN_METHODS
            ref = getattr(handle, method).remote(request) if own else handle.ask.remote(method, request)
        except Exception as error:  # noqa: BLE001 - Ray raises what it likes at submission
            self._failed(whom, method, args, done, turn, error)
            return
        number = next(self._numbers)
        self._outstanding[number] = ref, done

        def answered(answer: Any) -> None:
            if self._outstanding.pop(number, None) is None:
                return  # closed meanwhile
            if isinstance(answer, BaseException):
                self._failed(whom, method, args, done, turn, answer)
                return
            try:
                read = pickle.loads(answer)  # noqa: S301 - from this cluster
            except Exception as error:  # noqa: BLE001 - of another version, perhaps; whoever waits is to learn of it
                msg = f"{whom}.{method}: its answer cannot be read ({type(error).__name__}: {error})"
                done(None, RuntimeUnavailableError(msg))
            else:
                done(read, None)

        try:
            if type(ref) is ray.ObjectRef:
                ref._on_completed(lambda answer: _bring(answered, answer))  # noqa: SLF001 - future() without the future
            else:  # of a Ray Client, whose one thread for data must not wait for more data, as the next call would have it
                ref._on_completed(lambda answer: self._answers.put((answered, answer)))  # noqa: SLF001 - as above
                self._bring_answers()
        except BaseException as error:
            if self._outstanding.pop(number, None) is None or not isinstance(error, Exception):
                raise
            self._failed(whom, method, args, done, turn, error)

    def _bring_answers(self) -> None:
        """Have what a Ray Client answers brought by a thread of ours."""
        with self._lock:
            if self._bringing is None or not self._bringing.is_alive():
                self._bringing = threads.keep("koan-answers", self._bring_next)

    def _bring_next(self) -> None:
        while (brought := self._answers.get()) is not None:
            _bring(*brought)
            del brought  # it may be large, and the next one may be long in coming

    def know(self, whom: str, handle: Any) -> None:
        """Use this handle from now on."""
        self._handles[whom] = handle

    def _find_first(self, whom: str, then: Callable[[], None], done: Done) -> None:
        """Look the actor up, or create it, then go on with all calls that have gathered.

        On a thread of its own: it asks the GCS, and this may be a thread of Ray's that the answer needs.
        """
        with self._lock:
            waiting = self._finding.get(whom)
            if waiting is not None:
                if len(waiting) < _MAX_GATHERED:
                    waiting.append((then, done))
                    return
            elif time.monotonic() >= self._absent_until.get(whom, 0.0):
                finding = threading.Thread(target=self._look_up, args=(whom,), name="koan-find", daemon=True)
                finding.start()  # first: nobody shall wait for one that cannot start; it needs the lock to see who waits
                self._finding[whom] = [(then, done)]
                return
        done(None, RuntimeUnavailableError(f"there is no {whom} at present; repeat the request"))

    def _look_up(self, whom: str) -> None:
        problem: BaseException | None = None
        try:
            self._handles[whom] = self._find(whom)
        except BaseException as error:  # noqa: BLE001 - not there, or Ray is away
            problem = translate.to_ours(error, f"looking for the {whom}")
        with self._lock:
            waiting = self._finding.pop(whom, [])
            if problem is not None:
                self._absent_until[whom] = time.monotonic() + _ABSENT_S
        for then, done in waiting:
            if problem is None:
                threads.guarded("answer_not_delivered", then)
            else:
                threads.guarded("answer_not_delivered", done, None, problem)

    def _failed(self, whom: str, method: str, args: tuple[Any, ...], done: Done, turn: int, error: BaseException) -> None:
        if (translate.is_gone(error) or translate.is_unknown(error)) and turn < len(_RETRY_S) and not self._is_closed:
            if translate.is_gone(error):
                self._handles.pop(whom, None)
            # A timer thread, because this may be a thread of Ray's, which must not sleep or create actors.
            again = whom, method, args, done, turn + 1
            timer = threading.Timer(_RETRY_S[turn], threads.guarded, ("answer_not_delivered", self._call, *again))
            timer.daemon = True
            try:
                timer.start()
                return
            except RuntimeError as problem:  # as many threads as the system allows, or the interpreter ends
                error = problem
        done(None, translate.to_ours(error, f"{whom}.{method}"))


def _bring(answered: Callable[[Any], None], answer: Any) -> None:
    """Deliver an answer of Ray's, in a thread that delivers others as well."""
    threads.answering.now = True
    try:
        threads.guarded("answer_not_delivered", answered, answer)
    finally:
        threads.answering.now = False


def _over() -> RuntimeUnavailableError:
    return RuntimeUnavailableError("the engine was shut down; call koan.init() to start or join one")
