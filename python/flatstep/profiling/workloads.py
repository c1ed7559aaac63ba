"""The workloads: the shapes of the parameters that a step updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flatstep._torch import DTYPES
from flatstep.subjects import resolve

Shape = tuple[int, ...]

FILE_FORM = '{"name": "mine", "shapes": [[4096, 1024], [1024]]}, and "dtype" where it is wanted'


@dataclass(frozen=True)
class Workload:
    """The parameters of a model, as far as their update is concerned.

    Attributes:
        name: As it is chosen.
        title: What it is, in words.
        shapes: Of its tensors, in the model's order.
        devices: Where it is measured unless other workloads are chosen.
        dtype: Of its parameters, unless another one is chosen.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtype: str | None = None

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


#: The shapes that are measured, by their names.
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


def workload_named(name: str | Workload) -> Workload:
    """One of :data:`WORKLOADS`; one that is there already is returned as it is.

    Raises:
        ValueError: For another name, with those that there are.
    """
    if isinstance(name, Workload):
        return name
    if name not in WORKLOADS:
        raise ValueError(f"no workload '{name}'; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def size_classes(workload: Workload) -> list[Workload]:
    """The tensors whose sizes are of one power of ten, from small to large.

    Nothing where all are of one: they would be the workload again.
    """
    classes: dict[int, list[Shape]] = {}
    for shape in workload.shapes:
        digits = len(str(math.prod(shape)))
        classes.setdefault(digits, []).append(shape)
    if len(classes) < 2:
        return []
    return [
        Workload(f"{workload.name}, {digits} digits", workload.title, tuple(classes[digits]))
        for digits in sorted(classes)
    ]


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


def workload_of_file(path: Path) -> Workload:
    """The workload of a file with shapes, which need no model to be there.

    It holds ``{"name": "mine", "shapes": [[4096, 1024], [1024]]}`` and, where another one than
    float32 is wanted, ``"dtype"``. A shape that occurs several times may stand with its count, as
    in ``[[[4096, 1024], 24], [[1024], 48]]``; what has no parameters is left out.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it has to hold {FILE_FORM}")
    unknown = sorted(found.keys() - {"name", "shapes", "dtype"})
    if unknown or "shapes" not in found:
        wrong = f"an unknown key '{unknown[0]}'" if unknown else "no 'shapes'"
        raise ValueError(f"{path} has {wrong}; it has to hold {FILE_FORM}")
    name, dtype = found.get("name", path.stem), found.get("dtype")
    if not (isinstance(name, str) and name):
        raise ValueError(f"'name' in {path} is {name!r}, not a text")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"'dtype' in {path} is {dtype!r}; there are {', '.join(DTYPES)}")
    if not isinstance(found["shapes"], list):
        raise ValueError(f"'shapes' in {path} is {found['shapes']!r}, not a list of shapes")
    shapes: list[Shape] = []
    for place, entry in enumerate(found["shapes"]):
        shape, count = _shape_and_count(entry, f"shapes[{place}] in {path}")
        shapes += [shape] * (count if math.prod(shape) else 0)
    if not shapes:
        raise ValueError(f"'shapes' in {path} has no parameters; it has to hold {FILE_FORM}")
    return Workload(name, name, tuple(shapes), dtype=dtype)


def _shape_and_count(entry: Any, place: str) -> tuple[Shape, int]:
    """A shape of a file, and how often it occurs."""
    shape, count = entry, 1
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list):
        shape, count = entry
    sizes = [*shape, count] if isinstance(shape, list) else [None]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(
            f"{place} is {json.dumps(entry)}; a shape is a list of sizes such as [4096, 1024], or "
            "[[4096, 1024], 24] where it occurs 24 times"
        )
    return tuple(shape), count
