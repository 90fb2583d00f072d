"""Users, permissions and tokens on servers that run: who may do what, and how soon that changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import ANY_PORT, DEADLINE_S, Processes, complaint, wait_until

from understudy.client import Put, TokenSource, aconnect, connect, login
from understudy.client.peers import stream_end
from understudy.client.tokens import Tokens
from understudy.common import access_interceptor, passwords
from understudy.common.access import REQUIRES, Kind, Principal, Requires, meets
from understudy.common.accounts import token_key
from understudy.common.client_ids import client_id
from understudy.common.credentials import Credentials
from understudy.common.errors import (
    DiskFull,
    NotAuthenticated,
    NotPermitted,
    NotPrimary,
    Overloaded,
    Unavailable,
    UnderstudyError,
)
from understudy.common.memtable import Receipt
from understudy.common.operations import Delete, Operation, to_protos
from understudy.common.rpc import _ENDED_WHILE_WRITING, from_rpc, open_channel, peer_errors, short_socket_path
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.common.tokens import RETIRED_KEY_S, read_token, sign_token
from understudy.common.types import SESSIONS_REALM, SYSTEM_REALM
from understudy.primary import sync_service
from understudy.primary.admin_token import prepare_admin_token, renew_here
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.replica.server import ReplicaServer, serving_replica
from understudy.v1 import (
    accounts_pb2,
    accounts_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    data_pb2,
    data_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
)

PASSWORD = "correct horse"
Story = Callable[["World"], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords are hashed in a millisecond, and callers looked at often."""
    monkeypatch.setattr(passwords, "N", 16)
    monkeypatch.setattr(access_interceptor, "CHECK_S", 0.02)


class World:
    """A primary in ``a``, asked by whoever."""

    def __init__(self, server: PrimaryServer, path: Path, stack: contextlib.AsyncExitStack) -> None:
        self.server, self.path = server, path
        self._stack = stack

    @property
    def admin_token(self) -> str:
        return (self.path / "admin-token").read_text().strip()

    async def channel(self, token: str | None = None, *, address: str = "") -> grpc.aio.Channel:
        opened = open_channel(address or self.server.address, Credentials(token=token))
        return await self._stack.enter_async_context(opened)

    async def local(self) -> grpc.aio.Channel:
        socket = self._stack.enter_context(short_socket_path(self.path / "control.sock"))
        return await self._stack.enter_async_context(open_channel(f"unix:{socket}"))

    async def accounts(self, token: str | None = None) -> accounts_pb2_grpc.AccountsAsyncStub:
        return accounts_pb2_grpc.AccountsStub(await self.channel(token))

    async def admin(self) -> accounts_pb2_grpc.AccountsAsyncStub:
        return await self.accounts(self.admin_token)

    async def data(self, token: str | None) -> data_pb2_grpc.DataAsyncStub:
        return data_pb2_grpc.DataStub(await self.channel(token))

    async def add(self, name: str, *groups: str) -> str:
        """Makes a user; returns its id."""
        request = accounts_pb2.PutUserRequest(name=name, password=PASSWORD, groups=groups, must_be_new=True)
        with peer_errors("a"):
            return (await (await self.admin()).PutUser(request)).id

    async def login(self, name: str, password: str = PASSWORD) -> accounts_pb2.Tokens:
        request = accounts_pb2.LoginRequest(user=name, password=password)
        with peer_errors("a"):
            return await (await self.accounts()).Login(request)

    async def refresh(self, refresh: str) -> accounts_pb2.Tokens:
        with peer_errors("a"):
            return await (await self.accounts()).Refresh(accounts_pb2.RefreshRequest(refresh=refresh))

    async def grant(self, pattern: str, level: str, **subject: Any) -> str:
        request = accounts_pb2.GrantRequest(subject=accounts_pb2.Subject(**subject), pattern=pattern)
        request.level = accounts_pb2.Level.Value(f"LEVEL_{level.upper()}")
        with peer_errors("a"):
            return (await (await self.admin()).Grant(request)).id

    async def issue(
        self, kind: accounts_pb2.TokenKind.ValueType, user: str = ""
    ) -> accounts_pb2.IssueTokenResponse:
        with peer_errors("a"):
            return await (await self.admin()).IssueToken(accounts_pb2.IssueTokenRequest(kind=kind, user=user))

    async def tokens(self) -> list[accounts_pb2.TokenInfo]:
        pages = (await self.admin()).ListTokens(accounts_pb2.ListTokensRequest())
        return [one async for page in pages for one in page.tokens]

    async def is_known(self, token: str | None) -> bool:
        """Whether whoever shows this token is somebody."""
        try:
            with peer_errors("a"):
                await admin_pb2_grpc.AdminStub(await self.channel(token)).Status(admin_pb2.StatusRequest())
        except NotAuthenticated:
            return False
        return True


@contextlib.asynccontextmanager
async def _world(path: Path) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        settings = PrimarySettings(data_dir=path, listen=ANY_PORT)
        server = await stack.enter_async_context(serving_primary(settings))
        yield World(server, path, stack)


def _play(path: Path, story: Story) -> None:
    async def played() -> None:
        async with _world(path / "a") as world:
            await story(world)

    asyncio.run(played())


# -- every call ------------------------------------------------------------------------------------------------


async def _is_let_in(channel: grpc.aio.Channel, method: str) -> tuple[bool, str]:
    """Whether an empty message gets past the door, and the answer; what the service makes of it does not matter."""
    call: Any = channel.stream_stream(method)(timeout=20)  # type: ignore[call-arg]
    try:
        with contextlib.suppress(
            grpc.aio.BaseError, asyncio.InvalidStateError
        ):  # refused before it was written
            await call.write(b"")
            await call.done_writing()
        await call.read()
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL and error.details() == _ENDED_WHILE_WRITING:
            return await _is_let_in(
                channel, method
            )  # the status came while the message was on its way, and is lost
        at_the_door = " needs " in str(error.details())
        return error.code() is not grpc.StatusCode.UNAUTHENTICATED and not at_the_door, repr(error)
    finally:
        call.cancel()
    return True, "no error"


@pytest.mark.parametrize("method", ["Data/Get", "Data/Scan", "Accounts/PutUser", "Replication/ReadSnapshot"])
def test_g10_the_door_comes_before_the_message(tmp_path: Path, method: str) -> None:
    """G10: who shows no token is refused before anything that it sends is read, however large it is."""

    async def story(world: World) -> None:
        await world.add("ann")
        call: Any = (await world.channel()).stream_stream(f"/understudy.v1.{method}")(timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    _play(tmp_path, story)


# What an operator who sends an empty message would really bring about.
_DEEDS = {"/understudy.v1.Admin/Fence", "/understudy.v1.Accounts/RotateKeys"}


@pytest.mark.parametrize("kind", [Kind.ANONYMOUS, Kind.USER, Kind.REPLICA, Kind.ADMIN, Kind.LOCAL])
def test_g10_every_call_lets_in_whom_the_table_names(tmp_path: Path, kind: Kind) -> None:
    """G10: of all calls that a server answers, each principal gets past the door of those that are for it."""

    async def story(world: World) -> None:
        await world.add("ann")
        tokens = await world.login("ann")
        replica = await world.issue(accounts_pb2.TOKEN_REPLICA)
        shown: dict[Kind, Callable[[], Coroutine[Any, Any, grpc.aio.Channel]]] = {
            Kind.ANONYMOUS: world.channel,
            Kind.USER: lambda: world.channel(tokens.access),
            Kind.REPLICA: lambda: world.channel(replica.token),
            Kind.ADMIN: lambda: world.channel(world.admin_token),
            Kind.LOCAL: world.local,
        }
        channel = await shown[kind]()
        for method, requires in REQUIRES.items():
            expected = meets(Principal(kind=kind), requires)
            if requires is Requires.NOTHING and "Accounts" in method:
                continue  # they answer strangers as the door does
            if not (expected and method in _DEEDS):
                is_let_in, answer = await _is_let_in(channel, method)
                assert is_let_in is expected, (method, answer)

    _play(tmp_path, story)


def test_g10_a_call_that_is_not_in_the_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: where nothing says who may call, nobody may, not even over the Unix socket."""
    monkeypatch.delitem(cast("dict[str, Requires]", REQUIRES), "/understudy.v1.Admin/Status")

    async def story(world: World) -> None:
        with pytest.raises(NotPermitted), peer_errors("a"):
            await admin_pb2_grpc.AdminStub(await world.local()).Status(admin_pb2.StatusRequest())

    _play(tmp_path, story)


# -- protected mode --------------------------------------------------------------------------------------------


def test_g10_with_the_first_user_tokens_are_asked_for_and_stay_so(tmp_path: Path) -> None:
    """G10: a server in protected mode says so; once it had a user, it is never open again, nor after a restart."""

    async def access(world: World, token: str | None = None) -> str:
        stub = admin_pb2_grpc.AdminStub(await world.channel(token))
        with peer_errors("a"):
            return (await stub.Status(admin_pb2.StatusRequest())).access

    async def story(world: World) -> None:
        assert await access(world) == "protected"
        await world.add("ann")
        assert not await world.is_known(None)
        await (await world.admin()).RemoveUser(accounts_pb2.RemoveUserRequest(name="ann"))
        assert not await world.is_known(None)
        assert await access(world, world.admin_token) == "tokens"

    async def afterwards(world: World) -> None:
        assert not await world.is_known(None)
        assert await world.is_known(world.admin_token)
        await world.add("ben")  # numbers of the server's own changes go on

    _play(tmp_path, story)
    _play(tmp_path, afterwards)


def test_g10_streams_of_protected_mode_end_with_it(tmp_path: Path) -> None:
    """G10: who was let in without a word is sent away when words are asked for."""

    async def story(world: World) -> None:
        call = await _bound(await world.data(None))
        await world.add("ann")
        assert isinstance(await _end_of(call), NotAuthenticated)

    _play(tmp_path, story)


# -- realms ----------------------------------------------------------------------------------------------------


async def _bound(
    data: data_pb2_grpc.DataAsyncStub, client: bytes = bytes(16)
) -> grpc.aio.StreamStreamCall[data_pb2.CommitRequest, data_pb2.CommitResponse]:
    call = data.Commit(timeout=30)
    await call.write(data_pb2.CommitRequest(bind=data_pb2.Bind(protocol_version=1, client=client)))
    with peer_errors("a"):
        answer = await call.read()
    assert isinstance(answer, data_pb2.CommitResponse)
    assert answer.HasField("bound")
    return call


async def _commit(
    call: grpc.aio.StreamStreamCall[data_pb2.CommitRequest, data_pb2.CommitResponse],
    realm: str,
    number: int,
) -> data_pb2.Results:
    request = data_pb2.CommitRequest()
    request.transactions.transactions.add(
        number=number, realm=realm, operations=to_protos([Put(b"key", b"value")])
    )
    await call.write(request)
    answer = await call.read()
    assert isinstance(answer, data_pb2.CommitResponse)
    return answer.results


async def _end_of(call: Any) -> UnderstudyError:
    """Why a stream has ended."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call.read()
    error = await stream_end(call)
    return error if isinstance(error, UnderstudyError) else from_rpc(error, "a")


async def _may(world: World, token: str, realm: str) -> str:
    """What the owner of a token can really do with a realm: each call that is let through, as a letter."""
    data = await world.data(token)
    done = ""

    async def read_all() -> None:
        await data.Get(data_pb2.GetRequest(realm=realm, keys=[b"key"]))
        await data.Count(data_pb2.CountRequest(realm=realm))
        async for _ in data.Scan(data_pb2.ScanRequest(realm=realm)):
            pass

    async def write() -> None:
        call = await _bound(data, client=token.encode()[-16:])
        results = await _commit(call, realm, 1)
        if results.refusals:
            assert results.refusals[0].code == "NotPermitted"
            raise NotPermitted("refused")

    async def drop() -> None:
        await data.DropRealm(data_pb2.DropRealmRequest(realm=realm))

    for letter, attempt in (("w", write), ("r", read_all), ("d", drop)):
        with contextlib.suppress(NotPermitted), peer_errors("a"):
            await attempt()
            done += letter
    return done


def test_g10_permissions_are_what_users_can_do(tmp_path: Path) -> None:
    """G10: each level lets through what it holds and nothing else, by user, by group and for all; else nothing."""

    async def story(world: World) -> None:
        async with aconnect(world.server.address) as open_door:
            for realm in ("/read", "/write", "/manage/a", "/staff", "/all", "/none", "/other/notes"):
                await open_door.commit(realm, [Put(b"key", b"value")])
        await world.add("ann", "staff")
        await world.grant("/read", "read", user="ann")
        await world.grant("/write", "write", user="ann")
        await world.grant("/manage/**", "manage", user="ann")
        await world.grant("/staff", "read", group="staff")
        await world.grant("/none", "read", group="directors")
        await world.grant("/all", "read", anyone=True)
        token = (await world.login("ann")).access
        pages = (await world.data(token)).Realms(data_pb2.RealmsRequest())
        listed = [one.path async for page in pages for one in page.realms]
        assert listed == ["/all", "/manage/a", "/read", "/staff", "/write"]
        expected = {"/read": "r", "/write": "wr", "/manage/a": "wrd", "/staff": "r", "/all": "r", "/none": ""}
        assert {realm: await _may(world, token, realm) for realm in expected} == expected
        assert await _may(world, token, "/other/notes") == ""
        assert await _may(world, token, "/~/notes") == "wrd"

    _play(tmp_path, story)


def test_a_tilde_is_each_user_s_own(tmp_path: Path) -> None:
    """The same path is another realm for each user, and nobody reaches the other's under any name."""

    async def story(world: World) -> None:
        ids = {name: await world.add(name) for name in ("ann", "ben")}
        tokens = {name: (await world.login(name)).access for name in ids}
        for name in ids:
            async with aconnect(world.server.address, token=tokens[name]) as server:
                await server.commit("/~/notes", [Put(b"whose", name.encode())])
        for name, user_id in ids.items():
            async with aconnect(world.server.address, token=tokens[name]) as server:
                assert await server.get("/~/notes", b"whose") == name.encode()
                assert await server.get(f"/{user_id}/notes", b"whose") == name.encode()
        assert await _may(world, tokens["ben"], f"/{ids['ann']}/notes") == ""

    _play(tmp_path, story)


def test_g10_the_system_s_realms_are_nobody_s(tmp_path: Path) -> None:
    """G10: what holds the keys is neither read nor written nor dropped over the network, whoever asks."""

    async def story(world: World) -> None:
        await world.add("ann")
        await world.login("ann")
        await world.grant("/**", "manage", user="ann")
        for token in (world.admin_token, (await world.login("ann")).access):
            for realm in (SYSTEM_REALM, SESSIONS_REALM, "/~/__own"):
                assert await _may(world, token, realm) == "", realm

    _play(tmp_path, story)


def test_g10_the_system_s_realms_stay_closed_while_they_change(tmp_path: Path) -> None:
    """G10: nobody else's transaction slips in behind one of the server's own that is on its way."""

    async def story(world: World) -> None:
        node = world.server.node
        own = asyncio.create_task(node.commit_system(SYSTEM_REALM, [Put(b"key", b"value")]))
        await asyncio.sleep(0)
        assert not node.committer.is_settled(SYSTEM_REALM)
        transaction = data_pb2.Transaction(
            realm=SYSTEM_REALM, number=1, operations=to_protos([Put(b"tokens-required", b"")])
        )
        with pytest.raises(NotPermitted):
            node.submit(b"c" * 16, transaction, lambda receipt: None)
        await own

    _play(tmp_path, story)


def test_g6_a_user_can_t_use_up_the_numbers_of_another_user_s_client(tmp_path: Path) -> None:
    """G6: two users with one client id are two clients, or one could have the other's transactions refused."""

    async def story(world: World) -> None:
        for name in ("ann", "mallory"):
            await world.add(name)
        await world.grant("/shared", "write", anyone=True)
        mallory = await _bound(await world.data((await world.login("mallory")).access), b"c" * 16)
        assert not (await _commit(mallory, "/shared", 1_000)).refusals
        ann = await _bound(await world.data((await world.login("ann")).access), b"c" * 16)
        assert not (await _commit(ann, "/shared", 1)).refusals

    _play(tmp_path, story)


# -- what changes while it runs --------------------------------------------------------------------------------


def test_g10_what_is_taken_back_is_gone_at_once(tmp_path: Path) -> None:
    """G10: a permission, a group, a user that is no more counts for nothing from the next call on."""

    async def story(world: World) -> None:
        async with aconnect(world.server.address) as open_door:
            await open_door.commit("/realm", [Put(b"key", b"value")])
        old_id = await world.add("ann", "staff")
        permission = await world.grant("/realm", "read", user="ann")
        await world.grant("/realm", "write", group="staff")
        token, admin = (await world.login("ann")).access, await world.admin()
        assert await _may(world, token, "/realm") == "wr"
        await admin.PutUser(accounts_pb2.PutUserRequest(name="ann"))
        assert await _may(world, token, "/realm") == "r"
        await admin.RevokeGrant(accounts_pb2.RevokeGrantRequest(id=permission))
        assert await _may(world, token, "/realm") == ""
        await admin.PutUser(accounts_pb2.PutUserRequest(name="ann", disabled=True))
        assert not await world.is_known(token)
        await admin.PutUser(accounts_pb2.PutUserRequest(name="ann"))
        assert await world.is_known(token)
        await admin.RemoveUser(accounts_pb2.RemoveUserRequest(name="ann"))
        new_id = await world.add("ann")
        assert not await world.is_known(token)  # of somebody else with that name
        for user_id in (old_id, new_id):
            with contextlib.nullcontext() if user_id == new_id else pytest.raises(NotAuthenticated):
                world.server.authority.check_valid(Principal(kind=Kind.USER, user="ann", user_id=user_id))
        assert await _may(world, (await world.login("ann")).access, "/realm") == ""

    _play(tmp_path, story)


@pytest.mark.parametrize("how", ["revoked", "removed", "expired", "app token"])
def test_g10_a_stream_ends_with_what_it_rests_on(tmp_path: Path, how: str) -> None:
    """G10: a stream that was let in ends when its token is revoked or expires, or its user is removed."""

    async def story(world: World) -> None:
        await world.add("ann")
        await world.grant("/realm", "write", user="ann")
        token = (await world.login("ann")).access
        if how == "app token":
            token = (await world.issue(accounts_pb2.TOKEN_APP, "ann")).token
        call = await _bound(await world.data(token))
        assert not (await _commit(call, "/realm", 1)).refusals
        admin = await world.admin()
        if how == "removed":
            await admin.RemoveUser(accounts_pb2.RemoveUserRequest(name="ann"))
        elif how == "expired":
            world.server.authority.now_s = lambda: 4e9
        else:
            kind = accounts_pb2.TOKEN_APP if how == "app token" else accounts_pb2.TOKEN_SESSION
            (mine,) = [one.id for one in await world.tokens() if one.kind == kind]
            await admin.RevokeToken(accounts_pb2.RevokeTokenRequest(id=mine))
        assert isinstance(await _end_of(call), NotAuthenticated)

    _play(tmp_path, story)


def test_rotation_logs_nobody_out(tmp_path: Path) -> None:
    """After keys were rotated, tokens of the old one are taken until they expire, and refresh as before."""

    async def story(world: World) -> None:
        await world.add("ann")
        first = await world.login("ann")
        admin = await world.admin()
        old = world.server.authority.accounts.signing_key()
        assert old is not None
        keys = [(await admin.RotateKeys(accounts_pb2.RotateKeysRequest())).key_id for _ in range(2)]
        assert await world.is_known(first.access)
        second = await world.refresh(first.refresh)
        assert await world.is_known(second.access)
        signing = world.server.authority.accounts.signing_key()
        assert signing is not None
        assert signing[0] == keys[-1]
        retired = world.server.authority.accounts.key(old[0])
        assert retired is not None
        assert not retired.private
        # When none of its tokens can be good any more, the old key goes.
        later_s = world.server.authority.now_s() + 3600
        world.server.authority.now_s = lambda: later_s
        await admin.RotateKeys(accounts_pb2.RotateKeysRequest())
        assert world.server.authority.accounts.key(old[0]) is None

    _play(tmp_path, story)


# -- logins ----------------------------------------------------------------------------------------------------


def test_g10_nobody_can_tell_an_unknown_user_from_a_wrong_password(tmp_path: Path) -> None:
    """G10: no user, another password, a disabled user and one without a password are answered alike."""

    async def story(world: World) -> None:
        await world.add("ann")
        await world.add("ben")
        admin = await world.admin()
        await admin.PutUser(accounts_pb2.PutUserRequest(name="ben", disabled=True))
        await admin.PutUser(accounts_pb2.PutUserRequest(name="carla", must_be_new=True))
        answers = set()
        for name in ("ann", "ben", "carla", "nobody"):
            with pytest.raises(NotAuthenticated) as refused:
                await world.login(name, "" if name == "carla" else "wrong")
            answers.add(str(refused.value))
        assert len(answers) == 1

    _play(tmp_path, story)


def test_g9_failed_logins_are_followed_by_a_pause(tmp_path: Path) -> None:
    """G9: after some wrong passwords the right one is not taken either, until a while has passed; metrics tell."""

    async def story(world: World) -> None:
        await world.add("ann")
        for _ in range(5):
            with pytest.raises(NotAuthenticated):
                await world.login("ann", "wrong")
        with pytest.raises(Overloaded):
            await world.login("ann")
        registry = world.server.node.engine.metrics.registry
        assert registry.get_sample_value("understudy_logins_total", {"outcome": "refused"}) == 5

    _play(tmp_path, story)


def test_g10_a_refresh_token_is_good_once_and_a_copy_is_noticed(tmp_path: Path) -> None:
    """G10: the token before the newest is taken again, since its answer may have been lost; any earlier ends it all."""

    async def story(world: World) -> None:
        await world.add("ann")
        first = await world.login("ann")
        lost = await world.refresh(first.refresh)
        second = await world.refresh(first.refresh)  # its answer had been lost
        third = await world.refresh(second.refresh)
        assert await world.is_known(third.access)
        for copied in (lost.refresh, third.refresh):  # the second shows that the first has ended the login
            with pytest.raises(NotAuthenticated):
                await world.refresh(copied)
        assert not await world.is_known(third.access)

    _play(tmp_path, story)


def test_g10_a_refresh_token_is_no_access_token(tmp_path: Path) -> None:
    """G10: it is good for nothing but new tokens, and an access token not for that; logging out ends both."""

    async def story(world: World) -> None:
        await world.add("ann")
        tokens = await world.login("ann")
        assert not await world.is_known(tokens.refresh)
        with pytest.raises(NotAuthenticated):
            await world.refresh(tokens.access)
        await (await world.accounts()).Logout(accounts_pb2.LogoutRequest(refresh=tokens.refresh))
        assert not await world.is_known(tokens.access)
        with pytest.raises(NotAuthenticated):
            await world.refresh(tokens.refresh)

    _play(tmp_path, story)


def test_a_changed_password_ends_all_logins(tmp_path: Path) -> None:
    """A user changes its own password with the old one, nobody else's, and is logged out everywhere."""

    async def story(world: World) -> None:
        await world.add("ann")
        await world.add("ben")
        tokens = await world.login("ann")
        own = await world.accounts(tokens.access)
        for name, old in (("ben", PASSWORD), ("ann", "wrong")):
            with pytest.raises(NotPermitted), peer_errors("a"):
                await own.SetPassword(
                    accounts_pb2.SetPasswordRequest(name=name, password="battery staple", old_password=old)
                )
        await own.SetPassword(
            accounts_pb2.SetPasswordRequest(name="ann", password="battery staple", old_password=PASSWORD)
        )
        assert not await world.is_known(tokens.access)
        assert await world.is_known((await world.login("ann", "battery staple")).access)

    _play(tmp_path, story)


def test_g9_a_user_has_a_bounded_number_of_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: with one login too many, the oldest ends."""
    monkeypatch.setattr("understudy.primary.sessions.SESSIONS_PER_USER_MAX", 3)

    async def story(world: World) -> None:
        await world.add("ann")
        tokens = [await world.login("ann") for _ in range(5)]
        assert [await world.is_known(one.access) for one in tokens] == [False, False, True, True, True]

    _play(tmp_path, story)


def test_g9_calls_of_one_peer_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: one user can't take all that a server has; others are let in, and it again once its calls have ended."""
    monkeypatch.setattr(access_interceptor, "CALLS_MAX", 2)

    async def story(world: World) -> None:
        await world.add("ann")
        await world.add("ben")
        ann, ben = [(await world.login(name)).access for name in ("ann", "ben")]
        calls = [await _bound(await world.data(ann), bytes([number]) * 16) for number in range(2)]
        with pytest.raises(Overloaded):
            await world.is_known(ann)
        assert await world.is_known(ben)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(Overloaded):
                    assert await world.is_known(ann)
                    return

    _play(tmp_path, story)


# -- status ----------------------------------------------------------------------------------------------------


def test_users_are_told_who_reigns_and_not_what_operators_see(tmp_path: Path) -> None:
    """Replicas, positions and what came home are for operators and replicas; users learn what a client needs."""

    async def told(world: World, token: str) -> admin_pb2.StatusResponse:
        return await admin_pb2_grpc.AdminStub(await world.channel(token)).Status(admin_pb2.StatusRequest())

    async def story(world: World) -> None:
        await world.add("ann")
        home = sync_pb2.Homecoming(refused=1, problems=["/secret: who knows"])
        world.server.node.heal_window.note(b"a" * 16, "/secret", home)
        everything = await told(world, world.admin_token)
        assert everything.healing.homecoming.problems
        replica = (await world.issue(accounts_pb2.TOKEN_REPLICA)).token
        assert (await told(world, replica)).healing == everything.healing
        limited = await told(world, (await world.login("ann")).access)
        names = {field.name for field, _ in limited.ListFields()}
        assert names == {"role", "cluster", "epoch", "proof", "durability", "version", "access"}
        for name in names - {"access"}:
            assert getattr(limited, name) == getattr(everything, name)

    _play(tmp_path, story)


# -- admin tokens ----------------------------------------------------------------------------------------------


def test_the_admin_token_is_its_owner_s_alone(tmp_path: Path) -> None:
    """A new cluster's admin token lies in its directory, readable by its owner; what the server keeps is a hash."""

    async def story(world: World) -> None:
        await world.add("ann")
        assert stat.S_IMODE((world.path / "admin-token").stat().st_mode) == 0o600
        assert await world.is_known(world.admin_token)
        secret = world.admin_token.split("-", 3)[3].encode()
        assert not any(secret in path.read_bytes() for path in (world.path / "log").iterdir())

    _play(tmp_path, story)


def test_a_cluster_without_an_admin_token_gets_one_and_a_lost_file_is_not_made_up_for(tmp_path: Path) -> None:
    """A cluster of an earlier version has a token after its next start; a file that was removed stays so."""

    async def loses_row(world: World) -> None:
        (only,) = await world.tokens()
        await world.server.node.commit_system(SYSTEM_REALM, [Delete(token_key(only.id))])

    async def has_a_new_one(world: World) -> None:
        await asyncio.to_thread(wait_until, lambda: world.server.authority.accounts.has_admin_token())
        await world.add("ann")
        assert await world.is_known(world.admin_token)
        (world.path / "admin-token").unlink()

    async def has_none(world: World) -> None:
        assert world.server.authority.accounts.has_admin_token()
        assert not (world.path / "admin-token").exists()

    for story in (loses_row, has_a_new_one, has_none):
        _play(tmp_path, story)


async def _says_no(path: str, operations: Iterable[Operation]) -> Receipt:
    raise DiskFull("no space left")


def test_a_token_that_could_not_be_committed_does_not_take_the_place_of_one_that_is_good(
    tmp_path: Path,
) -> None:
    """Whatever cuts it off, the file holds a token that lets its owner in; what was prepared goes at the next start."""

    async def cut_off(world: World) -> None:
        await world.tokens()  # by now, what the start had to do is done
        directory = world.server.node.engine.directory
        before = world.admin_token
        with pytest.raises(DiskFull):
            await renew_here(directory, _says_no)
        assert world.admin_token == before
        assert (world.path / "admin-token.coming").exists()

    async def next_start(world: World) -> None:
        await asyncio.to_thread(wait_until, lambda: not (world.path / "admin-token.coming").exists())
        assert [one.kind for one in await world.tokens()] == [accounts_pb2.TOKEN_ADMIN]

    for story in (cut_off, next_start):
        _play(tmp_path, story)


def test_a_token_that_was_committed_gets_its_file_at_the_next_start(tmp_path: Path) -> None:
    """A new cluster, or a new token, that was cut off behind the commit has not lost it."""

    async def cut_off(world: World) -> None:
        await world.tokens()  # by now, what the start had to do is done
        node = world.server.node
        await node.commit_system(SYSTEM_REALM, [prepare_admin_token(node.engine.directory)])
        (world.path / "admin-token").unlink()

    async def next_start(world: World) -> None:
        await asyncio.to_thread(wait_until, (world.path / "admin-token").exists)
        assert not (world.path / "admin-token.coming").exists()
        assert len(await world.tokens()) == 2

    for story in (cut_off, next_start):
        _play(tmp_path, story)


# -- replicas and promotion ------------------------------------------------------------------------------------


async def _caught_up(replica: ReplicaServer, world: World) -> None:
    head = world.server.node.engine.durable.lsn
    await asyncio.to_thread(wait_until, lambda: replica.node.status().committed_lsn >= head)


def test_a_promoted_server_accepts_the_tokens_of_the_old_one(tmp_path: Path) -> None:
    """A replica needs a token to follow, asks for the same ones as its primary, and still does once promoted."""

    async def story() -> None:
        async with contextlib.AsyncExitStack() as stack:
            world = await stack.enter_async_context(_world(tmp_path / "a"))
            await world.add("ann")
            await world.grant("/realm", "write", user="ann")
            tokens = await world.login("ann")
            admin_token = world.admin_token
            follows = (await world.issue(accounts_pb2.TOKEN_REPLICA)).token
            settings = ReplicaSettings(
                data_dir=tmp_path / "b", primary=world.server.address, listen=ANY_PORT, id="b", token=follows
            )
            async with serving_replica(settings) as replica:
                async with aconnect(world.server.address, token=tokens.access) as server:
                    await server.commit("/realm", [Put(b"key", b"value")])
                await _caught_up(replica, world)
                async with aconnect(replica.address, token=tokens.access) as server:
                    assert await server.get("/realm", b"key") == b"value"
                    with pytest.raises(NotPermitted):
                        await server.get("/other", b"key")
                with pytest.raises(NotAuthenticated):
                    async with aconnect(replica.address):
                        pass
                stub = accounts_pb2_grpc.AccountsStub(await world.channel(address=replica.address))
                with pytest.raises(NotPrimary), peer_errors("b"):
                    await stub.Login(accounts_pb2.LoginRequest(user="ann", password=PASSWORD))
                admin = await world.channel(admin_token, address=replica.address)
                with peer_errors("b"):
                    await admin_pb2_grpc.AdminStub(admin).Promote(admin_pb2.PromoteRequest(), timeout=60)
        async with _world(tmp_path / "b") as promoted:
            assert await promoted.is_known(tokens.access)
            assert await promoted.is_known(admin_token)
            renewed = await promoted.refresh(tokens.refresh)
            async with aconnect(promoted.server.address, token=renewed.access) as server:
                await server.commit("/realm", [Put(b"key", b"other")])

    asyncio.run(story())


def test_g10_a_replica_without_a_token_gets_nothing(tmp_path: Path) -> None:
    """G10: a replica that shows no token, or an application's, is not sent a byte of the log."""

    async def story(world: World) -> None:
        await world.add("ann")
        app = (await world.issue(accounts_pb2.TOKEN_APP, "ann")).token
        for number, token in enumerate((None, app)):
            settings = ReplicaSettings(
                data_dir=tmp_path / f"b{number}",
                primary=world.server.address,
                listen=ANY_PORT,
                id="b",
                token=token,
            )
            async with serving_replica(settings) as replica:
                await asyncio.to_thread(
                    wait_until,
                    lambda of=replica.node: any("not following" in one for one in of.status().warnings),
                )
                assert replica.node.status().lsn == 0

    _play(tmp_path, story)


# -- from Python, and from the command line --------------------------------------------------------------------


def test_a_token_source_renews_itself(processes: Processes, tmp_path: Path) -> None:
    """An application that gives a token source stays logged in; it hears of each new refresh token."""
    primary = processes.primary(tmp_path / "a")
    processes.run(
        "user", "add", "ann", "--password-stdin", "--data-dir", tmp_path / "a", stdin=PASSWORD.encode()
    )
    with pytest.raises(NotAuthenticated):
        login(primary.address, "ann", "wrong")
    first = login(primary.address, "ann", PASSWORD)
    assert repr(first).count(first.access) + repr(first).count(first.refresh) == 0
    renewed: list[Tokens] = []
    about_to_expire = Tokens(
        access=first.access,
        refresh=first.refresh,
        access_s=0.0,
        refresh_s=first.refresh_s,
        user=first.user,
        user_id=first.user_id,
    )
    with (
        TokenSource(primary.address, about_to_expire, on_renewed=renewed.append) as source,
        connect(primary.address, token=source) as server,
    ):
        wait_until(lambda: renewed)
        assert source() == renewed[-1].access != first.access
        server.commit("/~/notes", [Put(b"key", b"value")])
    with TokenSource(primary.address, renewed[-1].refresh) as source:
        assert source.tokens.user_id == first.user_id


def test_from_the_command_line(processes: Processes, tmp_path: Path) -> None:
    """An operator makes users, permissions and tokens with its token file or the directory, and revokes them."""
    data = tmp_path / "a"
    primary = processes.primary(data)
    as_admin = ("--server", primary.address, "--token", f"@{data / 'admin-token'}")
    processes.run(
        "user", "add", "ann", "--password-stdin", "--data-dir", data, stdin=f"{PASSWORD}\n".encode()
    )
    refused = complaint(processes.run("realms", "--server", primary.address, code=7))
    assert "asks for a token" in refused
    processes.run("grant", "add", "--user", "ann", "--level", "write", "/inventory/**", *as_admin)
    token = processes.run("token", "issue", "--app", "ann", *as_admin).stdout.decode().strip()
    as_ann = ("--server", primary.address, "--token", token)
    processes.run("put", "/inventory", "apple", "3", *as_ann)
    assert "may not write /ledger" in complaint(processes.run("put", "/ledger", "a", "1", *as_ann, code=7))
    told = processes.run("status", "--server", primary.address, *as_ann).stdout
    assert b"primary" in told
    assert b"LSN" not in told
    status = json.loads(processes.run("status", "--server", primary.address, "--json", *as_ann).stdout)
    assert (status["role"], status["epoch"], status["lsn"], status["replicas"]) == ("primary", 1, None, None)
    assert b"ann" in processes.run("user", "list", "--data-dir", data).stdout
    assert b"/inventory/**" in processes.run("grant", "list", *as_admin).stdout
    processes.run("token", "revoke", token.split("-")[2], *as_admin)
    processes.run("get", "/inventory", "apple", *as_ann, code=7)
    before = (data / "admin-token").read_text()
    processes.run("token", "admin", data)
    while_running = (data / "admin-token").read_text()
    primary.terminate()
    processes.run("token", "admin", data)
    assert len({before, while_running, (data / "admin-token").read_text()}) == 3
    again = processes.primary(data)
    processes.run("status", "--server", again.address, "--token", f"@{data / 'admin-token'}")


# -- misuse ----------------------------------------------------------------------------------------------------


def test_g10_a_login_is_not_renewed_while_it_is_being_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: whoever renews a login in the moment of its end does not bring it back."""

    async def story(world: World) -> None:
        await world.add("ann")
        tokens = await world.login("ann")
        [login_id] = [one.id for one in await world.tokens() if one.user == "ann"]
        admin, service = await world.admin(), await world.accounts()
        submit, submitted = world.server.node.committer.submit_own, asyncio.Event()
        held: list[Callable[[], None]] = []

        def hold(*arguments: Any) -> None:  # as a slow disk would: taken in, and not applied yet
            held.append(lambda: submit(*arguments))
            submitted.set()

        monkeypatch.setattr(world.server.node.committer, "submit_own", hold)
        revoking = asyncio.ensure_future(admin.RevokeToken(accounts_pb2.RevokeTokenRequest(id=login_id)))
        await submitted.wait()
        renewing = asyncio.ensure_future(service.Refresh(accounts_pb2.RefreshRequest(refresh=tokens.refresh)))
        for _ in range(
            3
        ):  # behind it on the same connection: when they are answered, it has got as far as it can
            with pytest.raises(grpc.aio.AioRpcError):
                await service.Refresh(accounts_pb2.RefreshRequest(refresh="none"))
        monkeypatch.undo()
        for one in held:
            one()
        world.server.node.flush_soon()
        await revoking
        with pytest.raises(NotAuthenticated), peer_errors("a"):
            await renewing
        assert not [one for one in await world.tokens() if one.user == "ann"]

    _play(tmp_path, story)


def test_g10_a_password_that_was_changed_meanwhile_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: who is being checked while the password changes is not logged in with the one before."""
    checking, changed = threading.Event(), threading.Event()
    is_password = passwords.is_password

    def slow(password: str, row: accounts_pb2.Password | None) -> bool:
        checking.set()
        changed.wait(DEADLINE_S)
        return is_password(password, row)

    async def story(world: World) -> None:
        await world.add("ann")
        monkeypatch.setattr(passwords, "is_password", slow)
        entering = asyncio.ensure_future(world.login("ann"))
        await asyncio.to_thread(checking.wait, DEADLINE_S)
        request = accounts_pb2.SetPasswordRequest(name="ann", password="another horse")
        await (await world.admin()).SetPassword(request)
        changed.set()
        with pytest.raises(NotAuthenticated):
            await entering

    _play(tmp_path, story)


def test_g10_a_stolen_key_is_worth_nothing_once_its_tokens_have_expired(tmp_path: Path) -> None:
    """G10: what a retired key signs is taken for as long as what it signed in its time, and no longer."""

    async def story(world: World) -> None:
        await world.add("ann")
        tokens = await world.login("ann")
        authority = world.server.authority
        found = authority.accounts.signing_key()
        assert found is not None
        key_id, stolen = found[0], bytes(found[1].private)
        claims = read_token(
            tokens.access,
            public_key=lambda _: found[1].public,
            issuer=authority.issuer,
            now_s=authority.now_s(),
        )
        await (await world.admin()).RotateKeys(accounts_pb2.RotateKeysRequest())
        assert await world.is_known(tokens.access)
        later_s = authority.now_s() + RETIRED_KEY_S + 1
        authority.now_s = lambda: later_s
        forged = replace(claims, issued_s=int(later_s), expires_s=int(later_s) + 60)
        assert not await world.is_known(sign_token(forged, key_id=key_id, private=stolen))

    _play(tmp_path, story)


def test_g9_a_refusal_does_not_repeat_what_was_sent(tmp_path: Path) -> None:
    """G9: who may not write to a path without end is told so in a few words."""

    async def story(world: World) -> None:
        await world.add("ann")
        call = await _bound(await world.data((await world.login("ann")).access))
        [refusal] = (await _commit(call, "/" + "a" * 100_000, 1)).refusals
        assert refusal.code == "NotPermitted"
        assert len(refusal.message) + len(refusal.remedy) < 1_000

    _play(tmp_path, story)


def test_g9_who_watches_does_not_keep_others_from_logging_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: strangers behind the same address can't use up the calls that a login needs."""
    monkeypatch.setattr(access_interceptor, "ANONYMOUS_CALLS_MAX", 3)

    async def story(world: World) -> None:
        await world.add("ann")
        health = health_pb2_grpc.HealthStub(await world.channel())
        watching = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for call in watching:
            await call.read()
        with pytest.raises(Overloaded), peer_errors("a"):
            await health.Watch(health_pb2.HealthCheckRequest()).read()
        assert (await world.login("ann")).user == "ann"
        for call in watching:
            call.cancel()

    _play(tmp_path, story)


# -- synced clients --------------------------------------------------------------------------------------------


async def _connected(world: World, token: str, secret: bytes, client: bytes = b"") -> Any:
    """The stream of a directory with this secret; it shows its own id, where it does not show another."""
    call = sync_pb2_grpc.SyncStub(await world.channel(token)).Sync(timeout=30)
    hello = sync_pb2.SyncHello(
        protocol_version=1, client=client or client_id(secret, b"salt"), secret=secret, run=uuid.uuid4().bytes
    )
    await call.write(sync_pb2.SyncRequest(hello=hello))
    with peer_errors("a"):
        answer = await call.read()
    if not isinstance(answer, sync_pb2.SyncResponse):
        raise await _end_of(call)
    assert not answer.welcome.new_id
    return call


def test_g10_nobody_passes_for_another_user_s_client(tmp_path: Path) -> None:
    """G10: all who read a realm see whose changes they are, and can't take that id, in a hello or in a bind."""

    async def story(world: World) -> None:
        for name in ("ann", "eve"):
            await world.add(name)
        mine, hers = b"the one of ann's", b"the one of eve's"
        eve = (await world.login("eve")).access
        with pytest.raises(NotPermitted):
            await _connected(world, eve, hers, client_id(mine, b"salt"))
        call = await _connected(world, eve, hers)
        clients = [client_id(hers, b"salt"), client_id(mine, b"salt")]
        await call.write(sync_pb2.SyncRequest(bind=sync_pb2.BindRealm(ref=1, path="/a", clients=clients)))
        assert isinstance(await _end_of(call), NotPermitted)
        ann = await _connected(world, (await world.login("ann")).access, mine)
        ann.cancel()

    _play(tmp_path, story)


def test_g9_one_user_does_not_take_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: who has connected as many clients as a user may keeps nobody else out."""
    monkeypatch.setattr(sync_service, "USER_STREAMS_MAX", 1)

    async def story(world: World) -> None:
        for name in ("ann", "eve"):
            await world.add(name)
        eve = (await world.login("eve")).access
        first = await _connected(world, eve, b"the first secret")
        second = sync_pb2_grpc.SyncStub(await world.channel(eve)).Sync(timeout=30)
        hello = sync_pb2.SyncHello(
            protocol_version=1, client=client_id(bytes(16), bytes(4)), secret=bytes(16), run=bytes(16)
        )
        await second.write(sync_pb2.SyncRequest(hello=hello))
        assert isinstance(await _end_of(second), Unavailable)
        ann = await _connected(world, (await world.login("ann")).access, b"the third secret")
        for call in (first, ann):
            call.cancel()

    _play(tmp_path, story)
