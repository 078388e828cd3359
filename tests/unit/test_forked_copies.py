"""What was asked for before a fork has no outcome in the copy, and says so there."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from koan_ray import ambient
from koan_ray.domain.status import JobStatus
from koan_ray.errors import RuntimeUnavailableError
from koan_ray.pending import Pending
from koan_ray.progress import JobProgressUpdate, ProgressStream, Subscription


@pytest.fixture
def fork(monkeypatch):
    """Make this process take itself for a forked copy of what it was."""
    return lambda: monkeypatch.setattr(ambient, "forks", ambient.forks + 1)


def test_an_outcome_that_was_known_is_known_in_a_copy(fork):
    pending = Pending()
    pending.resolve(3)
    fork()
    assert pending.done
    assert pending.succeeded
    assert pending.get() == 3


@pytest.mark.parametrize("use", [
    lambda pending: pending.get(), lambda pending: pending.get(timeout=5), lambda pending: pending.map(str).get(),
    lambda pending: asyncio.run(asyncio.wait_for(pending, 5)),
])  # fmt: skip
def test_an_outcome_that_was_not_known_is_an_error_in_a_copy_whoever_holds_its_lock(fork, use):
    pending = Pending(yields_place=True)
    pending._lock.acquire()
    fork()
    with pytest.raises(RuntimeUnavailableError, match="forked copy of process"):
        use(pending)
    assert pending.done
    assert not pending.succeeded


def test_callbacks_of_the_original_are_not_called_in_a_copy_and_its_own_are(fork):
    pending, called = Pending(), []
    pending.add_done_callback(lambda: called.append("original"))
    fork()
    pending.add_done_callback(lambda: called.append("copy"))
    assert called == ["copy"]


def test_what_a_copy_asks_for_itself_has_an_outcome(fork):
    fork()
    pending = Pending()
    pending.resolve(3)
    assert pending.get() == 3


def test_a_stream_of_the_original_ends_in_a_copy(fork):
    update = JobProgressUpdate("id", 1, 0.5, None, None, None, None, None, JobStatus.RUNNING)

    def watch(deliver):
        deliver(update)
        return lambda: pytest.fail("nobody is there to be asked")

    stream = ProgressStream(watch).blocking()
    assert next(stream) is update
    fork()
    with pytest.raises(RuntimeUnavailableError):
        next(stream)


def test_a_subscription_of_the_original_is_closed_in_a_copy_without_asking_anybody(fork):
    subscription = Subscription(lambda: pytest.fail("nobody is there to be asked"))
    fork()
    subscription.close()
    assert subscription.closed


def test_the_error_names_both_processes_and_survives_pickling():
    error = ambient.left_behind()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "koan.init(runtime='local')" in str(error)
