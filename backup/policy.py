"""Policies of scheduled backups: the tables ``[[backup]]`` of the TOML file that a server is started with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from understudy.backup.archive_options import DEFAULT_LEVEL
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.places import are_apart, place_of
from understudy.backup.policy_table import PolicyTable, found
from understudy.backup.repository import check_url, folder_of_url
from understudy.backup.retention import Retention
from understudy.backup.schedule import Schedule
from understudy.backup.selection import Selection
from understudy.backup.zones import zone_named
from understudy.common.errors import UsageError
from understudy.common.secret_files import read_private

NAME_CHARACTERS_MAX = 60
_LEVEL_MAX = 19
_RETRIES_MAX = 100
_RETRY_WAIT_S_MAX = 24 * 3600
_DRILL_WARN_DAYS_MAX = 3650
_RETENTION_KEYS = sorted({field.name for field in fields(Retention)} - {"zone"})
_CRON = 'a cron expression such as "30 2 * * *"'
_ZONE = 'a time zone such as "Europe/Berlin"'
_FOLDERS = 'folders and URLs such as ["/backup"]'
_KEYS = 'public keys such as ["age1..."]'
_PATTERNS = 'patterns of realms such as ["/orders/**"]'
_PROGRAM = 'a program and its arguments such as ["/usr/bin/logger", "backup"]'
_EACH_MAX = 1_000_000  # of what a retention counts: more than anybody makes in a lifetime


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

    @property
    def is_encrypted(self) -> bool:
        """Whether what it stores is."""
        return bool(self.recipients) or self.passphrase_file is not None

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
        UsageError: it can't be read, or says what can't be; with the file, the policy and the setting.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError:  # an editor's, not a mistake with TOML; and what it holds is not for a log
        raise UsageError(f"{path} is no text in UTF-8", remedy="save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not TOML: {error}", remedy='texts stand in quotes, as in name = "nightly"'
        ) from error
    tables = content.get("backup", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(
            f"{path}: backup is {found(tables)}, and no list of tables",
            remedy="begin each policy with [[backup]], in two brackets each",
        )
    policies: dict[str, Policy] = {}
    for number, table in enumerate(tables, 1):
        policy = parse_policy(table, str(path), data_dir, number=number)
        if policy.name in policies:
            raise UsageError(
                f"{path}: two backup policies have the name {policy.name!r}",
                remedy="give each a name of its own",
            )
        policies[policy.name] = policy
    _check_encrypted_alike(list(policies.values()), path)
    return policies


def _check_encrypted_alike(policies: list[Policy], path: Path) -> None:
    """In one repository all is encrypted, or nothing: both kinds would ship the same log there."""
    encrypted = [policy for policy in policies if policy.is_encrypted]
    for plain in (policy for policy in policies if not policy.is_encrypted):
        for other in encrypted:
            shared = set(map(place_of, plain.repositories)) & set(map(place_of, other.repositories))
            if shared:
                raise UsageError(
                    f"{path}: backup policy {other.name!r} encrypts what it stores in {min(shared)}, "
                    f"and {plain.name!r} does not",
                    remedy="give both recipients or a passphrase_file, or each a repository of its own",
                )


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


def parse_policy(
    table: Mapping[str, Any], where: str, data_dir: Path | None = None, *, number: int = 1
) -> Policy:
    """One table.

    Args:
        where: the file's name, for messages.
        data_dir: as of :func:`read_policies`.
        number: which of the file's, for messages about its name.

    Raises:
        UsageError: a key is unknown, or a value can't be; with the policy and the key.
    """
    left = dict(table)
    name = left.pop("name", None)
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= NAME_CHARACTERS_MAX:
        what = "has no name" if name is None else f"name is {found(name)}"
        raise UsageError(
            f"{where}, backup policy number {number}: {what}",
            remedy=f'give 1 to {NAME_CHARACTERS_MAX} printable characters, such as name = "nightly"',
        )
    settings = PolicyTable(left, f"{where}, backup policy {name!r}")
    policy = _policy(name, settings)
    settings.check_all_known([*(field.name for field in fields(Policy)), "zone"])
    _check(policy, settings, data_dir)
    return policy


def _policy(name: str, settings: PolicyTable) -> Policy:
    zone = _zone(settings)
    realms, exclude = (settings.texts(key, expected=_PATTERNS) for key in ("realms", "exclude"))
    return Policy(
        name=name,
        realms=realms,
        exclude=exclude,
        portable=settings.flag("portable", False),
        schedule=_schedule(settings, zone),
        repositories=settings.texts("repositories", expected=_FOLDERS),
        recipients=settings.texts("recipients", expected=_KEYS),
        passphrase_file=settings.path("passphrase_file"),
        rate=settings.rate("rate"),
        level=settings.whole("level", DEFAULT_LEVEL, least=1, most=_LEVEL_MAX),
        retention=_retention(settings, zone),
        archive_log=settings.flag("archive_log", not (realms or exclude)),
        drill=settings.flag("drill", False),
        identity_file=settings.path("identity_file"),
        staging=settings.path("staging"),
        drill_warn_days=settings.whole("drill_warn_days", 7, least=1, most=_DRILL_WARN_DAYS_MAX),
        before=settings.texts("before", expected=_PROGRAM),
        after=settings.texts("after", expected=_PROGRAM),
        on_failure=settings.texts("on_failure", expected=_PROGRAM),
        retries=settings.whole("retries", 1, most=_RETRIES_MAX),
        retry_wait_s=settings.number("retry_wait_s", 60, most=_RETRY_WAIT_S_MAX),
    )


def _zone(settings: PolicyTable) -> str:
    zone = settings.text("zone", expected=_ZONE) or "UTC"
    with settings.checking("zone", _ZONE):
        zone_named(zone)
    return zone


def _schedule(settings: PolicyTable, zone: str) -> Schedule | None:
    expression = settings.text("schedule", expected=_CRON)
    if expression is None:
        return None
    with settings.checking("schedule", _CRON):
        return Schedule.parse(expression, zone)


def _retention(settings: PolicyTable, zone: str) -> Retention:
    numbers = settings.table("retention", expected="a table such as { daily = 7, weekly = 4 }")
    counts = {key: numbers.whole(key, 0, most=_EACH_MAX) for key in _RETENTION_KEYS if key in numbers}
    numbers.check_all_known(_RETENTION_KEYS)
    return Retention(**counts, zone=zone)


def _check(policy: Policy, settings: PolicyTable, data_dir: Path | None) -> None:
    """Refuses values that can't be, and those that can't be together."""
    _check_repositories(policy.repositories, settings)
    if policy.staging is not None:
        _check_staging(policy.staging, policy.repositories, settings, data_dir)
    for key, patterns in (("realms", policy.realms), ("exclude", policy.exclude)):
        with settings.checking(key, _PATTERNS):
            Selection(realms=patterns).check()
    if policy.recipients:
        with settings.checking("recipients", _KEYS):
            Encryption("", policy.recipients).check()
    _check_together(policy, settings)


def _check_together(policy: Policy, settings: PolicyTable) -> None:
    if policy.recipients and policy.passphrase_file is not None:
        raise settings.wrong("both recipients and passphrase_file are given", "give one of them")
    if policy.archive_log and policy.selection.is_filtered:
        raise settings.wrong(
            "archive_log is true, with realms or exclude: the log holds all realms",
            "leave it out, or leave it to a policy without them",
        )
    if policy.drill and policy.recipients and policy.identity_file is None:
        raise settings.wrong(
            "drill is true, with recipients and without identity_file: nothing here opens the backups",
            'set identity_file = "FILE" to a key of one of the recipients',
        )


def _check_repositories(urls: tuple[str, ...], settings: PolicyTable) -> None:
    if not urls:
        raise settings.wrong("repositories is missing", 'say where to: repositories = ["/backup"]')
    for url in urls:
        with settings.checking("repositories", _FOLDERS):
            check_url(url)
    if len(set(urls)) < len(urls):
        raise settings.wrong("repositories: one of them is named twice", "name each once")


def _check_staging(
    staging: Path, repositories: tuple[str, ...], settings: PolicyTable, data_dir: Path | None
) -> None:
    """Drills replace it as a whole, and restore beside it."""
    for place in (data_dir, *map(folder_of_url, repositories)):
        if place is not None and not are_apart(staging, place):
            raise settings.wrong(
                f"staging is {str(staging)!r}, and that and {place} lie within each other",
                "choose another place for it",
            )
