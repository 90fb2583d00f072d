"""Accounts on a replica: it has them all, and looks at them at each call, but only its primary changes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from understudy.common.errors import NotPrimary
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors
from understudy.v1 import accounts_pb2_grpc


class ReplicaAccountsService(accounts_pb2_grpc.AccountsServicer):
    """Refuses, naming who does not."""

    async def _refuse(self, request: Any, context: Context) -> Any:
        async with answering_errors(context):
            raise NotPrimary("this server is a replica", remedy="ask the primary")

    async def _refuse_list(self, request: Any, context: Context) -> AsyncIterator[Any]:
        await self._refuse(request, context)
        yield

    Login = Refresh = Logout = _refuse
    PutUser = RemoveUser = SetPassword = _refuse
    Grant = RevokeGrant = IssueToken = RevokeToken = RotateKeys = SetPolicy = _refuse
    ListUsers = ListGrants = ListTokens = _refuse_list
