"""One realm on a sync stream: what answers, changes and pages of the server mean for the local copy. Pure.

::

    UNBOUND --bind--> BINDING --STREAM--> STREAMING
                         |----LOAD------> LOADING --last page--> STREAMING
                         |----HEAL------> HEALING (the tail is sent) --another answer--> as from BINDING
                         '----RESET-----> STOPPED, perhaps by way of PARTING (the tail is sent) --tail taken-->
    STREAMING, LOADING --LOAD or RESET--> as from BINDING
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from understudy.client.local_types import Applied, ForeignChange, Received
from understudy.client.realm_binding import Phase, RealmBinding
from understudy.client.sync_messages import Connection, Message, check_head, last_numbers, received_changes
from understudy.client.sync_port import (
    Action,
    CaughtUp,
    HeadKnown,
    Loaded,
    Progress,
    RealmChanged,
    RealmError,
    ResetRequired,
    Uploaded,
)
from understudy.client.uploading import TailSender, UnknownClient, Uploader
from understudy.common.errors import ProtocolError, Unavailable, from_code
from understudy.v1 import sync_pb2


class RealmSession(RealmBinding):
    """A realm that is open; bound at most once at a time."""

    # -- what comes ----------------------------------------------------------------------------------------------

    def on_message(self, message: Message, *, now_s: float) -> list[Action]:
        """A message for this binding has come.

        Raises:
            ProtocolError: it can't be, here and now.
        """
        match message:
            case sync_pb2.RealmBound():
                return self._on_bound(message)
            case sync_pb2.Changes():
                return self._on_changes(message)
            case sync_pb2.StatePage():
                return self._on_page(message)
            case sync_pb2.Refusals():
                return self._on_refusals(message, now_s)
            case sync_pb2.Safe():
                self._expect(message, Phase.STREAMING, Phase.LOADING)
                self._realm.set_safe(message.safe_version)
                return []
            case sync_pb2.TailTaken():
                return self._on_tail_taken(message)
            case sync_pb2.RealmFailed():
                return self._on_failed(message, now_s)

    def _on_bound(self, bound: sync_pb2.RealmBound) -> list[Action]:
        if bound.decision in (sync_pb2.SYNC_LOAD, sync_pb2.SYNC_RESET):
            # Also where we have fallen too far behind, or the realm was dropped.
            self._expect(bound, Phase.BINDING, Phase.HEALING, Phase.STREAMING, Phase.LOADING)
        else:
            self._expect(bound, Phase.BINDING, Phase.HEALING)
        self._bound, self.head_version = bound, bound.head.version
        self._uploader, self._realm.is_sending = None, False
        # A reset may come of our silence, and must not end it; what else is written notes contact with it.
        if bound.decision == sync_pb2.SYNC_HEAL or bound.resumed:
            self._realm.touch(bound.time_us)
        self._backoff.reset()
        match bound.decision:
            case sync_pb2.SYNC_STREAM:
                return self._stream(bound)
            case sync_pb2.SYNC_LOAD:
                return self._load(bound)
            case sync_pb2.SYNC_HEAL:
                return self._send_tail(Phase.HEALING)
            case sync_pb2.SYNC_RESET:
                return self._send_tail(Phase.PARTING) if bound.tail_from else self._stop_for_reset()
        raise ProtocolError(f"unknown decision {bound.decision} about {self.path}")

    def _stream(self, bound: sync_pb2.RealmBound) -> list[Action]:
        numbers = last_numbers(bound.last_numbers, self._clients)
        if (foreign := self._shared_id(numbers)) is not None:
            # What is queued may be among what the server has: that shows as it comes.
            return [*self._take_new_id(foreign), *self._rebind()]
        if self._fresh:
            return [*self._head_known(), *self._load_nothing(bound, numbers)]
        check_head(bound, self._realm)
        if self._is_beside:
            self._realm.drop_incoming()  # the copy will do
        self._realm.note_bound(bound, cluster=self._cluster)
        self._forget_reset()
        self._start_uploader(numbers)
        self.phase = Phase.STREAMING
        return [*self._head_known(), *self._go_on()]

    def _load_nothing(self, bound: sync_pb2.RealmBound, numbers: Mapping[bytes, int]) -> list[Action]:
        """A reset wants the state of a realm that does not exist (yet): it is empty."""
        self._realm.begin_load(bound, cluster=self._cluster)
        page = sync_pb2.StatePage(position=bound.head, realm_id=bound.realm_id, last=True)
        self._realm.load_page(page, epoch=bound.epoch)
        return self._loaded_fresh(numbers)

    def _load(self, bound: sync_pb2.RealmBound) -> list[Action]:
        numbers = last_numbers(bound.last_numbers, self._clients)
        if (foreign := self._shared_id(numbers)) is not None:
            foreign.last = numbers[foreign.client]  # no changes come that would tell
            return [*self._take_new_id(foreign), *self._rebind()]
        if not bound.resumed:
            self._realm.begin_load(bound, cluster=self._cluster)
        elif not self._resumable:
            raise ProtocolError(f"the server would go on with a state of {self.path} that was never begun")
        self._resumable = False
        self._forget_reset()
        self.phase = Phase.LOADING
        return [*self._head_known(), Progress(path=self.path)]

    def _head_known(self) -> list[Action]:
        return [HeadKnown(path=self.path, ticket=self._ticket, version=self._bound.head.version)]

    def _forget_reset(self) -> None:
        """The server takes the copy again: a reset that was needed, and has not replaced it yet, is not."""
        row = self._realm.row
        if row.HasField("reset") and not row.reset.swapped and not self._fresh:
            self._realm.set_reset(None)

    # -- downloading ---------------------------------------------------------------------------------------------

    def _on_changes(self, changes: sync_pb2.Changes) -> list[Action]:
        self._expect(changes, Phase.STREAMING, Phase.LOADING)
        received = received_changes(changes)
        self.head_version = max(self.head_version, changes.head_version)
        if not received:
            self._realm.set_safe(changes.safe_version)
            return self._go_on()
        self._note_realm(changes.realm_id)
        try:
            applied = self._apply(received, changes)
        except ForeignChange:
            return [*self._apply_one_by_one(received, changes), *self._rebind()]
        if self._is_beside:
            return [Progress(path=self.path)]
        own = [change.number for change in applied if change.own]
        if own and self._uploader is not None:
            self._uploader.confirmed(own[-1])
        actions: list[Action] = [RealmChanged(path=self.path, applied=applied)]
        if own and not self._realm.row.queue_count:
            actions.append(Uploaded(path=self.path))
        return [*actions, *self._go_on()]

    def _apply(self, received: Sequence[Received], changes: sync_pb2.Changes) -> list[Applied]:
        return self._realm.apply(
            received,
            lsn=changes.lsn,
            epoch=self._bound.epoch,
            time_us=changes.time_us,
            safe_version=changes.safe_version,
        )

    def _apply_one_by_one(self, received: Sequence[Received], changes: sync_pb2.Changes) -> list[Action]:
        """Only what is surely somebody else's gives ours another name: the rest may be applied, and would be twice."""
        actions: list[Action] = []
        applied: list[Applied] = []
        for one in received:
            try:
                applied += self._apply([one], changes)
            except ForeignChange as foreign:
                actions += self._take_new_id(foreign)
                applied += self._apply([one], changes)
        return [*actions, RealmChanged(path=self.path, applied=[] if self._is_beside else applied)]

    def _note_realm(self, realm_id: int) -> None:
        """A realm that was bound before there was one has come into being: without its id it would pass for gone."""
        if realm_id and not self._is_beside and not self._realm.row.copy.realm_id:
            self._bound.realm_id = realm_id
            self._realm.note_bound(self._bound, cluster=self._cluster)

    @property
    def is_up_to_date(self) -> bool:
        """Whether the copy is where the server was when it spoke last."""
        return self.phase is Phase.STREAMING and not self._is_beside and self._caught_up

    @property
    def _is_beside(self) -> bool:
        """Whether what comes goes into another copy than the one that reads see."""
        return self._realm.row.incoming.id != 0

    def _on_page(self, page: sync_pb2.StatePage) -> list[Action]:
        self._expect(page, Phase.LOADING)
        progress: list[Action] = [Progress(path=self.path)]
        if page.last and not self._fresh:
            return [*progress, *self._finish(page)]
        self._realm.load_page(page, epoch=self._bound.epoch)
        if not page.last:
            return progress
        return [*progress, *self._loaded_fresh(last_numbers(page.last_numbers, self._clients))]

    def _loaded_fresh(self, numbers: Mapping[bytes, int]) -> list[Action]:
        """The state is here, beside the copy: changes go on into it, and it is the reset's turn."""
        self.phase = Phase.STREAMING
        return [Loaded(path=self.path, last_numbers=numbers, fresh=True)]

    def _finish(self, page: sync_pb2.StatePage) -> list[Action]:
        """The state is here, in the copy's place."""
        numbers = last_numbers(page.last_numbers, self._clients)
        had_queue = self._realm.row.queue_count > 0
        try:
            self._realm.finish_load(page, numbers, epoch=self._bound.epoch)
        except ForeignChange as foreign:
            return [*self._take_new_id(foreign), *self._rebind()]
        self.phase = Phase.STREAMING
        actions: list[Action] = [Loaded(path=self.path, last_numbers=numbers, fresh=False)]
        if had_queue and not self._realm.row.queue_count:
            actions.append(Uploaded(path=self.path))
        self._start_uploader(numbers)
        return [*actions, *self._go_on()]

    # -- what goes -----------------------------------------------------------------------------------------------

    def _start_uploader(self, numbers: Mapping[bytes, int]) -> None:
        self._uploader = Uploader(
            self._realm, ref=self._ref, last_numbers=numbers, may_write=self._bound.may_write
        )

    def _go_on(self) -> list[Action]:
        """What can be done as far as the copy has come by now."""
        if self.phase is not Phase.STREAMING or self._is_beside:
            return []
        if self.asked > self._ticket:
            return self._rebind()
        actions: list[Action] = []
        if not self._caught_up and self._realm.row.copy.version >= self.head_version:
            actions.append(CaughtUp(path=self.path))
        self._caught_up = self._realm.row.copy.version >= self.head_version
        return [*actions, *self.pump()]

    def pump(self) -> list[Action]:
        """Sends what there is to send, as far as there is room."""
        connection = self._connection
        actions: list[Action] = []
        if connection is None:
            return []
        while self._tail is not None and connection.has_room and (tail := self._tail.next()) is not None:
            actions.append(connection.send(sync_pb2.SyncRequest(tail=tail)))
        return [*actions, *self._pump_uploads(connection)]

    def _pump_uploads(self, connection: Connection) -> list[Action]:
        uploader = self._uploader
        # Only then is every own change that the server had known to us as such.
        is_ready = self.phase is Phase.STREAMING and self._realm.row.copy.version >= self._bound.head.version
        if uploader is None or self._is_beside or not is_ready:
            return []
        actions: list[Action] = []
        error = uploader.error
        try:
            while connection.has_room and (upload := uploader.next()) is not None:
                actions.append(connection.send(sync_pb2.SyncRequest(upload=upload)))
        except UnknownClient:
            actions += self._rebind()
        except ForeignChange as foreign:
            actions += [*self._take_new_id(foreign), *self._rebind()]
        else:
            self._realm.is_sending = connection.has_room and uploader.has_room
        if uploader.error is not error and uploader.error is not None:
            actions.append(RealmError(path=self.path, error=uploader.error))
        return actions

    def _on_refusals(self, refusals: sync_pb2.Refusals, now_s: float) -> list[Action]:
        self._expect(refusals, Phase.STREAMING)
        uploader = self._uploader
        if uploader is None or uploader.error is not None:
            return []
        uploader.refused(refusals.client, refusals.refusals, now_s=now_s)
        self._realm.is_sending = uploader.has_room
        if uploader.error is not None:
            return [RealmError(path=self.path, error=uploader.error)]
        return [] if self._realm.row.queue_count else [Uploaded(path=self.path)]

    # -- the tail, and the end -----------------------------------------------------------------------------------

    def _send_tail(self, phase: Phase) -> list[Action]:
        self._tail = TailSender(self._realm, ref=self._ref, from_version=self._bound.tail_from)
        self.phase = phase
        return self.pump()

    def _on_tail_taken(self, taken: sync_pb2.TailTaken) -> list[Action]:
        self._expect(taken, Phase.HEALING, Phase.PARTING)
        self._tail, self._tail_taken = None, taken.homecoming
        return self._stop_for_reset() if self.phase is Phase.PARTING else []

    def _stop_for_reset(self) -> list[Action]:
        self.phase = Phase.STOPPED
        return [
            ResetRequired(path=self.path, bound=self._bound, tail_taken=self._tail_taken, fresh=self._fresh)
        ]

    def _on_failed(self, failed: sync_pb2.RealmFailed, now_s: float) -> list[Action]:
        if self._connection is not None:
            del self._connection.refs[self._ref]
        error = from_code(failed.code, failed.message, failed.remedy)
        self.phase = Phase.STOPPED
        if isinstance(error, Unavailable):
            self.phase, self.retry_at_s = Phase.UNBOUND, now_s + self._backoff.next_s(0.5)
        return [RealmError(path=self.path, error=error)]

    # -- time ----------------------------------------------------------------------------------------------------

    @property
    def next_tick_s(self) -> float | None:
        """When :meth:`tick` has something to do."""
        upload_s = self._uploader.retry_at_s if self._uploader is not None else None
        return min((at_s for at_s in (self.retry_at_s, upload_s) if at_s is not None), default=None)

    def tick(self, *, now_s: float) -> list[Action]:
        """Time has passed."""
        if self.retry_at_s is not None and now_s >= self.retry_at_s:
            return self._rebind()
        if self._uploader is not None:
            self._uploader.tick(now_s=now_s)
        return self.pump()
