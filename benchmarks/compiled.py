"""What a step costs inside torch.compile's graph, beside torch's compiled step and both outside.

    python benchmarks/compiled.py

Each model is a list of shapes; every step is timed by itself, one of each kind in turn, with the
gradients in place; the table gives the medians in microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import flatstep

MLP = [(64, 80), (80,), (80, 56), (56,), (56, 10), (10,)]
MODELS = {"MLP, 6 tensors": MLP, "1 tensor of 1 M": [(1 << 20,)]}
ROUNDS = 200


def make_step(optimizer: type[torch.optim.Optimizer], shapes: list[tuple[int, ...]]) -> Callable:
    """A step of an optimizer of its own parameters, which have gradients."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    options = {"fused": True} if optimizer is torch.optim.Adam else {}
    return optimizer(params, **options).step


def make_torch_compiled(shapes: list[tuple[int, ...]]) -> Callable:
    """torch's step as it is to be compiled: not fused, so that the compiler can fuse it."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return torch.compile(torch.optim.Adam(params).step)


def main() -> None:
    """Prints a row for each model."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians in µs")
    names = ("flatstep, compiled", "flatstep", "torch, compiled", "torch, fused")
    print("| model |", " | ".join(names), "|")
    print("|---" * (1 + len(names)) + "|")
    for model, shapes in MODELS.items():
        torch._dynamo.reset()
        steps = [
            torch.compile(make_step(flatstep.Adam, shapes), fullgraph=True),
            make_step(flatstep.Adam, shapes),
            make_torch_compiled(shapes),
            make_step(torch.optim.Adam, shapes),
        ]
        times: list[list[float]] = [[] for _ in steps]
        for count in range(ROUNDS + 5):
            for step, own in zip(steps, times, strict=True):
                start = time.perf_counter()
                step()
                if count >= 5:
                    own.append(time.perf_counter() - start)
        cells = (f"{statistics.median(own) * 1e6:.0f}" for own in times)
        print(f"| {model} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
