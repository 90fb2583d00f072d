"""Before a command writes: is this a server that takes writes?"""

from __future__ import annotations

from understudy.common.directory import Role
from understudy.common.errors import Fenced, NotPrimary
from understudy.v1 import admin_pb2


def check_primary(status: admin_pb2.StatusResponse, server: str) -> None:
    """Refuses at once what a connection would wait for: that ``server`` becomes a primary.

    Raises:
        NotPrimary, Fenced.
    """
    if status.role == Role.FENCED:
        raise Fenced(f"{server} is fenced: another primary reigns", remedy="give the address of that one")
    if status.role != Role.PRIMARY:
        raise NotPrimary(f"{server} is a {status.role}", remedy="give the address of the primary")
