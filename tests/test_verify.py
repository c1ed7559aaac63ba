"""`flatstep verify` finds what is wrong, and nothing else."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flatstep
from flatstep import _core, torch_paths, verify
from flatstep.verify import cases, compare, names, ulp

Kernel = Callable[..., None]
SMALL: dict[str, Any] = {"sizes": [65], "threads": [1, 2], "setups": [0], "distances": False}

RULES = ", ".join([*(rule["name"] for rule in _core.rules()), "norm"])


def flip(address: int, index: int, itemsize: int = 4) -> None:
    """Flips the lowest bit of an element."""
    ctypes.c_uint8.from_address(address + index * itemsize).value ^= 1


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Makes every kernel do something more, with the arguments of `_core.update`."""
    real = _core.update

    def break_it(more: Kernel) -> None:
        def update(*args: Any, **beside: Any) -> None:
            real(*args, **beside)
            more(*args)

        monkeypatch.setattr(_core, "update", update)

    return break_it


# ---- the kernels


def test_every_kernel_has_the_bits_of_the_reference() -> None:
    report = verify.run(sizes=[1, 15, 64, 69], threads=[1], setups=[0, 1, 2], distances=False)
    assert report.ok
    assert report.cases == report.planned
    labels = {form.label for form in cases.all_forms().values()}
    rows = len(labels) * len(_core.rules()) + len(cases.all_dtypes())  # and the norms'
    assert len(report.tallies) == rows * len(cases.supported_isas())


def test_threads_split_the_largest_size() -> None:
    few = [*cases.all_dtypes(), *list(cases.all_forms())[7::17]]
    assert verify.run(dtypes=few, sizes=[cases.MANY], setups=[1], distances=False).ok


def test_an_empty_array_is_left_alone() -> None:
    assert verify.run(sizes=[0], distances=False).ok


def test_the_kernels_and_the_reference_use_the_same_names() -> None:
    assert names.disagreements() == []


# ---- what is wrong is found


@pytest.mark.parametrize("index", [0, 17, 64])
@pytest.mark.parametrize("array", ["param", "exp_avg", "max_exp_avg_sq"])
def test_one_wrong_bit_is_found(broken: Callable[[Kernel], None], array: str, index: int) -> None:
    def flip_it(_rule: str, _flags: int, _layout: int, param: int, *rest: Any) -> None:
        addresses = {"param": param, "exp_avg": rest[1][0], "max_exp_avg_sq": rest[1][-1]}
        flip(addresses[array], index, 8)

    broken(flip_it)
    report = verify.run(rules=["adam"], variants=["amsgrad"], dtypes=["float64"], **SMALL)
    assert not report.ok
    assert report.mismatched == report.cases
    mismatch = report.mismatches[0]
    assert (mismatch.array, mismatch.index, mismatch.differing) == (array, index, 1)
    assert int(mismatch.expected.hex, 16) ^ int(mismatch.got.hex, 16) == 1
    data = cases.draw("float64", 65, 0, 0)
    assert int(mismatch.inputs["param"].hex, 16) == data.param[index]
    assert int(mismatch.inputs["grad"].hex, 16) == data.grads[0][index]
    assert list(mismatch.inputs) == ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert (mismatch.step, mismatch.scale, mismatch.hyper["beta1"]) == (1, 1.0, 0.9)


@pytest.mark.parametrize("index", [-1, -64, 65, 128])
def test_a_write_outside_an_array_is_found(broken: Callable[[Kernel], None], index: int) -> None:
    broken(lambda _rule, _flags, _layout, param, *_: flip(param, index))
    report = verify.run(rules=["sgd"], variants=["plain"], dtypes=["float32"], **SMALL)
    assert (report.mismatches[0].array, report.mismatches[0].index) == ("param", index)
    assert report.mismatches[0].inputs == {}


def test_a_written_gradient_is_found(broken: Callable[[Kernel], None]) -> None:
    broken(lambda _rule, _flags, _layout, _param, grad, *_: flip(grad, 5))
    report = verify.run(rules=["sgd"], dtypes=["float32"], **SMALL)
    assert (report.mismatches[0].array, report.mismatches[0].index) == ("grad", 5)


def test_a_later_update_is_compared_too(broken: Callable[[Kernel], None]) -> None:
    def flip_it(*args: Any) -> None:
        if args[8] == 3:
            flip(args[3], 0)

    broken(flip_it)
    report = verify.run(rules=["sgd"], variants=["plain"], dtypes=["float32"], **SMALL)
    assert report.mismatches[0].step == 3


def test_each_instruction_set_and_number_of_threads_is_looked_at(
    broken: Callable[[Kernel], None],
) -> None:
    def flip_it(*args: Any) -> None:
        if _core.isa() == "scalar" and torch.get_num_threads() == args[-1] == 2:
            flip(args[3], 0)

    broken(flip_it)
    report = verify.run(rules=["sgd"], dtypes=["float32"], **SMALL)
    assert {(m.isa, m.threads) for m in report.mismatches} == {("scalar", 2)}
    for tally in report.tallies:
        assert tally.mismatches == (tally.cases // 2 if tally.isa == "scalar" else 0)


def test_a_name_that_only_the_kernels_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{**rule, "hyper": ("speed", *rule["hyper"][1:])} for rule in _core.rules()]
    monkeypatch.setattr(_core, "rules", lambda: rules)
    report = verify.run(rules=["sgd"], **SMALL)
    assert not report.ok
    assert report.cases == 0
    assert "speed" in report.names[0]
    assert "lr" in report.names[0]


@pytest.mark.parametrize("dtype", cases.FORMATS)
def test_nan_is_nan_but_zeros_have_signs(dtype: str) -> None:
    form = cases.FORMATS[dtype]
    nan = form.infinity + 1
    got = np.array([nan, form.sign | nan, 0, form.infinity, 3], form.unsigned)
    expected = np.array([form.sign - 1, nan, form.sign, nan, 3], form.unsigned)
    assert compare.differences(got, expected, dtype).tolist() == [2, 3]


# ---- the cases


@pytest.mark.parametrize("dtype", cases.FORMATS)
def test_cases_hold_what_is_special_and_what_is_not(dtype: str) -> None:
    form = cases.FORMATS[dtype]
    data = cases.draw(dtype, 4097, 0, 0)
    for bits in (data.param, *data.grads, *data.states):
        size = bits.astype(np.uint64) & np.uint64(form.sign - 1)
        least_normal = 1 << form.fraction
        for kind in (
            bits == 0,
            bits == form.sign,
            (size > 0) & (size < least_normal),
            size == form.infinity,
            size > form.infinity,
        ):
            assert 1 <= np.count_nonzero(kind) < bits.size // 5


def test_the_same_case_has_the_same_values_again() -> None:
    first = cases.draw("bfloat16", 65, 3, 7)
    cases.draw.cache_clear()
    again = cases.draw("bfloat16", 65, 3, 7)
    other = cases.draw("bfloat16", 65, 3, 8)
    assert np.array_equal(first.param, again.param)
    assert np.array_equal(first.states, again.states)
    assert not np.array_equal(first.param, other.param)


def test_arrays_begin_where_the_setup_says() -> None:
    variant = cases.all_variants()[0]
    for number, setup in enumerate(cases.SETUPS):
        arena = compare.Arena(cases.Case(variant, "float32", 65, number, 0))
        block = arena.block()
        for place, name in enumerate(arena.starts):
            assert arena.address(block, name) % 64 == place * setup.shift * 4 % 64


def test_what_was_in_use_is_in_use_after(broken: Callable[[Kernel], None]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = _core.isa(), torch.get_num_threads()
    verify.run(rules=["sgd"], threads=[3], sizes=[1])
    assert (_core.isa(), torch.get_num_threads()) == before
    broken(interrupt)
    with pytest.raises(KeyboardInterrupt):
        verify.run(rules=["sgd"], threads=[3], sizes=[1])
    assert (_core.isa(), torch.get_num_threads()) == before


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"rules": ["adamm"]}, f"there is no rule 'adamm'; those that exist: {RULES}"),
        ({"rules": ["sgd"], "variants": ["amsgrad"]}, "those that exist: plain, momentum, "),
        ({"dtypes": ["int8"]}, "those that exist: float32, float64, bfloat16, float16"),
        ({"isas": ["mmx"]}, "those that this build has and this processor runs: scalar"),
        ({"setups": [99]}, "there is no setup 99; those that exist: 0, 1, "),
        ({"sizes": [-1]}, "size must be at least 0, not -1"),
        ({"threads": [0]}, "threads must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_what_does_not_exist_is_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify.run(**selection)


# ---- the report


def test_a_report_is_json() -> None:
    seen: list[tuple[int, int, str]] = []
    report = verify.run(
        rules=["adam"],
        dtypes=["bfloat16"],
        sizes=[3],
        on_progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert (report.planned, report.planned, "bfloat16 × 3") in seen
    assert seen[-1][0] == seen[-1][1]
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["ok"] is True
    assert loaded["cases"] == loaded["planned"] > 0
    assert loaded["distances"][0]["optimizer"] == "Adam"


def test_flatstep_is_the_reference_and_torch_is_near() -> None:
    distances = verify.run(rules=["rmsprop", "sgd"], dtypes=["float32"], sizes=[1]).distances
    found = {(d.optimizer, d.implementation): d for d in distances}
    for optimizer in ("RMSprop", "SGD"):
        assert found[optimizer, "flatstep"].worst == 0
        assert 0 < found[optimizer, "for-loop"].mean < 1
        assert found[optimizer, "foreach"].lost == 0
    assert ("SGD", "fused") in found
    assert ("RMSprop", "fused") not in found


def test_a_path_that_torch_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_paths.PATHS, "both", {"foreach": True, "fused": True})
    report = verify.run(rules=["sgd"], dtypes=["float32"], sizes=[1])
    assert "both" not in {distance.implementation for distance in report.distances}


def test_an_optimizer_that_leaves_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = flatstep.SGD.variant

    def other_variant(self: flatstep.SGD, group: dict[str, Any]) -> Any:
        found = variant(self, group)
        changed = self.state and group["nesterov"]
        return found._replace(hyper=[found.hyper[0] * 2, *found.hyper[1:]]) if changed else found

    monkeypatch.setattr(flatstep.SGD, "variant", other_variant)
    report = verify.run(rules=["sgd"], dtypes=["float32"], sizes=[1])
    assert not report.ok
    assert not report.mismatched
    assert [d.options for d in report.strayed] == ["momentum=0.9 nesterov=True weight_decay=0.1"]


@pytest.mark.parametrize("dtype", cases.FORMATS)
def test_an_ulp_is_the_way_to_the_neighbour(dtype: str) -> None:
    form = cases.FORMATS[dtype]
    infinity, sign = form.infinity, form.sign
    pairs = [(5, 5, 0), (5, 6, 1), (infinity, infinity - 1, 1), (sign, 0, 0), (sign | 1, 2, 3)]
    pairs.append((sign | infinity, infinity, 2 * infinity))
    a, b, apart = zip(*pairs, strict=True)
    found = ulp.distance(np.array(a, form.unsigned), np.array(b, form.unsigned), dtype)
    assert found.tolist() == list(apart)
