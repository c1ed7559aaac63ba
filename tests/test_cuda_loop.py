"""The GPU's loop, run thread by thread on the host: its bits and the elements it touches.

No GPU is involved. What a GPU has run is in docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import (
    DTYPES,
    VARIANTS,
    Arrays,
    Update,
    Variant,
    address,
    assert_same,
    copies,
    random_arrays,
    updates,
    variant,
)

from flatstep import _core
from flatstep.optim import gpu
from flatstep.verify import cases, compare

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
]
FIRST_VARIANT = {
    rule["name"]: sum(1 << len(other["flags"]) for other in _core.rules()[:place])
    for place, rule in enumerate(_core.rules())
}

INLINE_ROWS = 42
VECTORISED = (0, 0)
# The bulk form's stages, and the bytes of a tile: for a few of a block's threads, or each twice.
PIPELINES = ((2, 512), (3, 1536), (8, 5632))
STORED = ("float32", "float64", "bfloat16", "float16")  # in the order of the kernels' enum

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc").is_dir(), reason="needs g++ and the sources"
)


class Row(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("state", ctypes.c_void_p * 3),
        ("begin", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("step", ctypes.c_void_p),
        ("master", ctypes.c_void_p),
        ("average", ctypes.c_void_p),
        ("first", ctypes.c_uint32),
    )


class Number(ctypes.Structure):
    _fields_ = (("value", ctypes.c_double), ("at", ctypes.c_void_p), ("is_double", ctypes.c_bool))


class Launch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.POINTER(Row)),
        ("row_count", ctypes.c_int),
        ("step_is_double", ctypes.c_bool),
        ("clears", ctypes.c_bool),
        ("skips", ctypes.c_bool),
        ("total", ctypes.c_int64),
        ("host_step", ctypes.c_int64),
        ("rule_step", ctypes.c_int64),
        ("hyper", Number * 5),
        ("sign", ctypes.c_double),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("max_norm", ctypes.c_double),
        ("types", ctypes.c_int * 3),
        ("extras", ctypes.c_uint),
        ("unscale", ctypes.c_double),
        ("average_decay", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("pipeline", ctypes.c_int * 2),
        ("inline_rows", Row * INLINE_ROWS),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("cuda") / "libemulate.so"
    source = ROOT / "tests" / "cuda" / "emulate.cpp"
    subprocess.run(
        ["g++", *FLAGS, "-I", str(ROOT / "csrc"), "-o", str(out), str(source)], check=True
    )
    library = ctypes.CDLL(str(out))
    assert library.launch_size() == ctypes.sizeof(Launch)
    assert library.inline_rows() == INLINE_ROWS
    return library


Run = Callable[..., None]


@pytest.fixture
def run(library: ctypes.CDLL) -> Run:
    """Runs one update over rows, each a dict of arrays, as the device's launch would."""

    def run(
        update: Update,
        rows: list[Arrays],
        blocks: int = 2,
        *,
        steps: np.ndarray | None = None,
        by_table: bool = False,
        pipeline: tuple[int, int] = VECTORISED,
        **changes: object,
    ) -> None:
        of, launch = update.variant, Launch()
        table = (Row * len(rows))()
        begin, alignment = 0, library.row_alignment()
        for place, arrays in enumerate(rows):
            states = [address(arrays[name]) for name in of.states]
            slots = _slots(of, states)
            step = None if steps is None else steps.ctypes.data + place * steps.itemsize
            table[place] = Row(
                address(arrays["p"]), address(arrays["g"]), slots, begin, arrays["p"].size, step
            )
            begin += -(-arrays["p"].size // alignment) * alignment
        if by_table:
            launch.rows = table
        else:
            for place, row in enumerate(table):
                launch.inline_rows[place] = row
        launch.row_count, launch.total, launch.host_step = len(rows), begin, update.step
        launch.step_is_double = steps is not None and steps.dtype == np.float64
        launch.sign, launch.pipeline[:] = update.scale, pipeline
        for place, name in enumerate(of.hyper_names):
            launch.hyper[place].value = update.hyper[name]
        for name, value in changes.items():
            setattr(launch, name, value)
        number = FIRST_VARIANT[of.rule] + of.flags
        library.emulate(ctypes.byref(launch), update.layout, number, blocks)
        if steps is not None:
            library.emulate_count(ctypes.byref(launch), 1)

    return run


def aligned_zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that begin at a multiple of 16 bytes."""
    room = np.zeros(count + 16, dtype)
    return room[-address(room) % 16 // room.itemsize :][:count]


def _slots(of: Variant, states: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    """The states' addresses in the rule's places; a state that is not used is null."""
    rule = next(rule for rule in _core.rules() if rule["name"] == of.rule)
    everything = max((names for _, names in rule["variants"]), key=len)
    given = dict(zip(of.states, states, strict=True))
    return (ctypes.c_void_p * 3)(*(given.get(name) for name in everything))


@pytest.mark.parametrize("pipeline", [VECTORISED, (3, 512)], ids=["vectorised", "bulk"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", VARIANTS, ids=str)
def test_every_kernel_has_the_reference_s_bytes(
    of: Variant, dtype: str, pipeline: tuple[int, int], run: Run
) -> None:
    for update in updates(of, dtype):
        before = random_arrays(of, dtype, 5000)
        found = copies(before)
        run(update, [found], pipeline=pipeline)
        assert_same(found, update.by_reference(before), before, update)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_size_and_alignment_are_touched_whole_and_nothing_beside_them(
    dtype: str, run: Run
) -> None:
    of = variant("adam-amsgrad")
    update = Update(of, dtype, of.hyper())
    befores, framed = [], []
    for place, size in enumerate([1, 63, 64, 65, 0, 257, 4099, 2, 31, 10_000]):
        befores.append(random_arrays(of, dtype, size))
        framed.append(
            {
                name: (np.zeros(size + 32, x.dtype), slice(start, start + size))
                for shift, (name, x) in enumerate(befores[-1].items())
                if (start := place * (shift + 1) % 16) >= 0
            }
        )
    rows = [{name: room[inside] for name, (room, inside) in row.items()} for row in framed]
    for blocks in (1, 3, 7):
        for row, before in zip(rows, befores, strict=True):
            for name, x in before.items():
                row[name][:] = x
        run(update, rows, blocks)
        for place, (row, before) in enumerate(zip(rows, befores, strict=True)):
            assert_same(row, update.by_reference(before), before, f"row {place}, {blocks} blocks")
            for room, inside in framed[place].values():
                assert not room[: inside.start].any()
                assert not room[inside.stop :].any()


@pytest.mark.parametrize(("stages", "tile"), PIPELINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_aligned_rows_go_through_the_stages_and_what_is_left_around_them(
    dtype: str, stages: int, tile: int, run: Run, library: ctypes.CDLL
) -> None:
    of = variant("adam-l2")
    update = Update(of, dtype, of.hyper())
    size = tile // random_arrays(of, dtype, 1)["p"].itemsize
    in_stages = [5 * size + 3, size, size - 1, 0, 1, 4 * size + 64, 2 * size]
    sizes = [*in_stages, 2 * size]  # the last one's gradient is away from aligned addresses
    befores = [random_arrays(of, dtype, count, str(place)) for place, count in enumerate(sizes)]
    framed = []
    for count, before in zip(sizes, befores, strict=True):
        rooms = {name: aligned_zeros(count + 128, x.dtype) for name, x in before.items()}
        framed.append({name: (room, slice(64, 64 + count)) for name, room in rooms.items()})
    framed[-1]["g"] = (framed[-1]["g"][0], slice(65, 65 + sizes[-1]))
    rows = [{name: room[inside] for name, (room, inside) in row.items()} for row in framed]
    for blocks, clears in ((1, False), (3, True), (40, False)):
        for row, before in zip(rows, befores, strict=True):
            for name, x in before.items():
                row[name][:] = x
        tiles = library.emulated_tiles()
        run(update, rows, blocks, clears=clears, pipeline=(stages, tile))
        if blocks == 1:
            assert library.emulated_tiles() - tiles == sum(count // size for count in in_stages)
        for place, (row, before) in enumerate(zip(rows, befores, strict=True)):
            after = update.by_reference(before)
            if clears:
                after["g"] = np.zeros_like(before["g"])
            assert_same(row, after, before, f"row {place}, {blocks} blocks")
            for room, inside in framed[place].values():
                assert not room[: inside.start].any()
                assert not room[inside.stop :].any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0, 0, 3, 4096]),
        ("vector,blocks=2", [0, 2, 3, 4096]),
        ("bulk", [1, 0, 3, 4096]),
        ("bulk,stages=8,tile=512,blocks=1", [1, 1, 8, 512]),
    ],
)
def test_a_form_is_told_by_its_text(text: str, expected: list[int], library: ctypes.CDLL) -> None:
    found = (ctypes.c_int * 4)()
    assert library.read_form(text.encode(), found)
    assert list(found) == expected


@pytest.mark.parametrize(
    "text",
    [
        "bulky",
        "bulk,,",
        "stages",
        "stages=",
        "stages=1",
        "stages=9",
        "tile=100",
        "blocks=0",
    ],
)
def test_a_text_that_is_no_form_is_refused(text: str, library: ctypes.CDLL) -> None:
    assert not library.read_form(text.encode(), (ctypes.c_int * 4)())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_row_has_its_own_step_on_the_device(dtype: type, run: Run) -> None:
    of = variant("adam")
    steps = np.array([0, 4, 4, 999], dtype)
    befores = [random_arrays(of, "float32", 300, str(place)) for place in range(len(steps))]
    rows = [copies(before) for before in befores]
    run(Update(of, "float32", of.hyper()), rows, 3, steps=steps)
    for row, before, done in zip(rows, befores, (0, 4, 4, 999), strict=True):
        update = Update(of, "float32", of.hyper(), step=done + 1)
        assert_same(row, update.by_reference(before), before, update)
    assert steps.tolist() == [1, 5, 5, 1000]


def test_numbers_are_read_on_the_device(run: Run) -> None:
    of = variant("adam")
    lr, scale = np.array([0.25], np.float64), np.array([1024], np.float32)
    before = random_arrays(of, "float32", 1000)
    found = copies(before)
    hyper = (Number * 5)(*(Number(of.hyper()[name], None, False) for name in of.hyper_names))
    hyper[of.hyper_names.index("lr")] = Number(0, lr.ctypes.data, True)
    run(
        Update(of, "float32", of.hyper(), scale=-1.0),
        [found],
        hyper=hyper,
        grad_scale=scale.ctypes.data,
    )
    update = Update(of, "float32", of.hyper(lr=0.25), scale=-1 / 1024)
    assert_same(found, update.by_reference(before), before, update)


def test_an_overflow_changes_nothing_and_counts_no_step(run: Run) -> None:
    of = variant("adam")
    before = random_arrays(of, "float32", 1000)
    found, steps = copies(before), np.array([3], np.float32)
    overflow = np.array([1], np.float32)
    update = Update(of, "float32", of.hyper())
    run(update, [found], steps=steps, found_inf=overflow.ctypes.data)
    assert_same(found, before, before)
    assert steps.tolist() == [3]


def test_gradients_are_cleared_where_that_is_asked_for(run: Run) -> None:
    of = variant("adam")
    before = random_arrays(of, "float16", 1001)
    found = copies(before)
    update = Update(of, "float16", of.hyper())
    run(update, [found], clears=True)
    assert not found["g"].any()
    after = update.by_reference(before)
    assert_same(found, after | {"g": np.zeros_like(before["g"])}, before)


def test_a_table_of_many_rows_is_shared_out_like_a_few(run: Run) -> None:
    of = variant("sgd-momentum")
    update = Update(of, "float32", of.hyper())
    befores = [random_arrays(of, "float32", 1 + place % 7, str(place)) for place in range(200)]
    rows = [copies(before) for before in befores]
    run(update, rows, 4, by_table=True)
    for place, (row, before) in enumerate(zip(rows, befores, strict=True)):
        assert_same(row, update.by_reference(before), before, f"row {place}")


@pytest.mark.parametrize("name", [f.name for f in cases.all_forms().values() if not f.is_uniform])
def test_every_form_has_the_reference_s_bytes(name: str, library: ctypes.CDLL) -> None:
    """One variant of each form, in turn, at addresses away from aligned ones; guards included."""
    place = list(cases.all_forms()).index(name)
    variants = cases.all_variants()
    for turn, size in enumerate((1, 65, 1003)):
        of = variants[(place * 3 + turn) % len(variants)]
        case = cases.Case(of, name, size, (place + turn) % len(cases.SETUPS), 0)
        expected = compare.Expected(case)
        arena, form, numbers = expected.arena, case.form, expected.numbers(0)
        block = expected.before(0)
        at = {array: arena.address(block, array) for array in arena.starts}
        states = (ctypes.c_void_p * 3)(*_places(of, at))
        launch = Launch()
        launch.inline_rows[0] = Row(
            at["param"],
            at["grad"],
            states,
            0,
            size,
            None,
            at.get("master"),
            at.get("average"),
            numbers["first"],
        )
        launch.row_count = 1
        launch.total = -(-size // library.row_alignment()) * library.row_alignment()
        launch.host_step, launch.sign = case.numbers.step, case.numbers.scale
        for index, value in enumerate(expected.hyper):
            launch.hyper[index].value = value
        launch.types[:] = [STORED.index(kind) for kind in (form.param, form.grad, form.state)]
        launch.extras = form.bits
        launch.unscale, launch.seed = numbers["unscale"], numbers["seed"]
        launch.average_decay = numbers["average_decay"]
        library.emulate(ctypes.byref(launch), case.layout, FIRST_VARIANT[of.rule] + of.number, 2)
        assert arena.differences(block, expected.after[0]) == [], case


def _places(of: cases.Variant, at: dict[str, int]) -> list[int | None]:
    rule = next(rule for rule in _core.rules() if rule["name"] == of.rule)
    return [at[state] if state in of.states else None for state in rule["states"]]


def test_a_build_without_kernels_for_a_gpu_says_once_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu._core, "gpu_count", lambda: 0)
    gpu.warn_if_absent.cache_clear()
    with pytest.warns(UserWarning, match="torch's operations"):
        gpu.warn_if_absent()
    gpu.warn_if_absent()  # a second warning would be an error
    gpu.warn_if_absent.cache_clear()
