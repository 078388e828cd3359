"""When a second submission under one id has the content of the first."""

from __future__ import annotations

import pytest

from koan_ray.engine.submitting import _same_json


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b'{"a":1,"b":[2]}', b'{"b": [2], "a": 1}', True),
        (b'{"a":1}', b'{"a":true}', False),
        (b"[1.0]", b"[1]", False),
        (b'{"x":{"koan:float":"NaN"}}', b'{"x": {"koan:float": "NaN"}}', True),
    ],
)
def test_contents_are_compared_by_value_and_type(one, other, same):
    assert _same_json(one, other) is same
