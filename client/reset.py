"""Client reset: a copy that is not on the server's history is given up, and what can be kept is kept.

In this order, so that it can be cut off anywhere and goes on when the directory is opened again: the attempt is
recorded; the copy, its queue with it, goes to ``recovered/``; the application is told; the server's state is loaded
beside; the queue is judged on top of it; the application is told; both change places in one local transaction; and
when upload and download are complete again, the record goes. A reset that leads to another one before that is not
tried again in the same way, so it can't loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from understudy.client import local_export, local_layout
from understudy.client.local_realm import LocalRealm
from understudy.client.open_realm import OpenRealm
from understudy.client.recovery import Known, RecoveryPlan, plan_recovery
from understudy.client.reset_table import Attempt, Refusal, choose, is_wanted, reason_name
from understudy.client.sync_port import Loaded, ResetRequired
from understudy.common.errors import ClientReset, UnderstudyError
from understudy.common.events import log
from understudy.common.types import new_id
from understudy.v1 import local_pb2, sync_pb2

_NAME_CHARACTERS_MAX = 128  # of a realm's path: file systems take 255 in all
_WHY_CHARACTERS_MAX = 500  # of an application's error: it may hold anything
_ALL = {"count_max": sys.maxsize, "bytes_max": sys.maxsize}


class CopyResetter:
    """Resets realms of one directory, on its thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept = directory / local_layout.RECOVERED
        # By path, what was begun since the realm was opened, and has not put another state in the copy's place.
        self._begun: dict[str, str] = {}

    def opened(self, realm: OpenRealm) -> None:
        """Gives up an attempt that was cut off, and that the present mode would not have made."""
        record = _copied(realm.realm.row.reset)
        self._begun.pop(realm.path, None)
        if record.attempted and not record.swapped and not is_wanted(realm.policy.mode, record.attempted):
            self._put_back(realm, record)

    def required(self, realm: OpenRealm, required: ResetRequired) -> bool:
        """The copy must be given up: whether that was begun. If not, the realm says why."""
        local, bound = realm.realm, required.bound
        record = _copied(local.row.reset)
        begun = self._begun.get(realm.path, "")
        # The connection was lost, and a server says again what the one before has said of the copy.
        goes_on = begun == record.attempted and not record.swapped and not required.fresh
        before = record.attempted if record.swapped else "" if goes_on else begun
        chosen = choose(realm.policy.mode, before, recovery_forbidden=bound.recovery_forbidden)
        _note_reason(record, bound)
        if required.tail_taken is not None:
            _log_tail(realm.path, required.tail_taken)
        if isinstance(chosen, Refusal):
            record.stopped = chosen.value
            if record.swapped:
                local.set_reset(record)
            else:
                self._put_back(realm, record)
            self._stop(realm, record, chosen.value)
            return False
        if goes_on and chosen.value == begun:
            local.set_reset(record)
            return True
        if record.swapped or not record.attempted:  # else the copy that was kept, or was about to be, will do
            record.kept, record.last_number = _name(realm.path), local.row.next_number - 1
        record.attempted, record.swapped, record.stopped = chosen.value, False, ""
        local.set_reset(record)
        return self._begin(realm, record)

    def _begin(self, realm: OpenRealm, record: local_pb2.ResetRecord) -> bool:
        log.warning(
            "client_reset",
            realm=realm.path,
            reason=reason_name(record.reason),
            attempt=record.attempted,
            kept=record.kept,
        )
        try:
            realm.realm.copy_to(self._kept / record.kept)
        except UnderstudyError as error:
            return self._give_up(realm, record, f"the copy could not be kept: {error}", error)
        before = realm.policy.before
        if before is not None:
            with realm.realm.view() as view:
                if not self._called(realm, record, "before_reset", lambda: before(view)):
                    return False
        self._begun[realm.path] = record.attempted
        return True

    def loaded(self, realm: OpenRealm, loaded: Loaded) -> bool:
        """The server's state has come: puts it in the copy's place; whether that was done."""
        local = realm.realm
        record = _copied(local.row.reset)
        plan = self._plan(local, record, loaded)
        after = realm.policy.after
        if after is not None:
            with local.view() as view, local.incoming_view() as fresh:
                if not self._called(realm, record, "after_reset", lambda: after(view, fresh, plan.report)):
                    return False
        record.swapped, record.last_number = True, plan.last_number
        local.swap_reset(plan.queue, record, replaced_to=plan.last_number)
        del self._begun[realm.path]
        log.info(
            "client_reset_done",
            realm=realm.path,
            version=local.row.copy.version,
            applied=plan.report.applied,
            dropped=plan.report.dropped,
        )
        return True

    def _plan(self, local: LocalRealm, record: local_pb2.ResetRecord, loaded: Loaded) -> RecoveryPlan:
        is_expired = record.reason == sync_pb2.CLIENT_EXPIRED
        known = Known(last_numbers=loaded.last_numbers, unsure_to=local.row.sent if is_expired else 0)
        # What was made since the copy was kept is in no copy, so it is not discarded.
        discard_to = record.last_number if record.attempted == Attempt.DISCARD.value else 0
        with local.incoming_view() as fresh:
            return plan_recovery(local.queued(0, **_ALL), fresh.get, known, discard_to=discard_to)

    def progressed(self, realm: OpenRealm, *, is_up_to_date: bool) -> None:
        """The copy or the queue has changed: a reset that has come to its end is forgotten."""
        if not is_up_to_date:
            return
        self._begun.pop(realm.path, None)
        row = realm.realm.row
        if not row.reset.swapped:
            return
        waiting = realm.realm.queued(0, count_max=1, bytes_max=1)
        if not waiting or waiting[0].number > row.reset.last_number:
            realm.realm.set_reset(None)

    # -- when it can't be ------------------------------------------------------------------------------------

    def _called(
        self, realm: OpenRealm, record: local_pb2.ResetRecord, name: str, callback: Callable[[], None]
    ) -> bool:
        """Runs an application's callback; an error in it leaves everything as it was."""
        try:
            callback()
        except (Exception, SystemExit) as error:  # to exit would end nothing but this thread
            log.error("callback_failed", realm=realm.path, callback=name, exc_info=error)
            return self._give_up(realm, record, f"{name} failed: {error!r}", error)
        return True

    def _give_up(
        self, realm: OpenRealm, record: local_pb2.ResetRecord, why: str, error: BaseException
    ) -> bool:
        self._begun.pop(realm.path, None)
        record.stopped = why[:_WHY_CHARACTERS_MAX]
        self._put_back(realm, record)
        self._stop(realm, record, why, error)
        return False

    def _put_back(self, realm: OpenRealm, record: local_pb2.ResetRecord) -> None:
        """Leaves everything as it was before the attempt, but for the reason why one is needed."""
        kept = record.kept
        realm.realm.drop_incoming()
        record.attempted, record.kept, record.last_number = "", "", 0
        realm.realm.set_reset(record)
        if kept:  # only now: until then, what is there counts as whole
            local_export.remove(self._kept / kept)

    def _stop(
        self, realm: OpenRealm, record: local_pb2.ResetRecord, why: str, error: BaseException | None = None
    ) -> None:
        reason = reason_name(record.reason)
        reset = ClientReset(
            f"{record.explanation or reason}: the local copy of {realm.path} must be given up, and {why}",
            remedy=f"understudy client reset {self._directory} {realm.path} --mode recover|discard --server HOST:PORT",
            reason=reason,
            realm=realm.path,
            common_version=record.common.version or None,
            path=str(self._directory),
        )
        reset.__cause__ = error
        realm.reset = reset
        realm.tell(reset)


def _copied(record: local_pb2.ResetRecord) -> local_pb2.ResetRecord:
    copy = local_pb2.ResetRecord()
    copy.CopyFrom(record)
    return copy


def _log_tail(path: str, taken: sync_pb2.Homecoming) -> None:
    """What became of confirmed changes that the server had lost: those that it refused are only in the kept copy."""
    (log.warning if taken.refused else log.info)(
        "client_reset_tail",
        realm=path,
        renewed=taken.renewed,
        known=taken.known,
        refused=taken.refused,
        problems=list(taken.problems),
    )


def _note_reason(record: local_pb2.ResetRecord, bound: sync_pb2.RealmBound) -> None:
    record.reason, record.explanation = bound.reason, bound.explanation
    record.ClearField("common")
    if bound.HasField("common"):
        record.common.CopyFrom(bound.common)


def _name(path: str) -> str:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = path.strip("/").replace("/", "_")[:_NAME_CHARACTERS_MAX]
    return f"{name}-{now}-{new_id().hex()[:8]}"
