"""What an older torch lacks, or does otherwise, has another way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import Case, clones, give_gradients, parameters, rich, same_bits, train

from flatstep import _core, _torch


@pytest.fixture
def _older_torch() -> Iterator[None]:
    _core.connect(None, torch.Tensor, torch.nn.Parameter)
    _core.connect_handles(None, None)
    _core.use_torch_threads(None)
    yield
    _torch.connect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@rich
def test_an_older_torch_gives_the_same_bits(
    case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    shapes = [(70_000,), (5, 7), (), (0,), (3, 4, 5)]
    params = parameters(dtype, shapes)
    copies = clones(params)
    train(case.ours(params), range(3))
    request.getfixturevalue("_older_torch")
    opt = case.ours(copies)
    train(opt, range(3))
    assert not opt._table.others
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, copies, strict=True))


@rich
def test_a_compiled_step_has_the_bits_of_one_outside(case: Case) -> None:
    """Before torch 2.13 the graph breaks there."""
    params = parameters(shapes=[(5, 7), (3,)])
    copies = clones(params)
    train(case.ours(params), range(3))
    opt = case.ours(copies)
    step, zero_grad = (torch.compile(f, backend="eager") for f in (opt.step, opt.zero_grad))
    for number in range(3):
        give_gradients(copies, number)
        step()
        zero_grad()
        assert all(p.grad is None for p in copies)
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, copies, strict=True))


INTERRUPTED = """
import flatstep, torch
def leave_behind():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    buffer = flatstep.FlatBuffer(model.parameters())
    def interrupt(_):
        raise KeyError
    model[1].bias.register_post_accumulate_grad_hook(interrupt)
    try:
        model(torch.ones(2, 4)).sum().backward()
    except KeyError:
        print("interrupted")
leave_behind()
"""


def test_a_process_ends_after_a_backward_that_raised() -> None:
    """torch 2.4 keeps what is left of it, buffers included, until after the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
