"""``understudy keys``: what it makes, what it leaves alone, and that others accept it."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from harness import Processes, complaint

from understudy.common.certificate_authority import CA_LIFE, LEAF_LIFE, KeyFiles, create_keys, renew_keys
from understudy.common.certificates import names_of
from understudy.common.errors import ExitCode, UsageError
from understudy.common.tls import REPLICA_NAME


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _trust(files: KeyFiles) -> PolicyBuilder:
    return PolicyBuilder().store(Store([_certificate(files.ca[0])]))


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_init_makes_what_a_start_needs(processes: Processes, tmp_path: Path) -> None:
    """A CA, a server's and a replica's certificate, and the two commands that use them."""
    directory = tmp_path / "deep" / "keys"
    done = processes.run("keys", "init", directory, "--host", "db1.example.org", "--host", "192.0.2.2")
    files = KeyFiles(directory)
    assert set(_content(directory)) == {
        path.name for pair in (files.ca, files.server, files.replica) for path in pair
    }
    assert names_of(_certificate(files.server[0]))[:-1] == (
        "db1.example.org",
        "localhost",
        "192.0.2.2",
        "127.0.0.1",
        "::1",
    )
    assert REPLICA_NAME in names_of(_certificate(files.replica[0]))
    told = done.stdout.decode()
    assert (
        f"understudy primary --data-dir DIR --listen db1.example.org:7850 --tls-cert {files.server[0]}"
        in told
    )
    assert f"understudy replica --data-dir DIR --primary db1.example.org:7850 --ca {files.ca[0]}" in told


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask."""
    before = os.umask(0)
    try:
        create_keys(tmp_path / "keys", ["localhost"])
    finally:
        os.umask(before)
    files = KeyFiles(tmp_path / "keys")
    for _, key in (files.ca, files.server, files.replica):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_certificates_pass_strict_verification(keys: KeyFiles) -> None:
    """Each for its own purpose, by every name, and no longer than is usual."""
    server, replica = _certificate(keys.server[0]), _certificate(keys.replica[0])
    for subject in (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("::1"))):
        _trust(keys).build_server_verifier(subject).verify(server, [])
    _trust(keys).build_client_verifier().verify(replica, [])
    now = datetime.datetime.now(datetime.UTC)
    assert server.not_valid_after_utc <= now + LEAF_LIFE
    assert _certificate(keys.ca[0]).not_valid_after_utc <= now + CA_LIFE


def test_nothing_is_overwritten(processes: Processes, tmp_path: Path) -> None:
    """G4: what is there stays as it is; an empty directory is used."""
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "ca.pem").write_text("ours")
    told = complaint(processes.run("keys", "init", full, "--host", "a", code=ExitCode.USAGE))
    assert f"understudy keys renew {full}" in told
    assert _content(full) == {"ca.pem": b"ours"}
    empty.mkdir()
    processes.run("keys", "init", empty, "--host", "a")
    assert len(_content(empty)) == 6


@pytest.mark.parametrize("host", ["", "a:7850", "[::1]", "a b", "-a", "a..b", "http://a", "\u00e4.example"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    """Before anything is made."""
    with pytest.raises(UsageError, match="bad host"):
        create_keys(tmp_path / "keys", [host])
    assert not list(tmp_path.iterdir())


def test_renew_signs_anew_and_keeps_keys_and_ca(processes: Processes, tmp_path: Path) -> None:
    """Whoever trusted the old certificates trusts the new ones, and each file is replaced by itself."""
    files = KeyFiles(tmp_path / "keys")
    create_keys(files.directory, ["a.example"])
    before = _content(files.directory)
    facts = json.loads(processes.run("keys", "renew", files.directory, "--json").stdout)
    after = _content(files.directory)
    assert {name for name in after if after[name] != before[name]} == {"server.pem", "replica.pem"}
    assert "a.example" in facts["hosts"]
    _trust(files).build_server_verifier(x509.DNSName("a.example")).verify(_certificate(files.server[0]), [])
    _trust(files).build_client_verifier().verify(_certificate(files.replica[0]), [])


def test_renew_can_change_the_hosts(tmp_path: Path) -> None:
    """The new names take the place of the old ones."""
    files = KeyFiles(tmp_path / "keys")
    create_keys(files.directory, ["a.example"])
    renew_keys(files.directory, ["b.example"])
    names = names_of(_certificate(files.server[0]))
    assert "b.example" in names
    assert "a.example" not in names


def test_renew_needs_the_ca_with_its_key(processes: Processes, tmp_path: Path) -> None:
    """It says which file is missing, and changes nothing."""
    files = KeyFiles(tmp_path / "keys")
    create_keys(files.directory, ["a"])
    files.ca[1].unlink()
    before = _content(files.directory)
    assert "ca-key.pem" in complaint(processes.run("keys", "renew", files.directory, code=ExitCode.USAGE))
    assert _content(files.directory) == before
