"""TLS: whom servers and clients let in, and what becomes of certificates that change while a server runs."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import ANY_PORT, DEADLINE_S, Process, Processes, complaint, wait_until

from understudy.client import Put, connect
from understudy.common import certificate_authority, certificate_proof, portal
from understudy.common.certificate_authority import KeyFiles, create_keys, renew_keys
from understudy.common.certificate_proof import PROOF_METADATA, PROOF_S_MAX, make_proof
from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.errors import (
    ExitCode,
    NotAuthenticated,
    NotPermitted,
    PeerUnreachable,
    UnderstudyError,
    UsageError,
)
from understudy.common.listener import Listener
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.tls import REPLICA_NAME, ServerTls
from understudy.primary import Primary

# -- joining a server and a client in one process ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def _listening(folder: Path, tls: ServerTls | None, listen: str = ANY_PORT) -> AsyncIterator[str]:
    listener = Listener()
    address = await listener.start(listen, folder / "control.sock", tls)
    try:
        yield address
    finally:
        await listener.stop()


@contextlib.contextmanager
def _running(folder: Path, tls: ServerTls) -> Iterator[str]:
    """The same for a test that waits for it on another thread."""
    manager = _listening(folder, tls)
    address = portal.call(manager.__aenter__())
    try:
        yield address
    finally:
        portal.call(manager.__aexit__(None, None, None))


async def _ask(address: str, credentials: Credentials) -> None:
    async with open_channel(address, credentials) as channel:
        with peer_errors(address):
            request = health_pb2.HealthCheckRequest()
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S)


def _error(folder: Path, tls: ServerTls | None, credentials: Credentials) -> UnderstudyError:
    """Why a client with ``credentials`` does not get in."""

    async def asked() -> UnderstudyError:
        async with _listening(folder, tls) as address:
            with pytest.raises(UnderstudyError) as raised:
                await _ask(address, credentials)
            return raised.value

    return portal.call(asked())


def _server(keys: KeyFiles) -> ServerTls:
    return ServerTls(*keys.server, keys.ca[0])


def _trusting(keys: KeyFiles) -> Credentials:
    return Credentials.given(ca=keys.ca[0])


def _replica(keys: KeyFiles) -> Credentials:
    cert, key = keys.replica
    return Credentials.given(ca=keys.ca[0], cert=cert, key=key)


@pytest.fixture
def own_keys(keys: KeyFiles, tmp_path: Path) -> KeyFiles:
    """A copy of the certificates, to change."""
    return KeyFiles(shutil.copytree(keys.directory, tmp_path / "keys"))


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFiles:
    """Those of another CA."""
    directory = tmp_path_factory.mktemp("other") / "keys"
    create_keys(directory, ["localhost"])
    return KeyFiles(directory)


def _served(address: str) -> int:
    """The serial number of the certificate that is shown to a new connection."""
    host, port = address.rsplit(":", 1)
    pem = ssl.get_server_certificate((host, int(port)), timeout=DEADLINE_S)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def _serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


# -- who gets in -------------------------------------------------------------------------------------------------


def test_a_client_that_trusts_the_ca_gets_in(keys: KeyFiles, tmp_path: Path) -> None:
    """By every name that the certificate has, with and without a certificate of its own."""

    async def asked() -> None:
        async with _listening(tmp_path, _server(keys)) as address:
            await _ask(address, _trusting(keys))
            await _ask(address.replace("127.0.0.1", "localhost"), _replica(keys))

    portal.call(asked())


def test_a_server_of_another_ca_is_not_trusted(keys: KeyFiles, other_keys: KeyFiles, tmp_path: Path) -> None:
    """G10: the refusal names the flag."""
    error = _error(tmp_path, _server(keys), _trusting(other_keys))
    assert isinstance(error, NotPermitted)
    assert "is not signed by the CA" in error.message
    assert "--ca" in error.remedy


def test_a_server_of_another_name_is_not_trusted(
    tmp_path: Path, keys: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: its certificate has to name the address."""
    monkeypatch.setattr(certificate_authority, "LOCAL_HOSTS", ())
    create_keys(tmp_path / "elsewhere", ["db.example.org"])
    elsewhere = KeyFiles(tmp_path / "elsewhere")
    error = _error(tmp_path, _server(elsewhere), _trusting(elsewhere))
    assert isinstance(error, NotPermitted)
    assert "is not for this name" in error.message


def test_a_listener_itself_refuses_the_open_network(tmp_path: Path) -> None:
    """G10: also where nobody has checked the settings."""

    async def started() -> None:
        async with _listening(tmp_path, None, "0.0.0.0:0"):
            pass

    with pytest.raises(NotPermitted, match="refusing to listen"):
        portal.call(started())


def test_a_client_in_the_clear_is_told_of_tls(keys: KeyFiles, tmp_path: Path) -> None:
    """A server with TLS serves nobody without."""
    error = _error(tmp_path, _server(keys), ANONYMOUS)
    assert isinstance(error, PeerUnreachable)
    assert "--ca" in error.remedy


def test_a_client_with_tls_does_not_fall_back(keys: KeyFiles, tmp_path: Path) -> None:
    """G10: where TLS is asked for, a server in the clear is refused."""
    error = _error(tmp_path, None, _trusting(keys))
    assert isinstance(error, PeerUnreachable)
    assert "does not speak TLS" in error.message
    assert "--tls-cert" in error.remedy


# -- files that can't be used ------------------------------------------------------------------------------------


def _not_pem(keys: KeyFiles) -> None:
    keys.server[0].write_text("certificate")


def _missing(keys: KeyFiles) -> None:
    keys.server[0].unlink()


def _no_key(keys: KeyFiles) -> None:
    keys.server[1].write_text("key")


def _other_key(keys: KeyFiles) -> None:
    shutil.copy(keys.replica[1], keys.server[1])


def _swapped(keys: KeyFiles) -> None:
    cert, key = (path.read_bytes() for path in keys.server)
    keys.server[0].write_bytes(key)
    keys.server[1].write_bytes(cert)


def _certificate_for_a_key(keys: KeyFiles) -> None:
    keys.server[1].unlink()
    shutil.copy(keys.server[0], keys.server[1])  # which others may read


def _open_key(keys: KeyFiles) -> None:
    keys.server[1].chmod(0o644)


def _encrypted_key(keys: KeyFiles) -> None:
    key = certificate_authority._make_key()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    keys.server[1].write_bytes(secret)


def _odd_key(keys: KeyFiles) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    keys.server[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _no_ca(keys: KeyFiles) -> None:
    keys.ca[0].write_text("")


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (_not_pem, UsageError, "server.pem is not a certificate"),
        (_missing, UsageError, "can't read .*server.pem"),
        (_no_key, UsageError, "server-key.pem is not a private key"),
        (_other_key, UsageError, "is not the one of the certificate"),
        (_swapped, UsageError, "server.pem holds a private key.*swapped"),
        (_certificate_for_a_key, UsageError, "server-key.pem holds a certificate"),
        (_open_key, NotPermitted, "others may read .*chmod 600 .*server-key.pem"),
        (_encrypted_key, UsageError, "is encrypted"),
        (_odd_key, UsageError, "neither ECDSA nor RSA"),
        (_no_ca, UsageError, "ca.pem is not a certificate"),
    ],
)
def test_files_that_can_not_be_used_are_refused(
    own_keys: KeyFiles, spoil: Callable[[KeyFiles], None], kind: type[UnderstudyError], said: str
) -> None:
    """G10: a server does not start with them, and says which and why."""
    spoil(own_keys)
    with pytest.raises(kind, match=said):
        _server(own_keys)


def test_an_expired_certificate_is_refused(own_keys: KeyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server that would show it, with the command that renews it."""
    monkeypatch.setattr(certificate_authority, "LEAF_LIFE", datetime.timedelta(minutes=-30))
    renew_keys(own_keys.directory)
    with pytest.raises(UsageError, match=r"expired on .*understudy keys renew"):
        _server(own_keys)


def test_what_is_no_small_file_is_refused(own_keys: KeyFiles) -> None:
    """A device or a database named by mistake is not read to its end."""
    with pytest.raises(UsageError, match="more than"):
        ServerTls(Path("/dev/zero"), own_keys.server[1])


# -- files that change -------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_shown_to_new_connections(own_keys: KeyFiles, tmp_path: Path) -> None:
    """Whether a connection or a look at status notices it first, and without a restart."""
    tls = _server(own_keys)
    cert = own_keys.server[0]

    with _running(tmp_path, tls) as address:
        for notice in (lambda: None, lambda: tls.warnings()):
            before = _served(address)
            assert before == _serial(cert)
            renew_keys(own_keys.directory)
            notice()
            assert _served(address) == _serial(cert) != before
            assert tls.warnings() == []


def test_half_a_certificate_leaves_the_old_one_in_place(own_keys: KeyFiles, tmp_path: Path) -> None:
    """New connections get the old one, status says why, and once it is whole the new one is used."""
    tls = _server(own_keys)
    cert = own_keys.server[0]
    before = _serial(cert)

    with _running(tmp_path, tls) as address:
        renew_keys(own_keys.directory)
        whole = cert.read_bytes()
        cert.write_bytes(whole[: len(whole) // 2])
        assert _served(address) == before
        (warning,) = tls.warnings()
        assert "not in use" in warning
        assert str(cert) in warning
        cert.write_bytes(whole)
        assert _served(address) == _serial(cert) != before
        assert tls.warnings() == []


def test_a_certificate_that_soon_expires_is_warned_of(
    own_keys: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In status, while there is time to renew it."""
    monkeypatch.setattr(certificate_authority, "LEAF_LIFE", datetime.timedelta(days=3))
    renew_keys(own_keys.directory)
    (warning,) = _server(own_keys).warnings()
    assert "expires on" in warning


# -- client certificates -----------------------------------------------------------------------------------------


def _proof(keys: tuple[Path, Path]) -> list[tuple[str, str | bytes]]:
    """A call's metadata with the proof of a certificate."""
    holder = certificate_authority._read(*keys)
    return [("other", "x"), (PROOF_METADATA, make_proof([holder.certificate], holder.key))]


def test_a_client_certificate_names_its_owner(keys: KeyFiles) -> None:
    """What `keys init` makes for replicas says so; a call without a certificate names nobody."""
    assert REPLICA_NAME in _server(keys).peer_certificate_names(_proof(keys.replica))
    assert _server(keys).peer_certificate_names([("authorization", "Bearer x")]) == ()


def test_a_client_certificate_of_another_ca_is_refused(keys: KeyFiles, other_keys: KeyFiles) -> None:
    """G10: whatever it says of itself."""
    with pytest.raises(NotAuthenticated, match="--tls-ca"):
        _server(keys).peer_certificate_names(_proof(other_keys.replica))


def test_a_servers_certificate_is_nobodys_as_a_client(keys: KeyFiles) -> None:
    """It was signed for another purpose."""
    with pytest.raises(NotAuthenticated):
        _server(keys).peer_certificate_names(_proof(keys.server))


def test_without_a_ca_no_client_certificate_counts(keys: KeyFiles) -> None:
    """G10: it is not taken on trust."""
    with pytest.raises(NotAuthenticated, match="--tls-ca"):
        ServerTls(*keys.server).peer_certificate_names(_proof(keys.replica))


def test_a_certificate_without_its_key_proves_nothing(keys: KeyFiles, other_keys: KeyFiles) -> None:
    """Certificates are public: the signature has to be made with the key."""
    stolen = certificate_authority._read(*keys.replica).certificate
    key = certificate_authority._read(*other_keys.replica).key
    with pytest.raises(NotAuthenticated, match="not made with its key"):
        _server(keys).peer_certificate_names([(PROOF_METADATA, make_proof([stolen], key))])


@pytest.mark.parametrize("ahead_s", [-PROOF_S_MAX - 10, PROOF_S_MAX + 10])
def test_an_old_proof_is_worth_nothing(
    keys: KeyFiles, ahead_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one from the future: the clocks are named."""
    proof = _proof(keys.replica)
    now_s = certificate_proof.time.time()
    monkeypatch.setattr(certificate_proof.time, "time", lambda: now_s - ahead_s)
    with pytest.raises(NotAuthenticated, match="clocks"):
        _server(keys).peer_certificate_names(proof)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"\x0a\x02ab\x12\x01c"])
def test_garbage_proves_nothing(keys: KeyFiles, garbage: bytes) -> None:
    """What can't be read is a refusal like any other."""
    with pytest.raises(NotAuthenticated):
        _server(keys).peer_certificate_names([(PROOF_METADATA, garbage)])


# -- real processes ----------------------------------------------------------------------------------------------


def _own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def _status(processes: Processes, data_dir: Path) -> dict[str, object]:
    """What the node that has ``data_dir`` open says of itself."""
    found: dict[str, object] = json.loads(processes.run("status", data_dir, "--json").stdout)
    return found


def _server_flags(keys: KeyFiles) -> tuple[str | Path, ...]:
    (cert, key), (ca, _) = keys.server, keys.ca
    return "--tls-cert", cert, "--tls-key", key, "--tls-ca", ca


def _replica_flags(keys: KeyFiles) -> tuple[str | Path, ...]:
    (cert, key), (ca, _) = keys.replica, keys.ca
    return "--ca", ca, "--cert", cert, "--cert-key", key


@pytest.mark.parametrize("is_local", [True, False])
def test_a_replica_follows_by_certificate(
    processes: Processes, keys: KeyFiles, tmp_path: Path, is_local: bool
) -> None:
    """Over TLS, on this machine's loopback and on an address that others reach; both say so in status."""
    host = "127.0.0.1" if is_local else _own_address()
    create_keys(tmp_path / "keys", [host])
    files = KeyFiles(tmp_path / "keys")
    (cert, key), (ca, _) = files.server, files.ca
    with Primary.open(tmp_path / "a", listen=f"{host}:0", tls_cert=cert, tls_key=key, tls_ca=ca) as primary:
        receipt = primary.commit("/realm", [Put(b"key", b"value")])
        assert primary.status().access == "tls"
        flags = ("--listen", f"{host}:0", *_server_flags(files), *_replica_flags(files))
        processes.replica(tmp_path / "b", primary.address, "--id", "b", *flags)
        wait_until(lambda: int(str(_status(processes, tmp_path / "b")["committed_lsn"])) >= receipt.lsn)
        assert _status(processes, tmp_path / "b")["access"] == "tls"


def test_a_replica_without_proof_does_not_follow(
    processes: Processes, keys: KeyFiles, other_keys: KeyFiles, tmp_path: Path
) -> None:
    """G10: TLS alone is no permission, and a certificate of another CA is none either; its status says why."""
    (cert, key), (ca, _) = keys.server, keys.ca
    with Primary.open(tmp_path / "a", listen=ANY_PORT, tls_cert=cert, tls_key=key, tls_ca=ca) as primary:
        stranger = other_keys.replica
        for name, flags, said in (
            ("nobody", ("--ca", ca), "token"),
            ("stranger", ("--ca", ca, "--cert", stranger[0], "--cert-key", stranger[1]), "certificate"),
        ):
            data_dir = tmp_path / name
            processes.replica(data_dir, primary.address, "--id", name, *flags)
            wait_until(lambda at=data_dir, said=said: said in str(_status(processes, at)["warnings"]))  # type: ignore[misc]
        assert not primary.status().replicas


@pytest.fixture
def with_tls(processes: Processes, own_keys: KeyFiles, tmp_path: Path) -> Process:
    """A primary with TLS, whose files may be changed, in ``a``."""
    return processes.primary(tmp_path / "a", *_server_flags(own_keys))


def test_commands_say_which_flag_is_missing(
    processes: Processes, with_tls: Process, own_keys: KeyFiles, other_keys: KeyFiles
) -> None:
    """The wrong CA, no CA, and a server without TLS: one line each, and never plaintext."""
    command = ("status", "--server", with_tls.address)
    told = complaint(processes.run(*command, "--ca", other_keys.ca[0], code=ExitCode.NOT_PERMITTED))
    assert "is --ca the right file?" in told
    assert "give --ca FILE" in complaint(processes.run(*command, code=ExitCode.UNREACHABLE))
    told = complaint(processes.run(*command, "--ca", "none.pem", code=ExitCode.USAGE))
    assert "can't read none.pem" in told


def test_who_is_refused_is_told_what_to_give(
    processes: Processes, with_tls: Process, own_keys: KeyFiles, tmp_path: Path
) -> None:
    """A user who asks for what operators do, and whoever shows a token that is none of this server's."""
    own, server = ("--data-dir", tmp_path / "a"), ("--server", with_tls.address, "--ca", own_keys.ca[0])
    processes.run("user", "add", "ann", "--no-password", *own)
    token = processes.run("token", "issue", "--app", "ann", *own).stdout.decode().strip()

    def told(*more: str) -> str:
        return complaint(processes.run("forget", "b", *server, *more, code=ExitCode.NOT_PERMITTED))

    assert "give --token @FILE with an operator's token: admin-token" in told("--token", token)
    assert "`understudy token issue`" in told("--token", token[:-1] + ("A" if token[-1] != "A" else "B"))
    assert "give --token @FILE" in told()


def test_commands_get_in_with_ca_and_token(
    processes: Processes, with_tls: Process, own_keys: KeyFiles, tmp_path: Path
) -> None:
    """From flags and from variables, and from Python by the same names; without a token nothing is answered."""
    address, ca, token = with_tls.address, own_keys.ca[0], f"@{tmp_path}/a/admin-token"
    wait_until((tmp_path / "a" / "admin-token").exists)
    put = ("put", "--server", address, "/realm", "key", "value")
    processes.run(*put, "--ca", ca, code=ExitCode.NOT_PERMITTED)
    processes.run(*put, "--ca", ca, "--token", token)
    with connect(address, ca=ca, token=token) as server:
        assert server.get("/realm", b"key") == b"value"
    processes.environment |= {"UNDERSTUDY_CA": str(ca), "UNDERSTUDY_TOKEN": token}
    assert processes.run("get", "--server", address, "/realm", "key").stdout == b"value"
    status = json.loads(processes.run("status", "--server", address, "--json").stdout)
    assert status["access"] == "tls"


def test_a_running_server_takes_up_a_renewed_certificate(
    processes: Processes, with_tls: Process, own_keys: KeyFiles, tmp_path: Path
) -> None:
    """`keys renew` is all that it takes; a broken file is a warning in status instead."""
    before = _served(with_tls.address)
    processes.run("keys", "renew", own_keys.directory)
    assert _served(with_tls.address) == _serial(own_keys.server[0]) != before
    own_keys.server[0].write_text("")
    assert "not in use" in str(_status(processes, tmp_path / "a")["warnings"])


def test_without_tls_status_says_protected(processes: Processes, tmp_path: Path) -> None:
    """A person reads that only this machine gets in, a program finds it in `access`."""
    processes.primary(tmp_path / "a")
    assert _status(processes, tmp_path / "a")["access"] == "protected"
    assert b"protected mode: only peers on this machine" in processes.run("status", tmp_path / "a").stdout


def test_metrics_are_served_over_https(processes: Processes, own_keys: KeyFiles, tmp_path: Path) -> None:
    """With the same certificate, renewed with it; whoever connects and says nothing keeps nobody waiting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.primary(tmp_path / "a", *_server_flags(own_keys), "--metrics", f"127.0.0.1:{port}")
    trusting = ssl.create_default_context(cafile=str(own_keys.ca[0]))
    with socket.create_connection(("127.0.0.1", port)):
        answer = urllib.request.urlopen(
            f"https://127.0.0.1:{port}/metrics", context=trusting, timeout=DEADLINE_S
        )
        assert b"understudy_durable_lsn" in answer.read()
    renew_keys(own_keys.directory)
    _status(processes, tmp_path / "a")
    assert _served(f"127.0.0.1:{port}") == _serial(own_keys.server[0])
