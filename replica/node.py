"""A replica: keeps a copy, follows a primary with it, and takes the primary's part when told to."""

from __future__ import annotations

import asyncio
import time

from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import UnderstudyError, WrongRole
from understudy.common.metrics import EngineMetrics
from understudy.common.settings import ReplicaSettings, load_tls
from understudy.common.types import ClusterId
from understudy.common.version import VERSION
from understudy.replica.copy import Copy
from understudy.replica.follower import Follower
from understudy.replica.promote import Promotion
from understudy.replica.takeover import begin_reign
from understudy.v1 import admin_pb2


class ReplicaNode:
    """A replica's moving parts. Everything runs on the loop that :meth:`start` is called on."""

    def __init__(self, directory: DataDirectory, settings: ReplicaSettings, metrics: EngineMetrics) -> None:
        self.directory = directory
        self.tls = load_tls(settings)
        self.ended: asyncio.Future[UnderstudyError | None] = asyncio.get_running_loop().create_future()
        self._copy = Copy(directory, metrics, log_floor_bytes=settings.log_floor_bytes, on_end=self._end)
        self._follower = Follower(self._copy, settings, on_end=self._end)

    # -- life ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes a new directory ours, or checks that it is a replica's, and opens what copy it has.

        Raises:
            WrongRole: it is a primary's.
            CorruptionError, StorageFailed, DiskFull.
        """
        if self.directory.is_new:
            self.directory.begin(Role.REPLICA, ClusterId(b""))
        _check_role(self.directory)
        self._copy.open()

    def start(self) -> None:
        """Begins to follow."""
        self._copy.start()
        self._follower.start()

    async def close(self) -> None:
        """Stops following, writes what was received, and closes."""
        await self._follower.stop()
        await self._copy.close()

    @property
    def engine(self) -> Engine:
        """The engine of the copy.

        Raises:
            Unavailable: there is no copy yet.
        """
        return self._copy.engine

    def _end(self, error: UnderstudyError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    # -- promotion -----------------------------------------------------------------------------------------

    async def promote(self) -> Promotion:
        """Stops following, applies what was received, and begins a new epoch; :meth:`leave` or a primary follow.

        Raises:
            Unavailable: there is no copy yet.
        """
        started_s = time.monotonic()
        engine = self.engine
        try:
            await self._follower.stop()
            await self._copy.drain()
            return begin_reign(engine, started_s=started_s)
        except BaseException as error:
            self._promotion_failed(error)
            raise

    def _promotion_failed(self, error: BaseException) -> None:
        """Goes on as the replica that this still is; what is half promoted ends, and is promoted anew."""
        if self.directory.role is Role.REPLICA:
            self._follower.start()
        else:
            self._end(
                error if isinstance(error, UnderstudyError) else UnderstudyError("promotion was cut off")
            )

    def leave(self, error: UnderstudyError | None) -> None:
        """Ends the process after a promotion, or with what has befallen the primary that it became."""
        self._end(error)

    async def hand_over(self) -> Engine:
        """Gives the promoted copy's engine, at work, to the primary that goes on with it and closes it."""
        return await self._copy.hand_over()

    # -- status --------------------------------------------------------------------------------------------

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""
        worker = self.directory.backup_worker
        response = admin_pb2.StatusResponse(
            role=self.directory.role.value,
            cluster=self.directory.cluster,
            node=self.directory.node,
            upstream=self._follower.status(),
            warnings=self._warnings(),
            version=VERSION,
            backups=worker.statuses() if worker is not None else (),
        )
        engine = self._copy.opened
        if engine is not None:
            received = self._copy.submitted or engine.durable
            response.epoch = engine.epoch
            response.lsn = max(received.lsn, engine.durable.lsn)
            response.durable_lsn = engine.durable.lsn
            response.committed_lsn = engine.state.applied.lsn
            response.checkpoint_lsn = engine.checkpoint.lsn
            response.digest = engine.durable.digest
            response.realms = engine.state.user_realm_count
            if engine.state.epochs:
                response.proof.CopyFrom(engine.state.epochs[-1].proof)
        return response

    def _warnings(self) -> list[str]:
        engine, follower = self._copy.opened, self._follower
        found = list(engine.warnings) if engine else []
        if self.tls is not None:
            found += self.tls.warnings()
        if engine is not None and engine.disk_full:
            found.append(f"no space left in {self.directory.path}: nothing more is received")
        found += [f"not following: {problem}" for problem in follower.problems.values()]
        if follower.bootstrap_progress is not None:
            done, total = follower.bootstrap_progress
            found.append(f"bootstrapping: {done:,} of {total:,} bytes fetched")
        worker = self.directory.backup_worker
        return found + (worker.warnings() if worker is not None else [])


def _check_role(directory: DataDirectory) -> None:
    remedies: dict[Role, str] = {
        Role.PRIMARY: f"understudy primary --data-dir {directory.path}, or understudy rewind {directory.path} "
        "--to HOST:PORT",
        Role.FENCED: f"understudy rewind {directory.path} --to HOST:PORT",
        Role.PROMOTING: f"understudy promote {directory.path}",
        Role.CREATING: f"understudy primary --data-dir {directory.path}",
        Role.BACKUP: f"understudy primary --data-dir {directory.path}",
    }
    if directory.role in remedies:
        raise WrongRole(
            f"{directory.path} is not a replica's directory, its role is {directory.role.value}",
            remedy=f"run: {remedies[directory.role]}",
        )
