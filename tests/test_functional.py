"""Arrays that the caller owns are updated in place, with the reference's bits, or refused whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flatstep import functional, reference

N = 1003

# name of the function: (rule, the states that it takes, options, flags of the reference)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, bool]]] = {
    "adam_": (
        "adam",
        ("exp_avg", "exp_avg_sq"),
        {"lr": 0.01, "step": 3, "weight_decay": 0.1},
        {"amsgrad": False, "l2": True},
    ),
    "adamw_": (
        "adam",
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        {"lr": 0.01, "step": 3, "weight_decay": 0.1},
        {"amsgrad": True, "l2": False},
    ),
    "rmsprop_": (
        "rmsprop",
        ("square_avg", "momentum_buffer", "grad_avg"),
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        {"momentum": True, "centered": True, "l2": True},
    ),
    "sgd_": (
        "sgd",
        ("momentum_buffer",),
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "step": 2},
        {"momentum": True, "nesterov": True, "l2": False},
    ),
}
HYPER = {
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8},
    "sgd": {"dampening": 0.0, "weight_decay": 0.0},
}

functions = pytest.mark.parametrize("name", CASES)


def arrays(name: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays of one call; bfloat16 as uint16, as the reference stores it."""
    rng = np.random.default_rng(7)
    compute = np.float64 if dtype == "float64" else np.float32
    made = {}
    for array in ("param", "grad", *CASES[name][1]):
        x = rng.standard_normal(N).astype(compute)
        x = np.abs(x) + 1 if array.endswith(("avg_sq", "square_avg")) else x
        made[array] = np.array(reference.narrow(x, dtype))
    return made


def call(name: str, made: dict[str, Any], **more: Any) -> None:
    getattr(functional, name)(**made, **{**CASES[name][2], **more})


def expected(name: str, made: dict[str, np.ndarray], dtype: str, scale: float) -> dict[str, Any]:
    rule, names, options, flags = CASES[name]
    made = {array: x.copy() for array, x in made.items()}
    hyper = {**HYPER[rule], **{k: v for k, v in options.items() if k not in ("step", "nesterov")}}
    states = {array: made[array] for array in names}
    step = options.get("step", 1)
    reference.update(
        rule, flags, hyper, made["param"], made["grad"], states, step=step, scale=scale, dtype=dtype
    )
    return made


def to_torch(x: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@functions
def test_torch_tensors_get_the_references_bits(name: str, dtype: str, maximize: bool) -> None:
    made = arrays(name, dtype)
    tensors = {array: to_torch(x, dtype) for array, x in made.items()}
    versions = {array: x._version for array, x in tensors.items()}
    call(name, tensors, maximize=maximize, grad_scale=4.0)
    wanted = expected(name, made, dtype, (-1 if maximize else 1) / 4)
    for array, x in tensors.items():
        assert to_numpy(x).tobytes() == wanted[array].tobytes(), array
        assert (x._version > versions[array]) == (array != "grad"), array


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@functions
def test_numpy_arrays_get_the_references_bits(name: str, dtype: str) -> None:
    made = arrays(name, dtype)
    wanted = expected(name, made, dtype, 1.0)
    made["grad"].flags.writeable = False
    call(name, made)
    for array, x in made.items():
        assert x.tobytes() == wanted[array].tobytes(), array


def test_any_shape_will_do_and_nothing_is_fine() -> None:
    square = {k: x[:1000].reshape(10, 100) for k, x in arrays("adam_").items()}
    flat = {k: x[:1000].copy() for k, x in arrays("adam_").items()}
    call("adam_", square)
    call("adam_", flat)
    assert np.array_equal(square["param"].ravel(), flat["param"])
    call("adam_", {k: x[:0] for k, x in arrays("adam_").items()})


def test_a_leaf_that_requires_grad_can_be_updated() -> None:
    tensors = {k: torch.from_numpy(x) for k, x in arrays("sgd_").items()}
    before = tensors["param"].clone()
    tensors["param"].requires_grad_()
    call("sgd_", tensors)
    assert not torch.equal(tensors["param"].detach(), before)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


# what is wrong: (the array, its replacement, the error)
WRONG: dict[str, tuple[str, Callable[[np.ndarray], Any], type[Exception]]] = {
    "dtype": ("grad", lambda x: x.astype(np.int32), TypeError),
    "other_dtype": ("exp_avg", lambda x: x.astype(np.float64), TypeError),
    "byte_order": ("param", lambda x: x.astype(">f4"), TypeError),
    "kind": ("exp_avg", lambda x: torch.from_numpy(x), TypeError),
    "list": ("grad", lambda x: x.tolist(), TypeError),
    "read_only": ("param", read_only, TypeError),
    "read_only_state": ("exp_avg_sq", read_only, TypeError),
    "shape": ("grad", lambda x: x[:-1], ValueError),
    "stride": ("param", lambda x: np.repeat(x, 2)[::2], ValueError),
    "none": ("exp_avg", lambda x: None, TypeError),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_array_is_named_and_nothing_is_written(fault: str) -> None:
    array, change, error = WRONG[fault]
    made = arrays("adam_")
    made[array] = change(made[array])
    before = {k: x.copy() for k, x in made.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=rf"\b{array}\b"):
        call("adam_", made)
    assert all(np.array_equal(made[k], x) for k, x in before.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: torch._neg_view(x),
        lambda x: x.repeat_interleave(2)[::2],
    ],
    ids=["meta", "complex", "sparse", "negative", "strided"],
)
def test_a_wrong_tensor_is_named(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {k: torch.from_numpy(x) for k, x in arrays("adam_").items()}
    before = tensors["param"].clone()
    tensors["grad"] = change(tensors["grad"])
    with pytest.raises((TypeError, ValueError), match=r"\bgrad\b"):
        call("adam_", tensors)
    assert torch.equal(tensors["param"], before)


def test_arrays_that_overlap_are_refused_by_name() -> None:
    made = arrays("adam_")
    memory = np.concatenate([made["param"], made["param"]])
    made["param"], made["exp_avg"] = memory[:N], memory[10 : N + 10]
    with pytest.raises(ValueError, match=r"param and exp_avg overlap"):
        call("adam_", made)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("adam_", {"lr": -1.0}, "lr"),
        ("adam_", {"lr": float("nan")}, "lr"),
        ("adam_", {"eps": -1e-8}, "eps"),
        ("adam_", {"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ("adamw_", {"betas": (0.9, float("nan"))}, r"betas\[1\]"),
        ("adamw_", {"weight_decay": -0.1}, "weight_decay"),
        ("adam_", {"step": 0}, "step"),
        ("adam_", {"grad_scale": 0.0}, "grad_scale"),
        ("rmsprop_", {"alpha": -0.1}, "alpha"),
        ("rmsprop_", {"momentum_buffer": None}, "momentum_buffer"),
        ("sgd_", {"momentum": -0.9, "nesterov": False}, "momentum"),
        ("sgd_", {"dampening": 0.5}, "Nesterov"),
        ("sgd_", {"dampening": float("nan"), "nesterov": False}, "dampening"),
        ("sgd_", {"momentum_buffer": None}, "momentum_buffer"),
    ],
)
def test_a_bad_number_is_named_and_nothing_is_written(
    name: str, options: dict[str, Any], word: str
) -> None:
    made = arrays(name)
    before = {k: x.copy() for k, x in made.items()}
    with pytest.raises(ValueError, match=word):
        call(name, {k: x for k, x in made.items() if k not in options}, **options)
    assert all(np.array_equal(made[k], x) for k, x in before.items())
