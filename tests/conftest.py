"""What the tests share: the cases, the layouts, the seeds, and a way to run two optimizers.

A test that takes `case` runs for every rule and every set of options in `CASES`; `@cases(...)`
narrows them, `@rich` takes the fullest set of each rule. A new case is a line in `CASES`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch_versions import NEWER_KEYS

import flatstep
from flatstep import _core
from flatstep.optim import base, gpu

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Built with FLATSTEP_CUDA=EMULATED: the host's memory counts as a GPU's (tools/emulate_gpu.sh).
EMULATED = _core.gpu_count() == 1 and not torch.cuda.is_available()

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "Adam": {
        "default": {},
        "no_first_moment": {"betas": (0.0, 0.99)},
        "short_memory": {"betas": (0.5, 0.9)},
        "large_eps": {"eps": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9)},
        "maximize": {"maximize": True},
        "all": {
            "lr": 3e-3,
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 0.1,
            "amsgrad": True,
            "maximize": True,
        },
    },
    "AdamW": {
        "default": {},
        "no_decay": {"weight_decay": 0.0},
        "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9), "weight_decay": 0.1},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "all": {
            "lr": 3e-3,
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 0.1,
            "amsgrad": True,
            "maximize": True,
        },
    },
    "RMSprop": {
        "default": {},
        "short_memory": {"alpha": 0.5, "lr": 1e-3},
        "large_eps": {"eps": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9},
        "centered": {"centered": True},
        "centered_momentum": {"centered": True, "momentum": 0.9},
        "maximize": {"maximize": True},
        "all": {
            "lr": 3e-3,
            "alpha": 0.9,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "momentum": 0.5,
            "centered": True,
            "maximize": True,
        },
    },
    "SGD": {
        "default": {},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.5},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "dampening_all": {
            "lr": 1e-2,
            "momentum": 0.5,
            "dampening": 0.3,
            "weight_decay": 0.1,
            "maximize": True,
        },
        "nesterov_all": {
            "lr": 1e-2,
            "momentum": 0.5,
            "nesterov": True,
            "weight_decay": 0.1,
            "maximize": True,
        },
    },
}

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (33, 3), (2, 3, 5, 7), (2, 0, 3))


@dataclass(frozen=True)
class Case:
    """One rule with one set of options, as ours and as torch's for-loop."""

    rule: str
    name: str
    options: dict[str, Any]

    def ours(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        return getattr(flatstep, self.rule)(params, **{**self.options, **more})

    def torchs(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        options = {**self.options, "foreach": False, **more}
        rule = self.rule
        if "decoupled_weight_decay" in NEWER_KEYS and options.pop("decoupled_weight_decay", False):
            rule = "AdamW"
        return getattr(torch.optim, rule)(params, **options)

    def __str__(self) -> str:
        return f"{self.rule}-{self.name}"


def case_of(rule: str, name: str = "default") -> Case:
    return Case(rule, name, CASES[rule][name])


def all_cases(rules: Iterable[str] = (), options: Iterable[str] = ()) -> list[Case]:
    rules, options = tuple(rules) or tuple(CASES), tuple(options)
    return [
        case_of(rule, name)
        for rule in rules
        for name in CASES[rule]
        if not options or name in options
    ]


def cases(rules: Iterable[str] = (), options: Iterable[str] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", all_cases(rules, options), ids=str)


#: for each rule the one set of options that exercises every state it can have
rich = cases(options=["all", "nesterov_all"])


@pytest.fixture(autouse=EMULATED)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tensors of the host be read as those of the emulated GPU."""
    monkeypatch.setattr(gpu, "device", lambda index: torch.device("cpu"))
    monkeypatch.setattr(gpu, "stream_of", lambda index: 0)
    monkeypatch.setattr(gpu, "is_there", lambda value: isinstance(value, Tensor))
    monkeypatch.setattr(base, "is_on_gpu", lambda value: True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="Where test_distributed.py has its tensors: on gloo, or on NCCL with a GPU a rank.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    narrowed = any(
        "case" in str(m.args[:1]) for m in metafunc.definition.iter_markers("parametrize")
    )
    if "case" in metafunc.fixturenames and not narrowed:
        metafunc.parametrize("case", all_cases(), ids=str)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium or Chrome, which finds no host."""
    from playwright.sync_api import sync_playwright  # not where a GPU's tests alone are run

    names = ("chromium", "google-chrome", "chromium-browser")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("Chromium is absent: apt-get install chromium, or Google's Chrome")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def _the_same_start_for_every_test() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(2)


# ---- parameters, gradients, layouts


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[Parameter]:
    """Parameters in (-1, 1), none of them smaller than 0.1."""
    params = []
    for shape in shapes:
        x = torch.rand(shape, dtype=torch.float64) * 0.9 + 0.1
        x = x * (torch.randint(0, 2, shape) * 2 - 1)
        params.append(Parameter((x * (1 + 0.5j) if dtype.is_complex else x).to(dtype)))
    return params


def clones(params: Iterable[Tensor]) -> list[Parameter]:
    """Fresh parameters with the same values and strides."""
    return [Parameter(p.detach().clone()) for p in params]


def gradient(p: Tensor, step: int, index: int = 0) -> Tensor:
    """A gradient that depends on `step` and `index` only; every seventh element is zero."""
    generator = torch.Generator("cpu").manual_seed(1000 * step + index)
    wide = torch.complex128 if p.dtype.is_complex else torch.float64
    g = torch.randn(tuple(p.shape), dtype=wide, generator=generator, device="cpu")
    g = (g + 0.5 * g.sgn()) * (1.0, 0.25, 0.5)[step % 3]
    g.view(-1)[::7] = 0
    return g.to(p.device, p.dtype)


def give_gradients(params: Iterable[Parameter], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = gradient(p, step, index)


def train(opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients that belong to the numbers in `steps`."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for step in steps:
        give_gradients(params, step)
        opt.step()


def _spread(x: Tensor) -> Tensor:
    """Every second element of a wider tensor of NaN."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _displaced(x: Tensor) -> Tensor:
    """A view that begins one element into its storage, as in a gradient bucket."""
    flat = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
    flat[1:-1] = x.reshape(-1)
    return flat[1:-1].view(x.shape)


CONTIGUOUS = torch.contiguous_format
LAYOUT_SHAPE = (2, 3, 4, 5)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(1, 3).clone(memory_format=CONTIGUOUS).transpose(1, 3),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "sliced": _spread,
    "sliced_transposed": lambda x: _spread(x.transpose(1, 3)).transpose(1, 3),
    "displaced": _displaced,
}
GRADIENT_LAYOUTS = LAYOUTS | {"expanded": lambda x: x[:, :1].expand(x.shape)}


# ---- comparisons


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals itself and -0 is not 0."""
    return x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def tensors_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter and every state tensor, in order."""
    found = []
    for group in opt.param_groups:
        for p in group["params"]:
            found.append(p.detach())
            found.extend(s for s in opt.state.get(p, {}).values() if isinstance(s, Tensor))
    return found


def snapshot(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [t.clone() for t in tensors_of(opt)]


def assert_unchanged(opt: torch.optim.Optimizer, before: list[Tensor]) -> None:
    after = tensors_of(opt)
    assert len(after) == len(before), "a state has appeared or gone"
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def precision(dtype: torch.dtype) -> float:
    """Spacing of `dtype` relative to float32's."""
    return torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def assert_same_run(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, scale: float = 1.0
) -> None:
    """Parameters within 1e-6 * lr/1e-3 (float32), states within 1e-6 of their size; same keys."""
    for our_group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        lr = max(float(their_group["lr"]), 1e-3)
        for p, q in zip(our_group["params"], their_group["params"], strict=True):
            atol = scale * 1e-6 * lr / 1e-3 * precision(p.dtype)
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)
            our_state, their_state = ours.state.get(p, {}), theirs.state.get(q, {})
            assert list(our_state) == list(their_state)
            for key, s in their_state.items():
                size = float(s.abs().max()) if s.numel() and key != "step" else 0.0
                atol = scale * 2e-6 * precision(p.dtype) * size
                torch.testing.assert_close(our_state[key], s, rtol=0, atol=atol, msg=key)
