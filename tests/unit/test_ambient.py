"""What a body finds around it."""

from __future__ import annotations

import pytest

import koan_ray as koan
from koan_ray import ambient


def test_a_body_that_outlives_its_engine_starts_no_other():
    assert ambient.current_engine() is None
    mark = ambient.attempt.set(object())  # type: ignore[arg-type]
    try:
        with pytest.raises(koan.RuntimeUnavailableError, match="has been shut down"):
            koan.Jobs.count()
    finally:
        ambient.attempt.reset(mark)
    assert ambient.current_engine() is None
