"""Mixed dtypes, masters and stochastic rounding: the reference's bits, through everything."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_run import ReferenceRun, stored
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch_versions import label, named, set_grad_dtype

import flatstep
from flatstep import reference
from flatstep.optim import weights

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": lambda params, **more: flatstep.Adam(params, lr=0.01, amsgrad=True, **more),
    "AdamW": lambda params, **more: flatstep.AdamW(params, lr=0.01, weight_decay=0.1, **more),
    "RMSprop": lambda params, **more: flatstep.RMSprop(
        params, momentum=0.9, centered=True, weight_decay=0.1, **more
    ),
    "SGD": lambda params, **more: flatstep.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **more),
    "plain SGD": lambda params, **more: flatstep.SGD(params, lr=0.1, **more),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = ((7, 5), (64,), (33, 65), (), (0, 3), (4097,))
# Parameter, gradient, options.
MODES: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "f32, bf16 gradients": (F32, BF16, {}),
    "f32, f16 gradients": (F32, F16, {}),
    "f32, bf16 states": (F32, F32, {"state_dtype": BF16}),
    "bf16, f32 gradients": (BF16, F32, {}),
    "f16, f32 gradients": (F16, F32, {}),
    "bf16, f32 states": (BF16, BF16, {"state_dtype": F32}),
    "f16, f32 states": (F16, F16, {"state_dtype": F32}),
    "bf16, f32 master": (BF16, BF16, {"master": "float32", "state_dtype": F32}),
    "f16, f32 master": (F16, F16, {"master": "float32"}),
    "bf16, split": (BF16, BF16, {"master": "split"}),
    "bf16, split, f32 states": (BF16, F32, {"master": "split", "state_dtype": F32}),
    "bf16, chance": (BF16, BF16, {"rounding": "stochastic", "seed": 2**64 - 1}),
    "bf16, average": (BF16, BF16, {"ema_decay": 0.9}),
    "f64, average": (F64, F64, {"ema_decay": 0.9}),
    "everything": (
        BF16,
        F32,
        {"master": "split", "state_dtype": F32, "ema_decay": 0.99, "max_grad_norm": 0.5},
    ),
}
every_mode = pytest.mark.parametrize("mode", MODES)


def make_params(dtype: torch.dtype, shapes: Any = SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give(params: list[Parameter], dtype: torch.dtype, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(dtype)
        if param.grad is not None and param.grad.dtype == dtype:
            param.grad.copy_(grad)
            continue
        if dtype != param.dtype:
            set_grad_dtype(param, dtype)
        param.grad = grad


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def assert_same_states(a: Any, b: Any, ours: list[Parameter], theirs: list[Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert same(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        assert all(same(value, b.state[q][key]) for key, value in a.state[p].items())


# ---- the bits


@every_optimizer
@every_mode
def test_a_step_has_the_bits_of_the_reference(name: str, mode: str) -> None:
    dtype, grad_dtype, options = MODES[mode]
    params = make_params(dtype)
    opt = OPTIMIZERS[name](params, **options)
    expected = ReferenceRun(opt)
    for step in range(3):
        give(params, grad_dtype, step)
        before = [param.grad.clone() for param in params]
        expected.step()
        opt.step()
        assert all(same(param.grad, grad) for param, grad in zip(params, before, strict=True))
        expected.assert_same()
    assert not opt._table.others, "went another way than through the kernel"


@every_optimizer
@every_mode
def test_flat_buffers_strides_and_threads_change_no_bit(name: str, mode: str) -> None:
    dtype, grad_dtype, options = MODES[mode]
    flat, strided, threaded, plain = (make_params(dtype) for _ in range(4))
    for param in strided:
        if param.dim() == 2:
            gaps = torch.zeros(*param.shape[:-1], 2 * param.shape[-1], dtype=dtype)
            param.data = gaps[..., ::2].copy_(param.data)
    for param in flat if grad_dtype != dtype else ():
        set_grad_dtype(param, grad_dtype)
    buffer = flatstep.FlatBuffer(flat)
    assert [grads.dtype for grads in buffer.grads] == [grad_dtype]
    opts = [OPTIMIZERS[name](params, **options) for params in (plain, flat, strided, threaded)]
    before = torch.get_num_threads()
    try:
        for step in range(3):
            for opt, params in zip(opts, (plain, flat, strided, threaded), strict=True):
                give(params, grad_dtype, step)
                torch.set_num_threads(3 if params is threaded else 1)
                opt.step()
    finally:
        torch.set_num_threads(before)
    for opt, params in zip(opts[1:], (flat, strided, threaded), strict=True):
        assert_same_states(opts[0], opt, plain, params)


@every_optimizer
@every_mode
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name: str, mode: str) -> None:
    dtype, grad_dtype, options = MODES[mode]
    params = make_params(dtype)
    opt = OPTIMIZERS[name](params, **options)
    for step in range(2):
        give(params, grad_dtype, step)
        opt.step()
    file = io.BytesIO()
    torch.save({"params": params, "opt": opt.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file)
    resumed = [Parameter(param.detach().clone()) for param in loaded["params"]]
    other = OPTIMIZERS[name](resumed, **options)
    other.load_state_dict(loaded["opt"])
    for ours, theirs in zip(params, resumed, strict=True):
        for key, value in opt.state[ours].items():
            assert same(value, other.state[theirs][key])
    copied, same_params = copy.deepcopy((opt, params))
    for step in range(2, 4):
        for of, these in ((opt, params), (other, resumed), (copied, same_params)):
            give(these, grad_dtype, step)
            of.step()
    assert_same_states(opt, other, params, resumed)
    assert_same_states(opt, copied, params, same_params)


# ---- states


def test_a_checkpoint_of_torch_becomes_f32_states() -> None:
    params = make_params(BF16)
    torchs = torch.optim.AdamW(params, lr=0.01)
    give(params, BF16, 0)
    torchs.step()
    opt = flatstep.AdamW(params, lr=0.01, state_dtype=F32, master="split", ema_decay=0.5)
    opt.load_state_dict(torchs.state_dict())
    give(params, BF16, 1)
    opt.step()
    state = opt.state[params[0]]
    assert {key: value.dtype for key, value in state.items()} == {
        "step": F32,
        "exp_avg": F32,
        "exp_avg_sq": F32,
        "master_low": torch.int16,
        "average": F32,
    }
    assert state["step"] == 2
    torchs.load_state_dict(opt.state_dict())
    torchs.step()


def test_without_an_option_states_are_as_in_torch() -> None:
    params = make_params(BF16)
    opt = flatstep.AdamW(params)
    give(params, BF16, 0)
    opt.step()
    assert list(opt.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    assert opt.state[params[0]]["exp_avg"].dtype == BF16
    assert "state_dtype" not in opt.param_groups[0]


def test_groups_may_differ() -> None:
    a, b = make_params(BF16, [(33,)]), make_params(F32, [(33,)])
    groups = [{"params": a, "master": "split"}, {"params": b, "ema_decay": 0.9}]
    opt = flatstep.AdamW(groups, state_dtype=F32)
    give(a, BF16, 0)
    give(b, F32, 0)
    opt.step()
    assert list(opt.state[a[0]]) == ["step", "exp_avg", "exp_avg_sq", "master_low"]
    assert list(opt.state[b[0]]) == ["step", "exp_avg", "exp_avg_sq", "average"]


def test_an_option_switched_on_later_starts_from_the_weights() -> None:
    params = make_params(BF16)
    opt = flatstep.SGD(params, lr=0.1)
    give(params, BF16, 0)
    opt.step()
    before = [param.detach().clone() for param in params]
    opt.param_groups[0].update(lr=0.0, master="float32", ema_decay=0.5, state_dtype=F32)
    opt.step()
    for param, was in zip(params, before, strict=True):
        assert same(param.detach(), was)
        assert torch.equal(opt.state[param]["master"], was.float())
        assert torch.equal(opt.state[param]["average"], was.float())


# ---- masters


@every_optimizer
def test_a_master_copy_is_the_run_of_a_float32_parameter(name: str) -> None:
    params = make_params(BF16)
    wide = [Parameter(param.detach().float()) for param in params]
    opt = OPTIMIZERS[name](params, master="float32", state_dtype=F32)
    own = OPTIMIZERS[name](wide)
    for step in range(5):
        give(params, BF16, step)
        give(wide, BF16, step)
        opt.step()
        own.step()
    for param, master, weight in zip(params, opt.master_parameters(), wide, strict=True):
        assert torch.equal(master, weight)
        assert torch.equal(param, weight.bfloat16())


@every_optimizer
def test_a_split_master_is_the_same_but_for_halves(name: str) -> None:
    params, halves = make_params(BF16), make_params(BF16)
    opt = OPTIMIZERS[name](params, master="float32", state_dtype=F32)
    split = OPTIMIZERS[name](halves, master="split", state_dtype=F32)
    for step in range(5):
        for of, these in ((opt, params), (split, halves)):
            give(these, BF16, step)
            of.step()
            for param, master in zip(these, of.master_parameters(), strict=True):
                assert torch.equal(param, master.bfloat16())
    for a, b in zip(opt.master_parameters(), split.master_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)  # an ULP of a weight when it was larger


def every_split() -> np.ndarray:
    """Every lower half of a few values, the halves above even and odd ones among them."""
    high = np.array(
        [0x0000, 0x0001, 0x3F80, 0x3F81, 0x8000, 0x8001, 0xBF81, 0x7F7F, 0xFF7F, 0x7F80]
    )
    return (high[:, None] << 16 | np.arange(1 << 16)).astype(np.uint32).reshape(-1).view(np.float32)


def test_two_halves_are_the_value_and_the_upper_one_its_nearest() -> None:
    values = every_split()
    values = values[~np.isnan(values)]
    high, low = reference.split(values)
    joined = reference.join(high, low)
    assert np.array_equal(reference.narrow(joined, "bfloat16"), high)
    bits = values.view(np.uint32)
    is_even_half = (bits & 0x1FFFF) == 0x8000
    assert np.array_equal(joined.view(np.uint32), bits - is_even_half)
    ours = weights.split(torch.from_numpy(values.copy()))
    assert np.array_equal(stored(ours[0]), high)
    assert np.array_equal(ours[1].numpy().view(np.uint16), low)
    assert np.array_equal(weights.join(*ours).numpy().view(np.uint32), joined.view(np.uint32))


@pytest.mark.parametrize("master", ["float32", "split"])
def test_master_weights_go_out_and_come_back(master: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.BatchNorm1d(17)).bfloat16()
    opt = flatstep.AdamW(model.parameters(), master=master, state_dtype=F32)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        opt.step()
    saved = opt.master_state_dict(model)
    assert list(saved) == list(model.state_dict())
    assert saved["0.weight"].dtype == F32
    assert saved["1.running_mean"].dtype == BF16
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for param in fresh.parameters():
            param.zero_()
    other = flatstep.AdamW(fresh.parameters(), master=master, state_dtype=F32)
    other.load_master_state_dict(fresh, saved)
    other.load_state_dict({**opt.state_dict(), "state": copy.deepcopy(opt.state_dict()["state"])})
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert same(a, b)
    third = flatstep.AdamW(fresh.parameters(), master=master)
    third.load_master_parameters([m.detach().clone() for m in opt.master_parameters()])
    for a, b in zip(opt.master_parameters(), third.master_parameters(), strict=True):
        assert same(a, b)
    with pytest.raises(ValueError, match="there are 4 parameters, but 1 masters"):
        third.load_master_parameters([torch.zeros(1)])
    with pytest.raises(ValueError, match="master 0 has shape"):
        third.load_master_parameters([torch.zeros(1)] * 4)


def test_weights_loaded_later_are_the_masters_too() -> None:
    params = make_params(BF16)
    opt = flatstep.SGD(params, lr=0.1, master="float32")
    give(params, BF16, 0)
    opt.step()
    masters = [master.clone() for master in opt.master_parameters()]
    with torch.no_grad():
        params[0].copy_(torch.full_like(params[0], 0.3))
        params[1].copy_(params[1].clone())  # written, but with what it is
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    after = list(opt.master_parameters())
    assert torch.equal(after[0], torch.full_like(after[0], 0.3).bfloat16().float())
    assert torch.equal(params[0], torch.full_like(params[0], 0.3))
    assert all(torch.equal(a, b) for a, b in zip(after[1:], masters[1:], strict=True))


# ---- stochastic rounding


def test_chance_is_unbiased() -> None:
    """The mean over many steps of a value between two neighbours, within 5 sigma."""
    size, steps = 4096, 64
    value = torch.tensor(1.0) + torch.rand(size, generator=torch.Generator().manual_seed(0)) / 128
    up = 0.0
    for step in range(steps):
        param = Parameter(torch.ones(size, dtype=BF16))
        opt = flatstep.SGD([param], lr=1.0, rounding="stochastic", seed=step)
        set_grad_dtype(param, F32)
        param.grad = 1 - value
        opt.step()
        assert ((param == 1) | (param == 1 + 1 / 128)).all()
        up = up + (param.detach().float() - 1) * 128
    share = (value - 1) * 128
    sigma = (share * (1 - share) / steps).sqrt()
    off = (up / steps - share).abs()
    assert (off > 5 * sigma + 1e-6).sum() <= 1
    assert abs(float((up / steps - share).mean())) < 5 * float((sigma**2).sum().sqrt()) / size


def test_chance_uses_every_bit_evenly_and_independently() -> None:
    numbers = np.arange(1 << 18, dtype=np.uint32)
    for seed, step in ((0, 1), (0, 2), (1, 1)):
        random = reference.random_halves(numbers, seed, step)
        counts = np.bincount(random >> 8, minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 380  # 255 degrees of freedom: five sigma either way
        neighbours = np.corrcoef(random[:-1], random[1:])[0, 1]
        assert abs(neighbours) < 0.01
    a, b = (reference.random_halves(numbers, 0, step).astype(float) for step in (1, 2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01


def test_chance_follows_the_seed_the_step_and_the_element() -> None:
    def run(seed: int, split: int) -> Tensor:
        whole = torch.linspace(0.5, 1.5, 1000).bfloat16()
        params = [Parameter(part.clone()) for part in (whole[:split], whole[split:])]
        opt = flatstep.SGD(params, lr=0.01, rounding="stochastic", seed=seed)
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.01)
            opt.step()
        return torch.cat([param.detach() for param in params])

    assert torch.equal(run(0, 333), run(0, 500))
    assert not torch.equal(run(0, 333), run(1, 333))


def test_a_step_without_learning_rate_changes_no_bit() -> None:
    """Distributed checkpoints make states by such a step."""
    for options in (
        {"rounding": "stochastic"},
        {"master": "split"},
        {"master": "float32", "ema_decay": 0.5},
    ):
        params = make_params(BF16)
        before = [param.detach().clone() for param in params]
        opt = flatstep.AdamW(params, lr=0.0, **options)  # type: ignore[arg-type]
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
        assert all(same(p.detach(), q) for p, q in zip(params, before, strict=True))


# ---- what excludes each other

BAD = [
    (F32, {"master": "float32"}, "'float32' is for bfloat16 and float16 parameters"),
    (F32, {"master": "split"}, "put this one into a group with master=None"),
    (F16, {"master": "split"}, "use master='float32'"),
    (F32, {"rounding": "stochastic"}, "use rounding='nearest'"),
    (BF16, {"rounding": "stochastic", "master": "split"}, "exclude each other"),
    (BF16, {"rounding": "up"}, "Invalid rounding value: 'up'; use 'nearest' or 'stochastic'"),
    (BF16, {"master": "f32"}, "Invalid master value: 'f32'; use None or 'float32' or 'split'"),
    (BF16, {"seed": -1}, "Invalid seed value: -1; use an integer from 0"),
    (BF16, {"seed": 0.5}, "Invalid seed value"),
    (BF16, {"state_dtype": F16}, "Invalid state_dtype value: torch.float16"),
    (F64, {"state_dtype": F32}, "use state_dtype=None in its group"),
    (F32, {"max_grad_norm": -1.0}, "Invalid max_grad_norm value: -1.0; use 0 or more"),
    (F32, {"max_grad_norm": float("nan")}, "Invalid max_grad_norm"),
    (F32, {"max_grad_norm": 1.0, "norm_type": 3}, "Invalid norm_type value: 3; use 2 or inf"),
    (F32, {"error_if_nonfinite": True, "skip_nonfinite": True}, "exclude each other"),
    (F32, {"ema_decay": 1.5}, "Invalid ema_decay value: 1.5; use 0 to 1"),
    (F32, {"ema_decay": 0.5, "differentiable": True}, "differentiable and ema_decay exclude"),
]


@pytest.mark.parametrize(("dtype", "options", "message"), BAD, ids=lambda x: str(x))
@pytest.mark.parametrize("cls", [flatstep.Adam, flatstep.AdamW, flatstep.RMSprop, flatstep.SGD])
def test_what_excludes_each_other_is_said(
    cls: Any, dtype: torch.dtype, options: dict[str, Any], message: str
) -> None:
    params = [Parameter(torch.zeros(3, dtype=dtype))]
    with pytest.raises(ValueError, match=message):
        cls(params, **options)
    opt = cls([Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": params, **options})
    assert len(opt.param_groups) == 1


def test_an_unknown_option_is_refused_as_by_torch() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'mastr'"):
        flatstep.SGD([Parameter(torch.zeros(3))], mastr="split")  # type: ignore[call-arg]


def test_what_no_kernel_takes_is_refused_by_name() -> None:
    param = Parameter(torch.zeros(3, 2))
    opt = flatstep.SGD(named(embedding=param), ema_decay=0.5)
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(
        ValueError, match=rf"{label('embedding', 0)}\W+cannot be updated by a kernel.*ema_decay"
    ):
        opt.step()
    assert not opt.state


# ---- what is around the step

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 1, 0.5),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 3),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=6),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_schedulers_are_followed(name: str, kind: str) -> None:
    dtype, grad_dtype, options = MODES["everything"]
    params = make_params(dtype)
    opt = OPTIMIZERS[name](params, **options)
    expected = ReferenceRun(opt)
    scheduler = SCHEDULERS[kind](opt)
    for step in range(4):
        give(params, grad_dtype, step)
        expected.step()
        opt.step()
        expected.assert_same()
        scheduler.step()


def test_gradients_accumulate_in_their_own_dtype() -> None:
    torch.manual_seed(0)
    model, other = (torch.nn.Linear(8, 4).bfloat16() for _ in range(2))
    other.load_state_dict(model.state_dict())
    for param in model.parameters():
        set_grad_dtype(param, F32)
    buffer = flatstep.FlatBuffer(model.parameters())
    opt = flatstep.AdamW(model.parameters(), master="split", state_dtype=F32, max_grad_norm=1.0)
    by_hand = flatstep.AdamW(other.parameters(), master="split", state_dtype=F32, max_grad_norm=1.0)
    for step in range(3):
        total = [torch.zeros_like(param, dtype=F32) for param in other.parameters()]
        for part in range(3):
            generator = torch.Generator().manual_seed(10 * step + part)
            x = torch.randn(16, 8, generator=generator).bfloat16()
            model(x).square().sum().backward()
            other.zero_grad()
            other(x).square().sum().backward()
            torch._foreach_add_(total, [param.grad.float() for param in other.parameters()])
        for param, grad in zip(other.parameters(), total, strict=True):
            param.grad = None
            set_grad_dtype(param, F32)
            param.grad = grad
        opt.step()
        opt.zero_grad()
        by_hand.step()
        for param in other.parameters():
            param.grad = None
            set_grad_dtype(param, BF16)
        assert all(same(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert buffer.grads[0].dtype == F32


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("mode", ["everything", "bf16, f32 master", "bf16, chance", "f64, average"])
def test_distributed_checkpoints_keep_every_dtype(mode: str, flatten: bool) -> None:
    dtype, _, options = MODES[mode]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3)).to(dtype)
    fresh = copy.deepcopy(model)
    opt = flatstep.AdamW(model.parameters(), **options)
    for step in range(2):
        give(list(model.parameters()), dtype, step)
        opt.step()
    saving = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=saving))
    fresh.load_state_dict(model.state_dict())
    other = flatstep.AdamW(fresh.parameters(), **options)
    set_optimizer_state_dict(fresh, other, saved, options=saving)
    assert_same_states(opt, other, list(model.parameters()), list(fresh.parameters()))
    for of, these in ((opt, model), (other, fresh)):
        give(list(these.parameters()), dtype, 2)
        of.step()
    assert_same_states(opt, other, list(model.parameters()), list(fresh.parameters()))
