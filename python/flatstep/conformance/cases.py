"""The cases. A new one is a function here; the command, the tests and the list find it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flatstep.conformance.lab import GUARD, USUAL, IgnoredError, Lab, RaisedError, Run
from flatstep.conformance.lab import same_bits as same
from flatstep.conformance.registry import FLOATS, case

NUMBERS, MEMORY, GRADIENTS = "numbers", "memory", "gradients and groups"
OPTIONS, SCALER, CHECKPOINTS = "options", "GradScaler", "checkpoints"
REPETITION = "repetition"

VECTOR_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 69, 1001, 4097)
MANY = 70_003  # elements: enough for three threads, and odd
STEPS = 3


def _train(run: Run, steps: int = STEPS) -> None:
    for _ in range(steps):
        run.step()


# ---- numbers


@case(
    NUMBERS,
    "every size around the widths of vectors",
    "Look at the arithmetic, at the count of steps, and at what is left over after whole vectors.",
    sizes=VECTOR_SIZES,
    dtypes=FLOATS,
)
def sizes(lab: Lab) -> None:
    _train(lab.run([lab.param()]))


@case(
    NUMBERS,
    "thirty steps in a row",
    "Look at the bias corrections, and at what the states are rounded to between steps.",
    dtypes=("float32", "float64"),
)
def thirty_steps(lab: Lab) -> None:
    # Slowly, so that no parameter crosses zero.
    _train(lab.run([lab.param()], lr=lab.options({})["lr"] / 16), 30)


@case(
    NUMBERS,
    "equal elements stay equal, in the body of a loop and in its tail",
    "The tail after whole vectors rounds otherwise: use the body's operations with fewer lanes.",
    sizes=(2, 9, 17, 33, 69),
    dtypes=FLOATS,
)
def tail(lab: Lab) -> None:
    values, generator = lab.values(8), torch.Generator().manual_seed(0)
    params = [Parameter(torch.full((lab.size,), float(x), dtype=lab.dtype)) for x in values]
    run = lab.run(params)
    for _ in range(10):
        sizes = torch.randn(len(params), generator=generator)
        run.step([torch.full_like(p, float(g)) for p, g in zip(params, sizes, strict=True)])
        for param in params:
            unlike = (param != param[0]).nonzero()
            if len(unlike):
                run.fail(
                    "elements that were equal, with equal gradients, are no longer",
                    param,
                    at=int(unlike[0]),
                    expected=param[:1].detach().expand(lab.size),
                    count=len(unlike),
                )


@case(
    NUMBERS,
    "NaN and infinity stay in the elements whose gradient they are",
    "Something is shared by all elements: a norm, a check, or an operation over neighbours.",
    sizes=(3, 9, 33),
    dtypes=FLOATS,
)
def not_finite(lab: Lab) -> None:
    run = lab.run([lab.param(), lab.param(index=1)])
    grads = [lab.gradient(p, 0) for p in run.params]
    grads[0][0], grads[0][-1] = math.nan, math.inf
    run.step(grads)
    run.step()


@case(
    NUMBERS,
    "lr = 0 leaves every bit of the parameters, and moves the states",
    "Distributed checkpointing steps with lr = 0 to make states, and expects nothing to move.",
    dtypes=FLOATS,
)
def zero_lr(lab: Lab) -> None:
    run = lab.run([lab.param()], lr=0.0)
    before = run.params[0].detach().clone()
    run.step(check=False)
    if not same(run.params[0], before):
        at = int((run.params[0] != before).nonzero()[0])
        run.fail("a step with lr = 0 changed a parameter", run.params[0], at=at, expected=before)
    run.set(lr=lab.options({})["lr"])
    _train(run)


@case(
    NUMBERS,
    "rows without gradients stay right, until their states are subnormal and beyond",
    "Look for 0 / 0, and for states that leave the range of normal numbers.",
    sizes=(2, 5),
    dtypes=("float32", "bfloat16"),
)
def frozen_rows(lab: Lab) -> None:
    memory: dict[str, Any] = {"betas": (0.5, 0.5), "alpha": 0.5, "momentum": 0.5}
    short = {name: memory[name] for name in USUAL[lab.rule] if name in memory}
    run = lab.run([lab.param(lab.size, 3)], **short)
    grad = lab.gradient(run.params[0], 0)
    grad[0] = 0
    run.step([grad])
    for _ in range(160):
        run.step([torch.zeros_like(grad)])


# ---- memory


@case(
    MEMORY,
    "a slice of a wider array, with guards on both sides",
    "The kernel takes the view for contiguous: honour its strides, or refuse it.",
    dtypes=("float32", "bfloat16"),
    refusal=("contiguous", "stride", "layout"),
)
def sliced(lab: Lab) -> None:
    storage = torch.full((lab.size + 4, 9), GUARD, dtype=lab.dtype)
    view = storage[2:-2, 3:6]
    view.copy_(lab.values(*view.shape))
    run = lab.run([Parameter(view)])
    run.guard(storage, view)
    _train(run)


@case(
    MEMORY,
    "a contiguous view that is not aligned, with guards on both sides",
    "Loads and stores must not assume an aligned address, nor reach beyond the last element.",
    sizes=(1, 3, 7, 17, 69),
    dtypes=FLOATS,
    refusal=("align",),
)
def misaligned(lab: Lab) -> None:
    for offset in (1, 3, 5):
        storage = torch.full((lab.size + 24,), GUARD, dtype=lab.dtype)
        view = storage[offset : offset + lab.size]
        view.copy_(lab.values(lab.size))
        run = lab.run([Parameter(view)])
        run.guard(storage, view)
        _train(run)


@case(
    MEMORY,
    "two parameters whose elements alternate in one array",
    "An update of a contiguous copy must be written back to the view alone.",
    dtypes=("float32", "bfloat16"),
    refusal=("contiguous", "stride", "layout"),
)
def interleaved(lab: Lab) -> None:
    storage = lab.values(lab.size, 2)
    _train(lab.run([Parameter(storage[:, 0]), Parameter(storage[:, 1])]))


@case(
    MEMORY,
    "a transposed parameter with a gradient of the same strides",
    "Walk over memory in one order for parameter, gradient and states.",
    sizes=(1, 2, 5, 16),
    dtypes=("float32", "bfloat16"),
    refusal=("contiguous", "stride", "layout"),
)
def transposed(lab: Lab) -> None:
    run = lab.run([Parameter(lab.values(3, lab.size).t())])
    for step in range(STEPS):
        run.step([lab.gradient(run.params[0].t(), step).t()])


@case(
    MEMORY,
    "a gradient with other strides than its parameter",
    "Elements are paired by their place in memory: pair them by their index.",
    sizes=(1, 2, 5, 16),
    dtypes=("float32", "bfloat16"),
    refusal=("contiguous", "stride", "layout"),
)
def other_strides(lab: Lab) -> None:
    run = lab.run([lab.param(3, lab.size)])
    for step in range(STEPS):
        run.step([lab.gradient(run.params[0], step).t().contiguous().t()])


@case(
    MEMORY,
    "a channels_last parameter",
    "Walk over memory in one order for parameter, gradient and states.",
    sizes=(2, 3, 5),
    refusal=("contiguous", "stride", "layout", "format"),
)
def channels_last(lab: Lab) -> None:
    values = lab.values(2, 3, lab.size, 4).to(memory_format=torch.channels_last)
    run = lab.run([Parameter(values)])
    for step in range(STEPS):
        grad = lab.gradient(run.params[0], step)
        run.step([grad.to(memory_format=torch.channels_last) if step else grad])


@case(
    MEMORY,
    "an expanded gradient, whose elements share memory",
    "A gradient's stride may be 0: read it by its strides, and do not write to it.",
    refusal=("contiguous", "stride", "expand"),
)
def expanded_gradient(lab: Lab) -> None:
    run = lab.run([lab.param(lab.size, 3)])
    for step in range(STEPS):
        run.step([lab.gradient(run.params[0], step)[:, :1].expand(lab.size, 3)])


@case(
    MEMORY,
    "the gradient is only read",
    "Work on a copy, or fold the change into the update: others read the gradient after a step.",
    dtypes=("float32", "bfloat16"),
)
def gradient_is_kept(lab: Lab) -> None:
    run = lab.run([lab.param()])
    for step in range(STEPS):
        grad = lab.gradient(run.params[0], step)
        before = grad.clone()
        run.step([grad], check=False)
        if not same(grad, before):
            at = int((grad != before).nonzero()[0])
            run.fail("a step changed the gradient", grad, at=at, expected=before)


@case(
    MEMORY,
    "empty and 0-dim parameters beside others",
    "An empty tensor has no address: leave it out, and do not index a 0-dim one.",
    dtypes=FLOATS,
)
def empty(lab: Lab) -> None:
    shapes: list[tuple[int, ...]] = [(0,), (lab.size,), (2, 0, 3), (), (1,)]
    _train(lab.run([Parameter(lab.values(*shape, index=i)) for i, shape in enumerate(shapes)]))


# ---- gradients and groups


@case(
    GRADIENTS,
    "a parameter whose first gradient comes late",
    "Make a state at the first step in which its parameter has a gradient, and count from there.",
)
def late(lab: Lab) -> None:
    run = lab.run([lab.param(), lab.param(index=1)])
    for step in range(5):
        first, second = (lab.gradient(p, step, i) for i, p in enumerate(run.params))
        run.step([first, second if step >= 2 else None])


@case(
    GRADIENTS,
    "a parameter without a gradient now and then",
    "Without a gradient, a parameter, its states and its count stay: no decay either.",
)
def absent(lab: Lab) -> None:
    run = lab.run([lab.param(), lab.param(index=1)])
    for step in range(6):
        first, second = (lab.gradient(p, step, i) for i, p in enumerate(run.params))
        run.step([first, None if step in (1, 2, 4) else second])


@case(
    GRADIENTS,
    "groups with a learning rate and a decay of their own",
    "Read the options from each group at each step, not from the defaults.",
)
def groups(lab: Lab) -> None:
    has_decay = lab.subject.accepts("weight_decay")
    own: list[dict[str, Any]] = [{"lr": 0.1}, {"weight_decay": 0.2} if has_decay else {}]
    params = [lab.param(index=i) for i in range(3)]
    _train(lab.run_groups([(params[:1], own[0]), (params[1:], own[1])]))


@case(
    GRADIENTS,
    "a group that is added after two steps",
    "Counts belong to parameters, not to the optimizer.",
)
def added_group(lab: Lab) -> None:
    run = lab.run([lab.param()])
    _train(run, 2)
    new = lab.param(index=1)
    with run.doing("add_param_group()"):
        run.optimizer.add_param_group({"params": [new], "lr": 0.1})
    run.add([new], {**run.options[0], "lr": 0.1})
    _train(run)


@case(
    GRADIENTS,
    "parameters of several dtypes in one group",
    "Take the dtypes one after the other, or refuse the mixture by name.",
    refusal=("dtype", "type", "float"),
)
def mixed_dtypes(lab: Lab) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    _train(lab.run([lab.param(index=i, dtype=dtype) for i, dtype in enumerate(dtypes)]))


@case(
    GRADIENTS,
    "a closure is called with gradients on, and its value returned",
    "Call it under torch.enable_grad() before the update, and return what it returns.",
    sizes=(1, 5),
)
def closure(lab: Lab) -> None:
    run = lab.run([lab.param()])
    factor = lab.gradient(run.params[0], 0)

    def loss() -> float:
        run.params[0].grad = None
        (run.params[0] * factor).sum().backward()
        return 0.25

    run.advance([factor])
    with run.doing("step(closure)"):
        returned: Any = run.optimizer.step(loss)
    run.check()
    if returned != 0.25:
        run.fail(f"step(closure) returned {returned!r}, not what the closure returned")


# ---- options


def _hold_option(lab: Lab, value: dict[str, Any], beside: dict[str, Any]) -> None:
    """Holds a run with an option against the rule, and against a run without the option."""
    run, without = lab.run([lab.param()], **beside, **value), lab.run([lab.param()], **beside)
    (param,), (other,) = run.params, without.params
    for step in range(4):
        grad = lab.gradient(param, step) / 4**step
        without.step([grad.clone()], check=False)
        run.step([grad], check=False)
    if run.truths[0].distance(param).wrong and same(param, other):
        text = ", ".join(f"{name}={setting}" for name, setting in value.items())
        run.fail(f"'{text}' is taken, and changes nothing", param, kind=IgnoredError)
    run.check()


def _option(
    option: str,
    value: Any,
    rules: Sequence[str],
    beside: dict[str, Any] | None = None,
    refusal: tuple[str, ...] = (),
) -> None:
    @case(
        OPTIONS,
        f"{option}={value} changes the result as the rule says",
        f"Use '{option}' of the group in the update, or refuse it by name.",
        name=f"option-{option.replace('_', '-')}",
        sizes=(5,),
        rules=tuple(rules),
        refusal=(option, option.replace("_", " "), *refusal),
    )
    def hold(lab: Lab) -> None:
        _hold_option(lab, {option: value}, beside or {})


ADAMS = ("adam", "adamw")
ALL = (*ADAMS, "rmsprop", "sgd")

_option("lr", 0.125, ALL)
_option("betas", (0.5, 0.75), ADAMS)
_option("eps", 0.5, (*ADAMS, "rmsprop"))
_option("alpha", 0.5, ("rmsprop",))
_option("weight_decay", 0.5, ALL)
_option("amsgrad", True, ADAMS, {"betas": (0.5, 0.5)})
_option("momentum", 0.5, ("rmsprop", "sgd"))
_option("dampening", 0.5, ("sgd",), {"momentum": 0.9})
_option("nesterov", True, ("sgd",), {"momentum": 0.9})
_option("centered", True, ("rmsprop",))
_option("maximize", True, ALL)


@case(
    OPTIONS,
    "a misspelled option is refused",
    "Do not take **kwargs without looking: raise a TypeError that names the option.",
    sizes=(1,),
    refusal=("lerning_rate",),
)
def misspelled_option(lab: Lab) -> None:
    name = "lerning_rate"
    try:
        optimizer = lab.subject([lab.param()], **{name: 0.5})
    except Exception as error:
        raise RaisedError("building it", error, unchanged=True, step=0) from error
    Run(lab, optimizer, []).fail(f"'{name}=0.5' is taken, and changes nothing", kind=IgnoredError)


@case(
    OPTIONS,
    "a negative learning rate is refused",
    "Check options where they are given: torch raises a ValueError that names the value.",
    sizes=(1,),
    refusal=("lr", "learning"),
)
def negative_lr(lab: Lab) -> None:
    lab.run([lab.param()], lr=-1.0).fail("lr=-1.0 is taken")


@case(
    OPTIONS,
    "lr as a tensor, changed in place between steps",
    "Read the tensor at each step, or refuse tensors by name.",
    refusal=("lr", "learning", "tensor"),
)
def tensor_lr(lab: Lab) -> None:
    lr = torch.tensor(0.0625)
    run = lab.run([lab.param()], lr=lr)
    _train(run, 2)
    with torch.no_grad():
        lr.fill_(0.25)
    _train(run, 2)


@case(
    OPTIONS,
    "a scheduler that changes lr",
    "Read 'lr' from the group at each step.",
)
def scheduled_lr(lab: Lab) -> None:
    run = lab.run([lab.param()])
    with run.doing("building a scheduler"):
        scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda epoch: 0.5**epoch)
    _follow(run, scheduler)


@case(
    OPTIONS,
    "OneCycleLR, which changes betas or momentum too",
    "Read every option from the group at each step.",
    refusal=("momentum", "beta"),
)
def scheduled_momentum(lab: Lab) -> None:
    beside = {"momentum": 0.9} if lab.rule == "rmsprop" else {}
    run = lab.run([lab.param()], **beside)
    with run.doing("building a scheduler"):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            run.optimizer, float(run.options[0]["lr"]), total_steps=8
        )
    _follow(run, scheduler)


def _follow(run: Run, scheduler: Any) -> None:
    for _ in range(5):
        run.follow_groups()
        run.step()
        scheduler.step()


# ---- GradScaler


def _scaled_step(run: Run, scaler: Any, *, overflows: bool) -> None:
    """A step through GradScaler; the scale is a power of two, so the gradients are exact."""
    factors = [run.lab.gradient(p, run.steps, i) for i, p in enumerate(run.params)]
    exact: list[Tensor | None] = [factor.clone() for factor in factors]
    if overflows:
        factors[0][0] = math.inf
        run.lab.on_step(run.steps + 1)
    else:
        run.advance(exact)
    run.optimizer.zero_grad()
    loss = sum((p * factor).sum() for p, factor in zip(run.params, factors, strict=True))
    scaler.scale(loss).backward()
    # What a state that is never written would be made of.
    junk = [torch.full_like(p, 1e30) for p in run.params for _ in range(8)]
    del junk
    before = run.snapshot()
    with run.doing("GradScaler.step()"):
        scaler.step(run.optimizer)
    scaler.update()
    if overflows and (changed := run.changed_since(before)) is not None:
        run.fail(f"a step that overflowed changed {changed}", run.params[0])
    run.check()


def _scaler(lab: Lab) -> tuple[Run, Any]:
    run = lab.run([lab.param(), lab.param(index=1)])
    return run, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@case(
    SCALER,
    "steps through GradScaler are those without it",
    "Divide the gradient by 'grad_scale' once, and only where it is set.",
    dtypes=("float32", "float64"),
)
def scaled(lab: Lab) -> None:
    run, scaler = _scaler(lab)
    for _ in range(5):
        _scaled_step(run, scaler, overflows=False)


@case(
    SCALER,
    "an overflow in the first step leaves nothing behind",
    "With 'found_inf' set, make no state: what is allocated and not written is used later.",
    sizes=(1, 5, 33, 4096),
)
def first_overflow(lab: Lab) -> None:
    run, scaler = _scaler(lab)
    for step in range(4):
        _scaled_step(run, scaler, overflows=step == 0)


@case(
    SCALER,
    "an overflow later on changes no parameter, no state and no count",
    "With 'found_inf' set, return before anything is written, the count of steps included.",
    dtypes=("float32", "float64"),
)
def later_overflow(lab: Lab) -> None:
    run, scaler = _scaler(lab)
    for step in range(5):
        _scaled_step(run, scaler, overflows=step in (2, 3))


# ---- checkpoints


def _saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _begun(lab: Lab) -> Run:
    run = lab.run([lab.param(), lab.param(lab.size, 2, index=1)])
    _train(run)
    return run


def _torchs(run: Run, params: Sequence[Parameter]) -> torch.optim.Optimizer:
    """Builds torch's class of the same rule, with the same options."""
    names = {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "sgd": "SGD"}
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, names[run.lab.rule])
    known = make([Parameter(torch.zeros(1))]).defaults
    options = {name: value for name, value in run.options[0].items() if name in known}
    return make(params, **options)


@case(
    CHECKPOINTS,
    "saved in the middle of training, loaded, and on",
    "Everything that the next step needs belongs in state_dict(), the count of steps too.",
    dtypes=("float32", "bfloat16"),
)
def resumed(lab: Lab) -> None:
    run = _begun(lab)
    with run.doing("state_dict()"):
        saved = _saved(run.optimizer.state_dict())
    again = lab.run([Parameter(p.detach().clone()) for p in run.params])
    with again.doing("load_state_dict() of its own state_dict()"):
        again.optimizer.load_state_dict(saved)
    again.truths, again.steps = run.truths, run.steps
    _train(again)


@case(
    CHECKPOINTS,
    "copied in the middle of training, and on",
    "What an optimizer keeps beside 'state' and 'param_groups' must follow a deepcopy.",
)
def copied(lab: Lab) -> None:
    run = _begun(lab)
    with run.doing("copy.deepcopy()"):
        params, optimizer = copy.deepcopy((run.params, run.optimizer))
    run.params, run.optimizer = params, optimizer
    _train(run)


@case(
    CHECKPOINTS,
    "begun with torch's class, and on with this one",
    "Keep the states' names, shapes and meaning as in torch's state_dict().",
    refusal=("state", "checkpoint"),
)
def from_torch(lab: Lab) -> None:
    run = lab.run([lab.param(), lab.param(lab.size, 2, index=1)])
    theirs = _torchs(run, [Parameter(p.detach().clone()) for p in run.params])
    for _ in range(STEPS):
        grads: list[Tensor | None] = [
            lab.gradient(p, run.steps, i) for i, p in enumerate(run.params)
        ]
        for param, grad in zip(theirs.param_groups[0]["params"], grads, strict=True):
            param.grad = grad
        run.advance(grads)
        theirs.step()
    # torch is some ULP away by now: what goes on is the reference's.
    for param, truth, torchs in zip(
        run.params, run.truths, theirs.param_groups[0]["params"], strict=True
    ):
        param.data.copy_(truth.expected().view_as(param))
        for name, state in theirs.state[torchs].items():
            if name in truth.states and state is not None:
                state.copy_(truth.state(name).view_as(state))
    with run.doing("load_state_dict() of torch's state_dict()"):
        run.optimizer.load_state_dict(_saved(theirs.state_dict()))
    _train(run)


@case(
    CHECKPOINTS,
    "begun with this class, and on with torch's (whose ULP are counted)",
    "Keep the states' names, shapes and meaning as in torch's state_dict().",
)
def to_torch(lab: Lab) -> None:
    run = _begun(lab)
    theirs = _torchs(run, run.params)
    with run.doing("torch's load_state_dict() of its state_dict()"):
        theirs.load_state_dict(_saved(run.optimizer.state_dict()))
        for group in theirs.param_groups:
            group.update(foreach=False, fused=False)
    run.optimizer = theirs
    _train(run)


# ---- repetition


def _bits_after(lab: Lab, threads: int) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = lab.run([lab.param()])
        _train(run)
    finally:
        torch.set_num_threads(before)
    return run.params[0].detach()


def _hold_equal(lab: Lab, threads: Sequence[int], what: str) -> None:
    first = _bits_after(lab, threads[0])
    for count in threads[1:]:
        again = _bits_after(lab, count)
        if not same(again, first):
            unlike = (again != first).nonzero()
            Run(lab, torch.optim.SGD([Parameter(first)]), []).fail(
                what, again, at=int(unlike[0]), expected=first, count=len(unlike)
            )


@case(
    REPETITION,
    "the same bits for one, two and three threads",
    "Where the work is cut decides how an element is rounded: make the tail like the body.",
    sizes=(1, 33, MANY),
    dtypes=("float32", "bfloat16"),
)
def threads(lab: Lab) -> None:
    _hold_equal(lab, (1, 2, 3), "the number of threads changes the result")


@case(
    REPETITION,
    "the same bits each time",
    "Something is random, not initialised, or carried from one optimizer to the next.",
    sizes=(1, 33, 4097),
    dtypes=("float32", "bfloat16"),
)
def repeated(lab: Lab) -> None:
    _hold_equal(lab, (2, 2, 2, 2), "the same run has another result")
