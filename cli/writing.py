"""Around a command that writes: is this a server that takes writes, and why does it not answer?"""

from __future__ import annotations

from understudy.client import Server
from understudy.common.directory import Role
from understudy.common.errors import Fenced, NotPrimary, OutcomeUnknown, UnderstudyError
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


def unanswered(connection: Server, realm: str, timeout_s: float) -> OutcomeUnknown:
    """The error for a transaction that was not answered in time, with what the server itself says about it."""
    try:
        why = "; ".join(connection.status(timeout_s=1).warnings)
    except UnderstudyError as error:
        why = error.message
    return OutcomeUnknown(
        f"a transaction on {realm} was not acknowledged within {timeout_s:g} s" + (f": {why}" if why else ""),
        remedy="it may take effect yet: look before you repeat it",
    )
