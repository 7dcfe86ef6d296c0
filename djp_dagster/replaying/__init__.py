"""Replay: the same handler on what was published before; it moves no offset, and what it emits goes nowhere, or aside.

1. **Plan**: which offsets of which partitions may hold the records wanted, up to the ends *as of* now. The plan is what
   reproduces a replay: the same handler on the same plan sees the same records, whatever is appended later.
2. **Refuse** what cannot be whole: a window that retention has begun to remove.
3. **Handle** the records as one batch, read piece by piece, in bounded memory; ``batch.is_replay`` is true. Without any
   record the handler is not called.
4. **Emits** are dropped; or, if a shadow topic is named, published there under the ids that the live consumer gives.

A crash at any point leaves nothing behind but what is in the shadow topic, where a later try publishes the same again,
once: the publishes are numbered by a producer that is named after the plan, the code and the shadow topics. They happen
between records, never in the middle of one that may yet fail.
"""
