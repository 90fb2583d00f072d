"""Settings: where they come from, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.common.certificate_authority import KeyFiles
from understudy.common.errors import ExitCode, NotPermitted, UsageError
from understudy.common.settings import LOG_CEILING_BYTES, PrimarySettings, ReplicaSettings, load_settings
from understudy.common.types import Durability


def primary(
    flags: dict[str, Any] | None = None,
    *,
    file: Path | None = None,
    environment: dict[str, str] | None = None,
) -> PrimarySettings:
    """A primary's settings from these sources alone, with a data directory."""
    given = {"data_dir": Path("data"), **(flags or {})}
    return load_settings(PrimarySettings, given, file=file, environment=environment or {})


def toml(folder: Path, text: str) -> Path:
    """A TOML file."""
    path = folder / "understudy.toml"
    path.write_text(text)
    return path


def test_a_flag_wins_over_a_variable_and_that_over_the_file(tmp_path: Path) -> None:
    """Each setting comes from the first of flag, variable, file and default that has it."""
    settings = primary(
        {"listen": "127.0.0.1:1"},
        environment={"UNDERSTUDY_LISTEN": "127.0.0.1:2", "UNDERSTUDY_SYNC_REPLICAS": "2"},
        file=toml(
            tmp_path,
            '[primary]\nlisten = "127.0.0.1:3"\nsync_replicas = 3\ndurability = "replica"\ndegrade_after_s = 4',
        ),
    )
    assert settings.listen == "127.0.0.1:1"
    assert settings.sync_replicas == 2
    assert settings.durability is Durability.REPLICA
    assert settings.degrade_after_s == 4.0
    assert settings.log_ceiling_bytes == LOG_CEILING_BYTES


def test_a_flag_not_given_is_no_setting() -> None:
    """A flag of None leaves the word to the variable."""
    settings = primary({"sync_replicas": None}, environment={"UNDERSTUDY_SYNC_REPLICAS": "2"})
    assert settings.sync_replicas == 2


def test_one_file_serves_both_processes(tmp_path: Path) -> None:
    """Each process reads its own table of a file and leaves the other's alone."""
    file = toml(
        tmp_path,
        '[primary]\ndata_dir = "a"\n[replica]\ndata_dir = "b"\nprimary = "127.0.0.1:7850"\nid = "second"',
    )
    first = load_settings(PrimarySettings, {}, file=file, environment={})
    second = load_settings(ReplicaSettings, {}, file=file, environment={})
    assert (first.data_dir, second.data_dir, second.id) == (Path("a"), Path("b"), "second")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[primary]\nlisten_on = 1", "listen_on"),
        ("[primery]\n", "primery"),
        ('listen = "127.0.0.1:1"', "listen"),
        ('[primary]\nprimary = "127.0.0.1:1"', "primary"),
        ("[primary", "understudy.toml"),
        ("[primary]\nsync_replicas = []", "sync_replicas"),
        ('[primary]\ndegrade_after_s = "soon"', "degrade_after_s"),
        ("[primary]\ninsecure = true", "insecure"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    """An unknown table or key, bad TOML, and a value of another type are usage errors that name them."""
    with pytest.raises(UsageError, match=named) as raised:
        primary(file=toml(tmp_path, text))
    assert raised.value.exit_code is ExitCode.USAGE


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A configuration file that can't be read is an error, not a reason to go by the defaults."""
    with pytest.raises(UsageError, match=r"absent\.toml"):
        primary(file=tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("kind", "flags", "missing"),
    [(PrimarySettings, {}, "--data-dir"), (ReplicaSettings, {"data_dir": Path("data")}, "--primary")],
)
def test_what_must_be_set_is_asked_for(kind: Any, flags: dict[str, Any], missing: str) -> None:
    """A setting without default that is nowhere set is named by its flag and its variable."""
    with pytest.raises(UsageError, match=missing) as raised:
        load_settings(kind, flags, environment={})
    assert "UNDERSTUDY_" in raised.value.remedy


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"listen": "7850"}, "7850"),
        ({"listen": "127.0.0.1:99999"}, "99999"),
        ({"listen": "127.0.0.1:"}, "bad address"),
        ({"metrics": "nowhere"}, "nowhere"),
        ({"sync_replicas": 0}, "sync_replicas"),
        ({"degrade_after_s": -1.0}, "degrade_after_s"),
        ({"log_floor_bytes": -1}, "log_floor_bytes"),
        ({"log_ceiling_bytes": 1}, "log_ceiling_bytes"),
        ({"log_floor_bytes": LOG_CEILING_BYTES + 1}, "log_ceiling_bytes"),
        ({"durability": "twice"}, "twice"),
    ],
)
def test_a_primary_refuses_what_can_not_be(flags: dict[str, Any], named: str) -> None:
    """Each value out of its range is a usage error that names it."""
    with pytest.raises(UsageError, match=named):
        primary(flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"primary": "here"}, "here"),
        ({"primary": "127.0.0.1:1,there"}, "there"),
        ({"id": ""}, "replica id"),
        ({"id": "a\nb"}, "replica id"),
        ({"id": "x" * 101}, "replica id"),
        ({"bootstrap_rate": 0}, "bootstrap_rate"),
    ],
)
def test_a_replica_refuses_what_can_not_be(flags: dict[str, Any], named: str) -> None:
    """Each value out of its range is a usage error that names it."""
    given = {"data_dir": Path("data"), "primary": "127.0.0.1:7850", **flags}
    with pytest.raises(UsageError, match=named):
        load_settings(ReplicaSettings, given, environment={})


@pytest.mark.parametrize("name", ["listen", "metrics"])
@pytest.mark.parametrize("address", ["0.0.0.0:7850", "[::]:7850", "192.0.2.1:7850", "example.org:7850"])
def test_beyond_this_machine_only_with_tls(name: str, address: str, keys: KeyFiles) -> None:
    """G10: an address that is not loopback is refused without TLS, for clients and for metrics."""
    with pytest.raises(NotPermitted, match="refusing to listen") as raised:
        primary({name: address})
    assert raised.value.exit_code is ExitCode.NOT_PERMITTED
    cert, key = keys.server
    assert getattr(primary({name: address, "tls_cert": cert, "tls_key": key}), name) == address


def test_what_is_asked_for_and_missing_is_refused(keys: KeyFiles, tmp_path: Path) -> None:
    """G10: half of a certificate and its key, or of a client's, or a file that is not there, is no plaintext."""
    (cert, key), (own, own_key) = keys.server, keys.replica
    for flags, named in (
        ({"tls_cert": cert}, "--tls-key"),
        ({"tls_key": key}, "--tls-cert"),
        ({"tls_ca": keys.ca[0]}, "--tls-cert"),
        ({"tls_cert": cert, "tls_key": tmp_path / "none.pem"}, "none.pem"),
        ({"tls_cert": cert, "tls_key": key, "tls_ca": tmp_path / "none.pem"}, "none.pem"),
    ):
        with pytest.raises(UsageError, match=named):
            primary(flags)
    for flags, named in (
        ({"cert": own}, "--cert-key"),
        ({"cert": own, "cert_key": own_key}, "--ca"),
        ({"ca": tmp_path / "none.pem"}, "none.pem"),
        ({"ca": keys.ca[0], "token": f"@{tmp_path}/none"}, "none"),
        ({"ca": keys.ca[0], "token": "two words"}, "token"),
    ):
        given = {"data_dir": Path("data"), "primary": "127.0.0.1:7850", **flags}
        with pytest.raises(UsageError, match=named):
            load_settings(ReplicaSettings, given, environment={})


def test_the_old_word_for_plaintext_is_an_error() -> None:
    """G10: what once allowed to serve everybody in the clear is refused, not left unheard."""
    with pytest.raises(UsageError, match="UNDERSTUDY_INSECURE"):
        load_settings(PrimarySettings, {"data_dir": Path("d")}, environment={"UNDERSTUDY_INSECURE": "true"})


def test_a_token_is_not_shown_with_the_settings() -> None:
    """Whoever logs the settings does not log the secret."""
    given = {"data_dir": Path("data"), "primary": "127.0.0.1:7850", "token": "secret-token"}
    settings = load_settings(ReplicaSettings, given, environment={})
    assert settings.credentials.bearer() == "secret-token"
    assert "secret-token" not in repr(settings) + repr(settings.credentials)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.1.2.3:7850", "[::1]:7850", "localhost:7850"])
def test_this_machine_needs_no_permission(address: str) -> None:
    """Loopback addresses of any kind are fine."""
    assert primary({"listen": address}).listen == address


def test_a_mistyped_variable_is_named() -> None:
    """A variable that is nobody's setting is refused; the other process's is left alone."""
    with pytest.raises(UsageError, match="UNDERSTUDY_DURABLITY"):
        load_settings(
            PrimarySettings, {"data_dir": Path("d")}, environment={"UNDERSTUDY_DURABLITY": "replica"}
        )
    settings = load_settings(
        PrimarySettings, {"data_dir": Path("d")}, environment={"UNDERSTUDY_PRIMARY": "127.0.0.1:1"}
    )
    assert settings.listen == PrimarySettings(data_dir=Path("d")).listen


def test_sizes_may_have_units_wherever_they_are_given(tmp_path: Path) -> None:
    """A variable and a TOML string may say 512MB; a fraction of a byte is refused."""
    settings = load_settings(
        PrimarySettings, {"data_dir": Path("d")}, environment={"UNDERSTUDY_LOG_FLOOR_BYTES": "512MB"}
    )
    assert settings.log_floor_bytes == 512_000_000
    config = tmp_path / "config.toml"
    config.write_text("[primary]\nlog_floor_bytes = 1.5\n")
    with pytest.raises(UsageError, match="log_floor_bytes"):
        load_settings(PrimarySettings, {"data_dir": Path("d")}, file=config, environment={})
