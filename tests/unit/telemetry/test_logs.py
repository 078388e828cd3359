"""What our processes log is one line for each record, said once; an application's own logging is left alone."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from koan_ray.telemetry import configure_logging, logs


@pytest.fixture
def alone(monkeypatch, capsys):
    """A process whose root logger nobody has configured, and its standard error."""
    monkeypatch.setattr(logs, "_root_listens", lambda: False)
    return Shown(capsys)


class Shown:
    def __init__(self, capsys):
        self._capsys, self._text = capsys, ""

    def getvalue(self):
        self._text += self._capsys.readouterr().err
        return self._text


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")


def lines(shown):
    return shown.getvalue().splitlines()


def test_a_record_is_a_line_with_time_level_process_event_and_fields(alone):
    configure_logging(who="coordinator")
    logs.get_logger(namespace="koan").warning("execution_lost", job_id="j1", n=3, problem="two words")
    (line,) = lines(alone)
    at, level, who, rest = line.split(" ", 3)
    assert at.endswith("Z")
    assert (level, who.partition("[")[0]) == ("WARNING", "coordinator")
    assert rest == "execution_lost namespace=koan job_id=j1 n=3 problem='two words'"


@pytest.mark.parametrize(
    "text", ["a\r\nERROR forged", "\x1b[31mred\x1b]0;title\x07", "\udce9", "\u202eevil", "x\u2028y", "\x00\x9b2J"]
)
@pytest.mark.parametrize("how", ["text", "json"])
def test_no_text_of_a_user_makes_a_line_of_its_own_or_steers_a_terminal(alone, text, how):
    configure_logging(format=how)
    logs.get_logger().warning("job_named", name=text, odd=Hostile())
    logging.getLogger("koan_ray.progress").warning("handler said %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        logs.get_logger().error("request_failed", exc_info=True)
    shown = alone.getvalue()
    shown.encode()
    assert not {"\x1b", "\x00", "\x9b", "\x07", "\r", "\u2028"} & set(shown)
    own = [line for line in shown.split("\n") if line and not line.startswith("  ")]
    assert len(own) == 3
    if how == "json":
        assert [json.loads(line)["event"] for line in own][::2] == ["job_named", "request_failed"]


def test_an_argument_that_cannot_be_shown_costs_no_record(alone):
    configure_logging()
    (handler,) = (each for each in logging.getLogger("koan_ray").handlers if isinstance(each, logs._Handler))
    # To it alone: the handlers of pytest would fail.
    handler.emit(logging.makeLogRecord({"name": "koan_ray.progress", "msg": "said %s", "args": (Hostile(),)}))
    assert "arguments could not be shown" in alone.getvalue()


def test_json_has_the_fields_as_members_and_the_stack_trace_as_text(alone):
    configure_logging(format="json", who="broker")
    try:
        raise LookupError("nobody")
    except LookupError:
        logs.get_logger().error("request_failed", request_id="r1", job_id="j1", share=0.5, none=None, exc_info=True)
    found = json.loads(alone.getvalue())
    assert (found["level"], found["process"], found["event"], found["request_id"]) == (
        "error",
        "broker",
        "request_failed",
        "r1",
    )
    assert (found["koan_job_id"], found["share"], found["none"]) == ("j1", 0.5, None)  # job_id is Ray's own
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("LookupError: nobody")


def test_a_stack_trace_follows_its_line_indented(alone):
    configure_logging()
    try:
        raise LookupError("first\nsecond")
    except LookupError as error:
        logs.get_logger().error("request_failed", exc_info=error)
    first, *rest = lines(alone)
    assert first.endswith(" request_failed")
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-2:] == ["  LookupError: first", "  second"]


def test_configured_twice_it_says_everything_once_and_as_told_last(alone):
    configure_logging(format="text")
    configure_logging(format="json", level="info")
    logs.get_logger().info("job_moved")
    assert json.loads(alone.getvalue())["event"] == "job_moved"


def test_below_its_level_nothing_is_written(alone):
    configure_logging(level="error")
    logs.get_logger().warning("something")
    assert alone.getvalue() == ""
    assert not logs.is_enabled()


def test_where_the_root_logger_has_handlers_they_get_it_and_nobody_else(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    configure_logging()
    logs.get_logger().warning("said_once", job_id="j1")  # pytest's own handlers are there
    assert [record.getMessage() for record in caplog.records] == ["said_once job_id=j1"]
    assert shown.getvalue() == ""


def test_in_a_request_each_record_carries_its_id(alone):
    configure_logging()
    with logs.bound(request_id="r1"):
        logs.get_logger().warning("record_skipped")
    logs.get_logger().warning("record_skipped")
    assert [line.endswith(" request_id=r1") for line in lines(alone)] == [True, False]


def test_standard_error_that_is_replaced_is_followed(alone, monkeypatch):
    configure_logging()
    monkeypatch.setattr(sys, "stderr", closed := io.StringIO())
    closed.close()
    monkeypatch.setattr(sys, "stderr", other := io.StringIO())
    logs.get_logger().warning("still_here")
    assert "still_here" in other.getvalue()
