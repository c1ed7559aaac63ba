"""What may happen to a process: no memory, signals, forks, an early end; and that nothing leaks."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, give_gradients, rich, same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader, Dataset
from torch_versions import IS_OLDER

import flatstep
from flatstep.optim import states

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Enough elements for several threads.
LARGE = 200_003


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 120) -> str:
    """What the process writes; one that hangs is killed."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == code, errors
    return output


# ---- out of memory


def model(case: Case, **more: Any) -> torch.optim.Optimizer:
    torch.manual_seed(1)
    params = [Parameter(torch.randn(33, 3).bfloat16()), Parameter(torch.randn(7).bfloat16())]
    give_gradients(params, 0)
    return case.ours(params, **more)


def params_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def assert_same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for mine, its in zip(params_of(one), params_of(other), strict=True):
        assert same_bits(mine, its)
        assert list(one.state[mine]) == list(other.state[its])
        for name, state in one.state[mine].items():
            assert same_bits(state, other.state[its][name]), name


class Scarce:
    """An allocator that has no memory for one of the buffers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
        self.asked, self.missing, self.gives = 0, missing, states.zeros_flat
        monkeypatch.setattr(states, "zeros_flat", self)

    def __call__(self, *arguments: Any) -> Tensor:
        self.asked += 1
        if self.asked - 1 == self.missing:
            raise MemoryError("there is none")
        return self.gives(*arguments)


EXTRAS = {"master": "float32", "ema_decay": 0.9}


@rich
def test_a_first_step_without_memory_leaves_no_state_and_can_be_made_later(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched, expected = model(case, **EXTRAS), model(case, **EXTRAS)
    for _ in range(2):
        expected.step()
    for missing in itertools.count():
        opt = model(case, **EXTRAS)
        with monkeypatch.context() as patch:
            allocator = Scarce(patch, missing)
            if allocator_suffices(opt, allocator):
                break
        assert not opt.state
        for param, before in zip(params_of(opt), params_of(untouched), strict=True):
            assert same_bits(param, before)
        for _ in range(2):
            opt.step()
        assert_same(opt, expected)
    made = next(iter(opt.state.values()))
    assert missing == len(made.keys() - {"step"})


def allocator_suffices(opt: torch.optim.Optimizer, allocator: Scarce) -> bool:
    try:
        opt.step()
    except MemoryError:
        return False
    return allocator.asked <= allocator.missing


@pytest.mark.parametrize("missing", [0, 1])
def test_loaded_states_survive_a_step_without_memory(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("Adam", "default", {})
    expected = model(case)
    expected.step()
    opt = model(case)
    for mine, its in zip(params_of(opt), params_of(expected), strict=True):
        mine.data.copy_(its.data)
    opt.load_state_dict(copy.deepcopy(expected.state_dict()))
    with monkeypatch.context() as patch:
        Scarce(patch, missing)
        with pytest.raises(MemoryError, match="there is none"):
            opt.step()
    assert_same(opt, expected)
    opt.step()
    expected.step()
    assert_same(opt, expected)


def test_a_first_step_without_memory_for_its_table_can_be_made_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGD's first step is unlike the others."""
    case = Case("SGD", "dampening", {"momentum": 0.9, "dampening": 0.5})
    opt, expected = model(case), model(case)

    def none(rule: str) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(opt), "_make_plan", staticmethod(none))
        with pytest.raises(MemoryError):
            opt.step()
    assert not opt.state
    opt.step()
    expected.step()
    assert_same(opt, expected)


LIMITED = """
import re, resource, sys
from pathlib import Path
import torch, flatstep
from torch.nn import Parameter

def limit(more):
    now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + more if more else resource.RLIM_INFINITY, -1))

torch.set_num_threads(1)
opts = []
for _ in range(2):
    param = Parameter(torch.ones(1 << 21))
    param.grad = torch.ones(1 << 21)
    opts.append(flatstep.Adam([param]))
opts[0].step()
limit(3 << 22)  # of two states that take twice as much
try:
    opts[1].step()
except MemoryError as error:
    print(error)
assert not opts[1].state
limit(None)
opts[1].step()
one, other = (opt.param_groups[0]["params"][0] for opt in opts)
assert torch.equal(one, other) and one[0] < 1
"""


@linux
def test_a_process_that_may_have_no_more_memory_is_told_how_much_was_asked_for() -> None:
    assert f"{1 << 23} bytes for a flat buffer cannot be had" in finish(start(LIMITED))


# ---- signals


INTERRUPTED = """
import os, random, signal, sys, threading
import torch, flatstep
from torch.nn import Parameter

signal.signal(signal.SIGINT, signal.default_int_handler)  # if ignored

def make():
    param = Parameter(torch.linspace(-1, 1, 1 << 21))
    param.grad = param.detach().flip(0).clone()
    return param, flatstep.Adam([param])

def interrupt(after):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()

random.seed(1)
param, opt = make()
opt.step()
for _ in range(8):
    try:
        interrupt(random.uniform(0, 0.03))
        while True:
            opt.step()
    except KeyboardInterrupt:
        pass
opt.step()
made = int(opt.state[param]["step"])
alone, other = make()
for _ in range(made):
    other.step()
assert torch.equal(param, alone), made
print(made, flush=True)
interrupt(0.1)
while True:
    opt.step()
"""


@linux
def test_an_interrupt_leaves_whole_steps_and_ends_the_process_as_python_does() -> None:
    made = finish(start(INTERRUPTED), code=-signal.SIGINT)
    assert int(made) > 1


# ---- fork


class Stepping(Dataset[tuple[int, Tensor]]):
    """Whoever asks for an item makes a step with the optimizer that it has."""

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt = opt

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.opt.step()
        param = params_of(self.opt)[0]
        return int(self.opt.state[param]["step"]), param.detach().clone()


def large() -> torch.optim.Optimizer:
    param = Parameter(torch.linspace(-1, 1, LARGE))
    param.grad = param.detach().flip(0).clone()
    return flatstep.Adam([param])


@forking
def test_workers_of_a_data_loader_step_alone_while_their_parent_goes_on() -> None:
    opt, alone = large(), large()
    after = []
    for _ in range(8):
        alone.step()
        after.append(params_of(alone)[0].detach().clone())
    opt.step()
    made = []
    for step, found in DataLoader(
        Stepping(opt), batch_size=None, num_workers=2, multiprocessing_context="fork"
    ):
        assert same_bits(found, after[step - 1])
        made.append(step)
        opt.step()
    assert sorted(made) == [2, 2, 3, 3, 4, 4]
    assert same_bits(params_of(opt)[0], after[len(made)])


# ---- the end of the process


ENDING = """
import sys, threading
import torch, flatstep
from flatstep import _core
from torch.nn import Parameter

pool, seconds = sys.argv[1:]
if pool == "own":
    _core.use_torch_threads(None)
torch.set_num_threads(2)
param = Parameter(torch.ones(1 << 22))
param.grad = torch.ones(1 << 22)
opt = flatstep.Adam([param], max_grad_norm=1.0)
under_way = threading.Event()

def run():
    while True:
        opt.step()
        under_way.set()

threading.Thread(target=run, daemon=True).start()
under_way.wait()
threading.Event().wait(float(seconds))
"""


@pytest.mark.skipif(IS_OLDER, reason="an older torch may abort then: docs/compatibility.md")
@pytest.mark.parametrize("pool", ["torch", "own"])
def test_a_process_may_end_while_a_thread_steps(pool: str) -> None:
    """In an update, that is, where almost all of its time goes."""
    for seconds in ("0", "0.02"):
        assert finish(start(ENDING, pool, seconds)) == ""


CROWDED = """
import os, sys, threading, time
import torch, flatstep
from torch.nn import Parameter

torch.set_num_threads(2)

class Last:
    def __del__(self, sleep=time.sleep, leave=os._exit):
        sleep(0.1)  # Python has begun to end: whoever asks for its lock now is unwound
        leave(0)

def run(opt, under_way):
    while True:
        opt.step()
        under_way.set()

last = Last()
for size in (1 << 8, 1 << 12, 1 << 15, 1 << 18):
    for options in ({}, {"max_grad_norm": 1.0}):
        param = Parameter(torch.ones(size))
        param.grad = torch.ones(size)
        opt, under_way = flatstep.AdamW([param], **options), threading.Event()
        threading.Thread(target=run, args=(opt, under_way), daemon=True).start()
        under_way.wait()
"""


def test_a_process_may_end_while_threads_step_small_and_large_models() -> None:
    """Of a small step, most is spent in between: Python, and torch's answers about its tensors."""
    processes = [start(CROWDED) for _ in range(2)]
    assert [finish(process) for process in processes] == ["", ""]


STEPPING_AT_EXIT = """
import atexit, sys, threading

def last():
    opt.step()
    print(int(opt.state[param]["step"]) > made, flush=True)
    go_on.set()
    thread.join()
    print("joined")

atexit.register(last)  # before flatstep's: it runs afterwards
import torch, flatstep
from flatstep.optim import ending
from torch.nn import Parameter

ending.PATIENCE = 0.5
param = Parameter(torch.ones(8))
param.grad = torch.ones(8)
opt = flatstep.Adam([param])
opt.step()
made = int(opt.state[param]["step"])
go_on = threading.Event()

def run():
    go_on.wait()
    opt.step()

thread = threading.Thread(target=run, daemon=True)
thread.start()
"""


def test_a_function_at_exit_may_step_and_wait_for_a_thread_that_steps() -> None:
    assert finish(start(STEPPING_AT_EXIT)) == "True\njoined\n"


FORKED_IN_A_STEP = """
import os, threading
import torch, flatstep
from flatstep.optim import ending
from torch.nn import Parameter

ending.PATIENCE = 1e6
param = Parameter(torch.ones(8))
param.grad = torch.ones(8)
opt = flatstep.Adam([param])
entered, leave = threading.Event(), threading.Event()

class Slow(float):
    def __float__(self):
        entered.set()
        leave.wait()
        return 1e-3

opt.param_groups[0]["lr"] = Slow(1e-3)
thread = threading.Thread(target=opt.step)
thread.start()
entered.wait()
child = os.fork()
if child:
    leave.set()
    thread.join()
    print(os.waitpid(child, 0)[1])
"""


@forking
def test_a_child_does_not_wait_at_its_end_for_a_step_of_its_parent() -> None:
    assert finish(start(FORKED_IN_A_STEP)) == "0\n"


ISOLATED = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
if {first}:
    import flatstep
inside = interpreters.create()
interpreters.run_string(inside, '''
try:
    import flatstep
except ImportError as error:
    print(error)
''')
interpreters.destroy(inside)
"""


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after the main interpreter"])
def test_a_sub_interpreter_is_refused(first: bool) -> None:
    found = finish(start(ISOLATED.format(first=first)))
    assert found == "flatstep works in the main interpreter only, as torch does\n"


# ---- memory over a long time


SOAKING = """
import sys
from pathlib import Path
import torch, flatstep
from torch.nn import Parameter

kind, count = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
param = Parameter(torch.ones(8))
grad = torch.full((8,), 1e-3)
param.grad = grad.clone()
opt = flatstep.AdamW([param], **({"max_grad_norm": 1.0} if kind == "clipping" else {}))
scaler = flatstep.GradScaler("cpu", init_scale=2.0, growth_interval=2**30)

def train():
    if kind == "zero_grad":
        opt.zero_grad(set_to_none=True)
        param.grad = grad.clone()
    if kind == "scaler":
        scaler.scale(grad)
        scaler.step(opt)
        scaler.update()
    else:
        opt.step()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

for _ in range(count // 10):
    train()
before = resident()
for _ in range(count - count // 10):
    train()
assert opt.state[param]["step"] == count
print(resident() - before)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "clipping", "scaler", "zero_grad"])
def test_a_million_steps_take_no_more_memory_than_the_first_hundred_thousand(kind: str) -> None:
    """One object of the smallest size a step would be 14 MiB."""
    assert int(finish(start(SOAKING, kind, "1000000"), timeout=280)) < 1 << 21
