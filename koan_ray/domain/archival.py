"""What moves to an archive, and where that is."""

from __future__ import annotations

from typing import Final

ARCHIVE: Final = "archive"  # the partition that finished jobs move to unless told otherwise


def is_archive(partition: str) -> bool:
    """Tell whether a partition is one that the archivist moves jobs to: ``archive``, or a name that begins with that."""
    return partition == ARCHIVE or partition.startswith(f"{ARCHIVE}-")
