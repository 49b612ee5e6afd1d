"""Planted mistakes: every one can be planted still, and the runner tells one from none."""

import ast

import pytest
from mutants import MUTANTS, ROOT, copied, noticed, planted


@pytest.mark.parametrize("subject", list(MUTANTS))
def test_every_mistake_can_be_planted(subject: str) -> None:
    """What it replaces stands in its file, what comes of it is Python, its tests are there."""
    assert len(MUTANTS[subject]) >= 30
    for name, mutant in MUTANTS[subject].items():
        (file, tests), _ = mutant
        found = planted(mutant)
        assert found != (ROOT / file).read_text() and ast.parse(found), name
        for test in tests.split():
            where, _, function = test.partition("[")[0].partition("::")
            text = (ROOT / "tests" / f"test_{where}.py").read_text()
            assert f"def {function}(" in text or not function, name


def test_names_are_given_once() -> None:
    assert not MUTANTS["kernels"].keys() & MUTANTS["trainer"].keys()


@pytest.mark.slow
def test_a_mistake_is_told_from_none() -> None:
    mistake = MUTANTS["trainer"]["rate stays at its peak"]
    (file, tests), _ = mistake
    none = (file, tests), [("rising, falling)", "rising, (falling))")]
    with copied() as place:
        assert noticed(mistake, place)
        assert not noticed(none, place)
        assert (place / file).read_text() == (ROOT / file).read_text()
