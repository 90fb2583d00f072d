"""Addresses as people give them, ``HOST:PORT``, and where a server may listen."""

from __future__ import annotations

import ipaddress
import re
import socket

from understudy.common.errors import NotPermitted, UsageError

PORT_MAX = 65535
# Without brackets, the last group of `::1:7850` could be a port or not.
_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:/,\s]+)):(?P<port>[0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host stands in brackets, and is returned without them.

    Raises:
        UsageError: it is not of that form.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or int(match["port"]) > PORT_MAX or not _is_ipv6_or_none(match["ipv6"]):
        raise UsageError(
            f"bad address {address!r:.200}", remedy="give HOST:PORT, for example 127.0.0.1:7850 or [::1]:7850"
        )
    return match["ipv6"] or match["host"], int(match["port"])


def _is_ipv6_or_none(host: str | None) -> bool:
    try:
        return host is None or bool(ipaddress.IPv6Address(host).packed)
    except ValueError:
        return False


def check_listen(address: str, *, has_tls: bool) -> None:
    """Refuses to listen beyond this machine in the clear (G10): without TLS, a server is in protected mode.

    Raises:
        NotPermitted: the address is not loopback and there is no TLS.
        UsageError: it is no address.
    """
    host, _ = split_address(address)
    if not has_tls and not is_loopback(host):
        raise NotPermitted(
            f"refusing to listen on {address} without TLS: in protected mode, only peers on this machine are served",
            remedy="listen on 127.0.0.1, or give --tls-cert and --tls-key: "
            "`understudy keys init DIR --host NAME` makes them",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by that name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(address: str) -> None:
    """Refuses an address that can't be listened on, before anything is made on disk.

    Raises:
        UsageError: it is in use, or not an address of this machine.
    """
    host, port = split_address(address)
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        raise not_listening(address) from error


def not_listening(address: str) -> UsageError:
    return UsageError(
        f"can't listen on {address}: it is in use, or not an address of this machine",
        remedy="choose another --listen address",
    )
