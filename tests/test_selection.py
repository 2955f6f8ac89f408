"""What a command leaves out is seen in another case: samples have every value, and the files that start first exist."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.selection import LONGEST, sample

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    nodeid: str


def features(*axes: str, pairs: bool = False) -> dict[Any, set[Any]]:
    """Return the cases of a product of letters, each with its letters or its pairs of letters."""
    found: dict[Any, set[Any]] = {}
    for letters in itertools.product(*axes):
        values = list(enumerate(letters))
        found[Case("".join(letters))] = set(itertools.combinations(values, 2) if pairs else values)
    return found


@pytest.mark.parametrize("pairs", [False, True])
def test_a_sample_has_every_feature_in_few_cases(pairs: bool) -> None:
    cases = features("abcdefg", "hij", "kl", pairs=pairs)
    chosen = sample(cases)
    assert set().union(*(cases[case] for case in chosen)) == set().union(*cases.values())
    least = 7 * 3 if pairs else 7
    assert least <= len(chosen) <= 1.3 * least
    assert sample(cases) == chosen, "the same in every process"


def test_a_value_meets_several_of_the_others() -> None:
    chosen = sample(features("abcdefg", "hij"))
    assert len({case.nodeid[1] for case in chosen}) == 3
    assert max(sum(case.nodeid[1] == letter for case in chosen) for letter in "hij") < 5


def test_the_files_that_start_first_exist() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []
