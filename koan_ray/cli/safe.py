r"""Text of others on a terminal: names, messages, errors and metadata come from jobs, and steer nothing here.

Everything that a command prints and that this program has not written itself goes through `safe`. What could move the
cursor, change colours, turn the direction of writing, hide or forge a line becomes visible, as ``\x1b`` or ``\u202e``.
Rich's markup is no danger in a `rich.text.Text`, which `shown` makes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

_MOST_LINES = 400


def safe(text: object) -> str:
    """Return text as one line without anything that a terminal would obey or hide.

    `str.isprintable` is false for exactly that: control characters (C0, C1, DEL), format characters (bidirectional
    controls, joiners, tags), separators of lines and paragraphs, surrogates, and what Unicode does not define or leaves to
    private use.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def safe_lines(text: object) -> str:
    """Return text of several lines, such as a stack trace, each of them safe."""
    lines = str(text).expandtabs(4).replace("\r\n", "\n").split("\n")
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"… and {len(lines) - _MOST_LINES} more lines"]
    return "\n".join(map(safe, lines))


def shown(text: object, style: str = "") -> Text:
    """Return text for Rich: safe, and not read as markup."""
    from rich.text import Text

    return Text(safe(text), style=style)


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON of printable ASCII, safe on a terminal as it is; what JSON has no word for becomes text."""
    return json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f")


def counted(n: int, one: str) -> str:
    """Return a number with what it counts, such as ``1 job`` or ``2,000 jobs``."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"
