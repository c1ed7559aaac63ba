"""Everything around the arithmetic is torch.optim's: signatures, groups, states, hooks, scaling."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import (
    CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    Case,
    assert_same_run,
    assert_unchanged,
    case_of,
    cases,
    clones,
    give_gradients,
    gradient,
    parameters,
    rich,
    same_bits,
    snapshot,
    tensors_of,
    train,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR
from torch_versions import NEWER_KEYS, named_or_not, needs_names

import flatstep

RULES = list(CASES)
every_rule = pytest.mark.parametrize("rule", RULES)
FEW_SHAPES = ((5,), (4, 3), (), (0,))


def build(library: Any, rule: str, **options: Any) -> Optimizer:
    return getattr(library, rule)([Parameter(torch.ones(3))], **options)


def known_to_torch(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in NEWER_KEYS}


def without_params(opt: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in known_to_torch(g).items() if k != "params"} for g in opt.param_groups]


# ---- signatures, groups


@every_rule
def test_signature_is_torchs(rule: str) -> None:
    """What torch does not have comes after it, by keyword only."""

    def shape(library: Any) -> list[Any]:
        signature = inspect.signature(getattr(library, rule))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    ours, theirs = shape(flatstep), shape(torch.optim)
    assert ours[: len(theirs)] == theirs
    further = [*{"RMSprop": ["fused"], "Adam": sorted(NEWER_KEYS)}.get(rule, []), "options"]
    assert [name for name, _, _ in ours[len(theirs) :]] == further
    assert all(kind.name in ("KEYWORD_ONLY", "VAR_KEYWORD") for _, kind, _ in ours[len(theirs) :])


@every_rule
def test_step_takes_a_closure_and_nothing_else(rule: str) -> None:
    """GradScaler and DCP look at the parameters of `step`."""
    ours = inspect.signature(build(flatstep, rule).step).parameters
    assert list(ours) == ["closure"]
    assert ours["closure"].default is None


@every_rule
def test_class_is_an_optimizer_of_the_same_name(rule: str) -> None:
    opt = build(flatstep, rule)
    assert isinstance(opt, Optimizer)
    assert type(opt).__name__ == rule
    assert issubclass(flatstep.AdamW, flatstep.Adam)


def test_groups_hold_torchs_keys_in_order_with_torchs_values(case: Case) -> None:
    if NEWER_KEYS and case.rule.startswith("Adam"):
        pytest.skip(f"torch {torch.__version__} lacks {', '.join(NEWER_KEYS)}")
    ours, theirs = (build(x, case.rule, **case.options) for x in (flatstep, torch.optim))
    assert list(ours.param_groups[0].items())[1:] == list(theirs.param_groups[0].items())[1:]
    assert list(ours.defaults.items()) == list(theirs.defaults.items())
    assert repr(ours) == repr(theirs)


# ---- state


@pytest.mark.parametrize("flag", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_state_has_torchs_keys_dtypes_shapes_and_strides(case: Case, flag: dict[str, bool]) -> None:
    accepted = inspect.signature(getattr(torch.optim, case.rule)).parameters
    if not set(flag) <= set(accepted):
        pytest.skip(f"torch's {case.rule} has no {next(iter(flag))}")
    start = parameters(shapes=[LAYOUT_SHAPE])[0].detach()

    def laid_out() -> list[Parameter]:
        found = [make(x) for x in (start, start.bfloat16()) for make in LAYOUTS.values()]
        return [Parameter(x) for x in (*found, torch.ones(()), torch.ones(0, 3))]

    ours, theirs = case.ours(laid_out(), **flag), case.torchs(laid_out())
    train(ours, [0])
    train(theirs, [0])
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for p, q in pairs:
        assert p.stride() == q.stride()
        assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
        for key, their_state in theirs.state.get(q, {}).items():
            our_state = ours.state[p][key]
            assert type(our_state) is torch.Tensor
            assert not our_state.requires_grad
            for attribute in ("dtype", "device", "shape"):
                assert getattr(our_state, attribute) == getattr(their_state, attribute), key
            # torch's SGD clones its first gradient, whose strides may be unlike the parameter's
            like = torch.empty_like(q) if case.rule == "SGD" else their_state
            assert our_state.stride() == like.stride(), key


@cases(["Adam", "AdamW", "RMSprop"], ["default"])
def test_step_follows_the_default_dtype_as_in_torch(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    p = Parameter(torch.ones(3))
    opt = case.ours([p])
    train(opt, range(2))
    assert opt.state[p]["step"].dtype == torch.float64
    assert opt.state[p]["step"].item() == 2


@rich
def test_each_parameter_counts_in_its_own_step_tensor(case: Case) -> None:
    if case.rule == "SGD":
        pytest.skip("SGD keeps no count")
    opt = case.ours(parameters(shapes=FEW_SHAPES))
    train(opt, range(3))
    params = opt.param_groups[0]["params"]
    opt.state[params[0]]["step"].fill_(10)
    assert [opt.state[p]["step"].item() for p in params] == [10, 3, 3, 3]
    train(opt, [3])
    assert [opt.state[p]["step"].item() for p in params] == [11, 4, 4, 4]


@rich
def test_states_may_be_rewritten_between_steps(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(3))
        first, second, *_ = opt.param_groups[0]["params"]
        key = next(k for k in opt.state[first] if k != "step")
        opt.state[first][key] = torch.full_like(opt.state[first][key], 0.5)
        opt.state[second][key].mul_(2)
        train(opt, range(3, 6))
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_clearing_the_state_starts_afresh(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(3))
        opt.state.clear()
        train(opt, range(3, 6))
        runs.append(opt)
    assert_same_run(*runs)


# ---- checkpoints


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRY: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "memory": copy.deepcopy,
    "file": through_a_file,
}


def layout_of(x: Any) -> Any:
    """A state dict with every tensor replaced by what describes it."""
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.shape, x.stride(), x.device)
    if isinstance(x, dict):
        return [(k, layout_of(v)) for k, v in known_to_torch(x).items() if k != "foreach"]
    return [layout_of(v) for v in x] if isinstance(x, (list, tuple)) else x


@named_or_not
def test_state_dict_is_laid_out_as_torchs(case: Case, named: bool) -> None:
    params = parameters()
    found = []
    for make in (case.ours, case.torchs):
        own = clones(params)
        opt = make([(f"p{i}", p) for i, p in enumerate(own)] if named else own)
        empty = opt.state_dict()
        train(opt, range(2))
        found.append((layout_of(empty), layout_of(opt.state_dict())))
    assert found[0] == found[1]


@pytest.mark.parametrize("carry", CARRY)
@pytest.mark.parametrize(
    ("first", "second"), [("ours", "torchs"), ("torchs", "ours")], ids=["to_torch", "from_torch"]
)
def test_a_checkpoint_goes_on_in_the_other_library(
    case: Case, first: str, second: str, carry: str
) -> None:
    if first == "torchs" and NEWER_KEYS & case.options.keys():
        pytest.skip(f"torch {torch.__version__} lacks {', '.join(NEWER_KEYS)}")
    params = parameters()
    uninterrupted = case.torchs(clones(params))
    train(uninterrupted, range(10))
    before = getattr(case, first)(params)
    train(before, range(5))
    after = getattr(case, second)(clones(params))
    after.load_state_dict(CARRY[carry](before.state_dict()))
    train(after, range(5, 10))
    assert_same_run(after, uninterrupted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("carry", CARRY)
@rich
def test_a_checkpoint_goes_on_to_the_same_bits(case: Case, carry: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    uninterrupted = case.ours(clones(params))
    train(uninterrupted, range(6))
    before = case.ours(params)
    train(before, range(3))
    after = case.ours(clones(params))
    train(after, [99])  # what it has learnt itself is forgotten
    for p, q in zip(after.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q.data)
    after.load_state_dict(CARRY[carry](before.state_dict()))
    train(after, range(3, 6))
    assert_unchanged(after, tensors_of(uninterrupted))


@rich
def test_a_checkpoint_is_no_larger_than_torchs(case: Case) -> None:
    sizes = []
    for make in (case.ours, case.torchs):
        opt = make(parameters(shapes=[(64, 64), (64,)]))
        train(opt, [0])
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] <= 1.1 * sizes[1] + 4096


@cases(["Adam", "AdamW", "RMSprop"], ["default", "all"])
def test_an_integer_step_of_an_old_checkpoint_is_understood(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    before = case.torchs(params)
    train(before, range(4))
    old = copy.deepcopy(before.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    after = case.ours(clones(params))
    after.load_state_dict(old)
    train(before, range(4, 8))
    train(after, range(4, 8))
    assert_same_run(after, before)


ADDED_KEYS = {
    "Adam": "amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay",
    "AdamW": "amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay",
    "RMSprop": "momentum centered capturable foreach maximize differentiable",
    "SGD": "nesterov maximize foreach differentiable fused",
}


@cases(options=["default"])
def test_keys_that_an_old_checkpoint_lacks_get_torchs_defaults(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    before = case.torchs(params)
    train(before, range(4))
    old = copy.deepcopy(before.state_dict())
    for key in known_to_torch(dict.fromkeys(ADDED_KEYS[case.rule].split())):
        del old["param_groups"][0][key]
    runs = []
    for make in (case.ours, case.torchs):
        after = make(clones(params))
        after.load_state_dict(copy.deepcopy(old))
        runs.append(after)
    assert without_params(runs[0]) == without_params(runs[1])
    for opt in (*runs, before):
        train(opt, range(4, 8))
    assert_same_run(runs[0], before)


def test_an_old_sgd_checkpoint_may_hold_none_for_the_momentum() -> None:
    case = case_of("SGD", "dampening")
    params = parameters(shapes=FEW_SHAPES)
    ours, theirs = case.ours(params), case.torchs(clones(params))
    train(theirs, [])
    old = theirs.state_dict()
    old["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    ours.load_state_dict(old)
    train(ours, range(3))
    train(theirs, range(3))
    assert_same_run(ours, theirs)


OTHER_LIBRARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "apex": lambda state: state.pop("step"),
    "bitsandbytes": lambda state: [state.pop(name) for name in list(state) if name != "step"],
}


@pytest.mark.parametrize("library", OTHER_LIBRARIES)
@cases(["Adam", "AdamW", "RMSprop"], ["default"])
def test_a_state_without_what_torch_calls_it_is_refused_by_name(case: Case, library: str) -> None:
    params = parameters(shapes=FEW_SHAPES)
    before = case.torchs(params)
    train(before, range(4))
    saved = copy.deepcopy(before.state_dict())
    OTHER_LIBRARIES[library](saved["state"][1])
    opt = case.ours([(f"p{index}", p) for index, p in enumerate(clones(params))])
    opt.load_state_dict(saved)
    give_gradients(opt.param_groups[0]["params"], 4)
    kept = snapshot(opt)
    with pytest.raises(ValueError, match=r"the state of parameter 'p1' .* it is not whole"):
        opt.step()
    assert_unchanged(opt, kept)


def test_adamw_decays_decoupled_whatever_it_loads() -> None:
    params = parameters(shapes=FEW_SHAPES)
    coupled = torch.optim.Adam(clones(params), weight_decay=0.1)
    opt = flatstep.AdamW(params)
    opt.load_state_dict(coupled.state_dict())
    assert opt.param_groups[0]["decoupled_weight_decay"] is True


SWITCHES: list[tuple[str, str, dict[str, Any], str]] = [
    ("Adam", "short_memory", {"amsgrad": True}, "max_exp_avg_sq"),
    ("AdamW", "default", {"amsgrad": True}, "max_exp_avg_sq"),
    ("RMSprop", "default", {"momentum": 0.9}, "momentum_buffer"),
    ("RMSprop", "default", {"centered": True}, "grad_avg"),
    ("SGD", "default", {"momentum": 0.9}, "momentum_buffer"),
    ("SGD", "momentum", {"nesterov": True}, "momentum_buffer"),
]


@pytest.mark.parametrize(("rule", "name", "switch", "key"), SWITCHES, ids=str)
def test_an_option_may_be_switched_on_mid_training(
    rule: str, name: str, switch: dict[str, Any], key: str
) -> None:
    """The missing state starts at zero (SGD: at the gradient), as if it were new."""
    case = case_of(rule, name)
    params = parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(4))
        opt.param_groups[0].update(switch)
        if make == case.torchs and rule != "SGD":  # where torch itself raises KeyError
            for p in opt.param_groups[0]["params"]:
                opt.state[p][key] = torch.zeros_like(p)
        train(opt, range(4, 8))
        runs.append(opt)
    assert key in runs[0].state[runs[0].param_groups[0]["params"][0]]
    assert_same_run(*runs)


@rich
def test_an_option_may_be_switched_off_and_on_again(case: Case) -> None:
    key = {"Adam": "amsgrad", "AdamW": "amsgrad", "RMSprop": "momentum", "SGD": "momentum"}
    off = {"amsgrad": False, "momentum": 0}
    params = parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        (group,) = opt.param_groups
        option = key[case.rule]
        train(opt, range(3))
        on, group[option] = group[option], off[option]
        train(opt, range(3, 5))
        group[option] = on
        train(opt, range(5, 7))
        runs.append(opt)
    assert_same_run(*runs)


# ---- schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.01, total_steps=12, cycle_momentum="betas" in o.defaults or o.defaults["momentum"] > 0
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {n for n in lr_scheduler.__all__ if n not in ("LRScheduler", "_LRScheduler")}
    assert known <= set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's own call
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@rich
def test_schedulers_lead_to_torchs_run(case: Case, name: str, lr: Any) -> None:
    params = parameters(shapes=FEW_SHAPES)
    runs, moved = [], []
    for make in (case.ours, case.torchs):
        opt = make(clones(params), lr=copy.deepcopy(lr))
        scheduler = SCHEDULERS[name](opt)
        rates = []
        for step in range(8):
            train(opt, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = opt.param_groups[0]
            rates.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
        runs.append(opt)
        moved.append(rates)
    assert moved[0] == moved[1]
    assert len({rate for rate, *_ in moved[0]}) > 1
    assert_same_run(*runs, scale=2.0)


# ---- closures, hooks, profiler


@rich
def test_a_closure_runs_with_gradients_and_its_value_is_returned(case: Case) -> None:
    p = Parameter(torch.linspace(0.5, 1, 5))
    opt = case.ours([p])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    expected = (p**2).sum()
    with torch.no_grad():
        returned = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert torch.equal(returned, expected)
    assert not torch.equal(p, before)
    assert opt.step(closure=lambda: 4.5) == 4.5
    assert calls == [True]
    assert opt.step() is None


@rich
def test_an_exception_in_a_closure_leaves_everything_as_it_was(case: Case) -> None:
    opt = case.ours(parameters(shapes=FEW_SHAPES))
    train(opt, [0])
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert torch.is_grad_enabled()
    assert_unchanged(opt, before)


@every_rule
def test_step_hooks_run_around_the_update(rule: str) -> None:
    opt = build(flatstep, rule)
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones(3)
    seen: list[Any] = []

    def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        seen.append(("pre", optimizer is opt, p.detach().clone()))
        return (*args, lambda: "from the hook"), kwargs

    def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(("post", optimizer is opt, p.detach().clone()))

    opt.register_step_pre_hook(pre)
    opt.register_step_post_hook(post)
    everywhere = register_optimizer_step_post_hook(
        lambda *_: seen.append(("everywhere", True, p.detach().clone()))
    )
    try:
        assert opt.step() == "from the hook"
    finally:
        everywhere.remove()
    assert [name for name, mine, _ in seen if mine] == ["pre", "post", "everywhere"]
    assert torch.equal(seen[0][2], torch.ones(3))
    assert torch.equal(seen[1][2], p)
    assert not torch.equal(seen[1][2], torch.ones(3))


@every_rule
def test_hooks_of_a_subclass_with_a_step_of_its_own_run_once(rule: str) -> None:
    class Mine(getattr(flatstep, rule)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            seen.append("mine")
            return super().step(closure)

    seen: list[str] = []
    for cls in (getattr(flatstep, rule), Mine):
        (p,) = parameters(shapes=[(3,)])
        p.grad = torch.ones(3)
        opt = cls([p])
        opt.register_step_pre_hook(lambda *_: seen.append("pre"))
        opt.register_step_post_hook(lambda *_: seen.append("post"))
        before = p.detach().clone()
        opt.step()
        assert not torch.equal(p, before)
    assert seen == ["pre", "post", "pre", "mine", "post"]


@every_rule
def test_without_hooks_the_entry_point_of_torchs_tools_is_called(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Optimizer] = []
    monkeypatch.setattr(Optimizer, "_optimizer_step_code", lambda opt: seen.append(opt))
    opt = build(flatstep, rule)
    opt.step()
    assert seen == [opt]


@every_rule
def test_state_dict_hooks_run(rule: str) -> None:
    opt = build(flatstep, rule)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(f"load {d.pop('extra')}"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state_dict = opt.state_dict()
    assert state_dict["extra"] == 1
    opt.load_state_dict(state_dict)
    assert seen == ["pre", "load 1", "loaded"]


@every_rule
def test_the_profiler_sees_the_range_that_torch_names(rule: str) -> None:
    class Mine(getattr(flatstep, rule)):  # type: ignore[misc]
        pass

    (p,) = parameters(shapes=[(3,)])
    p.grad = torch.ones(3)
    opt, mine = getattr(flatstep, rule)([p]), Mine([p])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
        mine.step()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{rule}.step" in names
    assert f"Optimizer.zero_grad#{rule}.zero_grad" in names
    assert "Optimizer.step#Mine.step" in names


# ---- groups, names, zero_grad


@rich
def test_a_group_may_be_added_mid_training(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        own = clones(params)
        opt = make(own[:2])
        train(opt, range(2))
        opt.add_param_group({"params": own[2:], "lr": 0.05})
        train(opt, range(2, 5))
        runs.append(opt)
    assert_same_run(*runs)
    assert runs[0].param_groups[1]["lr"] == 0.05


@needs_names
@every_rule
def test_named_parameters_are_kept_as_torch_keeps_them(rule: str) -> None:
    model = torch.nn.Linear(3, 2)
    for source in (model.named_parameters(), list(model.named_parameters())):
        opt = getattr(flatstep, rule)(source)
        assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
        assert opt.param_groups[0]["params"] == list(model.parameters())
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        getattr(flatstep, rule)([("a", Parameter(torch.ones(1))), Parameter(torch.ones(1))])


@rich
def test_zero_grad_forgets_or_clears(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    opt = case.ours(params)
    train(opt, range(2))
    gradients = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, gradients, strict=True))
    opt.step()
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@rich
def test_frozen_parameters_stay_where_they_are(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    opt = case.ours(params)
    train(opt, [0])
    params[1].requires_grad_(False)
    params[1].grad = None
    before = params[1].detach().clone()
    for step in range(1, 3):
        for i in (0, 2, 3):
            params[i].grad = gradient(params[i], step, i)
        opt.step()
    assert same_bits(params[1], before)


@rich
def test_parameters_may_be_replaced_in_their_group(case: Case) -> None:
    """accelerate swaps the parameters of FSDP2 models inside `param_groups`."""
    params, others = parameters(shapes=FEW_SHAPES), parameters(shapes=FEW_SHAPES)
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(2))
        opt.param_groups[0]["params"] = clones(others)
        train(opt, range(2))
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_a_parameter_may_get_other_memory(case: Case) -> None:
    """`p.data = ...` between steps, as ZeRO and `.to()` do."""
    params = parameters(shapes=FEW_SHAPES)
    runs, left_behind = [], []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(2))
        for p in opt.param_groups[0]["params"]:
            left_behind.append((p.data, p.data.clone()))
            p.data = p.data.clone()
        train(opt, range(2, 4))
        runs.append(opt)
    assert_same_run(*runs)
    assert all(same_bits(old, before) for old, before in left_behind)


# ---- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@rich
def test_a_copy_goes_on_to_the_same_bits_on_its_own(
    case: Case, copied: Callable[[Optimizer], Optimizer]
) -> None:
    original = case.ours(parameters())
    train(original, range(3))
    twin = copied(original)
    before = snapshot(original)
    train(twin, range(3, 6))
    assert_unchanged(original, before)
    train(original, range(3, 6))
    assert_unchanged(twin, tensors_of(original))
    assert type(twin) is type(original)


def test_a_fused_optimizer_keeps_its_options_through_pickling() -> None:
    opt = build(flatstep, "Adam", fused=True)
    twin = pickle.loads(pickle.dumps(opt))
    assert twin.param_groups[0]["fused"] is True
    assert without_params(twin) == without_params(opt)


# ---- GradScaler

SCALED = ["default", "momentum", "all", "nesterov_all"]


def scaled_steps(
    opt: Optimizer, overflows: list[bool], scale: float, unscale_first: bool = False
) -> Iterator[None]:
    """Train under a GradScaler; yields before each `step` and once after the last."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    params = opt.param_groups[0]["params"]
    for step, overflow in enumerate(overflows):
        opt.zero_grad()
        factors = [gradient(p, step, i) for i, p in enumerate(params)]
        if overflow:
            factors[0].view(-1)[0] = math.inf
        loss = sum((p * g).sum() for p, g in zip(params, factors, strict=True))
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params, 2.0)
        yield
        scaler.step(opt)
        assert not hasattr(opt, "grad_scale")
        assert not hasattr(opt, "found_inf")
        scaler.update()
    yield


GOOD, BAD = False, True


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("scale", [2.0**10, 3.0, 1000.0])
@pytest.mark.parametrize(
    "overflows",
    [[GOOD] * 4, [BAD, GOOD, GOOD], [GOOD, BAD, GOOD, BAD, GOOD], [BAD, BAD, GOOD]],
    ids=["never", "first", "between", "first_two"],
)
@cases(options=SCALED)
def test_a_scaled_run_is_torchs_and_an_overflow_changes_nothing(
    case: Case, overflows: list[bool], scale: float, fused: bool
) -> None:
    if fused and case.rule == "RMSprop":
        pytest.skip("torch's RMSprop has no fused")
    params = parameters(shapes=[(5,), (4, 3), (33,)])
    ours, theirs = (
        case.ours(params, **{"fused": True} if fused else {}),
        case.torchs(clones(params)),
    )
    our_steps = scaled_steps(ours, overflows, scale)
    next(our_steps)
    for overflow in overflows:
        before = snapshot(ours)
        next(our_steps)
        if overflow:
            assert_unchanged(ours, before)
    for _ in scaled_steps(theirs, overflows, scale):
        pass
    assert_same_run(ours, theirs)


@cases(["Adam", "AdamW", "SGD"], SCALED)
def test_gradients_that_are_already_unscaled_are_not_scaled_again(case: Case) -> None:
    params = parameters(shapes=[(5,), (4, 3)])
    ours, theirs = case.ours(params, fused=True), case.torchs(clones(params))
    for opt in (ours, theirs):
        for _ in scaled_steps(opt, [GOOD, BAD, GOOD], 1000.0, unscale_first=True):
            pass
    assert_same_run(ours, theirs)


@every_rule
def test_only_fused_asks_the_scaler_to_leave_the_gradients_to_us(rule: str) -> None:
    assert not getattr(build(flatstep, rule), "_step_supports_amp_scaling", False)
    if rule != "RMSprop":
        assert not getattr(build(flatstep, rule, fused=False), "_step_supports_amp_scaling", False)
        assert build(flatstep, rule, fused=True)._step_supports_amp_scaling is True


# ---- lr = 0, distributed checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_learning_rate_of_zero_changes_no_bit_of_a_parameter(
    case: Case, lr: Any, dtype: torch.dtype
) -> None:
    params = parameters(dtype)
    before = clones(params)
    opt = case.ours(params, lr=lr)
    train(opt, range(3))
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    if case.rule != "SGD":
        assert opt.state[params[0]]["step"].item() == 3


@named_or_not
@rich
def test_distributed_checkpoint_round_trip(case: Case, named: bool) -> None:
    """DCP fills an empty state by a step with zero gradients and lr = 0."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    def build(module: torch.nn.Module) -> Optimizer:
        return case.ours(module.named_parameters() if named else module.parameters())

    opt = build(model)
    train(opt, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    other = copy.deepcopy(model)
    fresh = build(other)
    before = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, fresh, saved)
    assert all(same_bits(p, q) for p, q in zip(other.parameters(), before, strict=True))
    train(opt, range(3, 6))
    train(fresh, range(3, 6))
    assert_unchanged(fresh, tensors_of(opt))


# ---- autograd


@rich
def test_a_backward_through_an_outdated_parameter_is_caught(case: Case) -> None:
    params = parameters(shapes=[(5,), (4, 3)])
    opt = case.ours(params)
    loss = sum((p**2).sum() for p in params)
    give_gradients(params, 0)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@rich
def test_the_version_of_every_tensor_that_a_step_writes_moves(case: Case) -> None:
    idle = Parameter(torch.ones(3))
    opt = case.ours(parameters(shapes=[(5,), (4, 3)]))
    train(opt, range(2))
    written = tensors_of(opt)
    opt.add_param_group({"params": [idle]})
    versions = [t._version for t in written]
    gradients = [(p.grad, p.grad._version) for p in opt.param_groups[0]["params"]]
    idle_version = idle._version
    opt.step()
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    assert all(g._version == v for g, v in gradients)
    assert idle._version == idle_version


@rich
def test_a_step_leaves_parameters_as_leaves(case: Case) -> None:
    params = parameters(shapes=FEW_SHAPES)
    opt = case.ours(params)
    train(opt, range(2))
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)


# ---- all or nothing


REFUSED: dict[str, Callable[[Parameter], None]] = {
    "sparse": lambda p: setattr(p, "grad", torch.ones(p.shape).to_sparse()),
    "overlapping": lambda p: setattr(p, "data", torch.ones(1).expand(p.shape)),
    "resized": lambda p: setattr(p, "data", torch.ones(p.numel() + 1)),
}


@pytest.mark.parametrize("first_step", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("place", [0, 1, 3], ids=["front", "middle", "other_group"])
@pytest.mark.parametrize("fault", REFUSED)
@rich
def test_a_refused_parameter_means_that_none_is_updated(
    case: Case, fault: str, place: int, first_step: bool
) -> None:
    if fault == "sparse" and case.rule == "SGD":
        pytest.skip("SGD takes sparse gradients")
    params = parameters(shapes=[(5,), (4, 3), (6,), (7,), (8,)])
    opt = case.ours([{"params": params[:3]}, {"params": params[3:]}])
    if not first_step:
        train(opt, range(2))
    give_gradients(params, 2)
    REFUSED[fault](params[place])
    before = snapshot(opt)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        opt.step()
    assert_unchanged(opt, before)


@cases(["Adam", "AdamW", "RMSprop"], ["default"])
def test_capturing_a_graph_without_capturable_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def is_capturing(self) -> bool:
            return True

    opt = case.ours(parameters(shapes=FEW_SHAPES))
    train(opt, [0])
    before = snapshot(opt)
    if hasattr(torch, "accelerator"):
        gpu = torch.device("cuda")
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: gpu
        )
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = (
        f"Attempting CUDA graph capture of step() for an instance of {case.rule} "
        "but param_groups' capturable is False."
    )
    with pytest.raises(RuntimeError) as error:
        opt.step()
    assert str(error.value) == message
    assert_unchanged(opt, before)
