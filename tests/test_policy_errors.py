"""Mistakes in a file of policies: told with file, policy, setting, what was found, and what is expected."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from harness import Processes, complaint

from understudy.backup.policy import Policy, parse_policy, read_policies
from understudy.common.errors import UsageError

USAGE = 2
LIST, WORDS, TEXT, FLAG = "a list", "give a list of", "a text", "true or false, without quotes"
COUNT = "a whole number from 0 to 1,000,000"
PUBLIC_KEY = "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"

# Setting, what is written, what was found, what is expected.
MISTAKES = [
    ("name", "5", "name is 5", "1 to 60 printable characters"),
    ("name", '""', "name is ''", "1 to 60 printable characters"),
    ("name", '"two\\nlines"', r"name is 'two\nlines'", "1 to 60 printable characters"),
    ("schedule", "230", "schedule is 230", "a cron expression"),
    ("schedule", '""', "schedule is ''", "a cron expression"),
    ("schedule", '"every day"', "'every day' can't be read", "give minute, hour, day"),
    ("schedule", '"0 0 31 2 *"', "bad day-of-month", "give minute, hour, day"),
    ("zone", "1", "zone is 1", "Europe/Berlin"),
    ("zone", '"Atlantis/Capital"', "'Atlantis/Capital'", "Europe/Berlin"),
    ("repositories", '"/backup"', "repositories is a text", WORDS),
    ("repositories", "[]", "repositories is an empty list", "folders and URLs"),
    ("repositories", '["/backup", 1]', "repositories holds a number", WORDS),
    ("repositories", '["/backup", ""]', "repositories holds a text that is empty", WORDS),
    ("repositories", '["backup"]', "'backup'", "give /path"),
    ("repositories", '["s3://[::1/x"]', "s3://[::1/x", "give /path"),
    ("repositories", '["/backup", "/backup"]', "named twice", "name each once"),
    ("realms", '"/orders"', "realms is a text", WORDS),
    ("realms", "[]", "realms is an empty list", "or leave it out"),
    ("realms", '["orders"]', "bad pattern 'orders'", "segment"),
    ("realms", '["/__x"]', "the system's own", "patterns of realms"),
    ("exclude", "7", "exclude is a number", WORDS),
    ("exclude", '["orders"]', "bad pattern 'orders'", "segment"),
    ("portable", '"yes"', "portable is 'yes'", FLAG),
    ("recipients", '"age1x"', "recipients is a text", WORDS),
    ("recipients", "[]", "recipients is an empty list", "or leave it out"),
    ("recipients", '["age1nobody"]', "'age1nobody'", "age public key"),
    ("passphrase_file", "true", "passphrase_file is true or false", "a path"),
    ("passphrase_file", '""', "passphrase_file is a text", "a path"),
    ("passphrase_file", '"/a\\u0000b"', "passphrase_file is a text", "a path"),
    ("passphrase_file", '"passphrase"', "passphrase_file is a text", "from / on"),
    ("identity_file", '["key"]', "identity_file is a list", "a path"),
    ("staging", "{ a = 1 }", "staging is a table", "a path"),
    ("staging", '"here"', "staging is a text", "from / on"),
    ("staging", '"/backup/x"', "staging is '/backup/x'", "another place"),
    ("rate", "5.5", "rate is 5.5", "bytes a second"),
    ("rate", "0", "rate is 0", "bytes a second"),
    ("rate", "50", "rate is 50", "such as"),
    ("rate", "-1", "rate is -1", "bytes a second"),
    ("rate", "true", "rate is true", "bytes a second"),
    ("rate", '"0MB/s"', "rate is '0MB/s'", "bytes a second"),
    ("rate", "1" + 400 * "0", "rate is 1000", "up to 1TB/s"),
    ("rate", '"2TB/s"', "rate is '2TB/s'", "up to 1TB/s"),
    ("rate", '"fast"', "rate: 'fast' is not a size", "256MB"),
    ("level", "0", "level is 0", "from 1 to 19"),
    ("level", "20", "level is 20", "from 1 to 19"),
    ("level", "true", "level is true", "from 1 to 19"),
    ("level", '"3"', "level is '3'", "from 1 to 19"),
    ("retention", "7", "retention is 7", "a table such as"),
    ("retention", "{ yearly = 1 }", "unknown key 'retention.yearly'", "known: daily, hourly, last, minimum"),
    ("retention", "{ zone = 1 }", "unknown key 'retention.zone'", "known: daily"),
    ("retention", "{ name = 1 }", "unknown key 'retention.name'", "known: daily"),
    ("retention", "{ daily = -1 }", "retention.daily is -1", COUNT),
    ("retention", "{ hourly = true }", "retention.hourly is true", COUNT),
    ("retention", "{ weekly = 1.5 }", "retention.weekly is 1.5", COUNT),
    ("retention", '{ minimum = "1" }', "retention.minimum is '1'", COUNT),
    ("archive_log", "1", "archive_log is 1", FLAG),
    ("drill", "2026-01-01", "drill is a date", FLAG),
    ("drill", "02:30:00", "drill is a time", FLAG),
    ("drill_warn_days", "0", "drill_warn_days is 0", "from 1 to 3,650"),
    ("drill_warn_days", "7.0", "drill_warn_days is 7.0", "from 1 to 3,650"),
    ("drill_warn_days", "99999999999", "drill_warn_days is 99999999999", "from 1 to 3,650"),
    ("before", '"/bin/true"', "before is a text", "a program and its arguments"),
    ("after", "[1]", "after holds a number", "a program and its arguments"),
    ("on_failure", '["/bin/true", ["x"]]', "on_failure holds a list", "a program and its arguments"),
    ("retries", "-1", "retries is -1", "from 0 to 100"),
    ("retries", "0x1" + 4000 * "0", "retries is a number", "from 0 to 100"),
    ("retries", "101", "retries is 101", "from 0 to 100"),
    ("retry_wait_s", "nan", "retry_wait_s is nan", "from 0 to 86,400"),
    ("retry_wait_s", "inf", "retry_wait_s is inf", "from 0 to 86,400"),
    ("retry_wait_s", "1" + 400 * "0", "retry_wait_s is 1000", "from 0 to 86,400"),
    ("retry_wait_s", '"60"', "retry_wait_s is '60'", "from 0 to 86,400"),
    ("colour", "1", "unknown key 'colour'", "known: after, archive_log"),
    ("passphrase", '"hidden"', "unknown key 'passphrase'", "passphrase_file"),
]
GOOD = {"name": '"nightly"', "repositories": '["/backup"]'}


@pytest.mark.parametrize(("setting", "written", "what", "expected"), MISTAKES)
def test_a_mistake_in_a_setting_is_told_with_all_that_it_takes_to_mend_it(
    tmp_path: Path, setting: str, written: str, what: str, expected: str
) -> None:
    """G10: when the server starts, not in the night of the first run; nothing that was asked for is passed over."""
    lines = (f"{key} = {value}\n" for key, value in {**GOOD, setting: written}.items())
    path = tmp_path / "u.toml"
    path.write_text("[[backup]]\n" + "".join(lines))
    with pytest.raises(UsageError) as caught:
        read_policies(path)
    policy = "number 1" if setting == "name" else "'nightly'"
    assert caught.value.message.startswith(f"{path}, backup policy {policy}: ")
    assert setting in caught.value.message
    assert what in caught.value.message
    assert expected in caught.value.remedy
    assert "hidden" not in str(caught.value)


def test_there_is_a_mistake_for_each_setting() -> None:
    """A setting that is new is told about as well."""
    known = {field.name for field in fields(Policy)} | {"zone"}
    assert known <= {setting for setting, *_ in MISTAKES}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            f'recipients = ["{PUBLIC_KEY}"]\npassphrase_file = "/p"\n',
            "both recipients and passphrase_file are given",
        ),
        ('realms = ["/a"]\narchive_log = true\n', "archive_log is true, with realms or exclude"),
        (
            f'drill = true\nrecipients = ["{PUBLIC_KEY}"]\n',
            "drill is true, with recipients and without identity_file",
        ),
    ],
)
def test_settings_that_can_not_be_together_are_told_with_the_policy(
    tmp_path: Path, more: str, says: str
) -> None:
    """Both are named."""
    path = tmp_path / "u.toml"
    path.write_text(f'[[backup]]\nname = "nightly"\nrepositories = ["/backup"]\n{more}')
    with pytest.raises(UsageError) as caught:
        read_policies(path)
    assert caught.value.message.startswith(f"{path}, backup policy 'nightly': {says}")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "what", "expected"),
    [
        (b"[[backup]]\nname = nightly\n", "is not TOML: Invalid value (at line 2, column 8)", "in quotes"),
        (b'[[backup]]\nname = "caf\xe9"\n', "is no text in UTF-8", "save it as UTF-8"),
        (b'[backup]\nname = "nightly"\n', "backup is a table, and no list of tables", "[[backup]]"),
        (b"backup = [1]\n", "backup is a list, and no list of tables", "[[backup]]"),
        (b'[[backup]]\nrepositories = ["/b"]\n', "backup policy number 1: has no name", "such as name ="),
    ],
)
def test_a_file_that_holds_no_policies_is_told_by_name(
    tmp_path: Path, content: bytes, what: str, expected: str
) -> None:
    """With the place, and what a policy looks like."""
    path = tmp_path / "u.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_policies(path)
    assert caught.value.message.startswith(str(path))
    assert what in caught.value.message
    assert expected in caught.value.remedy


def test_two_policies_of_one_name_and_the_second_without_one(tmp_path: Path) -> None:
    """Which of them is told by its number, as the name can't tell."""
    path, policy = tmp_path / "u.toml", '[[backup]]\nname = "nightly"\nrepositories = ["/b"]\n'
    path.write_text(policy + policy)
    with pytest.raises(UsageError, match="two backup policies have the name 'nightly'"):
        read_policies(path)
    path.write_text(policy + "[[backup]]\n")
    with pytest.raises(UsageError, match="backup policy number 2: has no name"):
        read_policies(path)


@pytest.mark.parametrize("key", [f'recipients = ["{PUBLIC_KEY}"]', 'passphrase_file = "/key"'])
@pytest.mark.parametrize(
    ("one", "other"),
    [("{}/b", "{}/b/"), ("{}/b", "file://{}/b"), ("{}/b", "{}/link"), ("s3://b/a", "s3://b/a/")],
)
def test_what_one_policy_encrypts_no_other_stores_in_the_clear(
    tmp_path: Path, key: str, one: str, other: str
) -> None:
    """G10: two policies share a repository, by whatever names, only if both encrypt or neither does."""
    (tmp_path / "link").symlink_to(tmp_path / "b")
    path = tmp_path / "u.toml"
    plain, secret = (
        f'[[backup]]\nname = "{name}"\nrepositories = ["/only/{name}", "{url.format(tmp_path)}"]\n'
        for name, url in (("plain", one), ("secret", other))
    )
    for content in (plain + secret + key, secret + key + "\n" + plain):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"'secret' encrypts what it stores in .*, and 'plain' does not"):
            read_policies(path)
    for content in (plain + secret, f"{plain}{key}\n{secret}{key}"):
        path.write_text(content)
        assert len(read_policies(path)) == 2


SECRET_KEYS = (
    "AGE-SECRET-KEY-1" + 10 * "HIDDEN",
    " age-secret-key-1" + 10 * "hidden",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nhidden",
)


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_a_secret_key_in_any_setting_is_not_shown(key: str) -> None:
    """G10: wherever it was pasted by mistake, no error holds it, and each says where it is."""
    written: list[dict[str, object]] = [{field.name: key} for field in fields(Policy)]
    written += [{name: [key]} for name in ("repositories", "realms", "exclude", "recipients")]
    written += [{"zone": key}, {"retention": {"daily": key}}, {key: 1}]
    written += [{name: f"{key}\0"} for name in ("passphrase_file", "identity_file", "schedule")]
    for said in written:
        with pytest.raises(UsageError) as caught:
            parse_policy({"name": "nightly", "repositories": ["/backup"], **said}, "u.toml")
        assert "hidden" not in str(caught.value).lower(), said
        assert next(iter(said)) in caught.value.message or key in said


def test_what_may_hold_a_secret_is_not_shown() -> None:
    """G10: a passphrase or a URL that was written into the wrong place comes into no log."""
    for said in (
        {"repositories": "s3://user:hidden@bucket"},
        {"repositories": ["s3://user:hidden@bucket"]},
        {"recipients": "correct horse hidden"},
        {"recipients": ["correct horse hidden"]},
        {"passphrase_file": "correct horse hidden"},
        {"passphrase_file": ["correct horse hidden"]},
        {"identity_file": "correct horse hidden"},
        {"before": "curl --header hidden"},
    ):
        with pytest.raises(UsageError) as caught:
            parse_policy({"name": "nightly", "repositories": ["/backup"], **said}, "u.toml")
        assert "hidden" not in str(caught.value).lower()


def test_a_server_says_what_is_wrong_with_its_policy(processes: Processes, tmp_path: Path) -> None:
    """On one line, before anything is made."""
    path = tmp_path / "u.toml"
    path.write_text('[[backup]]\nname = "nightly"\nrepositories = ["/backup"]\ndrill = "yes"\n')
    refused = processes.run("primary", "--data-dir", tmp_path / "a", "--config", path, code=USAGE)
    assert f"{path}, backup policy 'nightly': drill is 'yes' (give true or false" in complaint(refused)
    assert not (tmp_path / "a").exists()
