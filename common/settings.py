"""Settings of the two processes: flags first, then ``UNDERSTUDY_*`` variables, then a TOML file.

They become one frozen object, checked once here; nothing behind it asks the environment.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from understudy.common.addresses import check_listen, split_address
from understudy.common.credentials import Credentials
from understudy.common.errors import UsageError
from understudy.common.sizes import parse_size
from understudy.common.tls import ServerTls
from understudy.common.types import Durability

ENVIRONMENT_PREFIX = "UNDERSTUDY_"
LOG_FLOOR_BYTES = 256 << 20  # a replica that was away for a short while must not need a bootstrap
LOG_CEILING_BYTES = 8 << 30  # a replica that never comes back must not fill the disk
_SEGMENT_BYTES = 64 << 20
REPLICA_ID_MAX = 100
HEAL_WINDOW_S_MAX = 86_400.0  # no writes meanwhile: a day of that is more than anybody means


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimarySettings:
    """What ``understudy primary`` runs with."""

    data_dir: Path
    listen: str = "127.0.0.1:7850"
    durability: Durability = Durability.LOCAL
    sync_replicas: int = 1
    degrade_after_s: float | None = None  # None: wait for replicas as long as it takes
    heal_window_s: float = 0.0  # after a promotion, for tails only
    log_floor_bytes: int = LOG_FLOOR_BYTES
    log_ceiling_bytes: int = LOG_CEILING_BYTES
    metrics: str | None = None
    backup_policies: Path | None = (
        None  # a TOML file with tables [[backup]]; the one of these settings, if it has any
    )
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None  # signs clients' certificates

    def validate(self) -> None:
        """Refuses what can't be.

        Raises:
            UsageError, NotPermitted: with the setting's name.
        """
        _check_listening(self)
        if self.sync_replicas < 1:
            raise UsageError(f"sync_replicas is {self.sync_replicas}", remedy="give 1 or more")
        if self.degrade_after_s is not None and not self.degrade_after_s >= 0:  # NaN is neither
            raise UsageError(f"degrade_after_s is {self.degrade_after_s}", remedy="give seconds, 0 or more")
        if not 0 <= self.heal_window_s <= HEAL_WINDOW_S_MAX:
            raise UsageError(
                f"heal_window_s is {self.heal_window_s}",
                remedy=f"give seconds, 0 to {HEAL_WINDOW_S_MAX:,.0f}",
            )
        if self.log_floor_bytes < 0 or self.log_ceiling_bytes < max(self.log_floor_bytes, 2 * _SEGMENT_BYTES):
            raise UsageError(
                f"log_floor_bytes is {self.log_floor_bytes:,} and log_ceiling_bytes {self.log_ceiling_bytes:,}",
                remedy=f"the ceiling is at least the floor and at least {2 * _SEGMENT_BYTES:,}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """What ``understudy replica`` runs with."""

    data_dir: Path
    primary: str
    listen: str = "127.0.0.1:7851"
    id: str = dataclasses.field(default_factory=socket.gethostname)
    bootstrap_rate: int | None = None  # bytes a second; None: as fast as it goes
    log_floor_bytes: int = LOG_FLOOR_BYTES
    metrics: str | None = None
    backup_policies: Path | None = (
        None  # a TOML file with tables [[backup]]; the one of these settings, if it has any
    )
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None  # signs clients' certificates
    ca: Path | None = None  # signs the primary's certificate
    cert: Path | None = None  # this replica's own, to show the primary
    cert_key: Path | None = None
    token: str | None = dataclasses.field(default=None, repr=False)  # or @FILE

    @property
    def credentials(self) -> Credentials:
        """What it shows the primary."""
        return Credentials.given(ca=self.ca, cert=self.cert, key=self.cert_key, token=self.token)

    def validate(self) -> None:
        """Refuses what can't be.

        Raises:
            UsageError, NotPermitted: with the setting's name.
        """
        _check_listening(self)
        for address in self.primary.split(","):
            split_address(address.strip())
        self.credentials.check()
        if not self.id.isprintable() or not 1 <= len(self.id) <= REPLICA_ID_MAX:
            raise UsageError(
                f"bad replica id {self.id!r}", remedy=f"give 1 to {REPLICA_ID_MAX} printable characters"
            )
        if self.bootstrap_rate is not None and self.bootstrap_rate < 1:
            raise UsageError(
                f"bootstrap_rate is {self.bootstrap_rate}", remedy="give bytes a second, 1 or more"
            )


def _check_listening(settings: PrimarySettings | ReplicaSettings) -> None:
    has_tls = load_tls(settings) is not None
    for address in (settings.listen, settings.metrics):
        if address is not None:
            check_listen(address, has_tls=has_tls)


def load_tls(settings: PrimarySettings | ReplicaSettings) -> ServerTls | None:
    """The certificate that a server shows; None: it has no TLS, and is in protected mode.

    Raises:
        UsageError, NotPermitted: of the files, or one is missing.
    """
    cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_ca
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None:
        raise UsageError("TLS needs a certificate and its key", remedy="give both --tls-cert and --tls-key")
    return ServerTls(cert, key, ca)


_S = TypeVar("_S", PrimarySettings, ReplicaSettings)


def load_settings(
    kind: type[_S],
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> _S:
    """The settings of ``kind``, checked.

    Args:
        kind: which process.
        flags: from the command line; None means not given.
        file: a TOML file with the same names in a table ``[primary]`` or ``[replica]``.
        environment: where ``UNDERSTUDY_DATA_DIR`` and so on are looked up.

    Raises:
        UsageError, NotPermitted: a value can't be, a key is unknown, or a required one is missing.
    """
    settings = read_settings(kind, flags, file=file, environment=environment)
    settings.validate()
    return settings


def read_settings(
    kind: type[_S],
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> _S:
    """As :func:`load_settings`, but whether they go together is not checked.

    Raises:
        UsageError: a value is of another type, a key is unknown, or a required one is missing.
    """
    section = kind.__name__.removesuffix("Settings").lower()
    known = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    raw: dict[str, Any] = dict(_from_file(file, section, set(known))) if file else {}
    raw |= _from_environment(environment, set(known))
    raw |= {name: value for name, value in flags.items() if value is not None}
    values = {name: _convert(name, value, hints[name]) for name, value in raw.items()}
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise UsageError(
                f"{name} is not set",
                remedy=f"give --{name.replace('_', '-')} or {ENVIRONMENT_PREFIX}{name.upper()}",
            )
    return kind(**values)


def _from_environment(environment: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """The variables that are ours; the other process's are left alone, unknown ones refused."""
    ours = {field.name for kind in (PrimarySettings, ReplicaSettings) for field in dataclasses.fields(kind)}
    found = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
    for name in found:
        if name not in ours and name != "passphrase":  # of backups, for commands
            raise UsageError(
                f"unknown variable {ENVIRONMENT_PREFIX}{name.upper()}",
                remedy=f"known: {', '.join(ENVIRONMENT_PREFIX + name.upper() for name in sorted(known))}",
            )
    return {name: value for name, value in found.items() if name in known}


def _from_file(path: Path, section: str, known: set[str]) -> Mapping[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not text, a number or a depth without end
        raise UsageError(f"{path} is not TOML: {error}") from error
    for name in content:
        if name not in ("primary", "replica", "backup"):
            raise UsageError(
                f"{path}: unknown table or key {name!r}",
                remedy="known are [primary], [replica] and [[backup]]",
            )
    table = content.get(section, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {section!r} is no table", remedy=f"write [{section}] on a line of its own")
    for name in table:
        if name not in known:
            raise UsageError(
                f"{path}: unknown key {name!r} in [{section}]", remedy=f"known: {', '.join(sorted(known))}"
            )
    policies = {"backup_policies": str(path)} if "backup" in content else {}
    return policies | table


def _convert(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    try:
        if hint is Durability and not isinstance(value, Durability):
            return Durability.parse(str(value))
        if hint is int and isinstance(value, str):
            return parse_size(value)
        if hint is int and not isinstance(value, int):
            raise TypeError("not a whole number")
        if hint is Path and "\0" in str(value):
            raise ValueError("no name of a file")
        return value if isinstance(value, hint) else hint(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"bad value {value!r} for {name}", remedy=f"give a value of type {hint.__name__}"
        ) from error
