"""Whom a client talks to: the addresses that it was given, and which reign it has met at which of them.

An old primary that does not know yet that its reign is over would take writes, too. So a client with several
addresses asks all, shows the latest epoch's proof to who is behind (G7), and binds to who reigns in it. Two
primaries that began the same epoch, each with its own history, are split brain: then it binds to neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.directory import Role
from understudy.common.errors import (
    Diverged,
    Fenced,
    ForeignCluster,
    ProtocolError,
    Unavailable,
    UnderstudyError,
)
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.types import new_id
from understudy.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    data_pb2,
    data_pb2_grpc,
    local_pb2,
    replication_pb2,
    sync_pb2,
    sync_pb2_grpc,
)

Stream = grpc.aio.StreamStreamCall[data_pb2.CommitRequest, data_pb2.CommitResponse]
SyncStream = grpc.aio.StreamStreamCall[sync_pb2.SyncRequest, sync_pb2.SyncResponse]

_SURVEY_S_MAX = 1.0  # an address that does not answer must not keep us from one that does


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """What a server says of itself; ``proof`` is the entry that began the epoch."""

    address: str
    cluster: bytes
    epoch: int
    proof: bytes
    reigns: bool = True


class Peers:
    """The servers at some addresses, and the highest epoch met there.

    Attributes:
        current: index of the address last found to be right.
        last_error: of the last attempt that failed since one succeeded.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        met: local_pb2.LocalDirectory | None = None,
        credentials: Credentials = ANONYMOUS,
    ) -> None:
        self.addresses = addresses
        self.current = 0
        self.last_error: UnderstudyError | None = None
        self._channels = {address: open_channel(address, credentials) for address in addresses}
        self._client = new_id()
        met = met or local_pb2.LocalDirectory()
        # The highest epoch, whoever told.
        self._met = _Claim(address="", cluster=met.cluster, epoch=met.epoch, proof=met.proof.entry)
        self._reign: _Claim | None = None  # the primary that we were last bound to

    @property
    def is_one(self) -> bool:
        """Whether there is but one address, and nobody else to turn to."""
        return len(self.addresses) == 1

    async def close(self) -> None:
        """Closes all connections."""
        for channel in self._channels.values():
            await channel.close()

    def data(self, address: str) -> data_pb2_grpc.DataAsyncStub:
        """Transactions and reads at ``address``."""
        return data_pb2_grpc.DataStub(self._channels[address])

    def admin(self, address: str) -> admin_pb2_grpc.AdminAsyncStub:
        """Status at ``address``."""
        return admin_pb2_grpc.AdminStub(self._channels[address])

    def sync(self, address: str) -> sync_pb2_grpc.SyncAsyncStub:
        """Synced realms at ``address``."""
        return sync_pb2_grpc.SyncStub(self._channels[address])

    # -- whom to try -----------------------------------------------------------------------------------------

    async def in_order(self) -> list[int]:
        """Which addresses to try, the primary of the highest epoch first.

        Raises:
            Diverged: two primaries began the same epoch.
            ForeignCluster: the addresses are of several clusters.
        """
        if self.is_one:
            return [0]
        answers = await asyncio.gather(*(self._survey(address) for address in self.addresses))
        claims = [answer for answer in answers if answer is not None]
        _check_one_cluster(claims)
        highest = max(claims, key=lambda claim: (claim.epoch, claim.reigns), default=None)
        if highest is not None:
            self._learn(highest)
        stale = [claim for claim in claims if claim.reigns and claim.epoch < self._met.epoch]
        await asyncio.gather(*(self._show_epoch(claim.address) for claim in stale))
        self._check_one_reign([claim for claim in claims if claim.reigns])

        def rank(index: int) -> tuple[bool, int]:
            answer = answers[index]
            reigns = answer is not None and answer.reigns and answer not in stale
            return (not reigns, (index - self.current) % len(self.addresses))

        return sorted(range(len(self.addresses)), key=rank)

    async def _survey(self, address: str) -> _Claim | None:
        try:
            with peer_errors(address):
                answer = await self.admin(address).Status(admin_pb2.StatusRequest(), timeout=_SURVEY_S_MAX)
        except UnderstudyError:
            return None
        return _Claim(
            address=address,
            cluster=answer.cluster,
            epoch=answer.epoch,
            proof=answer.proof.entry,
            reigns=answer.role == Role.PRIMARY,
        )

    def _learn(self, claim: _Claim) -> None:
        if claim.epoch > self._met.epoch and self._met.cluster in (b"", claim.cluster):
            self._met = claim

    def _check_one_reign(self, primaries: Sequence[_Claim]) -> None:
        """Refuses to choose between two primaries of one epoch, one of which may be whom we were bound to.

        Both were promoted from copies of the same primary, and what each acknowledged since, the other lacks.
        """
        known = primaries if self._reign is None else [self._reign, *primaries]
        rivals = [
            claim for claim in known if (claim.cluster, claim.epoch) == (self._met.cluster, self._met.epoch)
        ]
        for other in rivals[1:]:
            if other.proof != rivals[0].proof:
                raise Diverged(
                    f"split brain: epoch {other.epoch} was begun twice, by the primary at {rivals[0].address} "
                    f"and by the one at {other.address}, and each has a history of its own",
                    remedy="fence one: stop it, make it a replica of the other with "
                    "`understudy rewind DIR --to HOST:PORT`, and connect anew",
                )

    async def _show_epoch(self, address: str) -> None:
        call = self.data(address).Commit(timeout=_SURVEY_S_MAX)
        try:
            with peer_errors(address):
                await self.bind(address, call)
        except UnderstudyError as error:
            self.last_error = kept(error)
        finally:
            call.cancel()

    # -- binding ---------------------------------------------------------------------------------------------

    async def bind(self, address: str, call: Stream) -> None:
        """Says who we are and what we have met, and hears whom we talk to.

        Raises:
            Fenced: a reign that is over.
            Diverged: another primary than the one we were bound to, in the same epoch.
            UnderstudyError, grpc.aio.AioRpcError: why we were not taken.
        """
        bind = data_pb2.Bind(client=self._client)
        self.introduce(bind)
        await call.write(data_pb2.CommitRequest(bind=bind))
        answer = await call.read()
        if not isinstance(answer, data_pb2.CommitResponse):
            raise await stream_end(call)
        if answer.WhichOneof("message") != "bound":
            raise ProtocolError(f"{address} did not answer the bind")
        self.accept(address, answer.bound)

    def introduce(self, hello: data_pb2.Bind | sync_pb2.SyncHello) -> None:
        """Adds what we speak and what we have met to the first message of a stream."""
        hello.protocol_version = PROTOCOL_VERSION
        hello.cluster = self._met.cluster
        hello.epoch = self._met.epoch
        hello.proof.entry = self._met.proof

    def accept(self, address: str, answer: data_pb2.Bound | sync_pb2.SyncWelcome) -> None:
        """Checks whom we talk to, and remembers it.

        A server of another cluster than the one met takes synced clients, too, and tells for each realm what becomes
        of their copy; from then on it is that cluster whose epochs count.

        Raises:
            Fenced: a reign that is over.
            Diverged: another primary than the one we were bound to, in the same epoch.
        """
        claim = _Claim(address=address, cluster=answer.cluster, epoch=answer.epoch, proof=answer.proof.entry)
        if self._met.cluster not in (b"", claim.cluster):
            self._met, self._reign = claim, None
        if claim.epoch < self._met.epoch:
            raise Fenced(f"{address} is in epoch {claim.epoch}, this client has met epoch {self._met.epoch}")
        self._learn(claim)
        self._check_one_reign([claim])
        self._reign = claim

    @property
    def met(self) -> local_pb2.LocalDirectory:
        """Cluster, highest epoch met there, and the proof of that epoch."""
        proof = replication_pb2.EpochProof(entry=self._met.proof)
        return local_pb2.LocalDirectory(cluster=self._met.cluster, epoch=self._met.epoch, proof=proof)


def _check_one_cluster(claims: Sequence[_Claim]) -> None:
    """Refuses to choose between clusters: one of the addresses must be wrong."""
    named = [claim for claim in claims if claim.cluster]  # a replica without a copy has none yet
    for other in named[1:]:
        if other.cluster != named[0].cluster:
            raise ForeignCluster(
                f"{named[0].address} and {other.address} are of different clusters",
                remedy="give the addresses of one cluster",
            )


def kept(error: UnderstudyError) -> UnderstudyError:
    """``error``, to be kept: without the frames that it came through, for these hold the call.

    While somebody holds a call, gRPC goes on connecting to where it went, also after its channel was closed.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


async def stream_end(call: Stream | SyncStream) -> UnderstudyError | grpc.aio.AioRpcError:
    """The error for a stream that ended; a server that is stopped ends it without one."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Unavailable("the server has ended the stream")
    return grpc.aio.AioRpcError(
        code,
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
