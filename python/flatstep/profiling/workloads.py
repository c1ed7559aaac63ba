"""The workloads: the shapes of the parameters that a step updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from flatstep.subjects import resolve

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """The parameters of a model, as far as their update is concerned.

    Attributes:
        name: As it is chosen.
        title: What it is, in words.
        shapes: Of its tensors, in the model's order.
        devices: Where it is measured unless other workloads are chosen.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def parameters(self) -> int:
        """The number of elements in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def _gpt2() -> Iterator[Shape]:
    width = 768
    yield from [(50257, width), (1024, width)]
    for _ in range(12):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,)]
        yield from [(width, width), (width,), (width,), (width,)]
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


def _resnet50() -> Iterator[Shape]:
    def convolution(inputs: int, outputs: int, size: int) -> Iterator[Shape]:
        yield from [(outputs, inputs, size, size), (outputs,), (outputs,)]

    yield from convolution(3, 64, 7)
    inputs = 64
    for stage, blocks in enumerate([3, 4, 6, 3]):
        width = 64 << stage
        for block in range(blocks):
            yield from convolution(inputs, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    yield from [(1000, inputs), (1000,)]


def _mlp() -> Iterator[Shape]:
    widths = [64, 80, 56, 10]
    for inputs, outputs in pairwise(widths):
        yield from [(outputs, inputs), (outputs,)]


def _llama() -> Iterator[Shape]:
    width, middle, keys = 2048, 8192, 512
    yield (128_256, width)  # of the output too
    for _ in range(16):
        yield from [(width, width), (keys, width), (keys, width), (width, width)]
        yield from [(middle, width), (middle, width), (width, middle), (width,), (width,)]
    yield (width,)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in [
        Workload("gpt2", "GPT-2 small", tuple(_gpt2())),
        Workload("resnet50", "ResNet-50", tuple(_resnet50())),
        Workload("mlp", "Small MLP", tuple(_mlp())),
        Workload("many", "10,000 tensors of 256", ((256,),) * 10_000),
        Workload("flat", "One tensor of 64 M", ((1 << 26,),)),
        Workload("llama-3.2-1b", "Llama-3.2-1B", tuple(_llama()), devices=("cuda",)),
    ]
}


def workload_named(name: str) -> Workload:
    """One of :data:`WORKLOADS`.

    Raises:
        ValueError: For another name, with those that there are.
    """
    if name not in WORKLOADS:
        raise ValueError(f"no workload '{name}'; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def workload_of_model(path: str) -> Workload:
    """The workload of the model that ``path``, as ``package.module:callable``, returns.

    The working directory is searched for the module too.

    Raises:
        ValueError: Where there is no such callable, or it returns no model with parameters.
    """
    make = resolve(path)
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"{path} gave no model: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{path} returned a {type(model).__name__}, not a torch.nn.Module")
    shapes = tuple(
        tuple(param.shape)
        for param in model.parameters()
        if param.requires_grad and param.numel() > 0
    )
    if not shapes:
        raise ValueError(f"the model of {path} has no parameters that are trained")
    return Workload(path, path, shapes)
