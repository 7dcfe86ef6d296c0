"""The event buffer: wait for all parts of a key, from any number of topics, and handle them together, once.

What happens is a function of the parts' append times alone (and event times, if asked for), not of how batches were
cut, which input was read first, or what crashed. The protocol of one batch of one task:

1. The batch holds, of all inputs of the task, everything that was appended up to one moment, its **horizon**
   (`djp_dagster.processing.cutting.cut_aligned`). So batches follow each other in the order of append times.
2. Its records are **merged** by (append time, topic, offset). Before a record is looked at, every key whose deadline
   lies before its append time **expires**, oldest first: so a part stamped after the deadline is late, always. By event
   time, keys expire that lie before the watermark as of then; a part that is later than its key is due is late, and the
   key waits on.
3. A part is **kept** in its key's entry, in the task's state. If all parts are there, the handler is called with them,
   and the entry becomes a **mark** that says so: one completion per key, ever, because the mark, what the handler
   emitted, and the offsets become visible in one commit. A mark is of the moment at which its key was done, not of when
   that was found out; what is appended more than ``remember`` after it begins the key anew.
   *Crash anywhere before the commit:* nothing of the batch has happened; the next attempt does the same again.
   *Crash after it:* the mark is in the changelog, and wherever the task moves it goes with it.
4. After the records, if the batch was woken by the group's **deadline**, every key due up to the horizon expires. The
   commit checks that no input holds an unread record from before the horizon; if one does, the batch is cut longer.
5. Entries still open are written back, and the next wake-up is set: one per task, at the earliest due time, so a
   million open keys cost the stream one row.

A handler that fails terminally fails its key alone: all its parts become dead letters. Parts that were kept are dead
letters with their own bytes, so they outlive the retention of their topics; a redrive puts them into the buffer again,
one by one, and ends no key: what was appended in time may not have been read yet. Their deadline counts from then.
"""
