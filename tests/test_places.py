"""Where backups may lie, and what a policy may say: what would harm the data, or ends nowhere, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Processes
from nodes import put

from understudy.backup.places import check_apart, check_repository_apart
from understudy.backup.point import parse_time
from understudy.backup.policy import parse_policy
from understudy.backup.repository import check_url
from understudy.common.errors import UsageError

FAILED, USAGE = 1, 2


def test_neither_lies_within_the_other(tmp_path: Path) -> None:
    """A link is where it leads to; what only begins alike is apart."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "link").symlink_to(inner)
    for one, other in ((inner, tmp_path / "a"), (tmp_path / "a", inner), (tmp_path / "link", tmp_path / "a")):
        with pytest.raises(UsageError, match="within each other"):
            check_apart(one, other)
    check_apart(tmp_path / "ab", tmp_path / "a")
    with pytest.raises(UsageError, match="within each other"):
        check_repository_apart(f"file://{inner}", tmp_path / "a")
    check_repository_apart("s3://bucket/a", tmp_path / "a")


def test_a_repository_within_the_data_is_refused(processes: Processes, tmp_path: Path) -> None:
    """G4: no run writes into the directory that it backs up, and nothing is restored into a repository."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))
    config, repository = tmp_path / "u.toml", tmp_path / "repository"
    repository.mkdir()
    run = ("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a", "--json")
    for folder, code in ((tmp_path / "a" / "log", FAILED), (repository, 0)):
        config.write_text(f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\nretries = 0\n')
        told = json.loads(processes.run(*run, code=code).stdout)
        assert ("within each other" in "".join(told["errors"])) == bool(code)
    assert not (tmp_path / "a" / "log" / "understudy.json").exists()
    refused = processes.run("restore", repository, "--to", repository / "restored", code=USAGE)
    assert "within each other" in refused.stderr.decode()


def test_an_archive_within_its_source_is_refused(processes: Processes, tmp_path: Path) -> None:
    """G4: no backup by hand writes into the directory that it copies, which is then to be lost with it."""
    processes.primary(tmp_path / "a").terminate()
    before = sorted(tmp_path.rglob("*"))
    for target in (tmp_path / "a/a.tar.zst", tmp_path / "a/store/a.tar.zst"):
        done = processes.run("backup", "-f", tmp_path / "a", "-t", target, code=USAGE)
        assert "within each other" in done.stderr.decode()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "repository", ["/backup/here", "/backup/here/staging/in/it", "file:///backup/here/staging"]
)
def test_a_staging_within_or_around_a_repository_is_refused(repository: str) -> None:
    """G4: what drills replace as a whole holds no backup, and is not taken for one."""
    said = {"name": "nightly", "repositories": ["s3://bucket", repository], "staging": "/backup/here/staging"}
    with pytest.raises(UsageError, match="'nightly': staging is '/backup/here/staging', and that"):
        parse_policy(said, "u.toml")
    parse_policy({**said, "staging": "/backup/staging"}, "u.toml")


def test_a_staging_within_the_data_is_refused_by_all_who_know_both(
    processes: Processes, tmp_path: Path
) -> None:
    """G4: the server does not start with it, and neither run nor drill begins."""
    data_dir, config = tmp_path / "a", tmp_path / "u.toml"
    processes.primary(data_dir).terminate()
    config.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = ["{tmp_path}/repository"]\nstaging = "{data_dir}/staging"\n'
    )
    policy = ("nightly", "--config", config, "--data-dir", data_dir)
    for command in (
        ("primary", "--data-dir", data_dir, "--config", config),
        ("replica", "--data-dir", data_dir, "--primary", "127.0.0.1:1", "--config", config),
        ("backup", "run", *policy),
        ("backup", "drill", *policy),
    ):
        done = processes.run(*command, code=USAGE)
        assert f"staging is '{data_dir}/staging', and that and {data_dir} lie" in done.stderr.decode()


def test_a_restore_of_realms_that_are_not_there_says_so(processes: Processes, tmp_path: Path) -> None:
    """A pattern that holds no realm is a mistake, not a success without any."""
    put(processes.primary(tmp_path / "a").address, "/orders", (b"key", b"value"))
    processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b")
    told = processes.run("restore", tmp_path / "b", "--to", tmp_path / "c", "--realm", "/ORDERS", code=USAGE)
    assert "holds no realm of /ORDERS" in complaint_of(told.stderr.decode())


def complaint_of(text: str) -> str:
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    "said",
    [
        {"drill_warn_days": 99_999_999_999},
        {"retry_wait_s": float("inf")},
        {"retry_wait_s": float("nan")},
        {"retries": 10**22},
        {"rate": -5},
        {"staging": "staging"},
        {"repositories": ["/backup", "/backup"]},
        {"repositories": ["s3://user:hidden@bucket/x"]},
        {"repositories": ["s3://[::1/x"]},
    ],
)
def test_what_a_policy_can_not_mean_is_refused(said: dict[str, object]) -> None:
    """Each value is refused when the server starts, not in the night of the first run."""
    with pytest.raises(UsageError) as caught:
        parse_policy({"name": "nightly", "repositories": ["/backup"], **said}, "u.toml")
    assert "hidden" not in str(caught.value)


def test_a_url_with_credentials_is_refused_before_it_is_opened() -> None:
    """G10: what would be printed later is not accepted first."""
    with pytest.raises(UsageError, match="holds credentials"):
        check_url("s3://user:hidden@bucket/x")


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "yesterday"])
def test_a_time_that_no_calendar_has_is_refused(text: str) -> None:
    """Not a traceback: a moment before the first year, or after the last, once its zone is taken into account."""
    with pytest.raises(UsageError, match="no date and time"):
        parse_time(text)
