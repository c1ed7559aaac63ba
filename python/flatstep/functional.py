"""One update in place on arrays that you own: flat torch tensors or NumPy arrays.

Every function takes a parameter, its gradient and its states as arrays of one kind and shape:
contiguous torch tensors, on the CPU or a GPU, or C-contiguous NumPy arrays that are writable (the
gradient need not be). The dtypes are float32, float64, float16 and bfloat16 (in NumPy: the dtype of
that name that ml_dtypes registers), one for all arrays, or 16-bit beside 32-bit ones, with one for
all states. Nothing has been written when an error is raised. Arrays must not overlap.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from flatstep._torch import LAYOUT, STORED, Arguments, increment_version, update_memory
from flatstep.optim.routes import is_on_gpu, is_plain
from flatstep.optim.rules import RULES, flag_bits

#: What every function takes, of one kind in one call.
Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"

__all__ = ["adam_", "adamw_", "rmsprop_", "sgd_"]


def adam_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Adam with L2 weight decay (Kingma and Ba, 2015, arXiv:1412.6980), in place.

    Args:
        param: Parameters, any shape.
        grad: Gradients; only read.
        exp_avg: First moments; zeros before step 1.
        exp_avg_sq: Second moments; zeros before step 1.
        max_exp_avg_sq: Their maxima, which switch amsgrad on.
        step: The number of this step, from 1.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: L2 weight decay.
        maximize: Whether to go up the gradient.
        grad_scale: The loss scale that the gradient is to be divided by.

    Raises:
        TypeError: An array of another kind, dtype or device, or one that cannot be written.
        ValueError: Another shape, arrays that are not contiguous or overlap, a bad number.
    """
    flags = {"amsgrad": max_exp_avg_sq is not None, "l2": weight_decay != 0}
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": max_exp_avg_sq}
    hyper = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
    }
    _update("adam", flags, hyper, param, grad, states, step, maximize, grad_scale)


def adamw_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Adam with decoupled decay (Loshchilov and Hutter, 2019, arXiv:1711.05101), in place.

    Arguments and errors as in :func:`adam_`.
    """
    flags = {"amsgrad": max_exp_avg_sq is not None, "l2": False}
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": max_exp_avg_sq}
    hyper = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
    }
    _update("adam", flags, hyper, param, grad, states, step, maximize, grad_scale)


def rmsprop_(
    param: Array,
    grad: Array,
    square_avg: Array,
    momentum_buffer: Array | None = None,
    grad_avg: Array | None = None,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """RMSprop (Hinton, 2012) with eps outside the root as in torch, in place.

    Args:
        param: Parameters, any shape.
        grad: Gradients; only read.
        square_avg: Averages of the squares; zeros at first.
        momentum_buffer: Momentum, zeros at first; needed where ``momentum`` is not 0.
        grad_avg: Averages of the gradients, zeros at first, which switch centering on.
        lr: Learning rate.
        alpha: Decay rate of the averages.
        eps: Added to the root.
        weight_decay: L2 weight decay.
        momentum: Momentum.
        maximize: Whether to go up the gradient.
        grad_scale: The loss scale that the gradient is to be divided by.

    Raises:
        TypeError: An array of another kind, dtype or device, or one that cannot be written.
        ValueError: Another shape, arrays that are not contiguous or overlap, a bad number, or
            momentum without its buffer.
    """
    flags = {
        "momentum": momentum != 0,
        "centered": grad_avg is not None,
        "l2": weight_decay != 0,
    }
    states = {"square_avg": square_avg, "momentum_buffer": momentum_buffer, "grad_avg": grad_avg}
    hyper = {
        "lr": lr,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
    }
    _update("rmsprop", flags, hyper, param, grad, states, 1, maximize, grad_scale)


def sgd_(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    step: int = 2,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """SGD with momentum in torch's form (Sutskever et al., 2013), in place.

    Args:
        param: Parameters, any shape.
        grad: Gradients; only read.
        momentum_buffer: Momentum; needed where ``momentum`` is not 0.
        step: The number of this step, from 1. At step 1 the buffer becomes the gradient, whatever
            it holds and whatever the dampening; later numbers are all alike.
        lr: Learning rate.
        momentum: Momentum.
        dampening: Dampening of momentum.
        weight_decay: L2 weight decay.
        nesterov: Whether to look ahead; needs momentum and no dampening.
        maximize: Whether to go up the gradient.
        grad_scale: The loss scale that the gradient is to be divided by.

    Raises:
        TypeError: An array of another kind, dtype or device, or one that cannot be written.
        ValueError: Another shape, arrays that are not contiguous or overlap, a bad number, or
            momentum without its buffer.
    """
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    flags = {"momentum": momentum != 0, "nesterov": nesterov, "l2": weight_decay != 0}
    hyper = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
    }
    states = {"momentum_buffer": momentum_buffer}
    _update("sgd", flags, hyper, param, grad, states, step, maximize, grad_scale)


def _check_numbers(hyper: dict[str, float], step: int, grad_scale: float) -> None:
    for name, value in {**hyper, "step": step, "grad_scale": grad_scale}.items():
        label = {"beta1": "betas[0]", "beta2": "betas[1]"}.get(name, name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{label} is {value!r}; it must be a number") from None
        if number != number or (number < 0 and name != "dampening"):
            raise ValueError(f"{label} is {value}; it must not be negative or NaN")
        if name in ("beta1", "beta2") and number >= 1:
            raise ValueError(f"{label} is {value}; it must be below 1")
    if not (1 <= step < 2**53 and step == int(step)):
        raise ValueError(f"step is {step}; it must be a whole number that counts from 1")
    if not 0 < grad_scale < math.inf:
        raise ValueError(f"grad_scale is {grad_scale}; it must be positive and finite")


class _Memory(NamedTuple):
    kind: str
    dtype: str
    shape: tuple[int, ...]
    address: int
    bytes: int


def _memory_of(name: str, array: Any, *, written: bool) -> _Memory:
    if isinstance(array, torch.Tensor):
        if not is_plain(array) or array.is_complex() or array.is_neg():
            raise TypeError(
                f"{name} is a {type(array).__name__} of {array.dtype} on {array.device}; flatstep "
                f"takes plain tensors of {_dtypes()}, on the CPU or a GPU that it has kernels for"
            )
        if not array.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous (strides {array.stride()}); pass a contiguous tensor"
            )
        if array.numel() and not array.data_ptr():
            raise ValueError(f"{name} has no memory (its storage was freed); restore it first")
        if written and array.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} was made under torch.inference_mode() and cannot be updated outside it"
            )
        found = _Memory(
            f"torch {array.device}" if is_on_gpu(array) else "torch",
            STORED[array.dtype],
            tuple(array.shape),
            array.data_ptr(),
            array.nbytes,
        )
    elif isinstance(array, np.ndarray):
        if array.dtype.name not in STORED.values() or not array.dtype.isnative:
            raise TypeError(f"{name} has dtype {array.dtype}; flatstep takes {_dtypes()}")
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is not C-contiguous (strides {array.strides}); pass a contiguous array"
            )
        if written and not array.flags.writeable:
            raise TypeError(f"{name} is read-only; pass an array that can be written")
        found = _Memory("numpy", array.dtype.name, array.shape, array.ctypes.data, array.nbytes)
    else:
        raise TypeError(f"{name} is a {type(array).__name__}; pass a torch tensor or a NumPy array")
    if found.address % array.itemsize:
        raise ValueError(f"{name} is not aligned to its elements; copy it first")
    return found


def _dtypes() -> str:
    return ", ".join(dict.fromkeys(STORED.values()))


def _update(
    rule: str,
    flags: dict[str, bool],
    hyper: dict[str, float],
    param: Array,
    grad: Array,
    states: dict[str, Array | None],
    step: int,
    maximize: bool,
    grad_scale: float,
) -> None:
    _check_numbers(hyper, step, grad_scale)
    number = sum(flag_bits(rule)[name] for name, is_set in flags.items() if is_set)
    wanted: tuple[str, ...] = dict(RULES[rule]["variants"])[number]
    if "momentum_buffer" in wanted and states["momentum_buffer"] is None:
        raise ValueError(f"momentum_buffer is missing: momentum {hyper['momentum']} needs it")
    arrays = {"param": param, "grad": grad, **{name: states[name] for name in wanted}}
    memory = {
        name: _memory_of(name, array, written=name != "grad") for name, array in arrays.items()
    }
    first = memory["param"]
    state_dtype = memory[wanted[0]].dtype if wanted else first.dtype
    layout = LAYOUT.get((first.dtype, memory["grad"].dtype, state_dtype))
    for name, found in memory.items():
        if found.kind != first.kind:
            raise TypeError(
                f"{name} is {found.kind}, but param is {first.kind}; pass arrays of one kind"
            )
        if name in wanted and found.dtype != state_dtype:
            raise TypeError(
                f"{name} is {found.dtype}, but {wanted[0]} is {state_dtype}; pass states of one "
                "dtype"
            )
        if layout is None and found.dtype != first.dtype:
            raise TypeError(
                f"{name} is {found.dtype}, but param is {first.dtype}; no kernel has the two "
                "together: pass arrays of one dtype, or float32 beside bfloat16 or float16"
            )
        if found.shape != first.shape:
            raise ValueError(f"{name} has shape {found.shape}, but param has {first.shape}")
    assert layout is not None
    spans = sorted((found.address, found.bytes, name) for name, found in memory.items())
    for (start, size, name), (next_start, _, next_name) in pairwise(spans):
        if size and start + size > next_start:
            raise ValueError(f"{name} and {next_name} overlap; pass arrays of their own memory")
    arguments: Arguments = (
        rule,
        number,
        layout,
        first.address,
        memory["grad"].address,
        [memory[name].address for name in wanted],
        first.bytes // torch.empty(0, dtype=getattr(torch, first.dtype)).element_size(),
        [float(hyper[name]) for name in RULES[rule]["hyper"]],
        int(step),
        (-1.0 if maximize else 1.0) / grad_scale,
    )
    device = param.device if isinstance(param, torch.Tensor) else torch.device("cpu")
    update_memory(device, arguments)
    increment_version(
        [a for name, a in arrays.items() if isinstance(a, torch.Tensor) and name != "grad"]
    )
