"""Exact or refused: a value of a user's as JSON that reads back as the same value, or the path at which it would not.

::

    value ─► plain by its type? ─────────────────────────────────────► JSON, as pydantic writes it
               │ no
               └─► JSON as pydantic writes it ─► read ─► the same? ──► that
                     │ no
                     └─► JSON with tags ─► read ─► the same? ────────► that
                           │ no
                           └─► with the member of each union ─► … ───► that
                                 │ no
                                 └─► `NotExactError`: what, where, and the way out

Whether a type is *plain*, so that its values need no second look, is decided once from its core schema (`plain`). All other
values are read back and compared (`compare`), so that what pydantic changes on the way (a subclass cut down to the declared
class, a validator that is not idempotent, a serializer that rounds) is noticed where the value enters.

What JSON has no form for is written as a *tag*, an object with one member whose name begins with ``koan:`` (`tags`):
``{"koan:float": "NaN"}``, ``{"koan:tuple": [1, 2]}``, ``{"koan:secret": "hunter2"}``. So contents are valid JSON everywhere,
and what shows them knows a secret without the class that declared it. A type is written with tags by a copy of its core
schema (`tagging`), and only the values that need it. Values of items, for which no type is declared, are in `loose`.
"""

from __future__ import annotations

from koan_ray.exact.codec import Codec, NotExactError
from koan_ray.exact.compare import difference
from koan_ray.exact.tags import is_tag, masked, revived, tagged

__all__ = ["Codec", "NotExactError", "difference", "is_tag", "masked", "revived", "tagged"]
