"""What torch lacks before 2.10 (the table of tensors, the pool of threads) has another way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import Case, clones, parameters, rich, same_bits, train

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
