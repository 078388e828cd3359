"""The job classes that a coordinator knows: their terms, and the bytes they travel as. It never looks inside.

Jobs that come back from a source name their kind only: code is no part of a document. They get the class that was
introduced last under that kind, and wait, unroutable and visible, while there is none.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from koan_ray.domain.records import identified

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from koan_ray.domain.records import JobRecord, Terms

_MAX_CODE = 1000  # shipped classes kept; those of live jobs are always kept


class Kinds:
    """Terms and classes by id, and the newest class of each kind.

    Args:
        keep: Called with a class that was not known before.
    """

    def __init__(self, keep: Callable[[Terms, bytes], None] = lambda _terms, _code: None) -> None:
        self._keep = keep
        self._terms: dict[str, Terms] = {}
        self._n_live: Counter[str] = Counter()  # jobs by terms; their terms and classes are kept
        self._code: OrderedDict[str, bytes] = OrderedDict()
        self._newest: dict[str, Terms] = {}  # by kind
        self._parts: dict[str, Terms] = {}  # of the chunks of items, by kind
        self._unroutable: dict[str, set[str]] = {}  # ids of jobs by kind

    # --- classes -----------------------------------------------------------------------------------------------------

    def learn(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> list[str]:
        """Take in terms and classes; returns the ids of jobs that have waited for one of these kinds."""
        routable: list[str] = []
        for code_id, blob in code.items():
            is_new = code_id not in self._code
            self._code[code_id] = blob
            for item in terms if is_new else ():
                if item.code_id == code_id and not item.part:
                    self._keep(item, blob)
        for item in terms:
            self._terms.setdefault(item.id, item)
            if item.part:
                self._parts[item.kind] = item
            elif item.code_id in self._code:
                self._newest[item.kind] = item
                routable += self._unroutable.pop(item.kind, ())
        if len(self._code) > _MAX_CODE or len(self._terms) > _MAX_CODE:
            self._forget_unused()
        return routable

    def has(self, terms_id: str) -> bool:
        """Tell whether jobs with these terms can be run."""
        terms = self._terms.get(terms_id)
        return terms is not None and terms.code_id in self._code

    def terms(self, terms_id: str) -> Terms:
        """Return terms by id."""
        return self._terms[terms_id]

    def code(self, code_id: str) -> bytes:
        """Return a class in shipped form."""
        self._code.move_to_end(code_id)
        return self._code[code_id]

    # --- jobs --------------------------------------------------------------------------------------------------------

    def routed(self, job: JobRecord) -> JobRecord | None:
        """Return a stored job with the class of its kind; None, remembering it, when no such class is known."""
        if job.terms.code_id and self.has(job.terms.id):
            return job
        newest = self._newest.get(job.terms.kind)
        if newest is None or newest.code_id not in self._code:
            self._unroutable.setdefault(job.terms.kind, set()).add(job.id)
            return None
        terms = identified(job.terms._replace(code_id=newest.code_id))
        terms = self._terms.setdefault(terms.id, terms)
        return job.evolve(terms=terms)

    def is_unroutable(self, job: JobRecord) -> bool:
        """Tell whether a job waits for its class."""
        return bool(self._unroutable) and job.id in self._unroutable.get(job.terms.kind, ())

    def part_of(self, lead: Terms) -> Terms | None:
        """Return the terms of the chunks of jobs over items, as far as they are known."""
        return self._parts.get(lead.kind)

    def begun(self, terms_id: str) -> None:
        """One more live job has these terms."""
        self._n_live[terms_id] += 1

    def ended(self, job: JobRecord) -> None:
        """One live job fewer."""
        self._n_live[job.terms.id] -= 1
        if self._unroutable and (waiting := self._unroutable.get(job.terms.kind)) is not None:
            waiting.discard(job.id)
            if not waiting:
                del self._unroutable[job.terms.kind]

    def names(self) -> list[str]:
        """Return the kinds that can be run."""
        return sorted(self._newest)

    def unroutable(self) -> dict[str, int]:
        """Return how many jobs wait for a class, by kind."""
        return {kind: len(ids) for kind, ids in self._unroutable.items()}

    def live(self) -> dict[str, int]:
        """Return how many live jobs there are, by kind."""
        found: Counter[str] = Counter()
        for terms_id, n in self._n_live.items():
            if n > 0 and (terms := self._terms.get(terms_id)) is not None and not terms.part:
                found[terms.kind] += n
        return found

    @property
    def n_live(self) -> int:
        """Live jobs by all terms."""
        return sum(self._n_live.values())

    def _forget_unused(self) -> None:
        """Drop terms and classes that no live job uses, oldest first; called long before a submission needs them."""
        used = {terms_id for terms_id, n in self._n_live.items() if n > 0}
        newest = {terms.id for known in (self._newest, self._parts) for terms in known.values()}
        for terms_id in [t for t in self._terms if t not in used and t not in newest][: _MAX_CODE // 2]:
            del self._terms[terms_id]
        used_code = {terms.code_id for terms in self._terms.values()}
        for code_id in [c for c in self._code if c not in used_code]:
            del self._code[code_id]
        self._n_live = Counter({terms_id: n for terms_id, n in self._n_live.items() if n > 0})
