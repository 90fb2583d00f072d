"""Decoders under fuzzing: any bytes give a result or one of our errors, in bounded memory."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from fuzz.mutations import inputs
from fuzz.registry import TARGETS
from fuzz.target import opened
from hypothesis import HealthCheck, given, settings

from understudy.primary.committer import Committer
from understudy.v1 import log_pb2, sync_pb2

# All targets together take some 20 s.
EXAMPLES, EXAMPLES_OF_SLOW = 150, 40


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_result_or_one_of_our_errors(name: str) -> None:
    """Mutated samples and random bytes are decoded or refused in words, whatever lengths and depths they claim (G9)."""
    target = TARGETS[name]
    with opened(target) as attempt:

        @settings(
            max_examples=EXAMPLES_OF_SLOW if target.is_slow else EXAMPLES,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(data=inputs(target))
        def any_bytes(data: bytes) -> None:
            attempt(data)

        any_bytes()


@pytest.mark.parametrize("name", TARGETS)
def test_samples_are_good(name: str) -> None:
    """What our own encoders make is taken: mutants of it come past the first check."""
    target = TARGETS[name]
    with opened(target) as attempt:
        for sample in target.samples():
            attempt(sample)


def test_the_tails_among_the_samples_are_taken_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes home with a sync and with an export is applied, so that mutants of it get as far as that."""
    taken: list[int] = []
    again = Committer.submit_again

    def counted(committer: Committer, change: log_pb2.Change, *rest: Any) -> None:
        again(committer, change, *rest)
        taken.append(change.version)

    monkeypatch.setattr(Committer, "submit_again", counted)
    for name in ("sync request", "salvage request"):
        with opened(TARGETS[name]) as attempt:
            for sample in TARGETS[name].samples():
                attempt(sample)
    assert taken == [5, 6, 5, 6]


def _entry(*, time_us: int = 1, kind: int = 1, realm: str = "/realm") -> bytes:
    change = log_pb2.Change(realm=realm, version=1, operations=[log_pb2.Operation(key=b"key")])
    change.operations[0].kind = kind  # type: ignore[assignment]  # of a later version, perhaps
    return log_pb2.Entry(time_us=time_us, change=change.SerializeToString()).SerializeToString()


def _with(target: str, sample: int, at: int, piece: bytes) -> tuple[str, bytes]:
    """A sample with some bytes written over."""
    data = TARGETS[target].samples()[sample]
    return target, data[:at] + piece + data[at + len(piece) :]


def _row(target: str, database: int, key: bytes, value: bytes) -> tuple[str, bytes]:
    return target, bytes([database, len(key)]) + key + value


def _claims(**changed: object) -> bytes:
    return json.dumps(json.loads(TARGETS["token claims"].samples()[0]) | changed).encode()


def _slot(**changed: object) -> bytes:
    table = json.loads(TARGETS["slots.json"].samples()[1])
    table["slots"][0] |= changed
    return json.dumps(table).encode()


def _safe(version: int) -> bytes:
    """A server streams, and says that so much is safe."""
    bound = TARGETS["sync response"].samples()[0]
    bound = bound[: 2 + int.from_bytes(bound[:2], "little")]
    safe = sync_pb2.SyncResponse(safe=sync_pb2.Safe(ref=1, safe_version=version)).SerializeToString()
    return bound + len(safe).to_bytes(2, "little") + safe


FOUND = {
    "a number with more digits than a float holds": ("settings", b"[primary]\nheal_window_s = " + b"9" * 400),
    "a size with more digits than a float holds": ("arguments", b"9" * 400),
    "a number with more digits than Python reads": (
        "settings",
        b"[primary]\nsync_replicas = " + b"9" * 5_000,
    ),
    "arrays without end": ("settings", b"a = " + b"[" * 10_000),
    "a number for a table": ("settings", b"primary = 5"),
    "a list of tables for a table": ("settings", b"[[primary]]\nlisten = 'a'"),
    "a token good for ever": ("token claims", _claims(iat=10**400, exp=10**400)),
    "half of a surrogate pair for a replica": ("slots.json", _slot(id="\ud800")),
    "a time in the year 75378": ("log entry shown", _entry(time_us=1 << 61)),
    "an operation of a later version": ("log entry shown", _entry(kind=9)),
    "and in a realm of the system": ("log entry shown", _entry(kind=9, realm="/__system")),
    "the start of an epoch that is none": (
        "log entry shown",
        log_pb2.Entry(epoch_start=b"\xff").SerializeToString(),
    ),
    "a segment from LSN 0 on, read": _with("segment read", 0, 40, bytes(8)),
    "a segment from LSN 0 on, recovered": _with("segment recovered", 0, 40, bytes(8)),
    "a million GiB of pages": _with("LMDB file", 0, 16 + 120, struct.pack("<Q", 1 << 50)),
    "a client's row that is none": _row("store row", 0, bytes(8) + b"c" * 16, b"\xff"),
    "a checkpoint that is none": _row("store row", 3, b"checkpoint", b"\xff"),
    "a time without an LSN": _row("store row", 3, b"time/" + b"\0" * 20, bytes(8)),
    "a local realm's path that is no text": _row("local row", 3, b"/\xff", b""),
    "more is safe than there can be": ("sync response", _safe((1 << 64) - 1)),
    "a certificate of a version that there is not": (
        "certificate proof",
        TARGETS["certificate proof"].samples()[0].replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x12"),
    ),
    "a request that is no message": ("service Accounts", b"\0\xff"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_fuzzing_has_found_is_refused_in_words(case: str) -> None:
    """Each of these once ended in an error that is not ours, or in as much memory as it asked for (G9)."""
    name, data = FOUND[case]
    with opened(TARGETS[name]) as attempt:
        attempt(data)
