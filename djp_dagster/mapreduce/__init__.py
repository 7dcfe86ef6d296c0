"""MapReduce: split, map, combine, shuffle by key hash, reduce; on one processor, on all, or on a cluster.

The protocol
    1. **Plan.** The source is cut into splits, each naming what it was cut from, in which version. Splits, code and
       settings have a hash: the job's id, under which everything of it lies in the *work place*, a payload store.
       *A crash leaves nothing.*
    2. **Map.** An attempt at a task reads its split block by block, maps, and adds to a buffer of accumulators or
       pairs. What exceeds its part of memory is sorted by partition and key and spilled to a temporary file. At the end
       the spills are merged into one run per partition: small ones travel with the answer, large ones are written under
       a path that names task, attempt and a random number. *A crash leaves temporary files, which have no name, and
       runs that nobody refers to.*
    3. **Commit of a map task.** Its answer (runs, counters, bad records, how much was read) is written as a document,
       unless there is one: the first attempt that comes so far counts, in everything; others are forgotten. *A crash
       before leaves 2; after it, the task is done for ever.*
    4. **Reduce**, once all map tasks are committed: one task per partition merges its runs, sorted, a window at a time,
       and reduces key after key. **Commit** as in 3.
    5. **Result.** It is made of the committed answers of 4. Whoever runs the same job (1) before that finds the
       documents of 3 and 4, verifies that what they refer to is there, and does what is missing.
    6. **Removal.** Everything under the job's id is removed: with the result, if the work place is temporary; once the
       result is stored elsewhere, if it is not. *A crash before leaves it; the same job goes on with it, and collection
       of garbage (`djp_dagster.claim_check.collection`) removes it a grace period later.*

    Without a work place that was named, or with less than 32 MiB to read, documents are kept in memory alone: nothing
    could, or need, go on with them.

Attempts
    A task whose process died, or stood still, is tried again by itself, up to ``max_attempts``; so is one that met an
    outage. One that raised is tried once more, because an exception must repeat to be believed. When nothing waits any
    more, a task that takes twice as long as the others gets a second attempt beside the first. An attempt that lost is
    killed.

Memory
    A process keeps at most ``memory``: half of what is above 128 MiB for the buffer, the rest for the interpreter, for
    a block of the source, and for one batch of each run that is merged, of at most 64 runs at once.
"""
