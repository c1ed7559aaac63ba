"""Which form of the GPU's kernels a measurement keeps, and which one a build is told to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_forms

    return gpu_forms


MOST_SHARED = 226 << 10  # bytes that a block of Hopper's can have, beside a kernel's own


def test_every_shape_of_the_bulk_form_fits_a_block(forms: ModuleType) -> None:
    arrays = 2 + max(case.states for case in forms.CASES)
    for form in forms.CHECKED:
        shape = dict(word.split("=") for word in form.split(",")[1:])
        assert int(shape["stages"]) * int(shape["tile"]) * arrays <= MOST_SHARED, form


def found(forms: ModuleType, shares: dict[str, Sequence[float]], rounds: int = 5) -> list:
    return [
        forms.Found(f"case {place}", "float32", form, 1.0, 0.004, share, rounds)
        for form, of_cases in shares.items()
        for place, share in enumerate(of_cases)
    ]


@pytest.mark.parametrize(
    ("bulk", "said"),
    [
        ((0.94, 0.96), "+5.5%, spread 0.4%: keep the bulk form"),
        ((0.85, 0.86), "-5.0%, spread 0.4%: keep the vectorised form"),
        ((0.902, 0.898), "no more apart than their spread: keep the vectorised form"),
    ],
)
def test_a_form_is_kept_for_its_best_shape_over_all_cases(
    forms: ModuleType, bulk: tuple[float, float], said: str
) -> None:
    shares = {
        "vector": (0.9, 0.9),
        "vector,blocks=1": (0.95, 0.6),  # better in one case, not in all
        forms.BULK[0]: bulk,
        forms.BULK[1]: (0.99,),  # did not run in the other
    }
    verdict = forms.verdict(found(forms, shares), "float32")
    assert verdict.startswith(f"float32: of the copy's rate vector 0.900, {forms.BULK[0]} ")
    assert said in verdict


def test_a_form_that_never_ran_is_no_loser(forms: ModuleType) -> None:
    verdict = forms.verdict(found(forms, {"vector": (0.9,)}), "float32")
    assert "no verdict" in verdict
    assert forms.BULK[0] in verdict


def test_too_few_rounds_decide_nothing(forms: ModuleType) -> None:
    shares = {"vector": (0.9,), forms.BULK[0]: (0.5,)}
    assert "no verdict" in forms.verdict(found(forms, shares, rounds=4), "float32")
