"""What partitions may be called; they become part of the names of collections."""

from __future__ import annotations

import re
from typing import Final

from koan_ray.domain.texts import quoted
from koan_ray.errors import ConfigurationError

NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")


def is_partition(name: str) -> bool:
    """Tell whether a partition may have this name; the empty one is the default's."""
    return not name or NAME.fullmatch(name) is not None


def check_partition(name: str) -> str:
    """Return the name of a partition as it is.

    Raises:
        ConfigurationError: It is not 1 to 64 of a-z, 0-9, ``_`` and ``-``, and not empty, which is the default's.
    """
    if not is_partition(name):
        msg = f"partition: expected 1 to 64 of a-z, 0-9, '_' and '-', got {quoted(name)}"
        raise ConfigurationError(msg)
    return name
