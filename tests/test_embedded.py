"""The embedded primary: the direct client's calls, without a connection."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wait_until

from understudy.client import Add, Put, connect
from understudy.client.blocking import Server
from understudy.common import portal
from understudy.common.errors import (
    BadKey,
    BadOperation,
    BadRealmPath,
    NotPermitted,
    OutcomeUnknown,
    Overloaded,
    UnderstudyError,
    UnknownRealm,
    UsageError,
)
from understudy.common.rpc import open_channel
from understudy.common.settings import ReplicaSettings
from understudy.primary import Primary, committer
from understudy.replica.server import serving_replica
from understudy.v1 import accounts_pb2, accounts_pb2_grpc


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    """A primary on any port."""
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0") as opened:
        yield opened


def _public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(member)
    }


def test_it_has_the_direct_clients_methods() -> None:
    """What is written for a connection works on an embedded primary: same names, same parameters."""
    embedded, direct = _public(Primary), _public(Server)
    for name, signature in direct.items():
        assert [str(one) for one in embedded[name].parameters.values()] == [
            str(one) for one in signature.parameters.values()
        ], name


@pytest.mark.parametrize("embedded", [True, False])
def test_both_do_the_same(primary: Primary, embedded: bool) -> None:
    """Each call gives the same on a connection and on the primary itself."""
    with connect(primary.address) as connected:
        server: Primary | Server = primary if embedded else connected
        with server.transaction("/realm") as tx:
            tx.put(b"a", b"1")
            tx.add(b"b", 2)
            tx.put(b"c", b"3")
        assert (tx.receipt.realm, tx.receipt.version) == ("/realm", 1)
        assert server.commit("/realm", [Add(b"b", 5)]).version == 2
        assert server.get("/realm", b"b") == b"7"
        assert server.get_many("/realm", [b"a", b"no", b"c"]) == [b"1", None, b"3"]
        assert server.count("/realm") == 3
        assert server.count("/realm", start=b"b") == 2
        assert list(server.scan("/realm", reverse=True, limit=2)) == [(b"c", b"3"), (b"b", b"7")]
        assert list(server.scan("/realm", limit=0)) == []
        assert [(one.path, one.version) for one in server.realms()] == [("/realm", 2)]
        status = server.status()
        assert (status.role, status.access) == ("primary", "protected")
        assert server.drop_realm("/realm") > tx.receipt.lsn
        with pytest.raises(UnknownRealm):
            server.get("/realm", b"a")
        with pytest.raises(UnknownRealm):
            server.get_many("/realm", [])


@pytest.mark.parametrize("embedded", [True, False])
def test_both_refuse_the_same(primary: Primary, embedded: bool) -> None:
    """A mistake is told in words, and by the same error, on a connection and on the primary itself."""
    primary.commit("/realm", [Put(b"a", b"1")])
    with connect(primary.address) as connected:
        server: Primary | Server = primary if embedded else connected
        for wrong in (None, 5, b"/realm", "realm"):
            with pytest.raises(BadRealmPath):
                server.commit(wrong, [Put(b"a", b"1")])  # type: ignore[arg-type]
            with pytest.raises(BadRealmPath):
                server.get(wrong, b"a")  # type: ignore[arg-type]
        for wrong in (None, "a", b""):
            with pytest.raises(BadKey):
                server.get("/realm", wrong)  # type: ignore[arg-type]
        with pytest.raises(BadOperation):
            server.commit("/realm", [])
        with pytest.raises(NotPermitted):
            server.get("/__system", b"history-key")
        with pytest.raises(NotPermitted):
            server.commit("/__system", [Put(b"a", b"1")])
        for call in (
            lambda: server.commit("/realm", [Put(b"a", b"1")], timeout_s=-1),
            lambda: server.commit("/realm", [Put(b"a", b"1")], durability="twice"),
            lambda: server.get("/realm", b"a", timeout_s="1"),  # type: ignore[arg-type]
            lambda: list(server.scan("/realm", limit=-1)),
            lambda: list(server.scan("/realm", start=None)),  # type: ignore[arg-type]
            lambda: server.count("/realm", end="z"),  # type: ignore[arg-type]
            lambda: server.wait(77),
        ):
            with pytest.raises(UsageError):
                call()
    assert primary.get("/realm", b"a") == b"1"


def test_a_scan_shows_one_state_whatever_is_written_meanwhile(primary: Primary) -> None:
    """G2: all pairs of a scan are as of the moment at which it began."""
    keys = [b"%06d" % number for number in range(5_000)]
    for start in range(0, len(keys), 1_000):
        primary.commit("/realm", [Put(key, b"before") for key in keys[start : start + 1_000]])
    scan = primary.scan("/realm")
    first = next(scan)
    for start in range(0, len(keys), 1_000):
        primary.commit("/realm", [Put(key, b"after") for key in keys[start : start + 1_000]])
    assert [first, *scan] == [(key, b"before") for key in keys]


def test_an_answer_that_is_late_can_be_waited_for(tmp_path: Path) -> None:
    """G6: after OutcomeUnknown, wait gives the receipt once a replica has the transaction."""
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0", durability="replica") as primary:
        with pytest.raises(OutcomeUnknown) as unknown:
            primary.commit("/realm", [Put(b"key", b"value")], timeout_s=0.05)
        number = unknown.value.number
        with pytest.raises(OutcomeUnknown):
            primary.wait(number, timeout_s=0)

        async def follow() -> None:
            settings = ReplicaSettings(
                data_dir=tmp_path / "b", primary=primary.address, listen="127.0.0.1:0", id="b"
            )
            async with serving_replica(settings):
                receipt = await asyncio.to_thread(primary.wait, number)
                assert receipt.version == 1

        asyncio.run(follow())
        assert primary.wait(number).version == 1


def test_g9_what_waits_for_replicas_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: when too much is unanswered, a transaction is not taken in, and the caller is told so."""
    monkeypatch.setattr(committer, "PENDING_ENTRIES_MAX", 5)
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0", durability="replica") as primary:
        refused = [_refusal(primary) for _ in range(10)]
        assert refused[0] is OutcomeUnknown
        assert refused[-1] is Overloaded
        assert primary.status().lsn <= 2 + 5


def _refusal(primary: Primary) -> type[UnderstudyError]:
    with pytest.raises(UnderstudyError) as refused:
        primary.commit("/realm", [Put(b"key", b"value")], timeout_s=0.05)
    return refused.type


def test_its_status_says_that_tokens_are_asked_for(primary: Primary) -> None:
    """Once there is a token for a replica, status says so, whoever asks for it."""

    async def issue() -> None:
        async with open_channel(primary.address) as channel:
            request = accounts_pb2.IssueTokenRequest(kind=accounts_pb2.TOKEN_REPLICA)
            await accounts_pb2_grpc.AccountsStub(channel).IssueToken(request)

    portal.call(issue())
    assert primary.status().access == "tokens"


def test_g6_what_waits_when_it_is_closed_is_not_said_to_be_refused(tmp_path: Path) -> None:
    """G6: a transaction that was taken in may be durable: that it failed would make its caller repeat it."""
    primary = Primary.open(tmp_path / "a", listen="127.0.0.1:0", durability="replica")
    outcome: list[BaseException] = []

    def commit() -> None:
        with pytest.raises(OutcomeUnknown) as unknown:
            primary.commit("/realm", [Put(b"key", b"value")], timeout_s=30)
        outcome.append(unknown.value)

    waiting = threading.Thread(target=commit)
    waiting.start()
    wait_until(lambda: primary.status().durable_lsn == 3)
    primary.close()
    waiting.join()
    assert "may or may not have been applied" in str(outcome[0])
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0") as again:
        assert again.get("/realm", b"key") == b"value"


def test_a_closed_primary_says_so(tmp_path: Path) -> None:
    """Every call after close is a mistake, told in words."""
    primary = Primary.open(tmp_path / "a", listen="127.0.0.1:0")
    primary.commit("/realm", [Put(b"a", b"1")])
    primary.close()
    primary.close()
    for call in (
        lambda: primary.get("/realm", b"a"),
        lambda: primary.commit("/realm", [Put(b"a", b"1")]),
        lambda: list(primary.scan("/realm")),
        primary.realms,
        primary.status,
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_fork_is_told_that_the_primary_is_its_parents(primary: Primary, tmp_path: Path) -> None:
    """In a fork every call but close says so, and none waits for a thread that a fork does not have."""
    primary.commit("/realm", [Put(b"a", b"1")])
    with pytest.MonkeyPatch.context() as patch:
        # A real fork of a process with gRPC's threads in it now and then crashes before any of our code runs.
        patch.setattr(os, "getpid", lambda: 1)
        primary.close()
        for call in (
            lambda: primary.get("/realm", b"a"),
            lambda: primary.commit("/realm", [Put(b"a", b"2")]),
            lambda: Primary.open(tmp_path / "b", listen="127.0.0.1:0"),
        ):
            with pytest.raises(UsageError, match="one is a fork"):
                call()
    assert primary.get("/realm", b"a") == b"1"
