"""State digests compared at the marks in the log, while both nodes run."""

from __future__ import annotations

from pathlib import Path

from harness import Processes, wait_until
from nodes import Pair, checkpoint, put, status, wait_until_caught_up, warnings

from understudy.common.store_layout import open_environment, realm_prefix
from understudy.v1.store_pb2 import RealmRow


def test_a_copy_that_is_not_the_primary_s_is_told_at_the_next_digest_mark(
    processes: Processes, tmp_path: Path
) -> None:
    """G11: a value that the replica's store lost is found when that key is written next, and the realm is named."""
    pair = Pair(processes, tmp_path)
    address = pair.primary.address
    for value in (b"first", b"second"):
        put(address, "/sound", (b"key", value))
        put(address, "/hurt", (b"key", value))
        checkpoint(address)
    wait_until_caught_up(address, pair.replica.address)
    wait_until(lambda: status(pair.replica.address).checkpoint_lsn == status(address).checkpoint_lsn)
    assert "not the primary's" not in warnings(pair.replica.address) + warnings(address)
    assert pair.replica.terminate() == 0
    _change_unseen(pair.b / "store", "/hurt", b"key", b"other")
    replica = processes.replica(pair.b, address, "--id", "b")
    put(address, "/sound", (b"key", b"third"))
    put(address, "/hurt", (b"key", b"third"))
    checkpoint(address)
    wait_until(lambda: "not the primary's" in warnings(replica.address))
    assert "realms /hurt;" in warnings(replica.address)
    assert "not the primary's" not in warnings(address)


def _change_unseen(store: Path, realm: str, key: bytes, value: bytes) -> None:
    """Changes a pair in a store that nobody has open, past what keeps its digests."""
    environment = open_environment(store, readonly=False)
    try:
        with environment.env.begin(environment.data, write=True) as txn:
            row = RealmRow.FromString(txn.get(realm.encode(), b"", environment.realms))
            assert txn.replace(realm_prefix(row.id) + key, value) is not None
    finally:
        environment.close()
