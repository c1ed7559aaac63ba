"""What an older torch lacks: marks that skip it, each with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor

__all__ = ["DTensor", "Replicate", "Shard", "distribute_tensor"]

TESTED = (2, 13)  # on it and on newer ones every test runs

#: keys of our groups that the installed torch does not know yet
NEWER_KEYS = {"decoupled_weight_decay"} - set(torch.optim.Adam([Parameter(torch.ones(1))]).defaults)


IS_OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < TESTED


def needs(what: str, probe: Callable[[], Any]) -> pytest.MarkDecorator:
    """Skips where the installed torch itself cannot do it yet, as the probe finds."""
    lacks = False
    if IS_OLDER:
        try:
            probe()
        except (AttributeError, ImportError, RuntimeError, TypeError):
            lacks = True
    return pytest.mark.skipif(lacks, reason=f"torch {torch.__version__} lacks {what}")


def _step_of_torch(rule: str, **options: Any) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = getattr(torch.optim, rule)([p], **options)
    if options.get("differentiable"):
        p.requires_grad_(False)  # a leaf that autograd follows may not be written
    opt.step()


needs_decoupled = needs(
    "Adam's decoupled_weight_decay",
    lambda: torch.optim.Adam([Parameter(torch.ones(1))], decoupled_weight_decay=True),
)
needs_names = needs(
    "named parameters", lambda: torch.optim.SGD([("p", Parameter(torch.ones(1)))], lr=0.1)
)
named_or_not = pytest.mark.parametrize(
    "named", [pytest.param(True, marks=needs_names), False], ids=["named", "unnamed"]
)
TAKES_NAMES = not needs_names.args[0]


def named(**params: Parameter) -> list[Any]:
    """What an optimizer is given: the parameters, with their names where torch takes them."""
    return list(params.items() if TAKES_NAMES else params.values())


def label(name: str, index: int) -> str:
    """What an error calls a parameter of group 0."""
    return name if TAKES_NAMES else f"{index} of group 0"


_needs_grad_dtype = needs("Tensor.grad_dtype", lambda: Parameter(torch.ones(1)).grad_dtype)


def set_grad_dtype(param: Parameter, dtype: torch.dtype) -> None:
    """Lets the parameter have a gradient of another dtype; skips the test where torch does not."""
    if _needs_grad_dtype.args[0]:
        pytest.skip(_needs_grad_dtype.kwargs["reason"])
    param.grad_dtype = dtype


needs_lr_of_one_dimension = needs(
    "learning rates of one dimension", lambda: _step_of_torch("Adam", lr=torch.ones(1))
)
needs_tensor_betas = needs(
    "tensors for betas",
    lambda: _step_of_torch("Adam", betas=(torch.tensor(0.9), torch.tensor([0.99]))),
)
needs_gradient_by_lr = needs(
    "SGD's gradient by its learning rate",
    lambda: _step_of_torch("SGD", lr=torch.tensor(0.1, requires_grad=True), differentiable=True),
)
needs_fully_shard = needs(
    "torch.distributed.fsdp.fully_shard",
    lambda: importlib.import_module("torch.distributed.fsdp").fully_shard,
)


def import_transformers() -> Any:
    """Hugging Face's Trainer's library; skips where it is absent or wants another torch."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if not transformers.utils.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} wants another torch")
    return transformers
