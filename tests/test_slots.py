"""Slots: what is remembered of replicas, over restarts, so that what they need is kept."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest

from understudy.common.errors import CorruptionError, DiskFull, NewerFormat, UsageError
from understudy.common.types import Lsn
from understudy.primary import slots
from understudy.primary.slots import SAVE_INTERVAL_S, SLOTS_MAX, Slot, SlotTable

NODE = bytes(range(16))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the table is kept."""
    return tmp_path / "slots.json"


def claim(table: SlotTable, name: str, lsn: int) -> Slot:
    return table.claim(name, NODE, lsn=Lsn(lsn), offset=100 * lsn, now_us=7)


def test_a_slot_survives_a_restart_the_moment_it_is_claimed(path: Path) -> None:
    """What a replica needs is on disk before it is sent anything, though not that it is connected."""
    table = SlotTable(path)
    slot = claim(table, "r1", 5)
    table.connect("r1")
    again = SlotTable(path)
    assert list(again) == [slot]
    assert again.get("r1") == Slot(
        id="r1", node=NODE.hex(), durable_lsn=5, durable_offset=500, applied_lsn=0, seen_us=7
    )
    assert not again.is_connected("r1")
    assert again.connected_count == 0


def test_what_slots_need_is_kept_connected_or_not(path: Path) -> None:
    """The log is kept from behind the slowest replica's last durable entry, wherever that replica is; without
    slots nothing is.
    """
    table = SlotTable(path)
    assert table.retain_from(Lsn(10)) == 11
    claim(table, "near", 9)
    far = claim(table, "far", 3)
    table.connect("near")
    assert table.retain_from(Lsn(10)) == 4
    far.durable_lsn = 10
    assert table.retain_from(Lsn(10)) == 10


def test_g9_a_lost_slot_keeps_nothing_and_is_still_known(path: Path) -> None:
    """G9: a replica that was given up holds no log any more, over a restart too, and is still shown."""
    table = SlotTable(path)
    claim(table, "near", 9)
    table.lose(claim(table, "far", 3))
    for known in (table, SlotTable(path)):
        assert known.retain_from(Lsn(10)) == 10
        slot = known.get("far")
        assert slot is not None
        assert slot.lost
        assert len(known) == 2


def test_a_saved_position_is_never_newer_than_the_truth(path: Path) -> None:
    """Progress is saved now and then and when a replica leaves: what a restart finds may be older, which only
    keeps more log.
    """
    table = SlotTable(path)
    slot = claim(table, "r1", 0)
    saved = []
    for second in range(20):
        slot.durable_lsn = second
        table.touch()
        save_what_is_due(table, 100.0 + second)
        found = SlotTable(path).get("r1")
        assert found is not None
        assert second - SAVE_INTERVAL_S < found.durable_lsn <= second
        saved.append(found.durable_lsn)
    assert 3 <= len(set(saved)) <= 5
    slot.durable_lsn = 25
    table.disconnect("r1")
    save_what_is_due(table, 120.0)
    found = SlotTable(path).get("r1")
    assert found is not None
    assert found.durable_lsn == 25
    assert table.saving(1e9) is None


def save_what_is_due(table: SlotTable, now_s: float) -> None:
    save = table.saving(now_s)
    if save is not None:
        save()


def test_what_is_saved_late_does_not_undo_what_was_claimed_meanwhile(path: Path) -> None:
    """Saving in another thread may be overtaken; the newest table is the one that stays."""
    table = SlotTable(path)
    claim(table, "r1", 1)
    table.touch()
    late = table.saving(100.0)
    assert late is not None
    claim(table, "r2", 2)
    late()
    assert SlotTable(path).get("r2") is not None


def test_a_slot_claimed_anew_begins_where_its_new_owner_is(path: Path) -> None:
    """Another copy that takes over a name takes its place in the log, too, and is not taken for lost."""
    table = SlotTable(path)
    table.lose(claim(table, "r1", 50))
    slot = table.claim("r1", b"x" * 16, lsn=Lsn(20), offset=2_000, now_us=9)
    assert len(table) == 1
    assert (slot.node, slot.durable_lsn, slot.applied_lsn, slot.lost) == ((b"x" * 16).hex(), 20, 0, False)
    assert table.retain_from(Lsn(60)) == 21


def test_connections_are_counted(path: Path) -> None:
    """How many replicas follow right now is known, each once."""
    table = SlotTable(path)
    for name in ("r1", "r2"):
        claim(table, name, 1)
        table.connect(name)
        table.connect(name)
    assert table.connected_count == 2
    table.disconnect("r1")
    table.disconnect("r1")
    assert (table.connected_count, table.is_connected("r1"), table.is_connected("r2")) == (1, False, True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": 1, "slots": 5}',
        b'{"format": 1, "slots": [{}]}',
        b'{"format": 1, "slots": [{"id": "r"}]}',
        b'{"format": 1, "slots": [{"id": "r", "node": "00", "durable_lsn": -5}]}',
        b'{"format": 1, "slots": [{"id": "r", "node": "00", "durable_lsn": 99999999999999999999}]}',
        b'{"format": 1, "slots": [{"id": "r", "node": "00", "durable_lsn": "x"}]}',
        b'{"format": 1, "slots": [{"id": "r", "node": "00", "lost": 1}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"slots": [',
    ],
)
def test_a_damaged_table_is_refused_with_the_remedy(path: Path, content: bytes) -> None:
    """Whatever is in the file, it is either a table or called damaged, with what to do."""
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"slots\.json can't be read.*remove it"):
        SlotTable(path)


def test_a_table_of_a_newer_format_is_refused(path: Path) -> None:
    """What a later version means by its rows is not guessed."""
    path.write_bytes(b'{"format": 2, "slots": []}')
    with pytest.raises(NewerFormat, match="upgrade"):
        SlotTable(path)


def test_what_a_later_version_adds_is_passed_over(path: Path) -> None:
    """A field that this version does not know does not keep it from reading the rest."""
    path.write_bytes(b'{"format": 1, "slots": [{"id": "r1", "node": "00", "durable_lsn": 3, "zone": "b"}]}')
    slot = SlotTable(path).get("r1")
    assert slot is not None
    assert slot.needs_from == 4


def test_g9_on_a_full_disk_the_old_table_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: where the table can't be saved, work goes on, and the one saved before is still there, whole."""
    table = SlotTable(path)
    slot = claim(table, "r1", 3)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise DiskFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(slots, "publish", full)
        slot.durable_lsn = 9
        table.save()
    assert path.read_bytes() == before
    table.save()
    found = SlotTable(path).get("r1")
    assert found is not None
    assert found.durable_lsn == 9


@pytest.mark.parametrize(("letter", "named"), [("", 10), ("x", 10), ("\U0001f4be", 2)])
def test_g9_however_many_ids_are_known_an_error_names_few(path: Path, letter: str, named: int) -> None:
    """G9: the error for an id that nobody has names ten at most and counts the rest, so that it fits into gRPC's 8 KiB
    of metadata twice over, three characters to a byte that is not ASCII; a long id that was asked for is cut.
    """
    table = SlotTable(path)
    for number in range(SLOTS_MAX):
        claim(table, f"{number:02}" + 98 * letter, 1)
    with pytest.raises(UsageError, match=r"^no replica 'yyy") as raised:
        table.remove("y" * 10_000)
    known, _, more = raised.value.remedy.removeprefix("known are: ").partition(" and ")
    assert known.split(", ") == [f"{number:02}" + 98 * letter for number in range(named)]
    assert more == f"{SLOTS_MAX - named} more"
    sent = len(quote(str(raised.value), safe=string.printable)) + len(raised.value.remedy.encode())
    assert sent < 7_000


def test_few_ids_are_all_named(path: Path) -> None:
    """Where ten or fewer are known, the error for another id names each, in order."""
    table = SlotTable(path)
    with pytest.raises(UsageError, match="none is known"):
        table.remove("c")
    for name in ("b", "a"):
        claim(table, name, 1)
    with pytest.raises(UsageError, match=r"known are: a, b\)$"):
        table.remove("c")
