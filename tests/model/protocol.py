"""The protocol of stored jobs as a model: one job and its documents, two coordinators, job actors, a client, and faults.

This is the specification that the engine follows. One job is enough: no rule of the protocol reads another job's document.
Time is not modelled, only what it decides: any holder may seem to have stopped (`Budget.takeover`), any write may be late.
Left out, as they are settled like a failure: reschedule, interrupt, return, timeout; and progress, due times, the archive.

What the store holds: the lease, reduced to its term (whoever got a term holds it); the job's `Doc`; how each execution's
document stands. Execution ids are places in `State.executions`. A coordinator is named by its term: a restart is a new one.

**A flush**, in this order:

1. The job's document, by compare-and-set on ``rev`` (an insert by the uniqueness of its id). It carries its *trail*: what
   this write means for executions, as ``(id, outcome)``, ``open`` for one that begins. One document, so that both are known
   or neither. The trail is that of this write; the next one replaces it.
2. The execution documents that the trail names, as upserts that leave closed ones alone.
3. Only now the flush is over. These wait for it: acks, the next flush of this job, "let go" to actors, the order of a
   write-ahead job, and after an insert the first dispatch. Other orders do not wait for Running to be written.

**A write in doubt**, because no reply came or because it was refused, is read back. ``(rev, term)`` are ours: written, maybe
by an earlier try that was late; its executions may not be, so they are written again. ``rev`` is as expected: write it
again. An insert that finds the id: a repeated submit, acknowledged. A newer term: stand down. Anything else: look at the
document as in a takeover.

**A takeover**, in this order; at each step, who finds a newer term in the lease stands down:

1. Read the lease, and take it by compare-and-set on what was read.
2. *Stamp* the unfinished documents that have an older term with the own one, raising ``rev``: what an older holder still has
   on its way fails from here on. Documents with the own or a newer term are left alone, or a holder that was paused here
   would set back its successor's, and a second look (6) would fence the holder's own writes.
3. *Read*, after that, the unfinished documents that carry the own term, and no others: what an older holder inserted since
   the stamp is still writable by it. Write the executions that trails name. Those of finished jobs count too: a crash within
   the flush that ended a job leaves its execution without an end, and that job is in no list of unfinished ones.
4. *Roll call*, only while the lease is ours in time: every job actor is told the new term and says what it runs or holds. An
   actor obeys nobody with an older term than it has heard of, and drops orders of older terms that it has not begun.
   Current executions are adopted, held results applied, all others killed, and their actors gone for certain.
5. Mark what is Running and held by nobody as lost. Only now dispatch.
6. Again and again: look for documents with an older term that are unfinished, or whose trail is not written, and take those
   through 2 to 5. An insert cannot be fenced by a stamp, since there was nothing to stamp: one that an older holder had on
   its way appears after 3, and nobody else would run it.

**In time**: a holder starts and kills nothing once 0.8 ttl have passed since its last acknowledged beat; others take over
after 1.5 ttl. This is the one rule that rests on clocks (on their rates), and only what leaves the store needs it: starting
bodies, killing actors. No write does. Nor does a write's filter need the term: a document with a newer term has a newer
``rev`` than an older holder can know, as it reads only its own. Comparing terms there too is a second net.

What the protocol does *not* promise: of a write-behind job, a body may have begun of which the store never hears, when its
coordinator was lost within one flush. `Config.write_ahead` is how a job class asks for more, and is checked for more.

**How to read a counter-example.** The first line names the promise that the last step breaks, by its key in `PROMISES`. Then
one line a step, in order; none can be left out. Last comes the state after them. ``c2`` is the coordinator that holds, or
believes to hold, term 2; ``x0`` is the first execution; "late" is a write whose sender no longer waits for it. Look for
the last step by somebody whose term is older than the lease's, or by a write that is late: what should have stopped it?
With guards removed the answer is known, which is the way to learn reading them:
``search(Protocol(CONFIG, ALL - {"term_stamp"}))``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tests.model.checker import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "running", "completed", "failed", "cancelled"
FINAL: Final = frozenset({COMPLETED, FAILED, CANCELLED})
OPEN, SUCCEEDED, LOST = "open", "succeeded", "lost"

PROMISES: Final = {
    "I1": "an acknowledged submit has a document",
    "I2": "a final state never changes",
    "I3": "rev grows by one, the term never falls, and a job leaves an execution only by that execution's end",
    "I4": "an execution gets one outcome and keeps it",
    "I5": "at rest every execution that the job counts, or that was written ahead and begun, is closed",
    "I6": "at rest a completed job has one succeeded execution, and its body ran at most once more than others ended",
    "I7": "what is accepted can be finished without further faults",
    "I8": "budgets of attempts and crashes are kept",
    "I9": "an answered cancel request is never forgotten and nothing is begun after it",
    "I10": "no body starts once the job is final",
    "ACK": "who was told of an end was told what is written",
    "HOLD": "an actor gives up a result only after it is written, or when its execution is not current",
    "ADOPT": "an execution that runs, or has ended, is not written off as lost unless its actor died",
    "ONE": "two bodies of a job run at once only if the actor of one was reported dead",
    "TERM": "a term has one holder",
}

GUARDS: Final = {
    "rev_cas": "an update's filter has the rev that the writer knows",
    "insert_unique": "an insert is refused where the id exists",
    "lease_cas": "taking the lease is a compare-and-set on what was observed",
    "term_stamp": "a takeover stamps the unfinished documents",
    "stamp_before_read": "it stamps first and reads then",
    "read_only_stamped": "it takes up only documents that carry its own term",
    "stamp_only_older": "it leaves documents with a newer term alone",
    "stop_in_time": "a holder starts and kills nothing once its lease may have been taken",
    "stand_down_when_fenced": "who finds a newer term stops being the holder",
    "sweep_unclaimed": "the holder looks for unfinished documents with an older term",
    "execution_fence": "a report counts only for the execution that is current",
    "actor_term_fence": "an actor obeys nobody with an older term than it has heard of",
    "outbox_until_ack": "an actor keeps and repeats a result until it is told to let go",
    "hold_until_written": "an actor is told to let go only after the flush",
    "adopt_before_lost": "a takeover asks the actors before it writes executions off",
    "kill_not_current": "a takeover kills executions that are not current",
    "ack_after_flush": "clients are answered after the flush",
    "read_back_unknown": "a write whose fate is unknown is read back",
    "read_back_refused": "a refused write is read back: it may be our own, sent twice",
    "read_back_executions": "if the job was written, its executions are written again",
    "closed_once": "a closed execution document is left alone",
    "job_before_execution": "the job's document is written first",
    "trail_in_job": "the job's document carries what its write means for executions",
    "close_on_recovery": "a takeover writes the executions that trails name",
    "start_after_insert": "a job is dispatched after its insert is written: till then, its id may be a finished job's",
    "start_after_flush": "a write-ahead job begins after its Running state is written",
    "cancel_kept": "what finds a cancel request ends as Cancelled and starts nothing",
    "crash_budget": "a job that killed max_crashes processes is given up",
    "attempt_budget": "a job that failed max_attempts times is given up",
}
ALL: Final = frozenset(GUARDS)
MAX_ATTEMPTS: Final = 2
MAX_CRASHES: Final = 2


class Doc(NamedTuple):
    """A job's document, and what a coordinator remembers of it."""

    status: str
    rev: int
    term: int
    current: int | None = None  # the execution whose report counts
    cancel: bool = False
    attempts: int = 0
    crashes: int = 0
    trail: tuple[tuple[int, str], ...] = ()


class Execution(NamedTuple):
    """What became of a body, which nobody writes down, and its document: empty for none."""

    body: str = ""  # began; ended, as long as its actor lives
    outcome: str = ""


class Coordinator(NamedTuple):
    """One of two. Phases in order: down, idle, seen, stamp, read, call, lead."""

    phase: str = "down"
    term: int = 0  # in phase seen: of the lease as read
    job: Doc | None = None  # rev as last written or sent; trail: staged since
    is_dirty: bool = False
    sent: Doc | None = None  # the one flush in flight
    doubt: str = ""  # unknown or refused: read back what became of it
    owed: int | None = None  # a write-ahead execution whose order is not sent


class Write(NamedTuple):
    """A flush on its way: next the job's document (part 0), or the executions (part 1)."""

    doc: Doc
    part: int = 0
    is_orphan: bool = False  # nobody waits for its reply


class Actor(NamedTuple):
    """A job actor with one execution: ordered, running, held."""

    execution: int
    phase: str
    term: int  # the highest that it has heard of
    outcome: str = ""
    is_cut: bool = False  # reported dead, but alive


class Client(NamedTuple):
    """What a client asked and was told."""

    submit: str = ""  # asked, acked
    cancel: str = ""  # asked, cancelled, requested
    told: str = ""  # final state


class Budget(NamedTuple):
    """How many faults of each kind may still happen."""

    crash: int = 0  # of a coordinator
    takeover: int = 0  # from a holder that lives
    timeout: int = 0  # of a flush: it may have been lost, applied, or be late
    death: int = 0  # of an actor
    cut: int = 0  # an actor is reported dead and lives
    repeat: int = 0  # a report arrives twice
    loss: int = 0  # of a report


class State(NamedTuple):
    """Everything."""

    doc: Doc | None
    executions: tuple[Execution, ...]
    lease: int
    coordinators: tuple[Coordinator, ...]
    writes: tuple[Write, ...]
    actors: tuple[Actor, ...]
    reports: tuple[tuple[int, str], ...]
    client: Client
    budget: Budget

    def __str__(self) -> str:
        parts = {name: value for name, value in self._asdict().items() if value not in ((), None)}
        return "\n     ".join(f"{name}: {value}" for name, value in parts.items())


class Config(NamedTuple):
    """One danger, bounded so that all its states are visited."""

    name: str
    budget: Budget
    n_coordinators: int = 2
    may_fail: bool = False
    may_cancel: bool = False
    write_ahead: bool = False
    restarts: bool = True


def _active(c: Coordinator) -> bool:
    return c.phase not in ("down", "idle", "seen")


def _mark(trail: tuple[tuple[int, str], ...], execution: int, outcome: str) -> tuple[tuple[int, str], ...]:
    return (*(item for item in trail if item[0] != execution), (execution, outcome))


def _rank(c: Coordinator) -> tuple[str, int]:
    return (c.phase, c.term)


def _order(w: Write) -> tuple[int, int, int, bool, str]:
    return (w.doc.rev, w.doc.term, w.part, w.is_orphan, w.doc.status)


class Protocol:
    """The steps of the protocol under a configuration, with some or all of its guards."""

    def __init__(self, config: Config, guards: frozenset[str] = ALL) -> None:
        self.config, self.guards = config, guards
        self._has = {guard: guard in guards for guard in GUARDS}

    def initial(self) -> State:
        started = tuple(Coordinator("idle") for _ in range(self.config.n_coordinators))
        return State(None, (), 0, started, (), (), (), Client(), self.config.budget)

    def steps(self, s: State) -> Iterator[Step]:
        yield from self._store_steps(s)
        yield from self._actor_steps(s)
        for place, c in enumerate(s.coordinators):
            if c.phase == "lead":
                yield from self._client_steps(s, place, c)
                yield from self._leader_steps(s, place, c)
                yield from self._report_steps(s, place, c)
            else:
                yield from self._takeover_steps(s, place, c)
            if not _active(c):
                continue
            if c.term != s.lease and self._has["stand_down_when_fenced"]:
                yield Step(f"c{c.term} finds its beat refused and stands down", self._leave(s, place, c, "idle"))
            if s.budget.crash:
                budget = s.budget._replace(crash=s.budget.crash - 1)
                yield Step(f"c{c.term} crashes", self._leave(s._replace(budget=budget), place, c, "down"), is_fault=True)

    # --- helpers ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _put(s: State, place: int, c: Coordinator, **changes) -> State:
        """Replace one coordinator; they are kept sorted, as their places mean nothing."""
        others = list(s.coordinators)
        others[place] = c
        others.sort(key=_rank)
        return s._replace(coordinators=tuple(others), **changes)

    def _leave(self, s: State, place: int, c: Coordinator, phase: str) -> State:
        """Stop being the holder: its memory is gone, its writes go on."""
        writes = s.writes
        if c.sent is not None:
            mine = tuple(w for w in writes if w.doc == c.sent and not w.is_orphan)
            writes = self._orphan(writes, mine[0]) if mine else writes
        return self._put(s, place, Coordinator(phase), writes=writes)

    @staticmethod
    def _orphan(writes: tuple[Write, ...], w: Write) -> tuple[Write, ...]:
        return tuple(sorted({*(other for other in writes if other != w), w._replace(is_orphan=True)}, key=_order))

    @staticmethod
    def _upsert(
        executions: tuple[Execution, ...], trail: tuple[tuple[int, str], ...], *, closed_once: bool
    ) -> tuple[Execution, ...]:
        after = list(executions)
        for execution, outcome in trail:
            if after[execution].outcome in ("", OPEN) or not closed_once:
                after[execution] = after[execution]._replace(outcome=outcome)
        return tuple(after)

    # --- the store -------------------------------------------------------------------------------------------------

    def _store_steps(self, s: State) -> Iterator[Step]:
        for w in s.writes:
            what = f"{'late ' if w.is_orphan else ''}write of c{w.doc.term}, {w.doc.status} rev {w.doc.rev},"
            yield self._job_part(s, w, what) if w.part == 0 else self._execution_part(s, w, what)
            others = tuple(other for other in s.writes if other != w)
            if w.is_orphan:
                yield Step(f"{what} is lost before part {w.part}", s._replace(writes=others))
            elif s.budget.timeout:
                budget = s.budget._replace(timeout=s.budget.timeout - 1)
                late = s._replace(writes=self._orphan(s.writes, w), budget=budget)
                yield Step(f"{what} gets no reply in time", self._doubted(late, w.doc, "unknown"), is_fault=True)

    def _job_part(self, s: State, w: Write, what: str) -> Step:
        """Compare and set; with a trail, the executions follow as a second write."""
        others = tuple(other for other in s.writes if other != w)
        if not self._has["job_before_execution"] and w.doc.trail:
            s = s._replace(executions=self._upsert(s.executions, w.doc.trail, closed_once=self._has["closed_once"]))
        if not self._may_write(s.doc, w.doc):
            after = s._replace(writes=others)
            return Step(f"{what} is refused", after if w.is_orphan else self._doubted(after, w.doc, "refused"))
        after = s._replace(doc=w.doc, writes=others)
        if w.doc.trail and self._has["job_before_execution"]:
            rest = w._replace(part=1)
            return Step(f"{what} is applied to the job", after._replace(writes=tuple(sorted({*others, rest}, key=_order))))
        return Step(f"{what} is applied", after if w.is_orphan else self._flushed(after, w.doc))

    def _may_write(self, stored: Doc | None, new: Doc) -> bool:
        if new.rev == 1:
            return stored is None or not self._has["insert_unique"]
        return stored is not None and (stored.rev == new.rev - 1 or not self._has["rev_cas"])

    def _execution_part(self, s: State, w: Write, what: str) -> Step:
        executions = self._upsert(s.executions, w.doc.trail, closed_once=self._has["closed_once"])
        after = s._replace(executions=executions, writes=tuple(other for other in s.writes if other != w))
        return Step(f"{what} is applied to its executions", after if w.is_orphan else self._flushed(after, w.doc))

    def _doubted(self, s: State, doc: Doc, doubt: str) -> State:
        for place, c in enumerate(s.coordinators):
            if c.sent == doc and not c.doubt:
                return self._put(s, place, c._replace(doubt=doubt))
        return s

    def _flushed(self, s: State, doc: Doc) -> State:
        """The writer hears that all parts are applied: tell the clients, and forget what is final."""
        for place, c in enumerate(s.coordinators):
            if c.sent == doc:
                is_over = doc.status in FINAL and not c.is_dirty
                after = c._replace(sent=None, doubt="", job=None if is_over else c.job)
                return self._put(s, place, after, client=self._tell(s.client, doc))
        return s

    @staticmethod
    def _tell(client: Client, doc: Doc) -> Client:
        submit, cancel, told = client
        if submit == "asked":
            submit = "acked"
        if cancel == "asked" and doc.status == CANCELLED:
            cancel = "cancelled"
        elif cancel == "asked" and doc.cancel:
            cancel = "requested"
        return Client(submit, cancel, doc.status if doc.status in FINAL else told)

    # --- actors ----------------------------------------------------------------------------------------------------

    def _actor_steps(self, s: State) -> Iterator[Step]:
        for a in s.actors:
            others = tuple(other for other in s.actors if other != a)
            name = f"x{a.execution}"
            if a.phase == "ordered":
                yield Step(f"the body of {name} starts", self._begin_body(s, others, a))
            elif a.phase == "running":
                yield from self._end_body(s, others, a, name)
            elif (a.execution, a.outcome) not in s.reports:
                reports = tuple(sorted((*s.reports, (a.execution, a.outcome))))
                yield Step(f"the actor of {name} repeats its report", s._replace(reports=reports))
            if s.budget.death:
                budget = s.budget._replace(death=s.budget.death - 1)
                died = s._replace(actors=others, budget=budget, executions=self._forgotten(s.executions, a))
                yield Step(f"the actor of {name} dies", died, is_fault=True)
            if s.budget.cut and a.phase != "ordered" and not a.is_cut:
                cut = s._replace(actors=self._sorted(others, a._replace(is_cut=True)))
                cut = cut._replace(executions=self._forgotten(s.executions, a))
                cut = cut._replace(budget=s.budget._replace(cut=s.budget.cut - 1))
                yield Step(f"the actor of {name} is reported dead and lives", cut, is_fault=True)
        if s.budget.loss:
            budget = s.budget._replace(loss=s.budget.loss - 1)
            for report in s.reports:
                left = tuple(other for other in s.reports if other != report)
                yield Step(f"the report of x{report[0]} is lost", s._replace(reports=left, budget=budget), is_fault=True)

    def _forgotten(self, executions: tuple[Execution, ...], a: Actor) -> tuple[Execution, ...]:
        return self._body(executions, a.execution, "began") if a.phase == "held" else executions

    @staticmethod
    def _sorted(actors: tuple[Actor, ...], a: Actor) -> tuple[Actor, ...]:
        return tuple(sorted((*actors, a)))

    def _begin_body(self, s: State, others: tuple[Actor, ...], a: Actor) -> State:
        began = self._body(s.executions, a.execution, "began")
        return s._replace(actors=self._sorted(others, a._replace(phase="running")), executions=began)

    @staticmethod
    def _body(executions: tuple[Execution, ...], execution: int, body: str) -> tuple[Execution, ...]:
        after = list(executions)
        after[execution] = after[execution]._replace(body=body)
        return tuple(after)

    def _end_body(self, s: State, others: tuple[Actor, ...], a: Actor, name: str) -> Iterator[Step]:
        for outcome in (SUCCEEDED, FAILED) if self.config.may_fail else (SUCCEEDED,):
            reports = tuple(sorted({*s.reports, (a.execution, outcome)}))
            held = others
            if self._has["outbox_until_ack"]:
                held = self._sorted(others, a._replace(phase="held", outcome=outcome))
            body = "began" if a.is_cut else "ended"
            after = s._replace(actors=held, reports=reports, executions=self._body(s.executions, a.execution, body))
            yield Step(f"the body of {name} ends, {outcome}, and is reported", after)

    # --- taking over -----------------------------------------------------------------------------------------------

    def _takeover_steps(self, s: State, place: int, c: Coordinator) -> Iterator[Step]:
        if c.phase == "down":
            if self.config.restarts:
                yield Step("a coordinator starts", self._put(s, place, Coordinator("idle")))
        elif c.phase == "idle":
            if s.budget.takeover or not self._is_held(s):
                yield Step(
                    f"a coordinator reads the lease, term {s.lease}", self._put(s, place, Coordinator("seen", s.lease))
                )
        elif c.phase == "seen":
            yield from self._take(s, place, c)
        elif c.phase == "stamp":
            yield Step(f"c{c.term} stamps", self._stamp(s, place, c))
        elif c.phase == "read":
            yield Step(f"c{c.term} reads the documents and writes what trails name", self._read(s, place, c))
        elif c.phase == "call" and self._in_time(s, c):
            yield Step(f"c{c.term} calls the roll of actors and leads", self._roll_call(s, place, c))

    def _in_time(self, s: State, c: Coordinator) -> bool:
        """Whether a coordinator may start or kill something: 0.8 ttl since its last beat end before others' 1.5 ttl do."""
        return c.term == s.lease or not self._has["stop_in_time"]

    @staticmethod
    def _is_held(s: State) -> bool:
        return any(c.term == s.lease and _active(c) for c in s.coordinators)

    def _take(self, s: State, place: int, c: Coordinator) -> Iterator[Step]:
        if s.lease != c.term and self._has["lease_cas"]:
            yield Step("the lease was taken by another", self._put(s, place, Coordinator("idle")))
            return
        is_false, budget = self._is_held(s), s.budget
        if is_false and not budget.takeover:
            yield Step("the holder beats again", self._put(s, place, Coordinator("idle")))
            return
        if is_false:
            budget = budget._replace(takeover=budget.takeover - 1)
        term = c.term + 1
        first = "stamp" if self._has["stamp_before_read"] else "read"
        after = self._put(s, place, Coordinator(first, term), lease=term, budget=budget)
        yield Step(f"c{term} takes the lease{' from a living holder' if is_false else ''}", after, is_fault=is_false)

    def _stamp(self, s: State, place: int, c: Coordinator) -> State:
        doc = s.doc
        if doc is not None and doc.status not in FINAL and self._is_to_be_stamped(doc, c):
            doc = doc._replace(rev=doc.rev + 1, term=c.term)
        if self._has["stamp_before_read"]:
            return self._put(s, place, c._replace(phase="read"), doc=doc)
        known = c.job._replace(rev=c.job.rev + 1, term=c.term) if c.job else None  # it believes so
        return self._put(s, place, c._replace(phase="call", job=known), doc=doc)

    def _is_to_be_stamped(self, doc: Doc, c: Coordinator) -> bool:
        # Not equal terms: what carries our own is known to us by its rev, and a second look must leave it so.
        return self._has["term_stamp"] and (doc.term < c.term or not self._has["stamp_only_older"])

    def _read(self, s: State, place: int, c: Coordinator) -> State:
        doc, executions = s.doc, s.executions
        if doc is not None and self._has["close_on_recovery"]:
            executions = self._repaired(executions, doc)
        is_ours = doc is not None and doc.status not in FINAL and (doc.term == c.term or not self._reads_stamped())
        job = doc._replace(trail=()) if is_ours else None
        after = "call" if self._has["stamp_before_read"] else "stamp"
        return self._put(s, place, c._replace(phase=after, job=job, is_dirty=False), executions=executions)

    def _reads_stamped(self) -> bool:
        """What was inserted since the stamp can still be written by its former holder; the next look stamps it."""
        return self._has["read_only_stamped"] and self._has["term_stamp"] and self._has["stamp_before_read"]

    def _repaired(self, executions: tuple[Execution, ...], doc: Doc) -> tuple[Execution, ...]:
        if self._has["trail_in_job"]:
            return self._upsert(executions, doc.trail, closed_once=self._has["closed_once"])
        # Without trails only open documents can be found; their end is guessed from the job's.
        outcome = SUCCEEDED if doc.status == COMPLETED else LOST
        stale = [(x, outcome) for x, e in enumerate(executions) if e.outcome == OPEN and x != doc.current]
        return self._upsert(executions, tuple(stale), closed_once=True)

    def _roll_call(self, s: State, place: int, c: Coordinator) -> State:
        job, is_dirty = c.job, c.is_dirty
        current = job.current if job is not None else None
        kept: list[Actor] = []
        is_held = False
        for a in s.actors:
            if a.is_cut or not self._has["adopt_before_lost"] or (self._has["actor_term_fence"] and a.term > c.term):
                kept.append(a)  # not reached, not asked, or it does not listen to us
            elif a.phase == "ordered":
                if not self._has["actor_term_fence"]:
                    kept.append(a)  # the order is still on its way and nobody will refuse it
            elif a.execution == current:
                is_held = True
                kept.append(a._replace(term=c.term))
                if a.phase == "held" and job is not None:
                    job, is_dirty = self._settled(job, a.execution, a.outcome), True
            elif not self._has["kill_not_current"]:
                kept.append(a)
        if current is not None and not is_held and job is not None:
            job, is_dirty = self._lost(job, current), True
        return self._put(s, place, c._replace(phase="lead", job=job, is_dirty=is_dirty), actors=tuple(kept))

    # --- clients ---------------------------------------------------------------------------------------------------

    def _client_steps(self, s: State, place: int, c: Coordinator) -> Iterator[Step]:
        client, job = s.client, c.job
        is_clean = c.sent is None and not c.is_dirty
        if client.submit != "acked" and job is None and is_clean:
            asked = s._replace(client=client._replace(submit="asked"))
            new = Doc(QUEUED, 0, c.term)
            yield Step(f"the client submits to c{c.term}", self._staged(asked, place, c._replace(job=new), new))
        elif client.submit == "asked" and job is not None and is_clean:
            yield Step(f"c{c.term} says that it has the job", s._replace(client=client._replace(submit="acked")))
        if self.config.may_cancel and client.submit == "acked" and client.cancel in ("", "asked") and job is not None:
            asked = s._replace(client=client._replace(cancel="asked"))
            if job.status == QUEUED:
                new = job._replace(status=CANCELLED)
                yield Step(f"the client cancels at c{c.term}", self._staged(asked, place, c, new))
            elif job.status == RUNNING and not job.cancel:
                new = job._replace(cancel=True)
                yield Step(f"the client asks c{c.term} to stop it", self._staged(asked, place, c, new))

    def _staged(self, s: State, place: int, c: Coordinator, job: Doc) -> State:
        """Make ``job`` what the coordinator knows, to be written with its next flush."""
        client = s.client if self._has["ack_after_flush"] else self._tell(s.client, job)
        return self._put(s, place, c._replace(job=job, is_dirty=True), client=client)

    # --- the holder ------------------------------------------------------------------------------------------------

    def _leader_steps(self, s: State, place: int, c: Coordinator) -> Iterator[Step]:
        job, name = c.job, f"c{c.term}"
        is_clean = c.sent is None and not c.is_dirty
        in_time = self._in_time(s, c)
        if c.doubt:
            yield Step(f"{name} reads back what is {c.doubt}", self._read_back(s, place, c))
        if c.is_dirty and c.sent is None:
            yield Step(f"{name} flushes", self._flush(s, place, c))
        if job is None:
            if is_clean and self._is_unclaimed(s, c):
                yield Step(f"{name} finds an unclaimed document", self._put(s, place, Coordinator("stamp", c.term)))
            return
        is_stored = not self._has["start_after_insert"] or job.rev > 1 or (job.rev == 1 and c.sent is None)
        if job.status == QUEUED and in_time and is_stored and not (job.cancel and self._has["cancel_kept"]):
            yield Step(f"{name} dispatches x{len(s.executions)}", self._dispatch(s, place, c, job))
        if c.owed is not None and is_clean and in_time:
            after = self._put(
                s, place, c._replace(owed=None), actors=self._sorted(s.actors, Actor(c.owed, "ordered", c.term))
            )
            yield Step(f"{name} sends the order of x{c.owed}", after)
        if job.status == RUNNING and c.owed is None:
            yield from self._watch(s, place, c, job, in_time=in_time)

    def _is_unclaimed(self, s: State, c: Coordinator) -> bool:
        """Whether an older holder's document has work for us: unfinished, or its trail not written."""
        if s.doc is None or s.doc.term >= c.term or not self._has["sweep_unclaimed"]:
            return False
        if s.doc.status not in FINAL:
            return True
        return self._has["close_on_recovery"] and self._repaired(s.executions, s.doc) != s.executions

    def _flush(self, s: State, place: int, c: Coordinator) -> State:
        sent = c.job._replace(rev=c.job.rev + 1, term=c.term)
        after = c._replace(job=sent._replace(trail=()), is_dirty=False, sent=sent)
        return self._put(s, place, after, writes=tuple(sorted((*s.writes, Write(sent)), key=_order)))

    def _read_back(self, s: State, place: int, c: Coordinator) -> State:
        """Decide by what is stored: ours, not written yet, or somebody else's."""
        sent, stored = c.sent, s.doc
        if c.doubt == "unknown" and not self._has["read_back_unknown"]:
            return self._flushed(s, sent)  # assumed to be written
        if c.doubt == "refused" and not self._has["read_back_refused"]:
            return self._put(s, place, Coordinator("lead", c.term))  # assumed to be a newer holder's
        if stored is not None and (stored.rev, stored.term) == (sent.rev, sent.term):  # a term has one holder: ours
            if sent.trail and self._has["read_back_executions"]:
                return self._send_again(s, place, c, Write(sent, 1))
            return self._flushed(s, sent)
        if (stored.rev if stored is not None else 0) == sent.rev - 1:
            return self._send_again(s, place, c, Write(sent))
        if sent.rev == 1 and s.client.submit == "asked":  # the id exists with the same content: a repeated submit
            s = s._replace(client=s.client._replace(submit="acked"))
        if stored is not None and stored.term > c.term:
            if self._has["stand_down_when_fenced"]:
                return self._leave(s, place, c, "idle")
            return self._put(s, place, c._replace(sent=None, doubt="", job=stored._replace(trail=()), is_dirty=False))
        return self._put(s, place, Coordinator("stamp", c.term))  # same or older term: look again

    def _send_again(self, s: State, place: int, c: Coordinator, w: Write) -> State:
        return self._put(s, place, c._replace(doubt=""), writes=tuple(sorted({*s.writes, w}, key=_order)))

    def _dispatch(self, s: State, place: int, c: Coordinator, job: Doc) -> State:
        x = len(s.executions)
        job = job._replace(status=RUNNING, current=x, attempts=job.attempts + 1, trail=_mark(job.trail, x, OPEN))
        s = s._replace(executions=(*s.executions, Execution()))
        if self.config.write_ahead and self._has["start_after_flush"]:
            return self._staged(s, place, c._replace(owed=x), job)
        return self._staged(s._replace(actors=self._sorted(s.actors, Actor(x, "ordered", c.term))), place, c, job)

    def _watch(self, s: State, place: int, c: Coordinator, job: Doc, *, in_time: bool) -> Iterator[Step]:
        holder = next((a for a in s.actors if a.execution == job.current and not a.is_cut), None)
        if holder is None:
            yield Step(f"c{c.term} hears that x{job.current} died", self._staged(s, place, c, self._lost(job, job.current)))
        elif job.cancel and c.sent is None and not c.is_dirty and in_time:
            after = job._replace(status=CANCELLED, current=None, trail=_mark(job.trail, job.current, CANCELLED))
            left = tuple(a for a in s.actors if a != holder)
            killed = s._replace(actors=left, executions=self._forgotten(s.executions, holder))
            yield Step(f"c{c.term} kills x{job.current} after the grace", self._staged(killed, place, c, after))

    # --- reports ---------------------------------------------------------------------------------------------------

    def _report_steps(self, s: State, place: int, c: Coordinator) -> Iterator[Step]:
        for report in s.reports:
            left = s._replace(reports=tuple(other for other in s.reports if other != report))
            after = self._reported(left, place, c, report)
            if after is None:
                continue
            yield Step(f"c{c.term} hears that x{report[0]} {report[1]}", after)
            if s.budget.repeat:
                budget = s.budget._replace(repeat=s.budget.repeat - 1)
                again = after._replace(reports=s.reports, budget=budget)
                yield Step(f"c{c.term} hears that x{report[0]} {report[1]}, and will again", again, is_fault=True)

    def _reported(self, s: State, place: int, c: Coordinator, report: tuple[int, str]) -> State | None:
        execution, outcome = report
        job = c.job
        if job is not None and job.status == RUNNING and (job.current == execution or not self._has["execution_fence"]):
            return self._staged(s, place, c, self._settled(job, execution, outcome))
        if self._has["hold_until_written"] and (c.is_dirty or c.sent is not None):
            return None  # the end may be in this flush: no answer, the actor repeats itself
        kept = tuple(a for a in s.actors if a.execution != execution or (a.term > c.term and self._has["actor_term_fence"]))
        return s._replace(actors=kept)  # "let go": it is written, or superseded

    def _settled(self, job: Doc, execution: int, outcome: str) -> Doc:
        """T5 to T8."""
        trail = _mark(job.trail, execution, outcome)
        if outcome == SUCCEEDED:
            status = COMPLETED
        elif job.cancel and self._has["cancel_kept"]:
            status = CANCELLED
        else:
            is_spent = job.attempts - job.crashes >= MAX_ATTEMPTS and self._has["attempt_budget"]
            status = FAILED if is_spent else QUEUED
        return job._replace(status=status, current=None, trail=trail)

    def _lost(self, job: Doc, execution: int) -> Doc:
        """T11."""
        crashes = job.crashes + 1
        if job.cancel and self._has["cancel_kept"]:
            status = CANCELLED
        else:
            status = FAILED if crashes >= MAX_CRASHES and self._has["crash_budget"] else QUEUED
        return job._replace(status=status, current=None, crashes=crashes, trail=_mark(job.trail, execution, LOST))

    # --- promises --------------------------------------------------------------------------------------------------

    def is_good(self, s: State) -> bool:
        """At rest: the job is final, nothing is on its way, and the holder knows that."""
        if s.doc is None or s.doc.status not in FINAL or s.writes:
            return False
        for c in s.coordinators:
            if c.phase == "lead" and c.term == s.lease and c.job is None and c.sent is None:
                return not self._is_unclaimed(s, c)
        return False

    def broken(self, before: State, after: State) -> str | None:
        promise = self._broken(before, after)
        return None if promise is None else f"{promise}: {PROMISES[promise]}"

    def _broken(self, before: State, after: State) -> str | None:
        if before.doc is not after.doc and (promise := self._broken_write(before, after)):
            return promise
        if before.executions is not after.executions and (promise := self._broken_execution(before, after)):
            return promise
        if len(before.actors) > len(after.actors) and self._is_given_up(before, after):
            return "HOLD"
        if before.client is not after.client and (promise := self._broken_answer(after)):
            return promise
        if before.lease is not after.lease or before.coordinators is not after.coordinators:
            terms = [c.term for c in after.coordinators if _active(c)]
            if len(set(terms)) < len(terms):
                return "TERM"
        return self._broken_at_rest(after) if self.is_good(after) else None

    def _broken_write(self, before: State, after: State) -> str | None:
        old, new = before.doc, after.doc
        if old is not None and old.status in FINAL and new != old:
            return "I2"
        if old is not None and (new.rev != old.rev + 1 or new.term < old.term):
            return "I3"
        if old is not None and old.current is not None and new.current != old.current:
            end = dict(new.trail).get(old.current, OPEN)
            if end == OPEN or (end == SUCCEEDED and new.status != COMPLETED):
                return "I3"
        if new.status == COMPLETED and (not new.trail or new.trail[-1][1] != SUCCEEDED):
            return "I3"
        if new.crashes > MAX_CRASHES or new.attempts - new.crashes > MAX_ATTEMPTS:
            return "I8"
        lost = {x for x, outcome in new.trail if outcome == LOST}
        if any(a.execution in lost and a.phase == "running" and not a.is_cut for a in after.actors):
            return "ADOPT"
        if any(after.executions[x].body == "ended" for x in lost):
            return "ADOPT"
        return self._broken_answer(after)

    @staticmethod
    def _broken_answer(s: State) -> str | None:
        client, doc = s.client, s.doc
        if client.submit == "acked" and doc is None:
            return "I1"
        if client.told and (doc is None or doc.status != client.told):
            return "ACK"
        if client.cancel == "cancelled" and (doc is None or doc.status != CANCELLED):
            return "I9"
        if client.cancel == "requested" and not doc.cancel:
            return "I9"
        return None

    @staticmethod
    def _broken_execution(before: State, after: State) -> str | None:
        if len(after.executions) > len(before.executions):
            return "I9" if before.client.cancel == "requested" else None
        for old, new in zip(before.executions, after.executions, strict=True):
            if old.outcome not in ("", OPEN) and new.outcome != old.outcome:
                return "I4"
            if new.body and not old.body:
                if after.doc is not None and after.doc.status in FINAL:
                    return "I10"
                if sum(a.phase == "running" and not a.is_cut for a in after.actors) > 1:
                    return "ONE"
        return None

    @staticmethod
    def _is_given_up(before: State, after: State) -> bool:
        """Whether an actor let go of a result that only a coordinator's memory has."""
        gone = {a.execution for a in before.actors if a.phase == "held"} - {a.execution for a in after.actors}
        if not gone or before.budget.death != after.budget.death:
            return False
        for c in after.coordinators:
            if c.term != after.lease:
                continue  # what a former holder remembers does not count
            unwritten = (c.job.trail if c.job else ()) + (c.sent.trail if c.sent and c.sent != after.doc else ())
            if any(x in gone and outcome in (SUCCEEDED, FAILED) for x, outcome in unwritten):
                return True
        return False

    def _broken_at_rest(self, s: State) -> str | None:
        outcomes = [e.outcome for e in s.executions if e.outcome]
        if OPEN in outcomes or len(outcomes) != s.doc.attempts:  # no attempt is given back in this model
            return "I5"
        # Unless it is written ahead, an execution may have begun of which a crash kept the store from hearing.
        n_unheard = sum(e.body != "" and not e.outcome for e in s.executions)
        if self.config.write_ahead and n_unheard:
            return "I5"
        n_succeeded = outcomes.count(SUCCEEDED)
        if n_succeeded != (s.doc.status == COMPLETED):
            return "I6"
        n_ran = sum(e.body != "" for e in s.executions)
        return "I6" if s.doc.status == COMPLETED and n_ran > 1 + len(outcomes) - n_succeeded + n_unheard else None
