r"""Text of users and of their code, made fit for every store, page, stream and log. The one place where that is done.

What comes in may hold escape sequences of terminals, control characters, and lone surrogates: Python's stand-ins for the
bytes of file names that are no UTF-8. None of these can be encoded or shown; one of them in one job has made whole lists
unreadable. A name such as ``caf\udce9.txt`` becomes ``caf\xe9.txt``, written out, so that it still tells which file it was.
"""

from __future__ import annotations

import re
from typing import Final

# CSI (colours, cursor), OSC (titles, links; ended by BEL or ST), the other strings (DCS, SOS, PM, APC), two-byte escapes.
_ESCAPES: Final = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)"
    "|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\\\|\x9c)"
    "|\x1b[ -/]*[0-~]"
)
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but tab and newline
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
MOST_HEADLINE: Final = 200  # characters of an error in a list
_UNREADABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def is_readable(text: str) -> bool:
    """Tell whether `readable` leaves text as it is, apart from its length."""
    return text.isprintable() or _UNREADABLE.search(text) is None


def is_unicode(text: str) -> bool:
    """Tell whether text can be encoded: it holds no lone surrogates."""
    return text.isascii() or _SURROGATES.search(text) is None


def readable(text: str, most: int | None = None) -> str:
    r"""Return text that can be stored, encoded as UTF-8 and shown; cut to ``most`` characters, the last of them an ellipsis.

    Escape sequences of terminals are left out, line ends become ``\n``, control characters U+FFFD, lone surrogates their
    escapes. An instance of a subclass of `str` becomes plain text. The same again changes nothing.
    """
    text = str.__str__(text)
    if most is not None and len(text) > 4 * most + 4096:  # what is cut away anyway is not read
        text = text[: 4 * most + 4096]
    if not text.isprintable() and _UNREADABLE.search(text) is not None:
        text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", "\n"))
        text = _SURROGATES.sub(_escaped, text)
    if most is not None and len(text) > most:
        return f"{text[: most - 1]}…"
    return text


def readable_end(text: str, most: int) -> str:
    """Return the end of a text of several lines, such as a stack trace, as `readable` does."""
    text = str.__str__(text)
    return readable(text[-2 * most :])[-most:]


def first_line(text: str, most: int = MOST_HEADLINE) -> str:
    """Return the first line that says something, for lists."""
    return readable(next((line.strip() for line in readable(text).split("\n") if line.strip()), ""), most)


def said(value: object, most: int | None = None) -> str:
    """Return what any value says of itself as readable text; never raises, whatever its ``__str__`` does."""
    try:
        text = value if isinstance(value, str) else str(value)
        return readable(text, most)
    except BaseException as problem:  # noqa: BLE001 - a user's __str__ may raise anything, KeyboardInterrupt included
        return readable(
            f"(text of {type(value).__name__} cannot be read: its __str__ raised {type(problem).__name__})", most
        )


def quoted(value: object, most: int = 80) -> str:
    """Return how a value is written in Python, for the message that refuses it; never raises, whatever its repr does.

    A whole number of thousands of digits, which Python refuses to write, is one of the values that get here.
    """
    try:
        return readable(repr(value), most)
    except BaseException as problem:  # noqa: BLE001 - as above
        return f"a {readable(type(value).__name__)} (its repr raised {type(problem).__name__})"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
