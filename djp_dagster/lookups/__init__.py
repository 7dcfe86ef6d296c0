"""Look-ups: what an event does not say is asked of a service, for a whole batch at once.

How a call is made, from the outside in; each ring is passed by those that have passed the one before:

1. **Coalesce**: keys asked for twice are asked once; keys asked for at the same time share a call, up to ``bulk_size``.
   Nobody joins a call that has begun, so an answer was given after it was asked for.
2. **Cache**, if there is one: a hit goes no further, and is counted. A key asked for alone looks there first.
3. **Retry**: what may be tried again is, after a pause to which the service may add (``Retry-After``), never longer
   than the budget of the whole.
4. **Breaker**: if the service has failed again and again, or has asked for quiet, a call fails at once, until it may be
   tried. It is asked before a call waits for its place, and again when it has it.
5. **Limit**: no more calls a second, and at the same time, than agreed.
6. **Call**, with a time limit.

A call that fails in the end is a `LookupUnavailableError`, which is transient: no event is to blame, no offset moves. A
key that the service does not know is nobody's failure: it is missing in the answer, and the handler decides. A call for
several keys that is refused is made again for each half, so that one bad key does not take others with it when threads
share calls.
"""
