"""Arrays that the caller owns are updated in place, with the reference's bits, or refused whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same_bits
from kernel_cases import VARIANTS, Variant, assert_same, copies, ordinary_arrays
from torch import Tensor
from torch.nn import Parameter

import flatstep
from flatstep import _core, functional, reference

NAN, INF = math.nan, math.inf
Error = type[Exception]


@dataclass(frozen=True)
class Call:
    """A call of a function with arrays by name, and the reference's hyper-parameters for it."""

    name: str
    states: tuple[str, ...]
    options: dict[str, Any]

    def __call__(self, arrays: dict[str, Any], **more: Any) -> None:
        getattr(functional, self.name)(**arrays, **{**self.options, **more})

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("param", "grad", *self.states)

    @property
    def variant(self) -> Variant:
        decay = self.options.get("weight_decay", 0)
        flags = {
            "amsgrad": "max_exp_avg_sq" in self.states,
            "momentum": "momentum_buffer" in self.states,
            "centered": "grad_avg" in self.states,
            "nesterov": self.options.get("nesterov", False),
            "l2": decay != 0 and self.name != "adamw_",
        }
        rule = "adam" if self.name == "adamw_" else self.name[:-1]
        return next(
            v
            for v in VARIANTS
            if v.rule == rule and all(flags[k] == x for k, x in v.options.items())
        )

    def expected(
        self, arrays: dict[str, np.ndarray], dtype: str, scale: float = 1.0, **dtypes: str
    ) -> dict[str, np.ndarray]:
        after = copies(arrays)
        beta1, beta2 = self.options.get("betas", (0, 0))
        defaults = {
            "beta1": beta1,
            "beta2": beta2,
            "momentum": 0,
            "dampening": 0,
            "weight_decay": 0,
        }
        reference.update(
            self.variant.rule,
            self.variant.options,
            {**defaults, **self.options},
            after["param"],
            after["grad"],
            {name: after[name] for name in self.states},
            step=self.options.get("step", 2),
            scale=scale,
            dtype=dtype,
            **dtypes,
        )
        return after

    def __str__(self) -> str:
        step = self.options.get("step", "")
        return "-".join([str(self.variant), self.name, *self.states[2:], f"step{step}"])


def calls() -> list[Call]:
    adam = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "step": 7}
    rmsprop = {"lr": 0.02, "alpha": 0.9, "eps": 1e-6}
    sgd = {"lr": 0.03, "step": 2}
    momentum = {"momentum": 0.9}
    found = []
    for decay in ({"weight_decay": 0.0}, {"weight_decay": 0.1}):
        for largest in ((), ("max_exp_avg_sq",)):
            states = ("exp_avg", "exp_avg_sq", *largest)
            found += [Call(name, states, adam | decay) for name in ("adam_", "adamw_")]
        for centered in ((), ("grad_avg",)):
            found.append(Call("rmsprop_", ("square_avg", *centered), rmsprop | decay))
            states = ("square_avg", "momentum_buffer", *centered)
            found.append(Call("rmsprop_", states, rmsprop | momentum | decay))
        found.append(Call("sgd_", (), sgd | decay))
        for more in ({"dampening": 0.5}, {"dampening": 0.5, "step": 1}, {"nesterov": True}):
            found.append(Call("sgd_", ("momentum_buffer",), sgd | momentum | decay | more))
    return found


CALLS = calls()
FULLEST = {call.name: call for call in CALLS}
every_call = pytest.mark.parametrize("call", CALLS, ids=str)
every_function = pytest.mark.parametrize("call", FULLEST.values(), ids=lambda c: c.name)


def stored(call: Call, dtype: str) -> dict[str, np.ndarray]:
    """Elements as in training, by the arguments' names; bfloat16 as the reference stores it."""
    made = ordinary_arrays(call.variant, dtype, 1000)
    return dict(zip(call.arrays, (made[name] for name in call.variant.arrays), strict=True))


def small(call: Call) -> dict[str, Tensor]:
    """Different values in each; every update changes everything but the gradient."""
    return {
        name: torch.linspace(0.5, 6 - place, 12).view(3, 4)
        for place, name in enumerate(call.arrays)
    }


# ---- bits


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@every_call
def test_torch_tensors_get_the_references_bits(call: Call, dtype: str) -> None:
    before = stored(call, dtype)
    # torch cannot take every type of NumPy's, nor NumPy torch's bfloat16: both know the bytes.
    tensors = {
        name: torch.from_numpy(x.view(np.uint8).copy()).view(getattr(torch, dtype)).view(10, 100)
        for name, x in before.items()
    }
    call(tensors)
    found = {
        name: x.view(-1).view(torch.uint8).numpy().view(before[name].dtype)
        for name, x in tensors.items()
    }
    assert_same(found, call.expected(before, dtype), before)


MIXED = [types for types in _core.layouts() if len(set(types)) > 1]


@pytest.mark.parametrize("types", MIXED, ids="-".join)
@every_function
def test_16_bits_beside_32_get_the_references_bits(call: Call, types: tuple[str, ...]) -> None:
    param, grad, state = types
    dtypes = {"param": param, "grad": grad, **dict.fromkeys(call.states, state)}
    before = {name: stored(call, dtype)[name] for name, dtype in dtypes.items()}
    tensors = {
        name: torch.from_numpy(x.view(np.uint8).copy()).view(getattr(torch, dtypes[name]))
        for name, x in before.items()
    }
    call(tensors)
    found = {
        name: x.view(torch.uint8).numpy().view(before[name].dtype) for name, x in tensors.items()
    }
    expected = call.expected(before, param, grad_dtype=grad, state_dtype=state)
    assert_same(found, expected, before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@every_call
def test_numpy_arrays_get_the_references_bits(call: Call, dtype: str) -> None:
    before = stored(call, dtype)
    found = {name: x.copy().reshape(10, 100) for name, x in before.items()}
    found["grad"].flags.writeable = False
    call(found)
    assert_same({n: x.ravel() for n, x in found.items()}, call.expected(before, dtype), before)


@every_function
def test_numpy_arrays_of_bfloat16_get_the_references_bits(call: Call) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    before = stored(call, "bfloat16")
    found = {name: x.copy().view(bfloat16) for name, x in before.items()}
    call(found)
    bits = {name: x.view(np.uint16) for name, x in found.items()}
    assert_same(bits, call.expected(before, "bfloat16"), before)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"maximize": True}, -1.0),
        ({"grad_scale": 1024.0}, 1 / 1024),
        ({"grad_scale": 3.0, "maximize": True}, -1 / 3),
    ],
    ids=str,
)
@every_function
def test_maximize_and_grad_scale_are_factors_of_the_gradient(
    call: Call, options: dict[str, Any], scale: float
) -> None:
    before = stored(call, "float32")
    found = copies(before)
    call(found, **options)
    assert_same(found, call.expected(before, "float32", scale), before)


@pytest.mark.parametrize(
    ("name", "rule", "states"),
    [("adam_", "Adam", 2), ("adamw_", "AdamW", 2), ("rmsprop_", "RMSprop", 1), ("sgd_", "SGD", 0)],
)
def test_the_defaults_are_the_optimizers(name: str, rule: str, states: int) -> None:
    p, grad = Parameter(torch.linspace(0.5, 1, 9)), torch.linspace(-1, 1, 9)
    own = p.detach().clone()
    p.grad = grad
    getattr(flatstep, rule)([p]).step()
    step = {} if name == "rmsprop_" else {"step": 1}
    getattr(functional, name)(own, grad, *(torch.zeros(9) for _ in range(states)), **step)
    assert same_bits(own, p)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)], ids=str)
@every_function
def test_any_shape_will_do(call: Call, shape: tuple[int, ...]) -> None:
    tensors = {name: torch.full(shape, 0.5) for name in call.arrays}
    arrays = {name: x.numpy().copy() for name, x in tensors.items()}
    call(tensors)
    call(arrays)
    assert all(np.array_equal(arrays[name], x.numpy()) for name, x in tensors.items())
    assert not (tensors["param"] == 0.5).any()


def test_numbers_may_be_tensors_and_numpy_scalars() -> None:
    tensors, scalars = torch.ones(3), torch.ones(3)
    functional.sgd_(tensors, torch.ones(3), lr=torch.tensor(0.25), step=torch.tensor(3))
    functional.sgd_(scalars, torch.ones(3), lr=np.float32(0.25), step=np.int64(3))
    assert tensors.tolist() == scalars.tolist() == [0.75] * 3


@pytest.mark.parametrize(("name", "states"), [("sgd_", 0), ("rmsprop_", 1)])
def test_without_momentum_its_buffer_is_left_alone(name: str, states: int) -> None:
    param, buffer = torch.ones(3), torch.full((3,), 7.0)
    getattr(functional, name)(param, torch.ones(3), *[torch.ones(3)] * states, buffer)
    assert (param != 1).all()
    assert (buffer == 7).all()


# ---- what is written, and who hears of it


@every_function
def test_all_but_the_gradient_is_written_and_autograd_hears_of_it(call: Call) -> None:
    tensors = small(call)
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    call(tensors)
    for name, x in tensors.items():
        value, version = before[name]
        assert same_bits(x, value) == (name == "grad"), name
        assert (x._version == version) == (name == "grad"), name


@every_function
def test_a_leaf_that_requires_grad_is_updated_and_a_stale_backward_caught(call: Call) -> None:
    tensors: dict[str, Any] = small(call)
    tensors["param"] = p = Parameter(tensors["param"])
    before, loss = p.detach().clone(), (p**2).sum()
    call(tensors)
    assert p.is_leaf
    assert not torch.equal(p, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_function
def test_tensors_of_inference_mode_are_updated_inside_it_and_refused_outside(call: Call) -> None:
    with torch.inference_mode():
        tensors = small(call)
        call(tensors)
        after = {name: x.clone() for name, x in tensors.items()}
    assert not torch.equal(after["param"], small(call)["param"])
    with pytest.raises(ValueError, match=r"^param was made under torch\.inference_mode"):
        call(tensors)
    assert all(same_bits(x, after[name]) for name, x in tensors.items())


# ---- errors


class Tagged(torch.Tensor):
    """A subclass that adds nothing."""


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _at_an_odd_byte(x: np.ndarray) -> np.ndarray:
    return np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


WRONG_TENSORS: dict[str, tuple[Error, str, Callable[[Tensor], Any]]] = {
    "integer": (TypeError, "int32", lambda x: x.int()),
    "complex": (TypeError, "complex64", lambda x: x.to(torch.complex64)),
    "other_dtype": (TypeError, "float64", lambda x: x.double()),
    "meta": (TypeError, "on meta", lambda x: x.to("meta")),
    "sparse": (TypeError, "plain", lambda x: x.to_sparse()),
    "subclass": (TypeError, "Tagged", lambda x: x.clone().as_subclass(Tagged)),
    "wrapped": (TypeError, "plain", torch._to_functional_tensor),
    "negative": (TypeError, "plain", torch._neg_view),
    "list": (TypeError, "list", lambda x: x.tolist()),
    "none": (TypeError, "NoneType", lambda x: None),
    "other_kind": (TypeError, "numpy", lambda x: x.clone().numpy()),
    "other_shape": (ValueError, r"\(4, 3\)", lambda x: x.clone().view(4, 3)),
    "fewer": (ValueError, r"\(2, 4\)", lambda x: x[:2].clone()),
    "transposed": (ValueError, "not contiguous", lambda x: x.view(4, 3).clone().t()),
    "expanded": (ValueError, "not contiguous", lambda x: x[:1].clone().expand(3, 4)),
    "freed": (ValueError, "no memory", _freed),
    "misaligned": (
        ValueError,
        "not aligned",
        lambda x: torch.frombuffer(bytearray(49), dtype=x.dtype, offset=1).view(3, 4),
    ),
}
WRONG_ARRAYS: dict[str, tuple[Error, str, Callable[[np.ndarray], Any]]] = {
    "integer": (TypeError, "int32", lambda x: x.astype(np.int32)),
    "complex": (TypeError, "complex64", lambda x: x.astype(np.complex64)),
    "other_dtype": (TypeError, "float64", lambda x: x.astype(np.float64)),
    "byte_order": (TypeError, "dtype [<>]f4", lambda x: x.astype(x.dtype.newbyteorder())),
    "read_only": (TypeError, "read-only", _read_only),
    "number": (TypeError, "float32", lambda x: x[0, 0]),
    "other_kind": (TypeError, "torch", lambda x: torch.from_numpy(x.copy())),
    "other_shape": (ValueError, r"\(12,\)", lambda x: x.copy().ravel()),
    "fortran": (ValueError, "not C-contiguous", np.asfortranarray),
    "sliced": (ValueError, "not C-contiguous", lambda x: np.zeros((3, 8), np.float32)[:, ::2]),
    "reversed": (ValueError, "not C-contiguous", lambda x: x.copy()[::-1]),
    "misaligned": (ValueError, "not aligned", _at_an_odd_byte),
}


def places(call: Call, fault: str) -> list[str]:
    """The arguments in which it is a fault, and that argument the one at fault."""
    if fault in ("other_dtype", "other_kind", "other_shape", "fewer"):
        return list(call.arrays[1:])  # where the parameter differs, another is named
    if fault == "read_only":
        return [name for name in call.arrays if name != "grad"]
    if fault == "none":
        may_be_absent = ("max_exp_avg_sq", "momentum_buffer", "grad_avg")
        return [name for name in call.arrays if name not in may_be_absent]
    return list(call.arrays)


@pytest.mark.parametrize("fault", WRONG_TENSORS)
@every_function
def test_a_wrong_tensor_is_named_and_nothing_is_written(call: Call, fault: str) -> None:
    error, words, change = WRONG_TENSORS[fault]
    for name in places(call, fault):
        tensors: dict[str, Any] = small(call)
        wrong = change(tensors[name])
        good = {n: x for n, x in tensors.items() if n != name}
        before = {n: x.clone() for n, x in good.items()}
        with pytest.raises(error, match=f"^{name} .*{words}"):
            call({**tensors, name: wrong})
        assert all(torch.equal(x, before[n]) for n, x in good.items())


@pytest.mark.parametrize("fault", WRONG_ARRAYS)
@every_function
def test_a_wrong_array_is_named_and_nothing_is_written(call: Call, fault: str) -> None:
    error, words, change = WRONG_ARRAYS[fault]
    for name in places(call, fault):
        arrays: dict[str, Any] = {n: x.numpy() for n, x in small(call).items()}
        wrong = change(arrays[name])
        good = {n: x for n, x in arrays.items() if n != name}
        before = {n: x.copy() for n, x in good.items()}
        with pytest.raises(error, match=f"^{name} .*{words}"):
            call({**arrays, name: wrong})
        assert all(np.array_equal(x, before[n]) for n, x in good.items())


@pytest.mark.parametrize("shift", [0, 4], ids=["wholly", "partly"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
@every_function
def test_arrays_that_overlap_are_named_and_nothing_is_written(
    call: Call, kind: str, shift: int
) -> None:
    for first in call.arrays:
        for second in call.arrays:
            if first == second:
                continue
            arrays: dict[str, Any] = small(call)
            memory = torch.linspace(0.5, 1, 16)
            arrays[first] = memory[:12].view(3, 4)
            arrays[second] = memory[shift : shift + 12].view(3, 4)
            if kind == "numpy":
                arrays = {name: x.numpy() for name, x in arrays.items()}
            before = memory.clone()
            pair = f"({first} and {second}|{second} and {first})"
            with pytest.raises(ValueError, match=f"^{pair} overlap"):
                call(arrays)
            assert torch.equal(memory, before)


ADAMS = ("adam_", "adamw_")
EVERY = (*ADAMS, "rmsprop_", "sgd_")
WRONG_NUMBERS: list[tuple[tuple[str, ...], Error, str, dict[str, Any]]] = [
    (EVERY, ValueError, "lr is -0.1", {"lr": -0.1}),
    (EVERY, ValueError, "lr is nan", {"lr": NAN}),
    (EVERY, TypeError, "lr is 'fast'", {"lr": "fast"}),
    (EVERY, TypeError, "lr is None", {"lr": None}),
    (EVERY, ValueError, "weight_decay is -1", {"weight_decay": -1}),
    (EVERY, ValueError, "weight_decay is nan", {"weight_decay": NAN}),
    (EVERY, ValueError, "grad_scale is 0", {"grad_scale": 0}),
    (EVERY, ValueError, "grad_scale is -2.0", {"grad_scale": -2.0}),
    (EVERY, ValueError, "grad_scale is nan", {"grad_scale": NAN}),
    (EVERY, ValueError, "grad_scale is inf", {"grad_scale": INF}),
    ((*ADAMS, "sgd_"), ValueError, "step is 0", {"step": 0}),
    ((*ADAMS, "sgd_"), ValueError, "step is -3", {"step": -3}),
    ((*ADAMS, "sgd_"), ValueError, "step is 1.5", {"step": 1.5}),
    ((*ADAMS, "sgd_"), ValueError, "step is nan", {"step": NAN}),
    ((*ADAMS, "sgd_"), ValueError, "step is inf", {"step": INF}),
    ((*ADAMS, "sgd_"), ValueError, "step is 1000000000", {"step": 10**30}),
    (ADAMS, ValueError, r"betas\[0\] is 1.0", {"betas": (1.0, 0.9)}),
    (ADAMS, ValueError, r"betas\[0\] is -0.1", {"betas": (-0.1, 0.9)}),
    (ADAMS, ValueError, r"betas\[1\] is nan", {"betas": (0.9, NAN)}),
    (ADAMS, ValueError, r"betas\[1\] is 1.5", {"betas": (0.9, 1.5)}),
    ((*ADAMS, "rmsprop_"), ValueError, "eps is -1e-08", {"eps": -1e-8}),
    ((*ADAMS, "rmsprop_"), ValueError, "eps is nan", {"eps": NAN}),
    (("rmsprop_",), ValueError, "alpha is -0.5", {"alpha": -0.5}),
    (("rmsprop_",), ValueError, "alpha is nan", {"alpha": NAN}),
    (("rmsprop_",), ValueError, "momentum is -0.9", {"momentum": -0.9}),
    (("rmsprop_",), ValueError, "momentum is nan", {"momentum": NAN}),
    (("sgd_",), ValueError, "momentum is -0.9", {"momentum": -0.9, "nesterov": False}),
    (("sgd_",), ValueError, "momentum is nan", {"momentum": NAN}),
    (("sgd_",), ValueError, "dampening is nan", {"dampening": NAN, "nesterov": False}),
    (("sgd_",), ValueError, "Nesterov momentum requires", {"momentum": 0.0}),
    (("sgd_",), ValueError, "Nesterov momentum requires", {"dampening": 0.1}),
]


@pytest.mark.parametrize(
    ("name", "error", "message", "options"),
    [(name, e, m, o) for names, e, m, o in WRONG_NUMBERS for name in names],
    ids=lambda x: str(x) if isinstance(x, (str, dict)) else "",
)
def test_a_wrong_number_is_named_and_nothing_is_written(
    name: str, error: Error, message: str, options: dict[str, Any]
) -> None:
    call = FULLEST[name]
    tensors = small(call)
    before = {n: x.clone() for n, x in tensors.items()}
    with pytest.raises(error, match=f"^{message}"):
        call(tensors, **options)
    assert all(torch.equal(x, before[n]) for n, x in tensors.items())


@pytest.mark.parametrize("name", ["rmsprop_", "sgd_"])
def test_momentum_without_its_buffer_is_refused(name: str) -> None:
    call = FULLEST[name]
    tensors = small(call)
    before = tensors["param"].clone()
    with pytest.raises(ValueError, match=r"^momentum_buffer is missing: momentum 0\.9 needs it"):
        call({n: x for n, x in tensors.items() if n != "momentum_buffer"})
    assert torch.equal(tensors["param"], before)
