"""When a checkpoint may follow another, and which of a job's pages count.

A checkpoint is two writes: its pages first, then the job's document that counts them. What a crash between the two leaves
behind are pages that no checkpoint counts: nobody reads them, and the next execution, which goes on from the checkpoint
before, writes the same numbers again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from koan_ray.domain.records import MAX_CHECKPOINT, MAX_PART, STREAMS, part_fence
from koan_ray.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from koan_ray.domain.records import Checkpoint, JobRecord, Part

MAX_PARTS_BYTES: Final = 16 * MAX_PART  # of the parts of one checkpoint


class Standing(StrEnum):
    """What a checkpoint is to the one that its job has."""

    NEXT = "next"
    REPEATED = "repeated"  # the same again: the answer to the first request was lost
    OLDER = "older"


def standing(job: JobRecord, checkpoint: Checkpoint) -> Standing:
    """Compare a checkpoint with the one that a job has; only the next one may be written."""
    known = job.checkpoint
    if known is None or checkpoint.sequence > known.sequence:
        return Standing.NEXT
    if checkpoint.sequence == known.sequence and checkpoint.body == known.body:
        return Standing.REPEATED
    return Standing.OLDER


def counted(job: JobRecord, checkpoint: Checkpoint, parts: Sequence[Part]) -> Checkpoint:
    """Return a checkpoint that counts the pages which are written with it, after those that counted before.

    Raises:
        ConflictError: The pages do not follow those that count without a gap, or something is too large.
    """
    for problem in _problems(job, checkpoint, parts):
        msg = f"job {job.id}: checkpoint {checkpoint.sequence}: {problem}; nothing was written"
        raise ConflictError(msg)
    known = job.checkpoint
    n_new = {stream: sum(part.stream == stream for part in parts) for stream in STREAMS}
    values, failed = ((known.n_parts(stream) if known is not None else 0) + n_new[stream] for stream in STREAMS)
    return checkpoint._replace(value_parts=values, failed_parts=failed)


def _problems(job: JobRecord, checkpoint: Checkpoint, parts: Sequence[Part]) -> Iterator[str]:
    if len(checkpoint.body) > MAX_CHECKPOINT:
        yield f"its state takes {len(checkpoint.body):,} bytes, the limit is {MAX_CHECKPOINT:,}"
    following = {stream: job.checkpoint.n_parts(stream) if job.checkpoint is not None else 0 for stream in STREAMS}
    for part in parts:
        place = f"part {part.seq} of {part.stream!r}"
        if part.job_id != job.id or part.stream not in following:
            yield f"{place} belongs to job {part.job_id}, or its stream is none of {', '.join(STREAMS)}"
        elif part.seq != following[part.stream]:
            yield f"{place} leaves a gap, or repeats what counts already: number {following[part.stream]} is next"
        elif len(part.body) > MAX_PART:
            yield f"{place} takes {len(part.body):,} bytes, the limit is {MAX_PART:,}"
        else:
            following[part.stream] += 1
    if (total := sum(len(part.body) for part in parts)) > MAX_PARTS_BYTES:
        yield f"its parts take {total:,} bytes, the limit is {MAX_PARTS_BYTES:,} for one checkpoint"


def fenced(job: JobRecord, parts: Sequence[Part], term: int) -> list[Part]:
    """Return parts as the job's current execution writes them."""
    fence = part_fence(term, job.ordinal)
    return [part._replace(fence=fence) for part in parts]
