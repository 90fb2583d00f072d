"""Verifying a node that has lost the key of its history."""

from __future__ import annotations

from test_verify import Sample, sample, template

from understudy.common.engine import HISTORY_KEY
from understudy.common.store_layout import open_environment, realm_prefix
from understudy.common.types import SYSTEM_REALM
from understudy.v1.store_pb2 import RealmRow

__all__ = ["sample", "template"]  # fixtures


def test_changes_whose_key_is_gone_are_not_called_sound(sample: Sample) -> None:
    """G11: where neither store nor log has the history key any more, it is said that no origin was checked."""
    environment = open_environment(sample.path / "store", readonly=False)
    try:
        with environment.env.begin(environment.data, write=True) as txn:
            row = RealmRow.FromString(txn.get(SYSTEM_REALM.encode(), b"", environment.realms))
            assert txn.delete(realm_prefix(row.id) + HISTORY_KEY)
    finally:
        environment.close()
    sample.segments[0].unlink()
    assert "their origin was not checked" in " ".join(sample.verify().problems)
