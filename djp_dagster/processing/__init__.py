"""Processing: how a batch is done, and what a crash at each point leaves behind.

The protocol. Its numbers are the names in `djp_dagster.processing.crash_points`, and a SIGKILL between every two of
them
is a test.

1. **Lease** the tasks: owner, epoch + 1, expiry by the store's clock; a thread prolongs it. An open intent that
covers a
   task extends the lease to its whole task set, all or none.
   *Crash after 1:* the lease runs out after its time to live; whoever is next raises the epoch again.
2. **Intent**: an open one is taken over whole and unchanged, as attempt + 1; if its last attempt never said how it
   ended, that is a death, and counts. Else the batch is cut, and exact ranges, batch id and attempt 1 are written in
   one
   transaction that also checks the lease. Nothing of the batch has been read.
   *Crash after 2:* the open intent. The next holder finds it with ``running`` set, counts the death, and handles the
   same records under the same batch id. Deaths that use up the retry budget start the search of *Failure*.
3. **Read** the records, piece by piece while the handler asks for them.
   *Crash in 3:* as after 2.
4. **Handle**: the handler's emits, state changes, failed records and deadlines are collected in memory. Before it
runs,
   the local state has caught up with the whole changelog.
   *Crash in 4:* as after 2; what the handler did to the outside world may happen again, with the same ``batch.id``
   and
   ``record.idempotency_key``.
5. **Store** the handler's return value, durably, under a path of this attempt.
   *Crash after 5:* as after 2, plus a stored output that nothing refers to.
6. **Commit**, one transaction, the only commit point. It expects the lease's epoch, the committed offsets the intent
   started from, and the changelog end; and makes visible: emitted events, changelog records, output reference, dead
   letters and their status, deadlines, requests done, new committed offsets, intent gone.
   *Crash before COMMIT:* as after 5. *Crash after COMMIT:* everything is done but 7 and 8.
   *Connection lost during COMMIT:* the task rows tell, each carrying (batch id, attempt, epoch) of its last commit:
   mine,
   it is done; lease and offsets as expected, it is sent again; else this holder is fenced and stops silently.
7. **Apply** the state changes to the local store, in one transaction that compares and sets (incarnation, changelog
   offset).
   *Crash before or in 7:* the local store is behind; before the next 4 it catches up from the changelog.
8. **Report**: the batch's figures go to whoever runs the consumer.
   *Crash before 8:* a committed batch nobody reported; the stream itself still knows all of it.

So every acknowledged event is in exactly one committed batch, or pending; and every committed effect (emit, state
change,
output reference, dead letter, offset) happens once. The handler itself is run at least once.

*Failure.* An error is transient or terminal (`djp_dagster.processing.failures`). Transient: the attempt ends, the
intent
remembers the failure, and the next attempt waits, longer each time, with jitter; after ``retry.max_attempts`` the run
fails, or the worker pauses; the offsets stay. Terminal: the first failing record is searched by probes, which run the
handler on ever narrower prefixes of the batch and discard all effects; each probe's length is in the intent before it
starts, so that a probe that kills its process is known to have failed; because processes also die for reasons of
their
own, a record is blamed for deaths only after it alone was the suspect and died ``retry.max_attempts`` times. Poison
records found are written into the intent; the batch
without them runs under its own id, and they are dead-lettered in the same commit. More than ``max_poison`` of them:
nothing is dead-lettered, `SystemicFailureError`. An outage of the stream is neither: nothing is counted, it is waited
for.
"""
