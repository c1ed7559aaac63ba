"""Wrong input gets torch's words, or an error that names the parameter; nothing is updated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CASES, Case, assert_unchanged, give_gradients, rich, snapshot, train
from torch import Tensor
from torch.nn import Parameter
from torch_versions import named_or_not

import flatstep
from flatstep import _core

RULES = list(CASES)
ADAMS = ("Adam", "AdamW")
NAN = float("nan")
T = torch.tensor
Refusal = tuple[tuple[str, ...], type[Exception], str, dict[str, Any]]

#: (rules, error, message word for word, options)
REFUSALS: list[Refusal] = [
    (tuple(RULES), ValueError, "Invalid learning rate: -0.1", {"lr": -0.1}),
    (tuple(RULES), ValueError, "Invalid learning rate: nan", {"lr": NAN}),
    (tuple(RULES), ValueError, f"Invalid learning rate: {T(-0.1)}", {"lr": T(-0.1)}),
    (tuple(RULES), ValueError, f"Invalid learning rate: {T(NAN)}", {"lr": T(NAN)}),
    (tuple(RULES), ValueError, "Tensor lr must be 1-element", {"lr": T([0.1, 0.2])}),
    (tuple(RULES), ValueError, "Invalid weight_decay value: -1", {"weight_decay": -1}),
    (tuple(RULES), ValueError, "Invalid weight_decay value: nan", {"weight_decay": NAN}),
    ((*ADAMS, "RMSprop"), ValueError, "Invalid epsilon value: -1e-08", {"eps": -1e-8}),
    ((*ADAMS, "RMSprop"), ValueError, "Invalid epsilon value: nan", {"eps": NAN}),
    (ADAMS, ValueError, "Invalid beta parameter at index 0: 1.0", {"betas": (1.0, 0.9)}),
    (ADAMS, ValueError, "Invalid beta parameter at index 0: -0.1", {"betas": (-0.1, 0.9)}),
    (ADAMS, ValueError, "Invalid beta parameter at index 0: nan", {"betas": (NAN, 0.9)}),
    (ADAMS, ValueError, "Invalid beta parameter at index 1: 1.5", {"betas": (0.9, 1.5)}),
    (ADAMS, ValueError, "Invalid beta parameter at index 1: nan", {"betas": (0.9, NAN)}),
    (
        ADAMS,
        ValueError,
        "betas must be either both floats or both Tensors",
        {"betas": (0.9, T(0.999))},
    ),
    (
        ADAMS,
        ValueError,
        "lr as a Tensor is not supported for capturable=False and foreach=True",
        {"lr": T(0.1), "foreach": True},
    ),
    (
        ADAMS,
        ValueError,
        "betas[0] as a Tensor is not supported for capturable=False and foreach=True",
        {"betas": (T(0.9), T(0.999)), "foreach": True},
    ),
    (("RMSprop", "SGD"), ValueError, "Invalid momentum value: -0.5", {"momentum": -0.5}),
    (("RMSprop", "SGD"), ValueError, "Invalid momentum value: nan", {"momentum": NAN}),
    (("RMSprop",), ValueError, "Invalid alpha value: -0.5", {"alpha": -0.5}),
    (("RMSprop",), ValueError, "Invalid alpha value: nan", {"alpha": NAN}),
    (
        ("SGD",),
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
        {"nesterov": True},
    ),
    (
        ("SGD",),
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ),
    (
        (*ADAMS, "SGD"),
        RuntimeError,
        "`fused` does not support `differentiable`",
        {"fused": True, "differentiable": True},
    ),
    (
        (*ADAMS, "SGD"),
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together.",
        {"fused": True, "foreach": True},
    ),
]


@pytest.mark.parametrize(
    ("rule", "error", "message", "options"),
    [(rule, e, m, o) for rules, e, m, o in REFUSALS for rule in rules],
    ids=lambda x: str(x) if isinstance(x, (str, dict)) else "",
)
def test_a_bad_option_is_refused_in_torchs_words(
    rule: str, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error) as refusal:
        getattr(flatstep, rule)([Parameter(torch.ones(3))], **options)
    assert str(refusal.value) == message


@pytest.mark.parametrize("rule", ADAMS)
def test_tensor_betas_have_one_element(rule: str) -> None:
    """In torch this message cannot be reached: the comparison before it raises."""
    with pytest.raises(ValueError, match=r"^Tensor betas\[0\] must be 1-element$"):
        getattr(flatstep, rule)([Parameter(torch.ones(3))], betas=(T([0.9, 0.9]), T(0.999)))


NUMBERS = {
    "Adam": {"lr": NAN, "betas": (0.9, NAN), "eps": NAN, "weight_decay": NAN},
    "AdamW": {"lr": NAN, "betas": (NAN, 0.9), "eps": NAN, "weight_decay": NAN},
    "RMSprop": {"lr": NAN, "alpha": NAN, "eps": NAN, "weight_decay": NAN, "momentum": NAN},
    "SGD": {"lr": NAN, "momentum": NAN, "dampening": NAN, "weight_decay": NAN},
}
each_number = pytest.mark.parametrize(
    ("rule", "option"),
    [(rule, {k: v}) for rule in RULES for k, v in NUMBERS[rule].items()],
    ids=str,
)


@each_number
def test_nan_is_refused_in_the_constructor(rule: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nan"):
        getattr(flatstep, rule)([Parameter(torch.ones(3))], **option)


@each_number
def test_nan_is_refused_in_a_group(rule: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nan"):
        getattr(flatstep, rule)([{"params": [Parameter(torch.ones(3))], **option}])


@each_number
def test_nan_is_refused_in_an_added_group(rule: str, option: dict[str, Any]) -> None:
    opt = getattr(flatstep, rule)([Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="nan"):
        opt.add_param_group({"params": [Parameter(torch.ones(3))], **option})
    assert len(opt.param_groups) == 1


GENERIC: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "nothing": (ValueError, "optimizer got an empty parameter list", list),
    "a_tensor": (
        TypeError,
        "params argument given to the optimizer should be an iterable of Tensors or dicts",
        lambda: torch.ones(3),
    ),
    "a_number": (TypeError, "optimizer can only optimize Tensors", lambda: [3.0]),
    "a_set": (
        TypeError,
        "optimizer parameters need to be organized in ordered collections",
        lambda: [{"params": {Parameter(torch.ones(3))}}],
    ),
    "a_result": (
        ValueError,
        "can't optimize a non-leaf Tensor",
        lambda: [Parameter(torch.ones(3)) * 2],
    ),
    "twice": (
        ValueError,
        "some parameters appear in more than one parameter group",
        lambda: [{"params": [p]} for p in [Parameter(torch.ones(3))] * 2],
    ),
}


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("rule", RULES)
def test_bad_parameters_are_refused_in_torchs_words(rule: str, name: str) -> None:
    error, message, params = GENERIC[name]
    with pytest.raises(error, match=re.escape(message)):
        getattr(flatstep, rule)(params())


SPARSE = {
    "Adam": "Adam does not support sparse gradients, please consider SparseAdam instead",
    "AdamW": "Adam does not support sparse gradients, please consider SparseAdam instead",
    "RMSprop": "RMSprop does not support sparse gradients",
}


@pytest.mark.parametrize("rule", SPARSE)
def test_sparse_gradients_are_refused_in_torchs_words(rule: str) -> None:
    p = Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse()
    opt = getattr(flatstep, rule)([p])
    with pytest.raises(RuntimeError) as refusal:
        opt.step()
    assert str(refusal.value) == SPARSE[rule]
    assert (p == 1).all()


@pytest.mark.parametrize("rule", ADAMS)
def test_a_tensor_learning_rate_arriving_later_with_foreach_is_refused(rule: str) -> None:
    opt = getattr(flatstep, rule)([Parameter(torch.ones(3))], foreach=True)
    opt.param_groups[0]["lr"] = T(0.1)
    give_gradients(opt.param_groups[0]["params"], 0)
    with pytest.raises(RuntimeError) as refusal:
        opt.step()
    expected = "lr as a Tensor is not supported for capturable=False and foreach=True"
    assert str(refusal.value) == expected


# ---- errors that name the parameter


def _overlapping(opt: torch.optim.Optimizer, p: Parameter) -> None:
    p.data = torch.ones(1).expand(p.shape)


def _partly_overlapping(opt: torch.optim.Optimizer, p: Parameter) -> None:
    p.data = torch.ones(20).as_strided(p.shape, (1, 1))


def _resized(opt: torch.optim.Optimizer, p: Parameter) -> None:
    p.data = torch.ones(7, 5)


def _integer(opt: torch.optim.Optimizer, p: Parameter) -> None:
    p.requires_grad_(False)
    p.grad = None
    p.data = torch.ones(p.shape, dtype=torch.int64)
    p.grad = torch.ones(p.shape, dtype=torch.int64)


def _state(
    change: Callable[[Tensor], Tensor],
) -> Callable[[torch.optim.Optimizer, Parameter], None]:
    def damage(opt: torch.optim.Optimizer, p: Parameter) -> None:
        key = next(k for k in opt.state[p] if k != "step")
        opt.state[p][key] = change(opt.state[p][key])

    return damage


DAMAGES: dict[str, Callable[[torch.optim.Optimizer, Parameter], None]] = {
    "overlapping": _overlapping,
    "partly_overlapping": _partly_overlapping,
    "resized": _resized,
    "integer": _integer,
    "short_state": _state(lambda s: torch.ones(2, 3)),
    "long_state": _state(lambda s: torch.ones(4, 4)),
    "meta_state": _state(lambda s: s.to("meta")),
    "no_tensor_state": _state(lambda s: 3.0),
}


@named_or_not
@pytest.mark.parametrize("damage", DAMAGES)
@rich
def test_an_unusable_tensor_is_named_and_nothing_is_updated(
    case: Case, damage: str, named: bool
) -> None:
    params = [Parameter(torch.rand(3, 4)) for _ in range(6)]
    given: list[Any] = [(f"layer{i}.weight", p) for i, p in enumerate(params)] if named else params
    opt = case.ours([{"params": given[:2]}, {"params": given[2:]}])
    train(opt, range(2))
    DAMAGES[damage](opt, params[5])
    before = snapshot(opt) if damage != "meta_state" else None
    kept = [p.detach().clone() for p in params[:5]]
    with pytest.raises((TypeError, ValueError)) as refusal:
        opt.step()
    message = str(refusal.value)
    pattern = r"\blayer5\.weight\b" if named else r"group 1\D+3\b|\b3 of group 1\b"
    assert re.search(pattern, message), message
    assert all(torch.equal(p, q) for p, q in zip(params[:5], kept, strict=True))
    if before is not None:
        assert_unchanged(opt, before)


@named_or_not
@rich
def test_a_checkpoint_of_another_shape_is_refused_at_the_latest_by_the_step(
    case: Case, named: bool
) -> None:
    other = case.torchs([Parameter(torch.rand(2, 2)), Parameter(torch.rand(3))])
    train(other, range(2))
    params = [Parameter(torch.rand(2, 2)), Parameter(torch.rand(3000))]
    kept = [p.detach().clone() for p in params]
    given: list[Any] = [("first", params[0]), ("second", params[1])] if named else params
    opt = case.ours(given)
    give_gradients(params, 0)

    def load_and_step() -> None:
        opt.load_state_dict(other.state_dict())
        opt.step()

    with pytest.raises((TypeError, ValueError), match="second" if named else "1 of group 0"):
        load_and_step()
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))


# ---- a first step that fails: SGD's is unlike the others, its buffer becomes the gradient itself


class Interrupted:
    """A plan whose update is interrupted: just before it begins, or just after it ended."""

    def __init__(self, plan: Any, when: str) -> None:
        self.plan, self.when = plan, when

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def step(self, *arguments: Any) -> None:
        if self.when == "after":
            self.plan.step(*arguments)
        raise KeyboardInterrupt


def first_step(**more: Any) -> flatstep.SGD:
    torch.manual_seed(1)
    params = [Parameter(torch.randn(33, 3).bfloat16()), Parameter(torch.randn(7).bfloat16())]
    give_gradients(params, 0)
    return flatstep.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **more)


def interrupt(opt: flatstep.SGD, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            type(opt), "_make_plan", staticmethod(lambda r: Interrupted(_core.Plan(r), when))
        )
        with pytest.raises(KeyboardInterrupt):
            opt.step()


def no_number(opt: flatstep.SGD, _: pytest.MonkeyPatch) -> None:
    opt.param_groups[0]["lr"] = "much"
    with pytest.raises(ValueError, match="much"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1


def interrupted(opt: flatstep.SGD, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(opt, "before", monkeypatch)


def without_version(opt: flatstep.SGD, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("flatstep.optim.updating.increment_version", fail)
        with pytest.raises(MemoryError):
            opt.step()


FAILURES: dict[str, Callable[[flatstep.SGD, pytest.MonkeyPatch], None]] = {
    "a hyper-parameter that is no number": no_number,
    "an interrupt": interrupted,
    "no memory": without_version,
}


def go_on(opt: torch.optim.Optimizer) -> None:
    """Two steps; with weight decay, so that the first makes its table anew."""
    opt.param_groups[0]["weight_decay"] = 0.1
    for _ in range(2):
        opt.step()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_first_step_that_failed_is_still_the_first(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, expected = first_step(), first_step()
    before = snapshot(opt)
    FAILURES[failure](opt, monkeypatch)
    assert not opt.state
    assert_unchanged(opt, before)
    go_on(opt)
    go_on(expected)
    assert_unchanged(opt, snapshot(expected))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_first_step_leaves_the_states_that_were_there(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as masters that were loaded before it, which alone make no step a second one."""
    opt, expected = first_step(master="float32"), first_step(master="float32")
    for each in (opt, expected):
        each.load_master_parameters([m.clone() for m in each.master_parameters()])
    before = {param: dict(state) for param, state in opt.state.items()}
    FAILURES[failure](opt, monkeypatch)
    for param, state in opt.state.items():
        assert list(state) == ["master"]
        assert state["master"] is before[param]["master"]
    go_on(opt)
    go_on(expected)
    assert_unchanged(opt, snapshot(expected))


def test_loaded_states_are_still_to_be_gathered_after_a_failed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt, loaded = first_step(), first_step()
    go_on(loaded)
    opt.load_state_dict(loaded.state_dict())
    apart = [state["momentum_buffer"] for state in opt.state.values()]
    interrupt(opt, "before", monkeypatch)
    assert all(
        state["momentum_buffer"] is buffer
        for state, buffer in zip(opt.state.values(), apart, strict=True)
    )
    opt.step()
    storages = {s["momentum_buffer"].untyped_storage().data_ptr() for s in opt.state.values()}
    assert len(storages) == 1


def test_a_first_step_that_was_interrupted_once_it_was_made_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt, expected = first_step(), first_step()
    interrupt(opt, "after", monkeypatch)
    expected.step()
    assert_unchanged(opt, snapshot(expected))
    go_on(opt)
    go_on(expected)
    assert_unchanged(opt, snapshot(expected))
