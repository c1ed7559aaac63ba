"""A step inside torch.compile's graph is the step outside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Case, cases, clones, parameters, rich, same_bits
from torch.nn import Parameter

import flatstep
from flatstep import _core
from flatstep.optim import compiled

pytestmark = pytest.mark.skipif(not compiled._IS_KNOWN, reason="the graph needs torch 2.13")

counters = torch._dynamo.utils.counters
SHAPES = [(5, 7), (9,), (), (2, 0), (3, 4, 5)]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No code that was made earlier: torch keeps it in a folder that all processes share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled_step(opt: Any, backend: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(opt.step, backend=backend, fullgraph=True, **options)


def set_grads(params: list[Parameter], copies: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param, same in zip(params, copies, strict=True):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = torch.empty_like(param).copy_(grad)
        same.grad = torch.empty_like(same).copy_(grad)


def check_same(opt: Any, other: Any) -> None:
    ours, theirs = opt.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        assert state.keys() == theirs[index].keys()
        for name, tensor in state.items():
            assert same_bits(tensor, theirs[index][name]), (index, name)
    for group, others in zip(opt.param_groups, other.param_groups, strict=True):
        for param, same in zip(group["params"], others["params"], strict=True):
            assert same_bits(param.detach(), same.detach())


def run_both(
    make: Callable[[list[Parameter]], Any],
    params: list[Parameter],
    *,
    steps: int = 4,
    backend: str = "eager",
) -> tuple[Any, Any]:
    copies = clones(params)
    opt, other = make(params), make(copies)
    step = compiled_step(opt, backend)
    for seed in range(steps):
        set_grads(params, copies, seed)
        step()
        other.step()
        check_same(opt, other)
    return opt, other


@cases()
def test_a_step_in_a_graph_has_the_bits_of_one_outside(case: Case) -> None:
    run_both(case.ours, parameters(torch.float32, SHAPES))
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@rich
def test_every_dtype_has_the_same_bits_in_a_graph(case: Case, dtype: torch.dtype) -> None:
    run_both(case.ours, parameters(dtype, SHAPES))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_dtype": torch.bfloat16}),
        (torch.float32, {"ema_decay": 0.9}),
        (torch.float32, {"max_grad_norm": 0.5}),
        (torch.float32, {"max_grad_norm": 0.5, "norm_type": float("inf")}),
        (torch.bfloat16, {"master": "float32", "ema_decay": 0.9, "max_grad_norm": 1.0}),
        (torch.bfloat16, {"master": "split"}),
        (torch.bfloat16, {"rounding": "stochastic", "seed": 2**64 - 3}),
    ],
    ids=str,
)
@rich
def test_options_of_the_one_pass_have_the_same_bits_in_a_graph(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    opt, other = run_both(lambda p: case.ours(p, **options), parameters(dtype, SHAPES))
    if "max_grad_norm" in options:
        assert same_bits(opt.grad_norm, other.grad_norm)


# torch's own compiler still imports what torch.jit has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compilers_keep_the_bits(backend: str) -> None:
    run_both(
        lambda p: flatstep.AdamW(p, amsgrad=True, max_grad_norm=1.0),
        parameters(torch.float32, SHAPES),
        backend=backend,
    )
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_whole_training_step_is_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    other_model = copy.deepcopy(model)
    opt = flatstep.SGD(model.parameters(), momentum=0.9, dampening=0.3)
    other = flatstep.SGD(other_model.parameters(), momentum=0.9, dampening=0.3)

    def train(model: torch.nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    whole = torch.compile(train, backend=backend, fullgraph=True)
    for _ in range(4):
        x = torch.randn(5, 8)
        assert same_bits(whole(model, opt, x), train(other_model, other, x))
    check_same(opt, other)
    assert graphs() == 1
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_changing_learning_rate_is_not_another_graph_each_time(lr: Any) -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    opt = flatstep.Adam(params, lr=copy.copy(lr))
    other = flatstep.Adam(copies, lr=copy.copy(lr))
    step = compiled_step(opt, "aot_eager")
    for seed in range(6):
        set_grads(params, copies, seed)
        for each in (opt, other):
            group = each.param_groups[0]
            if isinstance(lr, float):
                group["lr"] = 0.1 / (seed + 1)
            else:
                group["lr"].fill_(0.1 / (seed + 1))
        step()
        other.step()
    check_same(opt, other)
    assert graphs() <= 2


def test_an_option_that_changes_is_followed() -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    opt, other = flatstep.Adam(params), flatstep.Adam(copies)
    step = compiled_step(opt)
    changes = [{}, {"betas": (0.5, 0.9)}, {"max_grad_norm": 0.1}, {"ema_decay": 0.5}]
    for seed, change in enumerate(changes):
        set_grads(params, copies, seed)
        for each in (opt, other):
            each.param_groups[0].update(change)
        step()
        other.step()
        check_same(opt, other)
    assert graphs() == len(changes)


def test_graphs_that_take_turns_are_made_once() -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    opt, other = (flatstep.SGD(each, momentum=0.9, dampening=0.5) for each in (params, copies))
    step = compiled_step(opt)
    for seed in range(6):
        set_grads(params, copies, seed)
        if seed % 2:
            params[0].grad = copies[0].grad = None
        step()
        other.step()
        check_same(opt, other)
    assert graphs() == 2


def test_strides_and_missing_gradients_are_as_outside() -> None:
    def make() -> list[Parameter]:
        generator = torch.Generator().manual_seed(3)
        image = torch.randn(2, 3, 4, 5, generator=generator)
        return [
            Parameter(torch.randn(6, 8, generator=generator)),
            Parameter(torch.randn(4, 3, generator=generator).t()),
            Parameter(image.to(memory_format=torch.channels_last)),
            Parameter(torch.randn(3, generator=generator)),
        ]

    params, copies = make(), make()
    opt, other = flatstep.Adam(params), flatstep.Adam(copies)
    step = compiled_step(opt)
    for seed in range(4):
        set_grads(params, copies, seed)
        for each in (params, copies):
            each[2].grad = each[2].grad.contiguous()  # another order than the parameter's
            if seed < 2:
                each[3].grad = None
        step()
        other.step()
        check_same(opt, other)
    assert graphs() == 2


def test_groups_have_their_own_options() -> None:
    def make(params: list[Parameter]) -> Any:
        groups = [{"params": params[:2], "lr": 0.1, "maximize": True}, {"params": params[2:]}]
        return flatstep.SGD(groups, momentum=0.9, max_grad_norm=0.1)

    run_both(make, parameters(torch.float32, SHAPES))


def test_steps_in_and_outside_a_graph_take_turns() -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    opt = flatstep.SGD(params, momentum=0.9, dampening=0.5)
    other = flatstep.SGD(copies, momentum=0.9, dampening=0.5)
    step = compiled_step(opt)
    start = copy.deepcopy(opt.state_dict())
    for seed, here in enumerate([opt.step, step, step, opt.step, None, step, step]):
        set_grads(params, copies, seed)
        if here is None:  # the first step comes once more
            opt.load_state_dict(copy.deepcopy(start))
            other.load_state_dict(copy.deepcopy(start))
            continue
        here()
        other.step()
        check_same(opt, other)


def test_a_written_parameter_is_followed_by_its_master() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    copies = clones(params)
    opt, other = flatstep.Adam(params, master="float32"), flatstep.Adam(copies, master="float32")
    step = compiled_step(opt)
    for seed in range(3):
        set_grads(params, copies, seed)
        with torch.no_grad():
            for param in params + copies:
                param.add_(1)
        step()
        other.step()
        check_same(opt, other)


def test_hooks_and_a_closure_run_in_a_graph() -> None:
    params = parameters(torch.float32, SHAPES)
    opt = flatstep.Adam(params)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    set_grads(params, clones(params), 0)
    before = params[0].detach().clone()
    loss = compiled_step(opt)(lambda: torch.ones(()))
    assert float(loss) == 1
    assert seen == ["before", "after"]
    assert not torch.equal(before, params[0])


@pytest.mark.parametrize(
    ("rule", "options", "why"),
    [
        ("Adam", {"skip_nonfinite": True}, "skip_nonfinite"),
        ("RMSprop", {"error_if_nonfinite": True}, "error_if_nonfinite"),
        ("SGD", {"weight_decay": torch.tensor(0.1)}, "weight_decay"),
    ],
)
def test_what_no_graph_can_have_breaks_it_and_steps_outside(
    rule: str, options: dict[str, Any], why: str
) -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    opt, other = (getattr(flatstep, rule)(each, **options) for each in (params, copies))
    step = torch.compile(opt.step, backend="eager")
    for seed in range(3):
        set_grads(params, copies, seed)
        step()
        other.step()
    check_same(opt, other)
    assert counters["graph_break"]
    set_grads(params, copies, 3)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
        compiled_step(opt)()


def test_parameters_that_share_memory_break_the_graph() -> None:
    memory = torch.randn(8)
    opt = flatstep.Adam([Parameter(memory), Parameter(memory)])
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="shares memory"):
        compiled_step(opt)()


def test_a_flat_buffers_parameters_are_updated_outside_the_graph() -> None:
    params = parameters(torch.float32, SHAPES)
    copies = clones(params)
    flatstep.FlatBuffer(params)
    opt, other = flatstep.Adam(params), flatstep.Adam(copies)
    step = torch.compile(opt.step, backend="eager")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for param, same in zip(params, copies, strict=True):
            grad = torch.randn(param.shape, generator=generator)
            param.grad.copy_(grad)
            same.grad = grad
        step()
        other.step()
    check_same(opt, other)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="FlatBuffer"):
        compiled_step(opt)()


def test_a_graph_made_without_a_scaler_is_not_used_with_one() -> None:
    params = parameters(shapes=SHAPES)
    copies = clones(params)
    opt, other = (flatstep.AdamW(of, fused=True) for of in (params, copies))
    step = torch.compile(opt.step, backend="eager")
    for seed, overflow in enumerate([None, None, 0.0, 1.0, None]):
        set_grads(params, copies, seed)
        for each in (opt, other):
            if overflow is not None:
                each.grad_scale, each.found_inf = torch.tensor(4.0), torch.tensor(overflow)
        step()
        other.step()
        for each in (opt, other):
            if overflow is not None:
                del each.grad_scale, each.found_inf
        check_same(opt, other)


def test_what_a_graph_writes_is_a_view_of_nothing() -> None:
    # The compiler would copy all of a storage for each view into it.
    params = parameters(torch.float32, SHAPES)
    opt = flatstep.Adam(params, ema_decay=0.9)
    set_grads(params, clones(params), 0)
    opt.step()
    compiled_step(opt)()
    for state in opt.state.values():
        for tensor in state.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_autograd_sees_that_a_graph_has_written() -> None:
    param = Parameter(torch.ones(3))
    opt = flatstep.SGD([param])
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    compiled_step(opt, "aot_eager")()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_operations_declare_what_they_write() -> None:
    params, grads = [torch.randn(3, 4)], [torch.randn(3, 4)]
    states = [torch.zeros(3, 4), torch.zeros(3, 4)]
    numbers = [float("nan"), 0.9, 0.999, 1e-8, 0.0]  # the first is the tensor
    tensors = (params, grads, states, [torch.zeros(())], [], [torch.tensor(0.1)])
    torch.library.opcheck(
        torch.ops.flatstep.update_.default,
        (*tensors, "adam", 0, numbers),
    )
    torch.library.opcheck(torch.ops.flatstep.norm.default, (params, grads, 2.0))


def make_arguments() -> dict[str, Any]:
    """Of an update of two parameters."""
    lists = {name: [torch.ones(3, 4), torch.ones(2, 4)] for name in ("params", "grads")}
    return {
        "rule": "adam",
        "flags": 0,
        **lists,
        "states": [torch.zeros_like(param) for param in lists["params"] for _ in range(2)],
        "steps": [torch.zeros(()), torch.zeros(())],
        "fresh": [],
        "hyper": [0.1, 0.9, 0.999, 1e-8, 0.0],
        "scale": 1.0,
        "threads": 1,
        "average_decay": 0.0,
        "seed": 0,
        "firsts": [],
    }


@pytest.mark.parametrize(
    ("name", "place", "value", "why"),
    [
        ("params", 1, torch.ones(4, 4)[::2], "gaps"),
        ("params", 1, torch.ones(2, 4, dtype=torch.int64), "cannot be read"),
        ("params", 1, torch.ones(2, 4, device="meta"), "cannot be read"),
        ("params", 1, None, "cannot be read"),
        ("grads", 1, torch.ones(2, 5), "unlike"),
        ("grads", 1, torch.ones(2), "unlike"),
        ("states", 3, torch.ones(2, 4, dtype=torch.bfloat16), "wrong type"),
        ("steps", 1, torch.ones(2), "one element"),
        ("steps", 1, torch.tensor(-1.0), "count from 0"),
        ("states", slice(0, 1), [], "differ in length"),
        ("states", slice(1, 3), [], "too few"),
        ("states", slice(0, 0), [torch.ones(3, 4), torch.ones(3, 4)], "too many"),
        ("hyper", slice(0, 1), [], "hyper"),
    ],
)
def test_an_update_that_is_refused_changes_nothing(
    name: str, place: Any, value: Any, why: str
) -> None:
    arguments = make_arguments()
    arguments[name][place] = value
    with pytest.raises(ValueError, match=why):
        _core.update_group(**arguments)
    assert same_bits(arguments["params"][0], torch.ones(3, 4))
    assert float(arguments["steps"][0]) == 0


def test_what_lies_in_another_order_than_its_parameter_is_left_to_the_caller() -> None:
    arguments = make_arguments()
    for name, place in (("grads", 1), ("states", 3)):
        turned = {**arguments, name: list(arguments[name])}
        turned[name][place] = torch.ones(4, 2).t()
        assert not _core.update_group(**turned)
    assert same_bits(arguments["params"][0], torch.ones(3, 4))
    assert _core.update_group(**arguments)
    assert not torch.equal(arguments["params"][0], torch.ones(3, 4))


def test_a_state_in_another_order_is_updated_as_it_lies() -> None:
    results = []
    for turns in (False, True):
        param, grad = torch.ones(3, 4), torch.arange(12.0).view(3, 4)
        states = [torch.arange(12.0).view(3, 4), torch.ones(3, 4)]
        if turns:
            states[0] = states[0].t().contiguous().t()
        torch.ops.flatstep.update_(
            [param], [grad], states, [torch.ones(())], [], [], "adam", 0, [0.1, 0.9, 0.9, 1e-8, 0.0]
        )
        results.append([param, *states])
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(*results, strict=True))
