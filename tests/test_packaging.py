"""The wheel holds what the tree holds, and the lists in ``pyproject.toml`` are complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
SHIPPED = {".py", ".pyi", ".proto"}


def shipped_files() -> set[str]:
    """Of every package in the tree, under the names that they are installed by."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tree: here, leftovers of other builds would get in."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", copy],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_exactly_what_the_packages_hold(wheel_files: set[str]) -> None:
    """Every source, stub, marker and contract file of every package is in the wheel, and no other."""
    installed = {name for name in wheel_files if ".dist-info/" not in name}
    assert installed == shipped_files()


def test_wheel_carries_the_licence_and_the_command(wheel_files: set[str]) -> None:
    """The wheel has the licence's text and installs a console script."""
    metadata = {name.partition(".dist-info/")[2] for name in wheel_files}
    assert {"licenses/LICENSE", "entry_points.txt"} <= metadata


def test_every_folder_of_code_is_a_package() -> None:
    """Every folder at the top with an ``__init__.py`` stands in ``packages`` and in ``package-dir``."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= set(FOLDERS.values())
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(FOLDERS)


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_package_is_flat_typed_and_linked(package: str) -> None:
    """A package has its code in one folder, is marked as typed, and has its link in ``.types``."""
    folder = ROOT / FOLDERS[package]
    assert [path for path in folder.rglob("*.py") if path.parent != folder] == []
    assert (folder / "py.typed").is_file()
    assert (ROOT / ".types" / package.replace(".", "/")).resolve() == folder


@pytest.mark.parametrize(
    ("requirement", "file", "pattern"),
    [
        ("protobuf", "log_pb2.py", r"Protobuf Python Version: (\S+)"),
        ("grpcio", "data_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '(\S+)'"),
    ],
)
def test_lowest_version_allowed_can_load_generated_code(requirement: str, file: str, pattern: str) -> None:
    """Generated code refuses to load with a library older than its generator, so none may be installed."""
    generated_for = re.search(pattern, (ROOT / "proto/understudy/v1" / file).read_text())
    assert generated_for is not None
    requirements = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    (allowed,) = (each.specifier for each in requirements if each.name == requirement)
    (lowest,) = (Version(bound.version) for bound in allowed if bound.operator == ">=")
    assert lowest >= Version(generated_for[1])
