"""Two versions of a stateful consumer: the live one, and one that is rebuilt beside it until it takes its place.

The follower is a group of its own, ``<group>.next``. It begins at the beginning with empty state, does what the live
group has done and never more, and has no effect but on its state: its emits and outputs are dropped, for the live
version has them. The steps, and what a crash after each leaves behind:

1. **Follow** until little is missing. *Crash:* a follower that goes on where it stopped; the live version serves.
2. **Freeze**: lease all tasks of the live group, whoever holds them. What its holders have not committed is lost to
   them, and will be done by whoever is live then. *Crash:* the lease runs out, and the live version goes on.
3. **Catch up** with the offsets at which the live version stands now, and with the deadlines that it has fired.
   *Crash:* as after 2.
4. **Swap** the names, in one transaction that expects both leases and equal offsets, and raises all epochs. Readers
   find the new version when they look next; what it handles from here on, it emits. *Crash before:* as after 2.
   *Crash after:* the new version is live.

The former version is then called ``<group>.previous``. It may follow in turn, with the code that made it, so that the
same steps bring it back.
"""
