"""What `koan_ray.wiring` puts together."""

from __future__ import annotations

import asyncio
import threading

from koan_ray import wiring


def test_a_beat_that_is_ended_twice_still_closes_its_client():
    begun, closing, closed = threading.Event(), threading.Event(), threading.Event()

    async def beat():
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            closing.set()
            await asyncio.sleep(0.05)  # as closing a client takes its time
            closed.set()

    end = wiring._beside(beat())
    assert begun.wait(5)
    end()
    assert closing.wait(5)
    end()
    assert closed.wait(5)
