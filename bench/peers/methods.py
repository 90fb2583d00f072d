"""How each row was measured, in sentences that stand below its table."""

from __future__ import annotations

from collections.abc import Mapping

METHODS: Mapping[str, str] = {
    "commits": """
Writers in one client process, each of which writes a 100-byte value at a random key, waits for the acknowledgement,
and goes on. The data set is preloaded with all keys, so every write replaces a value. Acknowledged means: on disk
(fdatasync) at the primary and at one more node; where it is said so, visible to reads there as well. All nodes and the
client share the machine. Ours at `replica` is set against `synchronous_commit=on`, `WAIT 1` and etcd's majority, ours
at `applied` against `remote_apply`. What was acknowledged within the window counts.
""",
    "attached": """
As above, but a commit is acknowledged when it is on the primary's disk alone: with a replica attached that
receives, writes and applies on the same processors, and without one. The two follow each other within a turn.
""",
    "lag": """
Commits at local durability, begun when they are due (pgbench: a Poisson process of that rate on 64 connections).
Another process writes a marker to the primary every 10 ms and asks the replica every 2 ms which one it shows; the lag
of a marker is the time from its acknowledgement to the first answer that shows it, so it is overstated by up to
one interval between answers. The markers come on top of the load.
""",
    "catchup": """
The replica is stopped; so many transactions of one 100-byte value at a random key are committed; then it is
started. From the start of its process (the interpreter's included) until a read at it, asked for every 10 ms, shows the
last update. Redis's replica is not ended but cut off (`REPLICAOF` to a port where nobody listens, and back), as a
replica that was started anew takes a whole new copy; its backlog holds all that it missed.
""",
    "bootstrap": """
The same pairs of 980-byte values in each system, so many that they take this size in our store. From the start of
the command on an empty directory until the new replica, following, answers a read that shows the last write before
that; commits go on meanwhile at local durability. PostgreSQL: `pg_basebackup -X stream -c fast -R` with its fsync,
then the standby's start. Redis: a server with an empty directory and `replicaof`. `cp` and `mdb_copy` copy the file of
our store and sync it, under the same load; what `cp` gives is no consistent copy and only shows what the disk takes.
No caches are dropped.
""",
    "failover": """
A pair at local durability takes 50,000 commits; the replica has them all. From the SIGKILL of the primary (all
its processes) to the first write that a new connection to the promoted node has acknowledged. Ours:
`understudy promote --serve`, the start of the interpreter included. PostgreSQL: `pg_ctl promote -W`. Redis:
`REPLICAOF NO ONE`. Nobody has to notice the failure first, and no
address has to move: what finds out and decides takes its time on top, with each system. The promoted one acknowledges
at local durability, as it has no replica yet.
""",
}
