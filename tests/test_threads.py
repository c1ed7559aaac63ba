"""Threads: the same bits on any number of them, from either pool, after a fork, side by side."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Case, case_of, cases, give_gradients, same_bits
from kernel_cases import DTYPES, Update, assert_same, copies, random_arrays, variant
from torch import Tensor
from torch.nn import Parameter

from flatstep import _core, _torch

# Enough elements for five threads, and no multiple of anything.
LARGE = 200_003
# Fewer than any thread is worth waking for.
SMALL = 20_000

LENDS_THREADS = _core.use_torch_threads(str(_torch.LIBRARY))
POOLS = [
    pytest.param(
        "torch", marks=pytest.mark.skipif(not LENDS_THREADS, reason="this torch lends no threads")
    ),
    "own",
]

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "own":
        _core.use_torch_threads(None)
    yield request.param
    _torch.connect()


# ---- bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(pool: str, dtype: str) -> None:
    update = Update(variant("adam"), dtype, variant("adam").hyper())
    before = random_arrays(update.variant, dtype, LARGE)
    after = update.by_reference(before)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = copies(before)
        update.by_core(found, threads)
        assert_same(found, after, before, f"{threads} threads of {pool}")


def model(case: Case, size: int = LARGE) -> torch.optim.Optimizer:
    """An optimizer of two parameters that has made a step."""
    torch.manual_seed(1)
    opt = case.ours([Parameter(torch.randn(size // 2)), Parameter(torch.randn(size - size // 2))])
    give_gradients(opt.param_groups[0]["params"], 0)
    opt.step()
    return opt


def result(opt: torch.optim.Optimizer) -> Tensor:
    return torch.cat([p.detach() for p in opt.param_groups[0]["params"]])


@cases(options=["default", "nesterov_all"])
def test_two_optimizers_step_side_by_side_as_they_would_alone(case: Case, pool: str) -> None:
    alone = model(case)
    for _ in range(20):
        alone.step()
    opts = [model(case) for _ in range(2)]
    start = threading.Barrier(2)

    def run(opt: torch.optim.Optimizer) -> None:
        start.wait()
        for _ in range(20):
            opt.step()

    threads = [threading.Thread(target=run, args=(opt,)) for opt in opts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for opt in opts:
        assert same_bits(result(opt), result(alone))


def test_one_optimizer_in_two_threads_makes_whole_steps_or_says_no(pool: str) -> None:
    case = case_of("Adam")
    opt = model(case)
    made = [0, 0]
    start = threading.Barrier(2)

    def run(place: int) -> None:
        start.wait()
        for _ in range(50):
            try:
                opt.step()
            except RuntimeError:
                continue
            made[place] += 1

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = model(case)
    for _ in range(sum(made)):
        alone.step()
    assert sum(made) > 0
    assert all(state["step"] == 1 + sum(made) for state in opt.state.values())
    assert same_bits(result(opt), result(alone))


@pytest.mark.skipif(not LENDS_THREADS, reason="this torch lends no threads")
def test_an_update_inside_a_parallel_region_of_torch_has_the_same_bits() -> None:
    update = Update(variant("adam"), "float32", variant("adam").hyper())
    before = random_arrays(update.variant, "float32", LARGE)
    after = update.by_reference(before)
    found = [copies(before) for _ in range(4)]

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin: int, end: int, _: object) -> None:
        for place in range(begin, end):
            update.by_core(found[place], 2)

    torchs = ctypes.CDLL(str(_torch.LIBRARY)).torch_parallel_for
    torchs.argtypes = [ctypes.c_int64] * 3 + [type(body), ctypes.c_void_p]
    assert torchs(0, len(found), 1, body, None) == 0
    for arrays in found:
        assert_same(arrays, after, before)


def test_a_step_inside_backward_has_the_same_bits(pool: str) -> None:
    """As in training that frees each gradient as soon as it is there."""
    case = case_of("Adam")
    torch.manual_seed(1)
    start, slope = torch.randn(2, LARGE)
    inside, outside = Parameter(start.clone()), Parameter(start.clone())
    opts = [case.ours([p]) for p in (inside, outside)]

    def hook(param: Tensor) -> None:
        opts[0].step()
        opts[0].zero_grad()

    inside.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        (inside * slope).sum().backward()
        assert inside.grad is None
        outside.grad = slope.clone()
        opts[1].step()
    assert same_bits(inside, outside)


# ---- how many


COUNTING = f"""
import ctypes, json, os, sys
import torch
import flatstep
from flatstep import _core

def new_threads(size, count):
    if sys.argv[1] == "torch":
        torch.set_num_threads(count)
        count = 9  # which is not listened to
    data = bytearray(8 * size)
    at = ctypes.addressof(ctypes.c_char.from_buffer(data))
    before = len(os.listdir("/proc/self/task"))
    _core.update("sgd", 0, 0, at, at + 4 * size, [], size, [0.1, 0, 0, 0], 1, 1.0, count)
    return len(os.listdir("/proc/self/task")) - before

if sys.argv[1] == "own":
    _core.use_torch_threads(None)
print(json.dumps([new_threads(*x) for x in [({LARGE}, 1), ({SMALL}, 3), ({LARGE}, 3)]]))
"""


@linux
@pytest.mark.parametrize("kind", POOLS)
def test_as_many_threads_run_as_were_asked_for_and_none_for_a_small_step(kind: str) -> None:
    """In torch's pool it is torch.set_num_threads that decides."""
    one, small, large = json.loads(_run(COUNTING, kind))
    assert one == 0
    assert small == 0
    assert large == 2  # beside the caller


# ---- fork


FORKING = f"""
import hashlib, os, sys
import torch
import flatstep
from flatstep import _core
from torch.nn import Parameter

if sys.argv[1] == "own":
    _core.use_torch_threads(None)
torch.set_num_threads(2)
torch.manual_seed(0)
param = Parameter(torch.randn({LARGE}))
param.grad = torch.randn({LARGE})
opt = flatstep.Adam([param])
opt.step()

def digest():
    return hashlib.sha256(param.detach().numpy().tobytes()).hexdigest()

child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0, status
opt.step()
opt.step()
print(digest(), flush=True)
if not child:
    os._exit(0)
"""


@forking
@pytest.mark.parametrize("kind", POOLS)
def test_a_child_forked_after_a_parallel_step_goes_on_with_the_same_bits(kind: str) -> None:
    parent, child = _run(FORKING, kind).split()
    assert parent == child


def _run(code: str, *arguments: str) -> str:
    """The output of a Python process of its own; a child that hangs is killed with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()
    assert process.returncode == 0, errors
    return output
