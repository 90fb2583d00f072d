"""Logins, and what operators do with users, permissions, tokens and keys. All of it goes through the log."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable

from understudy.common.access import Level, caller, check_name, check_pattern, is_name, peer_host
from understudy.common.accounts import (
    ANYONE,
    GRANTS,
    REQUIRED,
    TOKENS,
    Subject,
    after_prefix,
    grants_key,
    policy_key,
    token_key,
    user_key,
)
from understudy.common.authority import Authority
from understudy.common.errors import NotAuthenticated, NotPermitted, UsageError
from understudy.common.events import log
from understudy.common.metrics import EngineMetrics
from understudy.common.operations import Delete, DeleteRange, Operation, Put
from understudy.common.passwords import Hasher, is_outdated
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors
from understudy.common.tokens import Lasting, LastingToken, new_token_id
from understudy.common.types import SYSTEM_REALM, check_realm_path, is_system_realm
from understudy.primary.account_lists import all_grants, all_tokens, all_users, pages
from understudy.primary.admin_token import CommitSystem
from understudy.primary.login_limits import LoginLimits
from understudy.primary.sessions import Sessions
from understudy.v1 import accounts_pb2, accounts_pb2_grpc

GROUPS_MAX = 100  # of one user
NOTE_MAX = 200
_KINDS = {
    accounts_pb2.TOKEN_ADMIN: Lasting.ADMIN,
    accounts_pb2.TOKEN_REPLICA: Lasting.REPLICA,
    accounts_pb2.TOKEN_APP: Lasting.APP,
}
_WRONG = "wrong user name or password"


class AccountsService(accounts_pb2_grpc.AccountsServicer):
    """The service of that name. ``commit`` changes the system's realms."""

    def __init__(self, commit: CommitSystem, authority: Authority, metrics: EngineMetrics) -> None:
        self._commit = commit
        self._authority = authority
        self._accounts = authority.accounts
        self._metrics = metrics
        self._sessions = Sessions(commit, authority)
        self._limits = LoginLimits()
        self._hasher = Hasher()
        self._changing = asyncio.Lock()  # one change is made of what the one before has left

    async def _change(self, event: str, operations: Iterable[Operation], **about: object) -> None:
        await self._commit(SYSTEM_REALM, operations)
        log.info(event, by=str(caller()), **about)

    def _now_us(self) -> int:
        return int(self._authority.now_s() * 1e6)

    # -- logins --------------------------------------------------------------------------------------------

    async def Login(self, request: accounts_pb2.LoginRequest, context: Context) -> accounts_pb2.Tokens:
        """A password for tokens."""
        async with answering_errors(context):
            row = await self._check_password(request.user, request.password, context)
            return await self._sessions.begin(request.user, row.id)
        raise AssertionError("aborted")

    async def _check_password(self, name: str, password: str, context: Context) -> accounts_pb2.UserRow:
        """The user's row.

        Raises:
            NotAuthenticated: no such user, or another password; one can't tell which, nor by the time it takes.
            Overloaded: too many failures, or too many at once.
        """
        peer = peer_host(context.peer())
        known = name[:NOTE_MAX]  # what is remembered must not grow with what was sent
        self._limits.begin(known, peer, now_s=time.monotonic())
        row = self._accounts.user(name) if is_name(name) else None
        usable = row if row is not None and row.HasField("password") and not row.disabled else None
        if not await self._hasher.check(password, usable.password if usable is not None else None):
            self._metrics.logins.labels("refused").inc()
            log.warning("login_refused", user=known, peer=peer)
            raise NotAuthenticated(_WRONG)
        assert usable is not None
        now = self._accounts.user(name)
        if now is None or now.password != usable.password:  # it was changed while this one was being checked
            raise NotAuthenticated(_WRONG)
        self._limits.succeeded(known, peer)
        self._metrics.logins.labels("accepted").inc()
        if is_outdated(usable.password):
            await self._set_password(name, password)
        return usable

    async def Refresh(self, request: accounts_pb2.RefreshRequest, context: Context) -> accounts_pb2.Tokens:
        """A refresh token for new tokens."""
        async with answering_errors(context):
            return await self._sessions.renew(request.refresh)
        raise AssertionError("aborted")

    async def Logout(
        self, request: accounts_pb2.LogoutRequest, context: Context
    ) -> accounts_pb2.LogoutResponse:
        """Ends a login."""
        async with answering_errors(context):
            await self._sessions.end(request.refresh)
            return accounts_pb2.LogoutResponse()
        raise AssertionError("aborted")

    # -- users ---------------------------------------------------------------------------------------------

    async def PutUser(
        self, request: accounts_pb2.PutUserRequest, context: Context
    ) -> accounts_pb2.PutUserResponse:
        """Makes a user, or changes one."""
        async with answering_errors(context):
            check_name(request.name, "user")
            _check_groups(request.groups)
            password = await self._hasher.hash(request.password) if request.password else None
            async with self._changing:
                row = self._new_user(request)
                row.groups[:] = sorted(set(request.groups))
                row.disabled = request.disabled
                if password is not None:
                    row.password.CopyFrom(password)
                await self._change(
                    "user_put",
                    [Put(user_key(request.name), row.SerializeToString()), _REQUIRE],
                    user=request.name,
                )
            return accounts_pb2.PutUserResponse(id=row.id)
        raise AssertionError("aborted")

    def _new_user(self, request: accounts_pb2.PutUserRequest) -> accounts_pb2.UserRow:
        row = self._accounts.user(request.name)
        if request.must_be_new and row is not None:
            raise UsageError(f"there is a user {request.name} already")
        if request.must_be_new:
            return accounts_pb2.UserRow(id=uuid.uuid4().hex, created_us=self._now_us())
        copy = accounts_pb2.UserRow()
        copy.CopyFrom(self._user(request.name))
        return copy

    def _user(self, name: str) -> accounts_pb2.UserRow:
        row = self._accounts.user(name) if is_name(name) else None
        if row is None:
            raise UsageError(f"no user {name:.120}", remedy="`understudy user list` shows who is known")
        return row

    async def RemoveUser(
        self, request: accounts_pb2.RemoveUserRequest, context: Context
    ) -> accounts_pb2.RemoveUserResponse:
        """Removes a user with its permissions, tokens and logins; its realms stay."""
        async with answering_errors(context):
            async with self._changing:
                row = self._user(request.name)
                tokens = [
                    Delete(token_key(at))
                    for at, token in self._accounts.rows(TOKENS, accounts_pb2.TokenRow)
                    if token.user_id == row.id
                ]
                grants = grants_key(("user", request.name))
                gone: list[Operation] = [
                    Delete(user_key(request.name)),
                    DeleteRange(grants, after_prefix(grants)),
                    *tokens,
                ]
                await self._change("user_removed", gone, user=request.name)
                await self._sessions.end_all(row.id)
            return accounts_pb2.RemoveUserResponse()
        raise AssertionError("aborted")

    async def ListUsers(
        self, request: accounts_pb2.ListUsersRequest, context: Context
    ) -> AsyncIterator[accounts_pb2.UsersPage]:
        """All users, by name."""
        async with answering_errors(context):
            for page in pages(all_users(self._accounts)):
                yield accounts_pb2.UsersPage(users=page)

    async def SetPassword(
        self, request: accounts_pb2.SetPasswordRequest, context: Context
    ) -> accounts_pb2.SetPasswordResponse:
        """Changes a password, and ends all logins of that user."""
        async with answering_errors(context):
            principal = caller()
            if not principal.is_operator:
                if principal.user != request.name:
                    raise NotPermitted(f"{principal} may change its own password only")
                await self._check_password(request.name, request.old_password, context)
            await self._set_password(request.name, request.password)
            await self._sessions.end_all(self._user(request.name).id)
            return accounts_pb2.SetPasswordResponse()
        raise AssertionError("aborted")

    async def _set_password(self, name: str, password: str) -> None:
        hashed = await self._hasher.hash(password)
        async with self._changing:
            row = accounts_pb2.UserRow()
            row.CopyFrom(self._user(name))
            row.password.CopyFrom(hashed)
            await self._change("password_set", [Put(user_key(name), row.SerializeToString())], user=name)

    # -- permissions ---------------------------------------------------------------------------------------

    async def Grant(self, request: accounts_pb2.GrantRequest, context: Context) -> accounts_pb2.GrantResponse:
        """Permits a subject something; instead of what it was permitted with the same pattern before."""
        async with answering_errors(context):
            check_pattern(request.pattern)
            if not Level.READ <= request.level <= Level.MANAGE:
                raise UsageError(f"no level {request.level}", remedy="give read, write or manage")
            async with self._changing:
                subject = self._subject(request.subject)
                prefix = grants_key(subject)
                known = (
                    at
                    for at, row in self._accounts.rows(prefix, accounts_pb2.GrantRow)
                    if row.pattern == request.pattern
                )
                grant = next(known, None) or new_token_id()
                row = accounts_pb2.GrantRow(
                    pattern=request.pattern, level=request.level, created_us=self._now_us()
                )
                await self._change(
                    "granted",
                    [Put(prefix + grant.encode(), row.SerializeToString()), _REQUIRE],
                    subject="/".join(subject),
                    pattern=request.pattern,
                    permits=Level(request.level).name.lower(),  # `level` is the line's own
                )
            return accounts_pb2.GrantResponse(id=grant)
        raise AssertionError("aborted")

    def _subject(self, subject: accounts_pb2.Subject) -> Subject:
        kind = subject.WhichOneof("subject")
        if kind == "user":
            self._user(subject.user)
            return ("user", subject.user)
        if kind == "group":
            check_name(subject.group, "group")
            return ("group", subject.group)
        if kind == "anyone":
            return ANYONE
        raise UsageError("nobody to permit something to", remedy="name a user, a group, or anyone")

    async def RevokeGrant(
        self, request: accounts_pb2.RevokeGrantRequest, context: Context
    ) -> accounts_pb2.RevokeGrantResponse:
        """Takes a permission back."""
        async with answering_errors(context):
            async with self._changing:
                rows = self._accounts.rows(GRANTS, accounts_pb2.GrantRow)
                at = next((at for at, _ in rows if at.rpartition("/")[2] == request.id), None)
                if at is None:
                    raise UsageError(
                        f"no permission {request.id:.80}", remedy="`understudy grant list` shows them"
                    )
                await self._change("grant_revoked", [Delete(GRANTS + at.encode())], grant=at)
            return accounts_pb2.RevokeGrantResponse()
        raise AssertionError("aborted")

    async def ListGrants(
        self, request: accounts_pb2.ListGrantsRequest, context: Context
    ) -> AsyncIterator[accounts_pb2.GrantsPage]:
        """All permissions, by subject."""
        async with answering_errors(context):
            for page in pages(all_grants(self._accounts)):
                yield accounts_pb2.GrantsPage(grants=page)

    # -- tokens --------------------------------------------------------------------------------------------

    async def IssueToken(
        self, request: accounts_pb2.IssueTokenRequest, context: Context
    ) -> accounts_pb2.IssueTokenResponse:
        """A token that lasts; it is told this once."""
        async with answering_errors(context):
            kind = _KINDS.get(request.kind)
            if kind is None or len(request.note) > NOTE_MAX or request.lifetime_s < 0:
                raise UsageError("no token can be like that", remedy="see `understudy token issue --help`")
            async with self._changing:
                token = LastingToken.new(kind)
                row = accounts_pb2.TokenRow(
                    kind=request.kind, hash=token.hash, note=request.note, created_us=self._now_us()
                )
                if kind is Lasting.APP:
                    row.user, row.user_id = request.user, self._user(request.user).id
                if request.lifetime_s:
                    row.expires_us = row.created_us + int(request.lifetime_s * 1e6)
                operations = [Put(token_key(token.id), row.SerializeToString())]
                # An operator who only makes sure to get in later has not asked for tokens of everybody.
                if kind is not Lasting.ADMIN:
                    operations.append(_REQUIRE)
                await self._change("token_issued", operations, kind=kind.value, token=token.id)
            return accounts_pb2.IssueTokenResponse(id=token.id, token=str(token))
        raise AssertionError("aborted")

    async def RevokeToken(
        self, request: accounts_pb2.RevokeTokenRequest, context: Context
    ) -> accounts_pb2.RevokeTokenResponse:
        """A token that lasts, or a login, is worth nothing from now on."""
        async with answering_errors(context):
            async with self._changing:
                user_id, is_login, session = request.id.partition(".")
                if is_login and await self._sessions.end_one(user_id[:80], session[:80]):
                    log.info("login_revoked", by=str(caller()), login=request.id)
                elif not is_login and self._accounts.token(request.id[:80]) is not None:
                    await self._change("token_revoked", [Delete(token_key(request.id))], token=request.id)
                else:
                    raise UsageError(
                        f"no token {request.id:.80}", remedy="`understudy token list` shows them"
                    )
            return accounts_pb2.RevokeTokenResponse()
        raise AssertionError("aborted")

    async def ListTokens(
        self, request: accounts_pb2.ListTokensRequest, context: Context
    ) -> AsyncIterator[accounts_pb2.TokensPage]:
        """All tokens that last, then all logins that have not expired."""
        async with answering_errors(context):
            for page in pages(all_tokens(self._accounts, now_us=self._now_us())):
                yield accounts_pb2.TokensPage(tokens=page)

    # -- keys and policy -----------------------------------------------------------------------------------

    async def RotateKeys(
        self, request: accounts_pb2.RotateKeysRequest, context: Context
    ) -> accounts_pb2.RotateKeysResponse:
        """A new key signs from now on."""
        async with answering_errors(context):
            key_id = await self._sessions.rotate()
            log.info("key_rotated", by=str(caller()), key=key_id)
            return accounts_pb2.RotateKeysResponse(key_id=key_id)
        raise AssertionError("aborted")

    async def SetPolicy(
        self, request: accounts_pb2.SetPolicyRequest, context: Context
    ) -> accounts_pb2.SetPolicyResponse:
        """What this server allows clients to do with a realm."""
        async with answering_errors(context):
            path = check_realm_path(request.realm)
            if is_system_realm(path):
                raise NotPermitted(f"realm {path} is the system's own")
            row = accounts_pb2.PolicyRow(recovery_forbidden=request.recovery_forbidden)
            await self._change("policy_set", [Put(policy_key(path), row.SerializeToString())], realm=path)
            return accounts_pb2.SetPolicyResponse()
        raise AssertionError("aborted")


_REQUIRE = Put(REQUIRED, b"1")


def _check_groups(groups: Iterable[str]) -> None:
    for number, group in enumerate(groups, 1):
        check_name(group, "group")
        if number > GROUPS_MAX:
            raise UsageError(f"more than {GROUPS_MAX} groups")
