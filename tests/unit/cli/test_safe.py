"""Nothing that a job says can steer the terminal of whoever looks at it."""

from __future__ import annotations

import io
import json
import re
import unicodedata

import pytest
from rich.console import Console

from koan_ray.cli import present
from koan_ray.cli.safe import as_json, safe, safe_lines, shown
from koan_ray.domain.records import ErrorInfo, JobView, Progress
from koan_ray.jobs import Job
from koan_ray.plain import job_object

CORPUS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;pwned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "clear": "\x1b[2J\x1b[H",
    "answerback": "\x05\x1b[c",
    "c1 csi": "\x9b31mred",
    "c1 osc": "\x9d0;pwned\x9c",
    "forged line": "ok\r\nkoan-ray: all jobs completed",
    "carriage return": "failed\rcompleted",
    "backspace": "failed\x08\x08\x08\x08\x08\x08fine",
    "delete": "a\x7fb",
    "nul": "a\0b",
    "bidi override": "\u202egnp.exe",
    "bidi isolate": "\u2066admin\u2069",
    "bidi mark": "\u200fabc\u061c",
    "line separator": "a\u2028b\u2029c",
    "zero width": "ad\u200bmin\u2060\ufeff",
    "tags": "x\U000e0041\U000e0042",
    "private": "\ue000\U000f0000",
    "surrogate": "\ud800",
    "markup": "[bold red]x[/] [link=http://evil.example]y[/link] [/nothing]",
    "emoji code": ":skull:",
    "backslash": "\\[bold]",
}
STEERS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def steering(text: str) -> list[str]:
    return [char for char in text if unicodedata.category(char) in STEERS and char != "\n"]


def drawn(what, *, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, emoji=False, highlight=False, force_terminal=True, color_system=None).print(
        what
    )
    return out.getvalue()


def hostile(text: str) -> Job:
    progress = Progress(1, 0.5, text, 1, 2)
    error = ErrorInfo(text or "E", text, f"line one\n{text}\nline three")
    return Job._in_hand(
        JobView(
            "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", text, "failed", json.dumps({text: text}).encode(), 1.0, text, text,
            {text: text, "n": [text]}, text, None, 0, 1.0, 2.0, 3.0, 3.0, 1, text, progress,
            json.dumps(text).encode(), error,
        )
    )  # fmt: skip


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_one_line_stays_one_line_and_holds_nothing_that_steers(text):
    assert safe(text).isprintable()
    assert "\n" not in safe(text)
    assert steering(safe_lines(text)) == []


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_a_job_whose_every_word_is_hostile_is_drawn_harmlessly(text):
    job = hostile(text)
    for width in (80, 120):
        page = drawn(present.job_page(job, None, width, full=True), width=width)
        table = drawn(present.jobs_table([job], width), width=width)
        # Rich may style what we give it; with its colours off, no escape of its own is left either.
        assert steering(re.sub(r"\x1b\[[0-9;]*m", "", page + table) if "\x1b" not in text else page + table) == []
        assert len(table.splitlines()) == 2


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_json_is_printable_and_says_the_same(text):
    written = as_json(job_object(hostile(text), whole=True))
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written)["name"] == text
    assert json.loads(written)["context"] == {text: text}


def test_markup_is_shown_as_it_was_written():
    assert drawn(shown("[bold]x[/] :skull:")).strip() == "[bold]x[/] :skull:"


def test_plain_words_of_any_language_stay_as_they_are():
    for text in ("Grüße, 世界! naïve Ελλάδα עברית", "3 of 10: /srv/data/file.csv", "🎉"):
        assert safe(text) == text


def test_a_stack_trace_keeps_its_lines_up_to_a_limit():
    assert safe_lines("a\n\tb\r\nc\x1b[0m") == "a\n    b\nc\\x1b[0m"
    assert safe_lines("\n".join(map(str, range(1000)))).splitlines()[-1] == "… and 600 more lines"
