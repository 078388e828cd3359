"""Text of users: what no store, page or log can hold never gets past the border."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koan_ray.domain.texts import is_readable, readable, readable_end, said


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("עברית \u200f and مرحبا", "עברית \u200f and مرحبا"),
        (os.fsdecode(b"caf\xe9.txt"), r"caf\xe9.txt"),
        ("\ud800 alone", r"\ud800 alone"),
        ("\x1b[1;31mE   assert 1 == 2\x1b[0m\x1b[K done", "E   assert 1 == 2 done"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x00b", "a\N{REPLACEMENT CHARACTER}b"),
        ("10 %\r20 %\r\n", "10 %\n20 %\n"),
        ("\x1b", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_text_is_made_readable(given_text, expected):
    assert readable(given_text) == expected


@given(st.text(st.characters(exclude_categories=()), max_size=50), st.integers(1, 60))
def test_whatever_it_was_it_can_be_encoded_and_is_not_changed_again(text, most):
    once = readable(text, most)
    assert len(once) <= most
    once.encode()
    assert "\x1b" not in once
    assert "\x00" not in once
    assert readable(once, most) == once
    assert is_readable(once)
    if is_readable(text) and len(text) <= most:
        assert once == text


def test_the_end_of_a_long_trace_is_kept():
    assert readable_end("x" * 10_000 + "\x1b[31mValueError\udce9", 20) == "x" * 6 + r"ValueError\xe9"


class _Rude:
    def __str__(self):
        raise KeyboardInterrupt


class _Lazy(str):
    __slots__ = ()

    def __str__(self):
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "expected"), [(5, "5"), (None, "None"), (ValueError("x\ud800"), r"x\ud800"), ([1], "[1]")]
)
def test_any_value_says_something(value, expected):
    assert said(value) == expected


def test_a_value_that_cannot_say_anything_is_named():
    assert said(_Rude()) == "(text of _Rude cannot be read: its __str__ raised KeyboardInterrupt)"
    assert said(_Lazy("kept")) == "kept"
    assert type(said(_Lazy("kept"))) is str
