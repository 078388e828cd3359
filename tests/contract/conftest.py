"""Suites may run in virtual time: ``virtual_time = True`` in the class."""

from __future__ import annotations

import asyncio

from koan_ray.testing import VirtualLoop


def pytest_asyncio_loop_factories(config, item):
    is_virtual = getattr(item.cls, "virtual_time", False)
    return {"virtual": VirtualLoop} if is_virtual else {"real": asyncio.new_event_loop}
