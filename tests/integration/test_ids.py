"""What is no id of a job belongs to no job, whoever asks; what is not even text is a mistake of the caller's."""

from __future__ import annotations

import pickle
import uuid

import pytest

import koan_ray as koan

NO_SUCH = "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10"
NO_IDS = [
    "abc",
    "",
    "0",
    NO_SUCH[:-1],
    f"{NO_SUCH}0",
    f"{{{NO_SUCH[1:-1]}}}",
    NO_SUCH.upper(),
    NO_SUCH.replace("-", "") + "----",
]
NO_IDS += [f"{NO_SUCH[:-1]}g", "\udce9" * 36, "\x1b[1mx", "é" * 36]


class Greet(koan.Job[str, str]):
    def execute(self, context, progress, cancellation) -> str:
        return f"hello {context}"


ASKED = {
    "Job.get": Greet.get,
    "Jobs.get": koan.Jobs.get,
    "Jobs.cancel": koan.Jobs.cancel,
    "Jobs.retry": koan.Jobs.retry,
    "Jobs.remove": koan.Jobs.remove,
    "Jobs.restore": koan.Jobs.restore,
    "Jobs.executions": koan.Jobs.executions,
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED.keys())
@pytest.mark.parametrize("text", NO_IDS, ids=ascii)
def test_text_that_is_no_id_is_a_job_that_is_not_found(local_engine, ask, text):
    pending = ask(text)  # the outcome tells, as for an id that nobody has
    with pytest.raises(koan.JobNotFoundError, match=r"not found\. An id is a UUID in lower case") as caught:
        pending.get(timeout=10)
    assert "looked for nowhere" in str(caught.value)
    assert caught.value.job_id == text
    str(caught.value).encode()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("ask", [ASKED["Job.get"], ASKED["Jobs.cancel"], ASKED["Jobs.executions"]])
def test_an_id_that_nobody_has_is_not_found_and_where_it_was_looked_for_is_said(local_engine, ask):
    with pytest.raises(koan.JobNotFoundError, match=f"job {NO_SUCH}: not found in the engine's memory. It never"):
        ask(NO_SUCH).get(timeout=10)


@pytest.mark.parametrize("value", [None, 5, 5.0, b"abc", ["abc"], object()], ids=repr)
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED.keys())
def test_what_is_no_text_is_refused_at_once(local_engine, ask, value):
    with pytest.raises(koan.ConfigurationError, match=f"expected the id of a job .* got {type(value).__name__} "):
        ask(value)


def test_a_job_in_hand_is_no_id_and_the_message_says_what_is(local_engine):
    job = Greet.start("you").run().get(timeout=10)
    with pytest.raises(koan.ConfigurationError, match=r"of a job in hand that is job\.id"):
        koan.Jobs.get(job)


def test_an_id_may_be_a_uuid(local_engine):
    job = Greet.start("you").run().get(timeout=10)
    job.wait().get(timeout=10)
    assert koan.Jobs.get(uuid.UUID(job.id)).get(timeout=10).id == job.id
    assert koan.Jobs.cancel(uuid.UUID(job.id)).get(timeout=10) is koan.JobStatus.COMPLETED
