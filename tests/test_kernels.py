"""Every kernel against the reference, on bytes, and the choice of the kernels."""

from __future__ import annotations

import os
import pickle
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_cases import (
    DTYPES,
    ISAS,
    STORED,
    VARIANTS,
    Update,
    Variant,
    assert_same,
    copies,
    every_value,
    instruction_set,
    narrowing_factors,
    plain_sgd,
    random_arrays,
    updates,
    variant,
)

import flatstep
from flatstep import _core, reference

every_kernel = pytest.mark.parametrize(
    ("of", "dtype"),
    [pytest.param(v, dtype, id=f"{v}-{dtype}") for v in VARIANTS for dtype in DTYPES],
)
half_types = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])

# More than two blocks and a tail of the widest kernel (32 lanes of bfloat16).
SMALL_SIZES = range(101)
# Where each array begins within memory aligned for the widest vectors: all alike, all different.
STARTS = ((0, 0, 0, 0, 0), (1, 2, 3, 5, 7))


# ---- bytes


@every_kernel
@pytest.mark.parametrize("starts", STARTS, ids=["aligned", "unaligned"])
def test_every_size_has_the_reference_s_bytes_and_nothing_outside_is_touched(
    of: Variant, dtype: str, starts: tuple[int, ...]
) -> None:
    longest = SMALL_SIZES[-1]
    for update in updates(of, dtype):
        before = random_arrays(of, dtype, longest)
        after = update.by_reference(before)
        leads = dict(zip(of.arrays, starts, strict=False))
        original = {name: _framed(x, leads[name]) for name, x in before.items()}
        for isa in ISAS:
            with instruction_set(isa):
                for size in SMALL_SIZES:
                    memory = copies(original)
                    expected = copies(original)
                    views = {}
                    for name, lead in leads.items():
                        views[name] = memory[name][lead : lead + size]
                        expected[name][lead : lead + size] = after[name][:size]
                    update.by_core(views)
                    assert_same(memory, expected, original, f"{update} on {isa}, size {size}")


def _framed(x: np.ndarray, lead: int) -> np.ndarray:
    """A copy of x from element `lead` of memory that is aligned to 64 bytes, noise around it."""
    behind = 64
    raw = np.empty((lead + x.size + behind) * x.itemsize + 64, np.uint8)
    raw[:] = np.arange(raw.size) * 37
    skipped = -raw.ctypes.data % 64
    framed = raw[skipped : skipped + (lead + x.size + behind) * x.itemsize].view(x.dtype)
    framed[lead : lead + x.size] = x
    return framed


@every_kernel
def test_every_thread_count_has_the_reference_s_bytes(of: Variant, dtype: str) -> None:
    update = Update(of, dtype, of.hyper(), step=7, scale=0.5)
    before = random_arrays(of, dtype, 100_003)
    after = update.by_reference(before)
    for isa in ISAS:
        with instruction_set(isa):
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found = copies(before)
                update.by_core(found, threads)
                assert_same(found, after, before, f"{update} on {isa}, {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_have_the_reference_s_bytes(dtype: str) -> None:
    """The scalars of the host, too: powers of beta for each step."""
    of = variant("adam-amsgrad")
    expected = random_arrays(of, dtype, 64)
    found = {isa: copies(expected) for isa in ISAS}
    for step in [*range(1, 50), 1_000, 1_000_000, 2**40]:
        update = Update(of, dtype, of.hyper(), step=step)
        before, expected = expected, update.by_reference(expected)
        for isa in ISAS:
            with instruction_set(isa):
                update.by_core(found[isa])
            assert_same(found[isa], expected, before, f"{update} on {isa}")


# ---- conversions


@half_types
@pytest.mark.parametrize("isa", ISAS)
def test_every_16_bit_value_survives_load_and_store(dtype: str, isa: str) -> None:
    values = every_value(dtype)
    found = {"p": values.copy(), "g": np.zeros_like(values)}
    with instruction_set(isa):
        plain_sgd(dtype, lr=0.0).by_core(found)
    canonical = {"bfloat16": 0x7FC0, "float16": 0x7E00}[dtype]
    is_nan = np.isnan(reference.widen(values, dtype))
    expected = np.where(is_nan, np.uint16(canonical), values.view(np.uint16))
    np.testing.assert_array_equal(found["p"].view(np.uint16), expected)


@half_types
def test_rounding_to_16_bits_has_the_reference_s_bytes(dtype: str) -> None:
    """Every 16-bit value times many factors: float32 values of full length, ties, overflow."""
    values = every_value(dtype)
    for factor in narrowing_factors():
        update = plain_sgd(dtype, lr=-factor)
        before = {"p": np.zeros_like(values), "g": values}
        after = update.by_reference(before)
        for isa in ISAS:
            found = copies(before)
            with instruction_set(isa):
                update.by_core(found)
            assert_same(found, after, before, f"factor {factor} on {isa}")


@half_types
def test_sums_half_way_between_two_16_bit_values_go_to_the_even_one(dtype: str) -> None:
    mantissa = {"bfloat16": 7, "float16": 10}[dtype]
    values = every_value(dtype)
    unsigned = values.view(np.uint16)
    exponent = unsigned >> mantissa & ((1 << 15 - mantissa) - 1)
    # Normal neighbours of one binade, whose half-way point float32 holds and half an ulp is normal.
    usable = (exponent > mantissa + 2) & (exponent < (1 << 15 - mantissa) - 1)
    usable &= (unsigned & ((1 << mantissa) - 1)) != (1 << mantissa) - 1
    low = unsigned[usable]
    half_ulp = low & np.uint16(0xFFFF & ~((1 << mantissa) - 1))  # the power of two, with its sign
    half_ulp = half_ulp - np.uint16((mantissa + 1) << mantissa)
    even = low + (low & 1)
    for isa in ISAS:
        found = {"p": low.view(STORED[dtype]).copy(), "g": half_ulp.view(STORED[dtype]).copy()}
        with instruction_set(isa):
            plain_sgd(dtype, lr=-1.0).by_core(found)
        np.testing.assert_array_equal(found["p"].view(np.uint16), even)


# ---- the caller's floating-point mode


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _flushes() -> bool:
    return (torch.tensor([1e-40]) * 1).item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_the_caller_s_flush_to_zero_changes_no_bit_and_is_restored(
    dtype: str, threads: int, isa: str, request: pytest.FixtureRequest
) -> None:
    torch.set_num_threads(threads)
    update = Update(variant("adam-l2"), dtype, variant("adam-l2").hyper(), scale=2.0**-20)
    before = random_arrays(update.variant, dtype, 70_001)
    after = update.by_reference(before)
    found = copies(before)
    request.getfixturevalue("flush_denormal")
    assert _flushes()
    with instruction_set(isa):
        update.by_core(found, threads)
    assert _flushes()
    torch.set_flush_denormal(False)
    assert not _flushes()
    assert_same(found, after, before, update)


# ---- the choice of the instruction set


@pytest.mark.isa
@pytest.mark.parametrize("isa", ISAS)
def test_a_forced_instruction_set_is_the_one_in_use(isa: str) -> None:
    done = _with_isa(isa, "import flatstep; print(flatstep.cpu_isa())")
    assert done.stdout.strip() == isa, done.stderr


def test_the_widest_supported_instruction_set_is_the_default() -> None:
    if "FLATSTEP_ISA" in os.environ:
        pytest.skip("FLATSTEP_ISA is set")
    assert flatstep.cpu_isa() == ISAS[0]


@pytest.mark.isa
def test_a_switch_of_the_instruction_set_is_reported() -> None:
    seen = []
    for isa in ISAS:
        with instruction_set(isa):
            seen.append(flatstep.cpu_isa())
    assert seen == list(ISAS)


@pytest.mark.isa
def test_an_unknown_instruction_set_is_an_error_that_names_those_that_exist() -> None:
    in_use = _core.isa()
    with pytest.raises(ValueError, match=r"'sse9'.*scalar"):
        _core.use_isa("sse9")
    assert _core.isa() == in_use


@pytest.mark.isa
def test_an_import_with_an_unknown_instruction_set_is_an_error() -> None:
    done = _with_isa("sse9", "import flatstep")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("RuntimeError")
    assert "sse9" in message
    assert all(name in message for name, _ in _core.isas())


def _with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FLATSTEP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


IN_AN_EMULATOR = """
import ctypes, importlib.util, pickle, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
at = lambda data: ctypes.addressof(ctypes.c_char.from_buffer(data))
calls = pickle.load(sys.stdin.buffer)
for rule, flags, layout, arrays, *rest in calls:
    p, g, *states = map(at, arrays)
    core.update(rule, flags, layout, p, g, states, *rest)
refused = {}
for name, supported in core.isas():
    if not supported:
        try:
            core.use_isa(name)
        except ValueError as error:
            refused[name] = str(error)
pickle.dump((core.isa(), refused, [call[3] for call in calls]), sys.stdout.buffer)
"""


@pytest.mark.isa
@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_an_emulated_older_processor_runs_its_own_kernels_and_refuses_wider_ones(
    processor: str, isa: str
) -> None:
    """The emulator stops at an instruction that the processor lacks: no kernel holds one."""
    emulator = shutil.which("qemu-x86_64")
    if not emulator or platform.machine() != "x86_64":
        pytest.skip("needs qemu-x86_64 on an x86-64 machine")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("the emulator does not run preloaded libraries, such as a sanitizer's")
    wanted, calls = [], []
    for of in VARIANTS:
        for dtype in DTYPES:
            update = Update(of, dtype, of.hyper())
            arrays = random_arrays(of, dtype, 100)
            wanted.append((update, arrays))
            hyper = [update.hyper[name] for name in of.hyper_names]
            data = [bytearray(arrays[name].tobytes()) for name in of.arrays]
            rest = (100, hyper, update.step, update.scale, 1)
            calls.append((of.rule, of.flags, update.layout, data, *rest))
    python = os.path.realpath(sys.executable)
    done = subprocess.run(
        [emulator, "-cpu", processor, python, "-I", "-S", "-c", IN_AN_EMULATOR, _core.__file__],
        input=pickle.dumps(calls),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    in_use, refused, results = pickle.loads(done.stdout)
    assert in_use == isa
    names = [name for name, _ in _core.isas()]
    assert list(refused) == names[: names.index(isa)]
    assert all(name in message for name, message in refused.items())
    for (update, before), result in zip(wanted, results, strict=True):
        found = {
            name: np.frombuffer(data, STORED[update.dtype])
            for name, data in zip(update.variant.arrays, result, strict=True)
        }
        assert_same(found, update.by_reference(before), before, update)
