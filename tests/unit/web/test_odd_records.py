"""A record that cannot be shown hides no other, in lists and in streams."""

from __future__ import annotations

from koan_ray.domain.records import ErrorInfo
from koan_ray.testing.contracts import job
from koan_ray.web import presenting, streams
from koan_ray.web.hub import Batch, Event
from koan_ray.web.redaction import REDACTED, Redactor


def test_a_list_leaves_out_what_cannot_be_shown_and_says_so(caplog):
    good, odd, last = job(name="a"), job(name=5), job(error=ErrorInfo("E", "\ud800"))
    with caplog.at_level("ERROR", logger="koan_ray"):
        assert [row.id for row in presenting.summaries([good, odd, last])] == [good.id, last.id]
    assert odd.id in caplog.text


def test_a_stream_goes_on_past_a_change_that_cannot_be_shown():
    good, odd = job(name="caf\udce9"), job(description=b"x")
    batch = Batch([Event("job", record.id, record, number) for number, record in enumerate((good, odd, good), start=1)])
    text = batch.text(streams._as_sse)
    assert text.count("event: job") == 2
    assert ": one change cannot be shown" in text
    text.encode()


def test_a_secret_is_taken_out_of_a_text_that_was_made_readable():
    redactor = Redactor(["hun\x00ter2", "\x1b[0msesame"])
    assert redactor.text("it was hun\N{REPLACEMENT CHARACTER}ter2") == f"it was {REDACTED}"
    assert redactor.text("it was hun\x00ter2 or \x1b[0msesame") == f"it was {REDACTED} or {REDACTED}"
