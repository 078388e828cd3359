"""What arrives from the process of one attempt is looked at before it is taken for a message."""

from __future__ import annotations

import pytest

from koan_ray.runtime.frames import Frames, GarbledError, frame


def test_messages_arrive_whole_however_they_are_cut():
    sent = [("progress", (0.5, None, "half")), ("report", b"x" * 1000)]
    stream = b"".join(frame(*each) for each in sent)
    for size in (1, 7, 100, len(stream)):
        frames = Frames()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [each for piece in pieces for each in frames.feed(piece)] == sent


@pytest.mark.parametrize(
    "garbage",
    [b"\x00" * 12, b"print something\n", frame("x", 1)[:12] + b"no pickle at all", b"koan" + (3).to_bytes(8, "big") + b"abc",
     b"koan" + (4).to_bytes(8, "big") + b"\x80\x05N."],
)  # fmt: skip
def test_what_we_did_not_write_is_refused(garbage):
    frames = Frames()
    with pytest.raises(GarbledError):
        list(frames.feed(garbage + b"\x00" * 100))


def test_a_message_that_says_it_is_huge_takes_no_memory_before_it_comes():
    frames = Frames()
    assert list(frames.feed(b"koan" + (1 << 60).to_bytes(8, "big"))) == []
