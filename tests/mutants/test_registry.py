"""The mutants, still to be made of the code as it is; `make mutants` tries them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutants.mutant import Mutant
from mutants.registry import MUTANTS, QUICK

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_one_place_in_code_that_can_be_read(mutant: Mutant) -> None:
    """Whoever moves what a mutant breaks hears of it at once, by its name; and each breaks more than the grammar."""
    ast.parse(mutant.source(ROOT))
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests)


def test_mutants_have_names_of_their_own() -> None:
    """A mutant is asked for by its name."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
