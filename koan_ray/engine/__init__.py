"""Decides and writes: coordinator, dispatcher, writer, broker, and the inside of a job actor. Knows only ports.

::

                 submit                    dispatch                      report
    driver ────────────────► COORDINATOR ─────────────► AGENT (job actor) ───────► COORDINATOR ──► waiters
      ▲                      job records,  batches of     attempts run the           settles, retries,
      │ ends                 lanes, due     orders        bodies                     group commit
      └──────────────────── times, actors                    │
      ▲                                                      │ newest progress, every few tens of ms
      └────────── states ◄────────────── BROKER ◄────────────┘

The life of a job is the table in `koan_ray.domain.transitions`; every move is made by the coordinator, in one thread, and
told to nobody before the `Writer` has written it.

Who is authoritative
    The store, for every job and execution. The coordinator's `LiveJobs` hold what is not final and are the truth between two
    flushes only for itself. The broker holds nothing that anybody relies on.

What a crash leaves behind (jobs in memory)
    *Job actor*: the launcher says that it is dead; bodies that were active are lost (a crash is counted, the attempt is kept
    apart from failures) and queued again, parked ones are interrupted and keep their attempt.
    *Broker*: watchers see a gap; running bodies are announced again within two seconds, ends come from the coordinator.
    *Coordinator*: its jobs are gone. Sessions see another epoch and fail their waits with `JobLostError`; the job actors of
    the old epoch are ended by the new coordinator before it dispatches anything, or end themselves.
    *Driver*: nothing; its jobs go on, and its session is forgotten after five minutes.

What a crash leaves behind (jobs in documents)
    What the next coordinator makes of it is told in `koan_ray.engine.recovery`. That a body runs is written behind, so one
    that began in the last moments of a coordinator may run again and leave no trace of the first time, unless its class
    has its claim written ahead (`koan_ray.engine.claims`). Every place where it matters has a name at which tests kill a
    process: `koan_ray.killpoints`.
    *Between the parts of a checkpoint and the document that counts them*: parts that nobody reads. The next execution goes
    on from the checkpoint before, and writes the same numbers again (`checkpoints`).

The fence is the execution id: a report for any other than the job's current execution is counted and dropped, so that it
does not matter whether it is late, doubled or from a process that was thought dead.

Waiting never deadlocks: a body that waits for other jobs gives its place in its actor to them, deeper jobs go first, and
the CPU of an actor in which every body waits is lent to an actor of another spec.

What is measured are plain numbers (`meters`), counted where things happen and read on a timer by whoever exports them:
`koan_ray.telemetry.metrics` and `koan_ray.runtime.ray.metrics`. No metrics library is called while jobs move.

Jobs over items (`koan_ray.FiniteJob`): the body is ours (`lead`), runs in an actor that holds no CPU and counts for nothing,
and sends the items in *chunks* to job actors. A chunk is a job that nobody sees: it is not stored, not listed, not tried
again, and forgotten once its end was told. What becomes of an item is decided in one place, `koan_ray.domain.items`, by
the lead; what has become of it is a checkpoint of the lead's job (`checkpoints`): ranges of indexes, not a document each.

* *The actor of a chunk* dies: its items are looked at in smaller chunks until the one that is to blame is alone, in a
  process in which nothing else is, and in the end never was. They carry their losses, also into the lead's next execution.
* *The lead* dies: its chunks are cancelled, and the next one goes on from the last checkpoint.
* *The coordinator* dies: the lead is adopted, its chunks are lost and sent again. A job in memory is gone with it.

Rejected: a document for each item (ten million of them for a job that needs four ranges); items in the queue of jobs (no
order, no back-pressure to the source, and the record of a job for each); the lead inside a job actor (an item that ends its
process would end the lead, and with one actor there would be no place for the chunks).

Rejected: one actor call for each job (slower than plain Ray tasks); queues in pending Ray calls (24 KB each); Ray's own
retries and restarts for job actors (retry has one owner); coroutines that sleep until a retry is due (a due time in a heap
survives, a coroutine does not).
"""
