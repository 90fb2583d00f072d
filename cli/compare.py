"""Compares two running nodes by digests that each recomputes from all that it holds."""

from __future__ import annotations

from dataclasses import dataclass

import grpc.aio

from understudy.cli.histories import Standing, check_related, diverged
from understudy.cli.output import counted
from understudy.common.addresses import split_address
from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.directory import Role
from understudy.common.errors import ProtocolError, Unavailable
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.types import Digest, Lsn
from understudy.v1 import admin_pb2, admin_pb2_grpc

SCAN_S_MAX = 3600.0  # a full scan of everything that a node holds
_STATUS_S_MAX = 30.0
# Checkpoints go on meanwhile, and a node answers for its latest. Each round asks for the later of the two.
ROUNDS_MAX = 5
_NAMED_REALMS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out at one LSN."""

    lsn: Lsn
    digest: Digest  # the first node's
    realms: int
    entries: int
    problems: list[str]


async def compare_servers(server: str, against: str, credentials: Credentials = ANONYMOUS) -> Comparison:
    """Compares log digest and state digests, combined and of each realm, at one LSN.

    A primary is asked for a fresh checkpoint first, so that all that it has committed is compared.

    Raises:
        UsageError: a bad address, or one primary by two.
        ForeignCluster: they have nothing to do with each other.
        Diverged: each has entries that the other lacks.
        ResetNeeded: both are primaries.
        PeerUnreachable, ProtocolError: of either.
        Unavailable: they did not come to answer for the same LSN.
    """
    for address in (server, against):
        split_address(address)
    async with open_channel(server, credentials) as one, open_channel(against, credentials) as other:
        first, second = _Node(server, one), _Node(against, other)
        ours, theirs = await first.status(), await second.status()
        standings = Standing(server, ours), Standing(against, theirs)
        check_related(*standings)
        lsn = await _checkpoint((first, ours), (second, theirs))
        for _ in range(ROUNDS_MAX):
            left = await first.digests(lsn)
            right = await second.digests(left.lsn)
            if left.lsn == right.lsn:
                if left.digest != right.digest:
                    raise diverged(*standings)
                return _compared(server, left, against, right)
            lsn = right.lsn
    raise Unavailable(
        f"{server} and {against} never stood at the same checkpoint, the last ones were {left.lsn} and {right.lsn}",
        remedy="try again when less is written",
    )


class _Node:
    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self._stub = admin_pb2_grpc.AdminStub(channel)

    async def status(self) -> admin_pb2.StatusResponse:
        with peer_errors(self.address):
            return await self._stub.Status(admin_pb2.StatusRequest(), timeout=_STATUS_S_MAX)

    async def digests(self, at_least_lsn: int, *, checkpoint: bool = False) -> admin_pb2.StateDigestsResponse:
        request = admin_pb2.StateDigestsRequest(at_least_lsn=at_least_lsn, checkpoint=checkpoint)
        try:
            with peer_errors(self.address):
                response = await self._stub.StateDigests(request, timeout=SCAN_S_MAX)
        except Unavailable as refused:
            raise Unavailable(
                f"{self.address} can't be compared now: {refused}", remedy="try again once it has caught up"
            ) from None
        if response.lsn < at_least_lsn:
            raise ProtocolError(
                f"{self.address} was asked for LSN {at_least_lsn} and answered for {response.lsn}"
            )
        return response


async def _checkpoint(*nodes: tuple[_Node, admin_pb2.StatusResponse]) -> int:
    """The LSN of a checkpoint that the primary among the nodes has just taken; of the later one if there is none."""
    lsn = max(status.checkpoint_lsn for _, status in nodes)
    for node, status in nodes:
        if status.role == Role.PRIMARY:
            return (await node.digests(lsn, checkpoint=True)).lsn
    return lsn


def _compared(
    server: str, left: admin_pb2.StateDigestsResponse, against: str, right: admin_pb2.StateDigestsResponse
) -> Comparison:
    problems = [f"{server}: {problem}" for problem in left.problems]
    problems += [f"{against}: {problem}" for problem in right.problems]
    differing = _differing_realms(left, right)
    problems += [f"realm {path} differs: {how}" for path, how in differing[:_NAMED_REALMS_MAX]]
    if len(differing) > _NAMED_REALMS_MAX:
        problems.append(f"{len(differing) - _NAMED_REALMS_MAX} more realms differ")
    if left.state_digest != right.state_digest or differing:
        problems.append(
            f"at LSN {left.lsn} the state of {server} has digest {left.state_digest.hex()}, that of {against} has "
            f"{right.state_digest.hex()} (stop each and run `understudy verify DIR` to find out which is damaged, then "
            "let that one bootstrap again)"
        )
    return Comparison(
        lsn=Lsn(left.lsn),
        digest=Digest(left.digest),
        realms=len(left.realms),
        entries=sum(realm.entries for realm in left.realms),
        problems=problems,
    )


def _differing_realms(
    left: admin_pb2.StateDigestsResponse, right: admin_pb2.StateDigestsResponse
) -> list[tuple[str, str]]:
    ours = {realm.realm: realm for realm in left.realms}
    theirs = {realm.realm: realm for realm in right.realms}
    found = []
    for path in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(path), theirs.get(path)
        if one is None or other is None:
            found.append((path, "only one of them has it"))
        elif (one.version, one.entries, one.state_digest) != (
            other.version,
            other.entries,
            other.state_digest,
        ):
            found.append(
                (
                    path,
                    f"version {one.version} with {counted(one.entries, 'entry', 'entries')}, digest "
                    f"{one.state_digest.hex()}, against version {other.version} with "
                    f"{counted(other.entries, 'entry', 'entries')}, digest {other.state_digest.hex()}",
                )
            )
    return found
