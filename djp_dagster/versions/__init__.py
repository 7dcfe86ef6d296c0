"""Two versions of a stateful consumer: the live one, and one that is rebuilt beside it until it takes its place.

The follower is a group of its own, ``<group>.next``. It begins where the live state began, with empty state, and does
what the live group has done, never more: records up to its committed offsets, deadlines up to the moment up to which
it has fired its own. It has no effect but on its state: its emits and outputs are dropped, for the live version has
them; what its handler fails on are dead letters of its own. The steps, and what a crash after each leaves behind:

1. **Follow** until little is missing. *Crash:* a follower that goes on where it stopped; the live version serves.
2. **Freeze**: lease all tasks of the live group, whoever holds them. What its holders have not committed is lost to
   them, and will be done by whoever is live then. *Crash:* the lease runs out, and the live version goes on.
3. **Catch up** with where the live version stands now. *Crash:* as after 2.
4. **Swap** the versions, in one transaction that expects both leases and equal offsets, and raises all epochs: state,
   deadlines and dead letters of the live group are those of the follower from now on. Readers find them when they look
   next; what is handled from here on, and every deadline that the former version has not fired, has its effects.
   *Crash before:* as after 2. *Crash after:* the new version is live.

The former version is then called ``<group>.previous``. It may follow in turn, with the code that made it, so that the
same steps bring it back. Both hold back retention from where they stand, until they are abandoned.
"""
