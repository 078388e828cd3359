"""Unit tests use simulated time, and no Ray."""

from __future__ import annotations

import time

import pytest


@pytest.fixture(autouse=True)
def no_cluster_no_sleep(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unit tests use koan_ray.testing and virtual time")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(time, "sleep", refuse)
