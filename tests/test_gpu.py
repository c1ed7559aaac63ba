"""On a real GPU: the bits of the CPU, graphs, streams and GradScaler. `pytest -m cuda` runs it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from conftest import EMULATED, Case, clones, gradient, parameters, rich
from torch import Tensor
from torch.nn import Parameter

import flatstep
from flatstep import _core

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        EMULATED or not torch.cuda.is_available() or _core.gpu_count() == 0,
        reason="needs a GPU, and flatstep and torch built for it",
    ),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (64,), (7,), (100_003,), (), (0, 4), (130, 3), (1 << 20,)]
MANY = [(1 + place % 300,) for place in range(400)]


def on_gpu(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().cuda()) for param in params]


def give_gradients(params: list[Parameter], step: int) -> None:
    for place, param in enumerate(params):
        grad = gradient(param.detach().cpu(), step, place).to(param.device)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def assert_same_bits(gpu: list[Parameter], cpu: list[Parameter]) -> None:
    for a, b in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=0, atol=0, equal_nan=True)


def captured(opt: Any) -> torch.cuda.CUDAGraph:
    """A graph of a step, after one step outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


@rich
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
@pytest.mark.parametrize("flat", [False, True], ids=["tensors", "flat"])
def test_training_has_the_cpu_s_bits(
    case: Case, dtype: torch.dtype, shapes: list[tuple[int, ...]], flat: bool
) -> None:
    cpu = parameters(dtype, shapes)
    gpu = on_gpu(cpu)
    if flat:
        flatstep.FlatBuffer(gpu)
    opts = [case.ours(cpu), case.ours(gpu)]
    for step in range(4):
        for opt, params in zip(opts, (cpu, gpu), strict=True):
            give_gradients(params, step)
            opt.step()
    assert_same_bits(gpu, cpu)
    for a, b in zip(gpu, cpu, strict=True):
        for name, state in opts[0].state[b].items():
            torch.testing.assert_close(opts[1].state[a][name].cpu(), state, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_gradients_have_the_cpu_s_bits(offset: int) -> None:
    cpu = parameters(shapes=[(1001,), (64,)])
    gpu = on_gpu(cpu)
    opts = [flatstep.AdamW(cpu), flatstep.AdamW(gpu)]
    for step in range(3):
        for place, (a, b) in enumerate(zip(gpu, cpu, strict=True)):
            b.grad = gradient(b, step, place)
            bucket = torch.empty(a.numel() + offset, device="cuda")
            a.grad = bucket[offset:].copy_(b.grad.cuda())
        for opt in opts:
            opt.step()
    assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_a_captured_step_has_the_bits_of_one_that_is_not(
    name: str, shapes: list[tuple[int, ...]]
) -> None:
    cpu = parameters(shapes=shapes)
    gpu = on_gpu(cpu)
    lr = torch.tensor(1e-3, device="cuda")
    ours: Any = getattr(flatstep, name)
    opt, expected = ours(gpu, lr=lr, capturable=True), ours(cpu, lr=float(lr))
    give_gradients(gpu, 0)
    give_gradients(cpu, 0)
    graph = captured(opt)
    expected.step()
    for step in range(1, 5):
        rate = 1e-3 / step
        lr.fill_(rate)
        expected.param_groups[0]["lr"] = float(lr)
        give_gradients(gpu, step)
        give_gradients(cpu, step)
        graph.replay()
        expected.step()
    assert_same_bits(gpu, cpu)


def test_an_optimizer_that_is_collected_during_a_capture_does_not_break_it_off() -> None:
    old = on_gpu(parameters(shapes=MANY))
    give_gradients(old, 0)
    doomed = [flatstep.Adam(old)]
    doomed[0].step()  # with a table: there are more parameters than a launch's arguments hold
    cpu = parameters(shapes=SHAPES)
    gpu = on_gpu(cpu)
    opt, expected = flatstep.Adam(gpu, capturable=True), flatstep.Adam(cpu)
    give_gradients(gpu, 0)
    give_gradients(cpu, 0)
    opt.step()
    expected.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doomed.clear()
        gc.collect()
        opt.step()
    give_gradients(gpu, 1)
    give_gradients(cpu, 1)
    graph.replay()
    expected.step()
    assert_same_bits(gpu, cpu)


def test_capture_without_capturable_is_refused_in_torch_s_words() -> None:
    (p,) = on_gpu(parameters(shapes=[(10,)]))
    p.grad = torch.ones_like(p)
    opt = flatstep.Adam([p])
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(graph):
        opt.step()


def test_a_scaler_s_overflow_is_skipped_without_the_host() -> None:
    cpu = parameters(shapes=SHAPES)
    gpu = on_gpu(cpu)
    opt: Any = flatstep.Adam(gpu, fused=True)
    expected = flatstep.Adam(cpu)
    for step, overflow in enumerate([1.0, 0.0, 1.0, 0.0]):
        give_gradients(gpu, step)
        for param in gpu:
            assert param.grad is not None
            param.grad.mul_(1024)
        opt.grad_scale = torch.tensor(1024.0, device="cuda")
        opt.found_inf = torch.tensor(overflow, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not overflow:
            give_gradients(cpu, step)
            expected.step()
    assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("fused", [None, True])
def test_a_step_does_not_wait_for_the_gpu(fused: bool | None) -> None:
    gpu = on_gpu(parameters(shapes=SHAPES))
    opt = flatstep.AdamW(gpu, fused=fused)
    give_gradients(gpu, 0)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_clipping_has_the_cpu_s_bits_and_waits_for_nothing(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, norm_type: float
) -> None:
    cpu = parameters(dtype, shapes)
    gpu = on_gpu(cpu)
    options: Any = {"max_grad_norm": 0.5, "norm_type": norm_type}
    opt, expected = flatstep.AdamW(gpu, **options), flatstep.AdamW(cpu, **options)
    for step in range(3):
        give_gradients(gpu, step)
        give_gradients(cpu, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected.step()
        assert opt.grad_norm is not None
        assert opt.grad_norm.is_cuda
        assert torch.equal(opt.grad_norm.cpu(), expected.grad_norm)  # type: ignore[arg-type]
    assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_a_captured_step_clips_and_skips_as_one_that_is_not(
    shapes: list[tuple[int, ...]],
) -> None:
    cpu = parameters(shapes=shapes)
    gpu = on_gpu(cpu)
    options: Any = {"max_grad_norm": 0.5, "skip_nonfinite": True}
    opt, expected = flatstep.Adam(gpu, capturable=True, **options), flatstep.Adam(cpu, **options)
    give_gradients(gpu, 0)
    give_gradients(cpu, 0)
    graph = captured(opt)
    expected.step()
    for step in range(1, 5):
        give_gradients(gpu, step)
        give_gradients(cpu, step)
        if step == 2:
            gpu[0].grad[0, 0] = cpu[0].grad[0, 0] = torch.nan  # type: ignore[index]
        graph.replay()
        expected.step()
    assert opt.skipped_steps == expected.skipped_steps == 1
    assert_same_bits(gpu, cpu)


def test_what_has_to_wait_for_the_norm_is_not_captured() -> None:
    (p,) = on_gpu(parameters(shapes=[(10,)]))
    p.grad = torch.ones_like(p)
    opt = flatstep.Adam([p], capturable=True, max_grad_norm=1.0, error_if_nonfinite=True)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="graph is being captured"), torch.cuda.graph(graph):
        opt.step()


@pytest.mark.parametrize("clips", [False, True])
def test_the_scaler_s_check_only_reads_and_waits_for_nothing(clips: bool) -> None:
    cpu = parameters(shapes=SHAPES)
    gpu = on_gpu(cpu)
    options: Any = {"fused": True, **({"max_grad_norm": 0.5} if clips else {})}
    opt, expected = flatstep.AdamW(gpu, **options), flatstep.AdamW(cpu, **options)
    ours = flatstep.GradScaler("cuda", init_scale=1024.0)
    theirs = flatstep.GradScaler("cpu", init_scale=1024.0)
    for scaler, device in ((ours, "cuda"), (theirs, "cpu")):
        scaler.scale(torch.tensor(1.0, device=device))
    for step in range(4):
        for params in (gpu, cpu):
            give_gradients(params, step)
            for param in params:
                assert param.grad is not None
                param.grad.mul_(1024)
        if step == 2:
            gpu[0].grad[0, 0] = cpu[0].grad[0, 0] = torch.inf  # type: ignore[index]
        before = [param.grad.clone() for param in gpu if param.grad is not None]
        ours.step(opt)
        theirs.step(expected)
        ours.update()
        theirs.update()
        if step:  # the first step is torch's, which divides the gradients
            for param, grad in zip(gpu, before, strict=True):
                torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)
    assert ours.get_scale() == theirs.get_scale() == 512.0
    assert_same_bits(gpu, cpu)


def test_checkpoints_go_to_torch_and_back() -> None:
    ours, torchs = (on_gpu(parameters(shapes=[(33,)])) for _ in range(2))
    torchs = [Parameter(param.detach().clone()) for param in ours]
    mine, theirs = flatstep.AdamW(ours, fused=True), torch.optim.AdamW(torchs, fused=True)
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(torchs, step)
        mine.step()
        theirs.step()
        if step % 2:
            swapped = mine.state_dict(), theirs.state_dict()
            mine.load_state_dict(swapped[1])
            theirs.load_state_dict(swapped[0])
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_functions_have_the_cpu_s_bits() -> None:
    cpu = [torch.rand(1003) for _ in range(4)]
    gpu = [x.cuda() for x in cpu]
    for step in range(1, 4):
        flatstep.functional.adamw_(*cpu, step=step, lr=0.01)
        flatstep.functional.adamw_(*gpu, step=step, lr=0.01)
    for a, b in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)
    with pytest.raises(TypeError, match="cuda"):
        flatstep.functional.adamw_(gpu[0], *cpu[1:], step=1, lr=0.01)


def test_a_strided_gradient_has_the_cpu_s_bits() -> None:
    cpu = parameters(shapes=[(30, 40)])
    gpu = on_gpu(cpu)
    for params in (cpu, gpu):
        opt = flatstep.Adam(params)
        for step in range(3):
            params[0].grad = gradient(cpu[0], step).to(params[0].device).t().contiguous().t()
            opt.step()
    assert_same_bits(gpu, cpu)


def test_the_current_device_and_stream_stay_as_they_were() -> None:
    gpu = on_gpu(parameters(shapes=SHAPES))
    opt = flatstep.SGD(gpu, momentum=0.9)
    give_gradients(gpu, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        opt.step()
        assert torch.cuda.current_stream() == side
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == 0


def test_a_model_on_cpu_and_gpu_is_updated_on_both() -> None:
    def train(tensors: list[Tensor]) -> list[Tensor]:
        params = [Parameter(tensor) for tensor in tensors]
        opt = flatstep.Adam(params)
        for step in range(3):
            give_gradients(params, step)
            opt.step()
        return [param.detach().cpu() for param in params]

    start = [param.detach() for param in clones(parameters(shapes=[(50,), (70,)]))]
    mixed = train([start[0].clone(), start[1].cuda()])
    for a, b in zip(mixed, train([x.clone() for x in start]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
