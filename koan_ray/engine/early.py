"""Messages that arrive before what they are about.

A job actor takes its calls on several threads and in no order, so a request to stop an order, or to answer a batch now, may
be there before the batch itself. It is kept until then: bounded, and no longer than a batch can be on its way.
"""

from __future__ import annotations

from collections import OrderedDict

_MOST = 10_000  # of one kind of message; beyond it the oldest is forgotten


class Early:
    """Keeps what was said of things that are not here yet. Not thread-safe.

    Most of what is kept is late and not early, which nobody can tell: its subject has been here and is gone. It ages out.

    Args:
        keep_s: For how long, in seconds; no subject arrives later than that.
    """

    __slots__ = ("_keep_s", "_said")

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._said: OrderedDict[str | int, tuple[str, float]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._said)

    def keep(self, about: str | int, said: str, *, now: float) -> None:
        """Keep ``said`` until its subject is here. The first one said counts, as it does for what is here already."""
        while self._said and (len(self._said) >= _MOST or now - next(iter(self._said.values()))[1] > self._keep_s):
            self._said.popitem(last=False)
        self._said.setdefault(about, (said, now))

    def take(self, about: str | int) -> str | None:
        """Return what was said of something that is here now, and forget it."""
        found = self._said.pop(about, None) if self._said else None
        return None if found is None else found[0]
