"""One client's directory that syncs: what to answer its binds, and what to send it next. Pure; its shell does the rest.

Nothing is queued for a client but one answer a message of its own: what it has not been sent is read from history
when there is room to send it. So a slow client costs a cursor a realm, however much happens meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from understudy.common.errors import Overloaded, ProtocolError, UnderstudyError
from understudy.common.realm_relation import OurRealm, find_facts, last_common
from understudy.common.sync_table import HEAL, LOAD, RESET, STREAM, Cluster, Realm, Reason, SyncFacts, decide
from understudy.primary.incoming_tails import IncomingTails
from understudy.primary.sync_bind import can_resume, check_bind, explain, our_realm, undecided
from understudy.primary.sync_host import Head, Host
from understudy.primary.sync_load import Loading
from understudy.primary.sync_safe import find_safe_version
from understudy.primary.sync_uploads import Uploads
from understudy.v1 import sync_pb2

BINDINGS_MAX = 1_000  # realms of one directory: each costs a cursor, and an answer with its locator
CHANGES_MAX = 1_000  # in a message
CHANGES_BYTES_MAX = 256 << 10
ANSWERS_MAX = 64  # that wait for the client to read: until then, nothing more that it says is listened to


@dataclass(frozen=True, slots=True, kw_only=True)
class TailHome:
    """A tail has arrived: take it in, and say :meth:`SyncSession.on_tail_taken` when that is committed."""

    ref: int
    path: str
    changes: list[tuple[bytes, bytes]]
    may_renew: bool


@dataclass(slots=True)
class _Binding:
    """A realm bound. ``version`` is what the client has been sent: it gets what follows, in order."""

    ref: int
    bind: sync_pb2.BindRealm
    path: str
    realm_id: int = 0
    version: int = 0
    told_safe: int = 0
    safe_sought: tuple[int, int] = (0, 0)  # safe LSN and version when the safe version was looked for last
    streams: bool = False
    loading: Loading | None = None
    heals: bool = False  # another answer follows the tail
    uploads: Uploads = field(default_factory=Uploads)


class SyncSession:
    """The server's side of a ``Sync``, from behind the hello on.

    ``is_busy``: what is to be sent next needs longer than anybody should have to wait; ask for it again.
    """

    def __init__(self, host: Host) -> None:
        self.is_busy = False
        self._host = host
        self._bindings: dict[int, _Binding] = {}
        self._followed: dict[str, set[int]] = {}
        self._last_ref = 0
        self._answers: deque[sync_pb2.SyncResponse] = deque()
        self._ready: OrderedDict[int, None] = OrderedDict()
        self._tails = IncomingTails(host.tail_room)
        self._undecided: OrderedDict[int, None] = OrderedDict()  # bindings whose tail must wait for its turn

    @property
    def has_room(self) -> bool:
        """Whether more should be received now: not while its answers are left unread."""
        return len(self._answers) < ANSWERS_MAX

    def close(self) -> None:
        """Lets go of everything."""
        self._undecided.clear()
        for ref in list(self._bindings):
            self._unbind(ref)
        self._tails.close()

    # -- what the client says --------------------------------------------------------------------------------

    def receive(self, message: sync_pb2.SyncRequest) -> TailHome | None:
        """Takes a message in; :meth:`next_message` has what is to be said to it.

        Raises:
            ProtocolError: it must not be sent, or not now.
        """
        kind = message.WhichOneof("message")
        if kind == "bind":
            self._bind(message.bind)
        elif kind == "unbind":
            self._unbind(message.unbind.ref)
        elif kind == "upload":
            self._upload(message.upload)
        elif kind == "tail":
            return self._take_tail(message.tail)
        else:
            raise ProtocolError(f"a message of kind {kind} after the first")
        return None

    def _bind(self, bind: sync_pb2.BindRealm) -> None:
        check_bind(bind)
        if bind.ref <= self._last_ref:
            raise ProtocolError(f"binding {bind.ref} comes after {self._last_ref}")
        self._last_ref = bind.ref
        try:
            if len(self._bindings) >= BINDINGS_MAX:
                raise Overloaded(
                    f"{BINDINGS_MAX} realms are bound already", remedy="use another directory for more"
                )
            path = self._host.resolve(bind.path)
        except UnderstudyError as error:
            self._fail(bind.ref, error)
            return
        binding = _Binding(ref=bind.ref, bind=bind, path=path)
        self._bindings[bind.ref] = binding
        self._followed.setdefault(path, set()).add(bind.ref)
        self._host.follow(path)
        self._decide(binding)

    def _unbind(self, ref: int) -> None:
        binding = self._bindings.pop(ref, None)
        if binding is None:
            return
        if binding.loading is not None:
            binding.loading.close()
        self._ready.pop(ref, None)
        self._undecided.pop(ref, None)
        self._tails.give_up(ref)
        self._decide_waiting()
        refs = self._followed[binding.path]
        refs.discard(ref)
        if not refs:
            del self._followed[binding.path]
            self._host.unfollow(binding.path)

    def _fail(self, ref: int, error: UnderstudyError) -> None:
        self._unbind(ref)
        failed = sync_pb2.RealmFailed(ref=ref, code=error.code, message=error.message, remedy=error.remedy)
        self._answers.append(sync_pb2.SyncResponse(failed=failed))

    def _upload(self, upload: sync_pb2.Upload) -> None:
        binding = self._bindings.get(upload.ref)
        if binding is None or not self._is_live(binding):
            return  # ended meanwhile, and the client will hear of it
        if upload.client not in binding.bind.clients:
            raise ProtocolError("an upload under an id that its bind does not name")
        refusals = sync_pb2.Refusals(ref=upload.ref, client=upload.client)
        for transaction in upload.transactions:
            transaction.realm = binding.path
            try:
                binding.uploads.submit(self._host, upload.client, transaction)
            except UnderstudyError as error:
                refusals.refusals.add(
                    number=transaction.number, code=error.code, message=error.message, remedy=error.remedy
                )
        if refusals.refusals:
            self._answers.append(sync_pb2.SyncResponse(refusals=refusals))

    def _is_live(self, binding: _Binding) -> bool:
        """Whether the client follows the realm that is there."""
        return binding.streams and (not binding.realm_id or self._is_here(binding))

    def _is_here(self, binding: _Binding) -> bool:
        head = self._host.state.realm(binding.path)
        return head is not None and head.id == binding.realm_id

    # -- deciding --------------------------------------------------------------------------------------------

    def _decide(self, binding: _Binding) -> None:
        """Answers the bind, and begins what follows from that."""
        ours = our_realm(self._host, binding.bind, binding.path)
        bind = binding.bind
        facts = find_facts(bind, ours)
        row = decide(facts)
        wants_tail = row.decision == HEAL or (row.decision == RESET and self._wants_tail(binding, facts))
        if wants_tail and self._tails.is_full:
            self._undecided[binding.ref] = None
            return
        bound = undecided(self._host, binding.bind, binding.path)
        bound.decision, bound.reason = row.decision, row.reason
        common = last_common(bind.locator, ours) if facts.cluster is Cluster.SAME else None
        if common is not None:
            bound.common.CopyFrom(common)
        if row.decision == STREAM:
            self._begin_stream(binding, bound)
        elif row.decision == LOAD:
            self._begin_load(binding, bound, ours)
        elif wants_tail:
            # From where we surely agree: a fork between two positions of the locator shows only in the tail.
            bound.tail_from = max(common.version + 1 if common else 1, bind.tail_first)
            binding.heals = row.decision == HEAL
            self._tails.expect(binding.ref)
        bound.explanation = explain(bound)
        self._answers.append(sync_pb2.SyncResponse(bound=bound))

    def _wants_tail(self, binding: _Binding, facts: SyncFacts) -> bool:
        """Whether what the client still holds of another history may come home as new changes."""
        return (
            binding.bind.tail_first > 0
            and facts.cluster is Cluster.SAME
            and facts.realm in (Realm.HERE, Realm.LOST)
            and self._host.may_write(binding.path)
        )

    def _begin_stream(self, binding: _Binding, bound: sync_pb2.RealmBound) -> None:
        locator = binding.bind.locator
        binding.realm_id = bound.realm_id
        binding.version = locator[0].version if locator else 0
        binding.streams = True
        self._ready[binding.ref] = None
        rows = (
            self._host.state.history(binding.path, binding.version, count_max=1, bytes_max=1)
            if locator
            else None
        )
        bound.lsn = rows[0].lsn if rows and rows[0].version == binding.version else binding.bind.lsn

    def _begin_load(self, binding: _Binding, bound: sync_pb2.RealmBound, ours: OurRealm) -> None:
        binding.realm_id = bound.realm_id
        bound.entries, bound.bytes = self._host.size(binding.path)
        bound.resumed = can_resume(binding.bind, ours)
        binding.version = binding.bind.incoming.version if bound.resumed else 0
        binding.loading = Loading(binding.bind.frontier if bound.resumed else None)
        self._ready[binding.ref] = None

    # -- what comes home -------------------------------------------------------------------------------------

    def _take_tail(self, tail: sync_pb2.Tail) -> TailHome | None:
        binding = self._bindings.get(tail.ref)
        if binding is None:
            return None
        try:
            changes = self._tails.receive(tail)
        except Overloaded as error:
            self._fail(tail.ref, error)
            return None
        if changes is None:
            return None
        self._decide_waiting()
        return TailHome(
            ref=tail.ref,
            path=binding.path,
            changes=changes,
            may_renew=self._host.may_write(binding.path),
        )

    def _decide_waiting(self) -> None:
        """Another realm has its turn, if its tail may be asked for now."""
        while self._undecided and not self._tails.is_full:
            ref, _ = self._undecided.popitem(last=False)
            self._decide(self._bindings[ref])

    def on_tail_taken(self, ref: int, homecoming: sync_pb2.Homecoming) -> None:
        """What came of a tail; the client is told, and gets another answer where it was to heal."""
        self._tails.taken(ref)
        binding = self._bindings.get(ref)
        if binding is None:
            return
        taken = sync_pb2.TailTaken(ref=ref, homecoming=homecoming)
        self._answers.append(sync_pb2.SyncResponse(tail_taken=taken))
        binding.bind.tail_first = 0  # it is not asked for again: what did not help once will not
        if binding.heals:
            self._decide(binding)

    # -- what the client is told -----------------------------------------------------------------------------

    def on_shown(self, path: str) -> None:
        """There is a change of this realm to be sent."""
        for ref in self._followed.get(path, ()):
            self._ready[ref] = None

    def check_time(self, now_s: float) -> None:
        """Time has passed.

        Raises:
            ProtocolError: the client has let us wait for too long; the stream must end.
        """
        self._tails.check_time(now_s)

    def poll(self) -> None:
        """Time has passed: says what is safe by now, and looks again at what could not be shown."""
        for binding in self._bindings.values():
            if binding.loading is not None:
                binding.loading.poll()
            if binding.streams and binding.told_safe < binding.version and self.has_room:
                self._tell_safe(binding)
            head = self._host.state.realm(binding.path)
            if head is not None and (head.version > binding.version or binding.loading is not None):
                self._ready[binding.ref] = None

    def next_message(self) -> sync_pb2.SyncResponse | None:
        """What to send now; None: nothing, until something happens or, if it :attr:`is_busy`, others had a turn."""
        self.is_busy = False
        if self._answers:
            return self._answers.popleft()
        while self._ready:
            ref, _ = self._ready.popitem(last=False)
            message = self._produce(self._bindings[ref])
            if self.is_busy:
                # Before all others: what it holds must not wait until a slow client has taken theirs.
                self._ready[ref] = None
                self._ready.move_to_end(ref, last=False)
                return None
            if message is not None:
                if ref in self._bindings:
                    self._ready[ref] = None  # behind all others
                return message
            if self._answers:
                return self._answers.popleft()
        return None

    def _produce(self, binding: _Binding) -> sync_pb2.SyncResponse | None:
        if not binding.streams and binding.loading is None:
            return None
        try:
            self._host.resolve(binding.bind.path)
        except UnderstudyError as error:  # it may not read this realm any more
            self._fail(binding.ref, error)
            return None
        head = self._host.state.realm(binding.path)
        if head is None or (binding.realm_id and head.id != binding.realm_id):
            return self._ended(binding, head) if binding.realm_id else None
        binding.realm_id = head.id
        if binding.loading is not None:
            return self._state_page(binding, binding.loading, head)
        return self._changes(binding, head.version)

    def _ended(self, binding: _Binding, head: Head | None) -> sync_pb2.SyncResponse:
        """The realm was dropped under the client."""
        bound = undecided(self._host, binding.bind, binding.path)
        bound.decision = RESET
        bound.reason = Reason.REALM_GONE if head is None else Reason.REALM_RECREATED
        bound.explanation = explain(bound)
        binding.streams = False
        if binding.loading is not None:
            binding.loading.close()
            binding.loading = None
        return sync_pb2.SyncResponse(bound=bound)

    def _changes(self, binding: _Binding, upto: int) -> sync_pb2.SyncResponse | None:
        """What follows the client's version, as far as others may see it."""
        if binding.version >= upto:
            return None
        state, shown, safe = self._host.state, self._host.shown_lsn, self._host.safe_lsn
        rows = state.history(
            binding.path, binding.version + 1, count_max=CHANGES_MAX, bytes_max=CHANGES_BYTES_MAX
        )
        if rows is None:
            return self._load_anew(binding)
        sent = [row for row in rows if row.lsn <= shown and row.version <= upto]
        if not sent:
            return None  # `on_shown` or `poll` come again
        last = sent[-1]
        binding.version = last.version
        safe_version = max((row.version for row in sent if row.lsn <= safe), default=0)
        binding.told_safe = max(binding.told_safe, safe_version)
        head = state.realm(binding.path)
        return sync_pb2.SyncResponse(
            changes=sync_pb2.Changes(
                ref=binding.ref,
                changes=[row.change for row in sent],
                hmacs=b"".join([row.hmac for row in sent]),
                lsn=last.lsn,
                time_us=state.time_us,
                safe_version=binding.told_safe,
                head_version=head.version if head else last.version,
                realm_id=binding.realm_id,
            )
        )

    def _load_anew(self, binding: _Binding) -> sync_pb2.SyncResponse:
        """The client was too slow: what it has not been sent is no longer kept."""
        if binding.loading is not None:
            binding.loading.close()
        binding.bind.ClearField("incoming")
        ours = our_realm(self._host, binding.bind, binding.path)
        bound = undecided(self._host, binding.bind, binding.path)
        bound.decision = LOAD
        binding.streams = False
        self._begin_load(binding, bound, ours)
        return sync_pb2.SyncResponse(bound=bound)

    def _state_page(self, binding: _Binding, loading: Loading, head: Head) -> sync_pb2.SyncResponse | None:
        clients = binding.bind.clients
        page = loading.next_page(self._host, binding.path, head, clients)
        if page is None:
            return None
        if loading.begun and binding.version < page.position.version:
            return self._changes(binding, page.position.version)
        if not loading.make_whole(self._host, binding.path, page):
            self.is_busy = True
            return None
        loading.sent(page)
        page.ref = binding.ref
        binding.version = page.position.version
        if page.last:
            loading.close()
            binding.loading, binding.streams = None, True
        return sync_pb2.SyncResponse(page=page)

    def _tell_safe(self, binding: _Binding) -> None:
        sought = self._host.safe_lsn, binding.version
        if sought == binding.safe_sought or not self._is_here(binding):
            return
        binding.safe_sought = sought
        safe = find_safe_version(self._host, binding.path, told=binding.told_safe, upto=binding.version)
        if safe > binding.told_safe:
            binding.told_safe = safe
            message = sync_pb2.Safe(ref=binding.ref, safe_version=safe)
            self._answers.append(sync_pb2.SyncResponse(safe=message))
