"""What calls require, whom a server asks for proof, and what patterns of permissions hold."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

import understudy.v1
from understudy.common.access import (
    ANONYMOUS,
    LOCAL,
    OPEN,
    REQUIRES,
    Door,
    Kind,
    Level,
    Principal,
    Requires,
    caller,
    check_name,
    check_pattern,
    door,
    matches,
    meets,
    peer_host,
    resolve_path,
)
from understudy.common.errors import UsageError
from understudy.common.types import check_realm_path

ANN = Principal(kind=Kind.USER, user="ann", user_id="a1")


# -- what calls require ----------------------------------------------------------------------------------------


def _methods() -> set[str]:
    """Every RPC of every .proto file of ours, and of the two services that every server has beside them."""
    files = [
        importlib.import_module(f"understudy.v1.{proto.stem}_pb2").DESCRIPTOR
        for proto in Path(understudy.v1.__path__[0]).glob("*.proto")
    ]
    services = [
        service
        for file in (*files, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    ]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_g10_every_rpc_is_in_the_table() -> None:
    """G10: nobody adds a call without saying what it requires, and no row outlives its call."""
    assert REQUIRES.keys() == _methods()
    assert len(REQUIRES) > 20


def test_only_logins_and_health_require_nothing() -> None:
    """Whoever has shown nothing can prove who it is, and see that the server lives, and no more."""
    assert {method for method, requires in REQUIRES.items() if requires is Requires.NOTHING} == {
        "/understudy.v1.Accounts/Login",
        "/understudy.v1.Accounts/Refresh",
        "/understudy.v1.Accounts/Logout",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
    }


def test_g10_what_an_operator_or_a_replica_must_have_proved() -> None:
    """G10: said twice, so that no slip opens to users what changes a server, or gives everything away."""

    def named(requires: Requires) -> set[str]:
        return {method.rpartition(".")[2] for method, found in REQUIRES.items() if found is requires}

    assert named(Requires.REPLICA) == {
        f"Replication/{name}"
        for name in ("Follow", "PinSnapshot", "DigestSnapshot", "ReadSnapshot", "ReleaseSnapshot")
    }
    assert named(Requires.ADMIN) == {
        "Sync/Salvage",
        *(f"Admin/{name}" for name in ("Promote", "Fence", "Freeze", "Thaw", "Forget", "StateDigests")),
        *(f"Admin/{name}" for name in ("StartBackup", "CancelBackup", "WatchBackup")),
        *(f"Accounts/{name}" for name in ("PutUser", "RemoveUser", "ListUsers", "RotateKeys", "SetPolicy")),
        *(f"Accounts/{name}" for name in ("Grant", "RevokeGrant", "ListGrants")),
        *(f"Accounts/{name}" for name in ("IssueToken", "RevokeToken", "ListTokens")),
    }


@pytest.mark.parametrize("requires", Requires)
def test_who_meets_a_requirement(requires: Requires) -> None:
    """Operators may do everything, users what is for users, a replica nothing but follow, a stranger nothing."""
    kinds = {kind for kind in Kind if meets(Principal(kind=kind), requires)}
    operators = {Kind.LOCAL, Kind.OPEN, Kind.ADMIN}
    expected = {
        Requires.NOTHING: set(Kind),
        Requires.ANY: operators | {Kind.USER, Kind.REPLICA},
        Requires.REPLICA: operators | {Kind.REPLICA},
        Requires.ADMIN: operators,
    }
    assert kinds == expected.get(requires, operators | {Kind.USER})


def test_g10_where_nobody_has_looked_the_caller_is_nobody() -> None:
    """G10: a service that is reached past the door gives nothing away."""
    assert caller() is ANONYMOUS


# -- the door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", list(itertools.product([False, True], repeat=4)))
def test_g10_what_is_asked_of_a_peer(facts: tuple[bool, bool, bool, bool]) -> None:
    """G10: without TLS and accounts only this machine is let in; with either, everybody proves who it is."""
    unix, loopback, tls, accounts = facts
    found = door(unix=unix, loopback=loopback, tls=tls, accounts=accounts)
    table = {
        # (tls, accounts): what a peer on this machine is asked for, and one elsewhere
        (False, False): (Door.OPEN, Door.CLOSED),
        (False, True): (Door.PROOF, Door.PROOF),
        (True, False): (Door.PROOF, Door.PROOF),
        (True, True): (Door.PROOF, Door.PROOF),
    }
    here, elsewhere = table[tls, accounts]
    assert found is (Door.LOCAL if unix else here if loopback else elsewhere)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:1234", "127.0.0.1"),
        ("ipv6:%5B::1%5D:1234", "::1"),
        ("ipv6:[fe80::1%25eth0]:1234", "fe80::1%eth0"),
        ("unix:", "unix:"),
    ],
)
def test_the_host_of_a_peer(peer: str, host: str) -> None:
    """Attempts and calls are counted by host, whatever port they come from."""
    assert peer_host(peer) == host


# -- permissions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "holds", "not_"),
    [
        ("/inventory", ["/inventory"], ["/inventory/a", "/Inventory", "/inventor"]),
        ("/inventory/*", ["/inventory/a"], ["/inventory", "/inventory/a/b"]),
        ("/inventory/**", ["/inventory", "/inventory/a", "/inventory/a/b"], ["/inventory2", "/other"]),
        ("/*/public", ["/a/public"], ["/public", "/a/b/public"]),
        ("/*/**", ["/a", "/a/b"], []),
        ("/**", ["/a", "/a/b"], []),
    ],
)
def test_what_a_pattern_holds(pattern: str, holds: list[str], not_: list[str]) -> None:
    """``*`` is any one segment, ``**`` at the end any rest, also none."""
    check_pattern(pattern)
    assert all(matches(pattern, path) for path in holds)
    assert not any(matches(pattern, path) for path in not_)


@pytest.mark.parametrize(
    "pattern",
    ["", "inventory", "/", "/a//b", "/**/a", "/a*", "/~/a", "/a/../b", "/__system", "/a/__b/**", "/ä"],
)
def test_what_is_no_pattern(pattern: str) -> None:
    """A pattern that could mean something else than its author thinks is refused, and the system's realms with it."""
    with pytest.raises(UsageError):
        check_pattern(pattern)


_segments = st.sampled_from(["a", "b", "c-1", "d.e"])
_paths = st.lists(_segments, min_size=1, max_size=5).map(lambda segments: "/" + "/".join(segments))
_patterns = st.tuples(
    st.lists(st.one_of(_segments, st.just("*")), min_size=1, max_size=4), st.booleans()
).map(lambda parts: "/" + "/".join([*parts[0], *["**"] * parts[1]]))


@given(_patterns, _paths)
def test_patterns_agree_with_regular_expressions(pattern: str, path: str) -> None:
    """A pattern holds exactly the paths that its translation to a regular expression holds."""
    body = re.escape(pattern).replace(r"/\*\*", "(/.*)?").replace(r"\*", "[^/]+")
    assert matches(pattern, path) == (re.fullmatch(body, path) is not None)


@given(_paths)
def test_a_path_is_a_pattern_of_itself(path: str) -> None:
    """A path as pattern holds that path, and no other that is longer or shorter."""
    check_pattern(path)
    assert matches(path, path)
    assert not matches(path, f"{path}/x")


def test_a_tilde_is_the_caller_s_own_id() -> None:
    """A user's ``~`` is its own; who has no id keeps it as it is, and what only looks like it stays."""
    assert resolve_path(ANN, "/~/notes") == "/a1/notes"
    assert resolve_path(ANN, "/teams/~/x") == "/teams/a1/x"
    assert resolve_path(ANN, "/~x/notes") == "/~x/notes"
    for principal in (LOCAL, OPEN, ANONYMOUS):
        assert resolve_path(principal, "/~/notes") == "/~/notes"
    check_realm_path(resolve_path(ANN, "/~/notes"))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "~", "-a", "ä", "a" * 101, "a\n"])
def test_names_that_would_be_something_else_in_a_key(name: str) -> None:
    """A name is one segment of a key, and can be told from an option on a command line."""
    with pytest.raises(UsageError):
        check_name(name, "user")


def test_levels_hold_those_before_them() -> None:
    """Who may manage may write, and who may write may read."""
    assert Level.NONE < Level.READ < Level.WRITE < Level.MANAGE
    assert Level.parse("write") is Level.WRITE
    with pytest.raises(UsageError):
        Level.parse("none")
