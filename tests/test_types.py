"""The small values: LSNs, ids, realm paths, keys, levels, and the tree of errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.common import errors
from understudy.common.errors import BadKey, BadRealmPath, ExitCode, UnderstudyError, UsageError, from_code
from understudy.common.types import (
    KEY_BYTES_MAX,
    REALM_PATH_BYTES_MAX,
    SYSTEM_REALM,
    Digest,
    Durability,
    Lsn,
    Position,
    check_key,
    check_realm_path,
    format_id,
    format_lsn,
    is_system_realm,
    new_id,
    parse_lsn,
)
from understudy.v1 import data_pb2

GOOD_PATHS = [
    "/inventory",
    "/a/b/c",
    "/~",
    "/~/notes",
    "/A-1_z.9/x",
    "/-",
    "/_private",
    "/__system",
    "/" + "x" * (REALM_PATH_BYTES_MAX - 1),
]
BAD_PATHS = [
    "",
    "/",
    "//",
    "inventory",
    "/a/",
    "/a//b",
    "/.hidden",
    "/a/.b",
    "/..",
    "/a b",
    "/a\n",
    "/a\x00",
    "/~x",
    "/x~",
    "/é",
    "/a\\b",
    "/a:b",
    "/\ud800",
    "/" + "x" * REALM_PATH_BYTES_MAX,
    "/" + "é" * 127 + "xx",
]

lsns = st.integers(min_value=0, max_value=2**64 - 1).map(Lsn)


@given(lsns, lsns)
def test_lsns_as_text_sort_as_numbers_do(one: Lsn, other: Lsn) -> None:
    """Names made from LSNs are in the LSNs' order, and give the LSNs back."""
    assert (format_lsn(one) < format_lsn(other)) == (one < other)
    assert parse_lsn(format_lsn(one)) == one


@pytest.mark.parametrize(
    "text", ["", "1", "1" * 19, "1" * 21, "-" + "1" * 19, "+" + "1" * 19, "1_" * 10, "\u0661" * 20]
)
def test_only_twenty_digits_are_an_lsn(text: str) -> None:
    """Whatever Python would take for a number, a name that this program did not write is no LSN."""
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(text)


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_a_well_formed_realm_path_is_taken(path: str) -> None:
    """Segments of letters, digits and _ . -, the user's own id alone in its segment, up to 255 bytes."""
    assert check_realm_path(path) == path


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_bad_realm_path_is_refused_with_the_rule(path: str) -> None:
    """A path that is not well-formed is refused, and the error says how one looks."""
    with pytest.raises(BadRealmPath, match="a realm path is /"):
        check_realm_path(path)


@given(st.text(max_size=30).map(lambda text: "/" + text))
def test_a_path_that_is_taken_can_be_a_file_name_and_a_log_line(path: str) -> None:
    """No path that passes holds anything that a shell, a file system or a terminal takes for something else."""
    try:
        check_realm_path(path)
    except BadRealmPath:
        return
    assert path.isascii()
    assert path.isprintable()
    assert not set(path) & set(" \\:*?\"'<>|$`")
    assert not {"", ".", ".."} & set(path[1:].split("/"))


def test_system_realms_are_those_with_two_underscores() -> None:
    """A segment beginning with two underscores is the system's own, wherever it stands."""
    assert is_system_realm(SYSTEM_REALM)
    assert is_system_realm("/a/__b")
    assert not is_system_realm("/_a")
    assert not is_system_realm("/a__b")


@pytest.mark.parametrize("length", [0, KEY_BYTES_MAX + 1])
def test_an_empty_and_a_too_long_key_are_refused(length: int) -> None:
    """A key has 1 to 480 bytes, and the error says how many this one has."""
    with pytest.raises(BadKey, match=f"of {length} bytes.*1 to 480"):
        check_key(b"k" * length)


@pytest.mark.parametrize("length", [1, KEY_BYTES_MAX])
def test_keys_at_the_limits_are_taken(length: int) -> None:
    """The shortest and the longest key pass."""
    check_key(b"\0" * length)


def test_levels_are_numbered_as_on_the_wire_and_ordered_by_what_they_ask() -> None:
    """A level's number is the one in data.proto, and a higher level asks for more."""
    for level in Durability:
        assert data_pb2.Durability.Name(data_pb2.Durability.ValueType(level.value)) == level.name
        assert Durability.parse(level.name.lower()) is level
    assert Durability.LOCAL < Durability.REPLICA < Durability.APPLIED
    with pytest.raises(UsageError, match="choose local, replica or applied"):
        Durability.parse("remote")


def test_ids_are_random_and_shown_as_uuids() -> None:
    """An id has 16 bytes of its own and is shown as a UUID, where there is none as a dash."""
    one, other = new_id(), new_id()
    assert one != other
    assert len(one) == 16
    assert len(format_id(one)) == 36
    assert format_id(b"") == "-"


def test_a_position_shows_lsn_and_digest() -> None:
    """A position in a message has both halves: the counter alone is not identity."""
    assert str(Position(Lsn(7), Digest(b"\xab" * 32))) == "7:abababababab"


# -- errors ------------------------------------------------------------------------------------------------


def all_errors() -> list[type[UnderstudyError]]:
    found = [UnderstudyError]
    for cls in found:
        found += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_an_error_comes_back_from_its_code_as_the_same_class(cls: type[UnderstudyError]) -> None:
    """Every class of the tree survives being named on the wire."""
    error = cls("what happened", remedy="what mends it")
    back = from_code(error.code, error.message, error.remedy)
    assert type(back) is cls
    assert str(back) == "what happened (what mends it)"


def test_an_unknown_code_gives_the_base_class() -> None:
    """An error that only a newer version knows is still one of ours, with its message."""
    error = from_code("InventedLater", "it is new", "")
    assert type(error) is UnderstudyError
    assert str(error) == "it is new"
    assert error.exit_code is ExitCode.FAILED


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_the_tree_in_the_docstring_is_the_tree(cls: type[UnderstudyError]) -> None:
    """Who reads the head of errors.py sees every class."""
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.UnderstudyError, 1),
        (errors.UsageError, 2),
        (errors.Diverged, 3),
        (errors.ForeignCluster, 3),
        (errors.AheadOfPrimary, 3),
        (errors.Fenced, 3),
        (errors.CorruptionError, 4),
        (errors.PeerUnreachable, 5),
        (errors.OutcomeUnknown, 5),
        (errors.DirectoryInUse, 6),
        (errors.WrongRole, 6),
        (errors.NotPermitted, 7),
    ],
)
def test_exit_codes_are_the_documented_ones(cls: type[UnderstudyError], code: int) -> None:
    """1 failed, 2 usage, 3 reset, 4 corrupt, 5 not reachable, 6 directory, 7 not permitted."""
    assert cls.exit_code == code
