"""Policies of scheduled backups: the tables ``[[backup]]`` of the TOML file that a server is started with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from understudy.backup.archive_options import DEFAULT_LEVEL
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.places import are_apart
from understudy.backup.repository import check_url, folder_of_url
from understudy.backup.retention import Retention
from understudy.backup.schedule import Schedule
from understudy.backup.selection import Selection
from understudy.common.errors import UsageError
from understudy.common.secret_files import read_private
from understudy.common.sizes import parse_size

NAME_CHARACTERS_MAX = 60
_LEVELS = range(1, 20)
_RETRIES_MAX = 100
_RETRY_WAIT_S_MAX = 24 * 3600
_DRILL_WARN_DAYS_MAX = 3650
_RETENTION_KEYS = frozenset(field.name for field in fields(Retention)) - {"zone"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is backed up when, to where, and what is kept."""

    name: str
    schedule: Schedule | None  # None: only when asked for
    repositories: tuple[str, ...]
    realms: tuple[str, ...] = ()  # patterns; none: all
    exclude: tuple[str, ...] = ()
    portable: bool = False
    recipients: tuple[str, ...] = ()
    passphrase_file: Path | None = None
    rate: int | None = None  # bytes a second
    level: int = DEFAULT_LEVEL  # of zstd
    retention: Retention = Retention()  # noqa: RUF009  # frozen
    archive_log: bool = True  # ship the log too, so that restores go to any moment
    drill: bool = False  # restore each backup after it was made
    identity_file: Path | None = None  # opens for drills what is encrypted for recipients
    staging: Path | None = None  # where the last proven backup is kept as a data directory
    drill_warn_days: int = 7  # without a drill for so long, `status` warns
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    on_failure: tuple[str, ...] = ()
    retries: int = 1
    retry_wait_s: float = 60.0

    @property
    def selection(self) -> Selection:
        """What of the source its backups hold, and in which form."""
        return Selection(realms=self.realms, exclude=self.exclude, portable=self.portable)

    def encryption(self) -> Encryption | None:
        """What its backups are encrypted with, read anew each time: older backups keep theirs.

        Raises:
            UsageError: the file holds no passphrase.
            NotPermitted: others may read it.
        """
        if self.passphrase_file is None:
            return Encryption("", self.recipients) if self.recipients else None
        return Encryption(read_passphrase(self.passphrase_file))

    def unlocking(self) -> Unlocking:
        """What opens its backups again, for drills.

        Raises:
            UsageError: there is nothing that does, or a file can't be read.
            NotPermitted: others may read a file.
        """
        if self.recipients and self.identity_file is None:
            raise UsageError(
                f"the backups of {self.name} are encrypted for recipients, and the policy has no key that opens them",
                remedy='set identity_file = "FILE" in the policy',
            )
        if self.identity_file is not None:
            read_private(self.identity_file)  # refuses what others may read
        return Unlocking.given(
            passphrases=[read_passphrase(self.passphrase_file)] if self.passphrase_file else [],
            identity_files=[self.identity_file] if self.identity_file else [],
        )


def read_passphrase(path: Path) -> str:
    """The first line of a file that nobody else may read.

    Raises:
        NotPermitted: others may read it.
        UsageError: it can't be read, is empty, or is no text.
    """
    try:
        text = read_private(path).decode()
    except UnicodeDecodeError:  # which holds the passphrase
        raise UsageError(
            f"{path} is no text in UTF-8", remedy="write a passphrase on its first line"
        ) from None
    passphrase = text.partition("\n")[0].removesuffix("\r")
    if not passphrase:
        raise UsageError(f"{path} holds no passphrase", remedy="write it on the first line")
    return passphrase


def read_policies(path: Path, data_dir: Path | None = None) -> dict[str, Policy]:
    """The policies of a file, by name.

    Args:
        data_dir: of the node that they are for, if that is known.

    Raises:
        UsageError: it can't be read, or says what can't be; with the policy's name and the key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    tables = content.get("backup", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: 'backup' is no list of tables", remedy="begin each policy with [[backup]]")
    policies: dict[str, Policy] = {}
    for table in tables:
        policy = parse_policy(table, str(path), data_dir)
        if policy.name in policies:
            raise UsageError(f"{path}: two policies are called {policy.name!r}")
        policies[policy.name] = policy
    return policies


def find_policy(path: Path, name: str, data_dir: Path | None) -> Policy:
    """The policy of that name.

    Args:
        data_dir: as of :func:`read_policies`.

    Raises:
        UsageError: the file has none, or can't be read.
    """
    policies = read_policies(path, data_dir)
    if name not in policies:
        known = f"known: {', '.join(sorted(policies))}" if policies else "the file has none"
        raise UsageError(f"{path} has no backup policy {name!r}", remedy=known)
    return policies[name]


def parse_policy(table: Mapping[str, Any], where: str, data_dir: Path | None = None) -> Policy:
    """One table.

    Args:
        where: the file's name, for messages.
        data_dir: as of :func:`read_policies`.

    Raises:
        UsageError: a key is unknown, or a value can't be.
    """
    name = table.get("name")
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= NAME_CHARACTERS_MAX:
        raise UsageError(
            f"{where}: a policy's name is {name!r}",
            remedy=f"give 1 to {NAME_CHARACTERS_MAX} printable characters",
        )
    return _Table(table, f"{where}, backup policy {name!r}", data_dir).policy(name)


class _Table:
    """A policy's table while it is being read."""

    def __init__(self, table: Mapping[str, Any], where: str, data_dir: Path | None) -> None:
        self._left = {key: value for key, value in table.items() if key != "name"}
        self._where = where
        self._data_dir = data_dir

    def policy(self, name: str) -> Policy:
        zone = self._take("zone", str, "UTC")
        expression = self._take("schedule", str, "")
        realms, exclude = self._words("realms"), self._words("exclude")
        policy = Policy(
            name=name,
            realms=realms,
            exclude=exclude,
            portable=self._take("portable", bool, False),
            schedule=Schedule.parse(expression, zone) if expression else None,
            repositories=self._words("repositories"),
            recipients=self._words("recipients"),
            passphrase_file=self._path("passphrase_file"),
            rate=self._rate(),
            level=self._take("level", int, DEFAULT_LEVEL),
            retention=self._retention(zone),
            archive_log=self._take("archive_log", bool, not (realms or exclude)),
            drill=self._take("drill", bool, False),
            identity_file=self._path("identity_file"),
            staging=self._path("staging"),
            drill_warn_days=self._take("drill_warn_days", int, 7),
            before=self._words("before"),
            after=self._words("after"),
            on_failure=self._words("on_failure"),
            retries=self._take("retries", int, 1),
            retry_wait_s=float(self._take("retry_wait_s", (int, float), 60)),
        )
        self._check(policy)
        return policy

    def _check(self, policy: Policy) -> None:
        if self._left:
            known = [*sorted(field.name for field in fields(Policy)), "zone"]
            raise self._wrong(f"unknown key {min(self._left)!r}", f"known: {', '.join(known)}")
        if not policy.repositories:
            raise self._wrong("no repositories", 'say where to: repositories = ["/backup"]')
        for url in policy.repositories:
            check_url(url)
        if policy.level not in _LEVELS:
            raise self._wrong(f"level is {policy.level}", "give 1 to 19")
        if len(set(policy.repositories)) < len(policy.repositories):
            raise self._wrong("a repository is named twice", "name each once")
        if policy.staging is not None:
            self._check_staging(policy.staging, policy.repositories)
        if not (
            0 <= policy.retries <= _RETRIES_MAX
            and 0 <= policy.retry_wait_s <= _RETRY_WAIT_S_MAX
            and 1 <= policy.drill_warn_days <= _DRILL_WARN_DAYS_MAX
        ):
            raise self._wrong(
                "retries, retry_wait_s or drill_warn_days is out of range",
                f"give up to {_RETRIES_MAX} retries, {_RETRY_WAIT_S_MAX} seconds, and 1 to {_DRILL_WARN_DAYS_MAX} days",
            )
        if policy.recipients and policy.passphrase_file is not None:
            raise self._wrong("recipients and passphrase_file", "give one of them")
        policy.selection.check()
        if policy.archive_log and policy.selection.is_filtered:
            raise self._wrong(
                "archive_log with realms or exclude: the log holds all realms",
                "leave it out, or leave it to a policy without them",
            )
        if policy.drill and policy.recipients and policy.identity_file is None:
            raise self._wrong(
                "drill, and recipients without identity_file: nothing here opens the backups",
                'set identity_file = "FILE" to a key of one of the recipients',
            )
        if policy.recipients:
            Encryption("", policy.recipients).check()

    def _check_staging(self, staging: Path, repositories: tuple[str, ...]) -> None:
        """Drills replace it as a whole, and restore beside it."""
        if not staging.is_absolute():
            raise self._wrong(f"staging is {str(staging)!r}", "give the whole path, from / on")
        for place in (self._data_dir, *map(folder_of_url, repositories)):
            if place is not None and not are_apart(staging, place):
                raise self._wrong(
                    f"staging is {str(staging)!r}, and that and {place} lie within each other",
                    "choose another place for it",
                )

    def _take(self, key: str, kind: Any, default: Any) -> Any:
        value = self._left.pop(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(f"{key} is {value!r}", "see the README's chapter on backups")
        return value

    def _words(self, key: str) -> tuple[str, ...]:
        words = self._take(key, list, [])
        if not all(isinstance(word, str) and word for word in words):
            raise self._wrong(f"{key} is {words!r}", "give a list of texts")
        return tuple(words)

    def _path(self, key: str) -> Path | None:
        text = self._take(key, str, "")
        return Path(text) if text else None

    def _rate(self) -> int | None:
        rate = self._take("rate", (str, int), 0)
        if isinstance(rate, str):
            rate = parse_size(rate.removesuffix("/s"))
        if rate < 0:
            raise self._wrong(f"rate is {rate}", "give bytes a second, such as 50MB/s")
        return rate or None

    def _retention(self, zone: str) -> Retention:
        table = self._take("retention", dict, {})
        for key, value in table.items():
            if key not in _RETENTION_KEYS:
                raise self._wrong(
                    f"unknown key {key!r} in retention", f"known: {', '.join(sorted(_RETENTION_KEYS))}"
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self._wrong(f"{key} in retention is {value!r}", "give a number, 0 or more")
        return Retention(**table, zone=zone)

    def _wrong(self, what: str, remedy: str) -> UsageError:
        return UsageError(f"{self._where}: {what}", remedy=remedy)
