"""What is text: settings, node.json, slots.json, imports, exports, tokens, certificates, paths, addresses."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from log_helpers import CLUSTER
from state_helpers import Author

from fuzz.target import Decode, Target, kept_folder, pure
from understudy.cli import salvage
from understudy.cli.json_lines import encode_pair
from understudy.cli.pairs import lines
from understudy.common.access import check_name, check_pattern
from understudy.common.addresses import split_address
from understudy.common.arguments import parse_addresses
from understudy.common.certificate_authority import KeyFiles, create_keys
from understudy.common.certificate_proof import make_proof, proven_names
from understudy.common.certificates import check_pair, parse_certificates, parse_key, uris_of
from understudy.common.directory import DataDirectory, NodeFile, Role
from understudy.common.entry_json import entry_row
from understudy.common.errors import UnderstudyError
from understudy.common.operations import Put
from understudy.common.settings import PrimarySettings, ReplicaSettings, load_settings
from understudy.common.sizes import parse_size
from understudy.common.tokens import Claims, Lasting, LastingToken, new_signing_key, read_token, sign_token
from understudy.common.types import Lsn, check_realm_path, format_id
from understudy.primary.slots import SlotTable

_ISSUER = format_id(CLUSTER)
_NOW_S = 1_700_000_000
_CLAIMS = Claims(
    user="ann", user_id="a1", session="s1", issuer=_ISSUER, issued_s=_NOW_S, expires_s=_NOW_S + 60, id="t1"
)
_PRIVATE, _PUBLIC = new_signing_key()


def _in_file(
    name: str, read: Callable[[Path], object]
) -> Callable[[Path], contextlib.AbstractContextManager[Decode]]:
    """For what reads a file of that name."""

    @contextlib.contextmanager
    def opened(folder: Path) -> Iterator[Decode]:
        path = folder / name

        def decode(data: bytes) -> None:
            path.write_bytes(data)
            read(path)

        yield decode

    return opened


# -- files of a data directory -------------------------------------------------------------------------------


def _read_settings(path: Path) -> None:
    for kind, flags in ((PrimarySettings, {"data_dir": "data"}), (ReplicaSettings, {"primary": "a:1"})):
        with contextlib.suppress(UnderstudyError):
            load_settings(kind, flags, file=path, environment={})


def _settings() -> list[bytes]:
    primary = '[primary]\ndata_dir = "a"\nlisten = "127.0.0.1:0"\ndurability = "replica"\nsync_replicas = 2\n'
    sizes = "degrade_after_s = 1.5\nheal_window_s = 10\nlog_floor_bytes = 1024\nlog_ceiling_bytes = '1GiB'\n"
    replica = '[replica]\ndata_dir = "b"\nprimary = "a:7850,b:7850"\nid = "r"\nbootstrap_rate = "10MB"\n'
    tls = 'tls_cert = "cert.pem"\ntls_key = "key.pem"\ntls_ca = "ca.pem"\nmetrics = "[::1]:9000"\ntoken = "@file"\n'
    return [text.encode() for text in (primary + sizes + replica, primary + tls, replica + tls)]


def _node_files() -> list[bytes]:
    row = {"format": 1, "cluster": _ISSUER, "node": format_id(bytes(16))}
    return [json.dumps(row | {"role": str(role)}).encode() for role in Role]


def _open_directory(path: Path) -> None:
    NodeFile.read(path)
    with DataDirectory.open_existing(path.parent) as directory:
        assert len(directory.node) == 16
        assert directory.has_copy or not directory.cluster or directory.role is Role.CREATING


def _read_slots(path: Path) -> None:
    table = SlotTable(path)
    for slot in table:
        slot.id.encode()  # as status tells it
    table.save()


@functools.cache
def _slots() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        table = SlotTable(Path(folder) / "slots.json")
        empty = json.dumps({"format": 1, "slots": []}).encode()
        table.claim("one", bytes(16), lsn=Lsn(1), offset=100, now_us=1)
        table.lose(table.claim("two", bytes(16), lsn=Lsn(5), offset=500, now_us=2))
        return [empty, (Path(folder) / "slots.json").read_bytes()]


# -- imports and exports ---------------------------------------------------------------------------------------


def _import(data: bytes) -> None:
    list(lines(io.BytesIO(data), "standard input", from_line=1))


def _pairs() -> list[bytes]:
    pairs = [(b"key", b"value"), (b"\xff\0", b"\xfe"), ("é".encode(), b""), (b"k" * 480, b"v" * 100)]
    return [b"\n".join(encode_pair(*pair) for pair in pairs) + b"\n", encode_pair(*pairs[0])]


def _export() -> list[bytes]:
    author = Author()
    made = [
        author.epoch_start(),
        author.change("/a", [Put(b"k", b"v")]),
        author.change("/__system", [Put(b"\xff", b"")]),
    ]
    rows = [json.dumps(entry_row(record)).encode() for record in [*made, author.freeze(), author.drop("/a")]]
    return [b"\n".join(rows) + b"\n", *rows]


# -- tokens and certificates -----------------------------------------------------------------------------------


def _read_token(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    LastingToken.read(text)
    read_token(
        text, public_key=lambda key_id: _PUBLIC if key_id == "k1" else None, issuer=_ISSUER, now_s=_NOW_S
    )


def _read_signed_claims(data: bytes) -> None:
    """As a thief of a signing key could make them."""
    from understudy.common.tokens import Ed25519PrivateKey, _encoded

    header = _encoded(json.dumps({"alg": "EdDSA", "typ": "JWT", "kid": "k1"}).encode())
    signed = f"{header}.{_encoded(data)}"
    signature = Ed25519PrivateKey.from_private_bytes(_PRIVATE).sign(signed.encode())
    _read_token(f"{signed}.{_encoded(signature)}".encode())


def _tokens() -> list[bytes]:
    lasting = [str(LastingToken(kind, "0123456789abcdef", "s" * 43)).encode() for kind in Lasting]
    return [sign_token(_CLAIMS, key_id="k1", private=_PRIVATE).encode(), *lasting]


def _claims() -> list[bytes]:
    row = {
        "sub": "ann",
        "uid": "a1",
        "sid": "s1",
        "iss": _ISSUER,
        "iat": _NOW_S,
        "exp": _NOW_S + 60,
        "jti": "t1",
    }
    return [json.dumps(row).encode()]


@functools.cache
def _keys() -> KeyFiles:
    folder = kept_folder()
    create_keys(folder / "keys", ["localhost", "127.0.0.1"])
    return KeyFiles(folder / "keys")


def _pems() -> list[bytes]:
    files = _keys()
    return [path.read_bytes() for pair in (files.ca, files.server, files.replica) for path in pair]


def _read_pem(data: bytes) -> None:
    path = Path("file.pem")
    key = parse_key(_pems()[1], path)
    with contextlib.suppress(UnderstudyError):
        key = parse_key(data, path)
    chain = parse_certificates(data, path)
    check_pair(chain, key, path, path)
    for certificate in chain:
        uris_of(certificate)


@contextlib.contextmanager
def _proving(_: Path) -> Iterator[Decode]:
    path = _keys().ca[0]
    ca = parse_certificates(path.read_bytes(), path)
    yield lambda data: proven_names(data, ca)


def _proofs() -> list[bytes]:
    (certificate, key), (server, server_key) = _keys().replica, _keys().server
    return [
        make_proof(parse_certificates(cert.read_bytes(), cert), parse_key(private.read_bytes(), private))
        for cert, private in ((certificate, key), (server, server_key))
    ]


# -- small things ----------------------------------------------------------------------------------------------


def _read_arguments(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    reads: Sequence[Callable[[str], object]] = (
        parse_size,
        parse_addresses,
        split_address,
        check_realm_path,
        check_pattern,
        lambda name: check_name(name, "user"),
    )
    for read in reads:
        with contextlib.suppress(UnderstudyError):
            read(text)


def _arguments() -> list[bytes]:
    return [b"1.5GiB", b"1024", b"a:7850,[::1]:7851", b"/realm/~/notes", b"/a/*/**", b"ann@example.org"]


def targets() -> Sequence[Target]:
    """All that is text, and what is shown with it."""
    return (
        Target(name="settings", opened=_in_file("s.toml", _read_settings), samples=_settings, is_text=True),
        Target(
            name="node.json", opened=_in_file("node.json", _open_directory), samples=_node_files, is_text=True
        ),
        Target(name="slots.json", opened=_in_file("slots.json", _read_slots), samples=_slots, is_text=True),
        Target(name="import", opened=pure(_import), samples=_pairs, is_text=True),
        Target(name="export", opened=_in_file("e.jsonl", salvage._check), samples=_export, is_text=True),
        Target(name="token", opened=pure(_read_token), samples=_tokens, is_text=True),
        Target(name="token claims", opened=pure(_read_signed_claims), samples=_claims, is_text=True),
        Target(name="certificate file", opened=pure(_read_pem), samples=_pems, is_text=True),
        Target(name="certificate proof", opened=_proving, samples=_proofs),
        Target(name="arguments", opened=pure(_read_arguments), samples=_arguments, is_text=True),
    )
