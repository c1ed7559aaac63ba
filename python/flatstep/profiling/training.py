"""What an update costs in training: backward, step and zero_grad on a real model."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import flatstep
from flatstep.profiling.check import close
from flatstep.profiling.implementations import build_named
from flatstep.profiling.measure import FAILURES, Timing, failure
from flatstep.profiling.results import Training, TrainingResult
from flatstep.subjects import Subject

OPTIMIZER = "adam"
LEAST_ROUNDS = 5
MOST_ROUNDS = 40
TORCH = "torch fused"
TENSORS = "flatstep"
FLAT = "flatstep, FlatBuffer"
FLAT_CLEARING = "flatstep, FlatBuffer that clears"
FLAT_PARAMETERS = "flatstep, FlatBuffer without gradients"


class Block(nn.Module):
    """A transformer's block: attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.ln_1(x)).split(width, dim=2)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class SmallGPT(nn.Module):
    """GPT-2's architecture at a tenth of the size of its smallest, with tied embeddings."""

    def __init__(self, width: int = 384, depth: int = 6, vocabulary: int = 8192, length: int = 64):
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=6) for _ in range(depth)))
        self.ln = nn.LayerNorm(width)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of predicting each token, but the first, from those before it."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        scores = self.ln(self.blocks(x)) @ self.tokens.weight.T
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Phases(NamedTuple):
    """Seconds of the phases of one iteration."""

    forward: float
    backward: float
    step: float
    zero_grad: float


class Way:
    """A copy of the model with an optimizer, and the seconds of its phases."""

    def __init__(self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]):
        self.model = copy.deepcopy(model)
        self.optimizer = build(self.model)
        self.phases: list[Phases] = []

    def iterate(self, tokens: Tensor) -> None:
        """One iteration."""
        begin = perf_counter()
        loss = self.model(tokens)
        start = perf_counter()
        loss.backward()
        after_backward = perf_counter()
        self.optimizer.step()
        after_step = perf_counter()
        self.optimizer.zero_grad()
        end = perf_counter()
        self.phases.append(
            Phases(
                start - begin, after_backward - start, after_step - after_backward, end - after_step
            )
        )


def _ours(**flat: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        if flat:
            flatstep.FlatBuffer(model.parameters(), **flat)
        return flatstep.Adam(model.parameters())

    return build


WAYS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    TORCH: lambda model: torch.optim.Adam(model.parameters(), fused=True),
    TENSORS: _ours(),
    FLAT: _ours(gradients=True),
    FLAT_CLEARING: _ours(gradients=True, clear_gradients=True),
    FLAT_PARAMETERS: _ours(gradients=False),
}


def bytes_needed(model: nn.Module, named: int = 0) -> int:
    """What the race takes: parameters, gradients and two states for each way, named ones too."""
    return 4 * (len(WAYS) + named) * sum(p.nbytes for p in model.parameters())


def new(model: nn.Module) -> Training:
    """The results for a model, before they are measured."""
    return Training(type(model).__name__, sum(p.numel() for p in model.parameters()), OPTIMIZER)


def measure(
    training: Training,
    model: SmallGPT,
    named: Sequence[Subject],
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    """Trains a copy of the model in every way, taking turns, and fills in the results.

    An interrupt leaves the results of the rounds that were finished.

    Args:
        training: Where the results go.
        model: What to train.
        named: Optimizers to train it with, too.
        until: When it should end, by time.perf_counter.
        rounds: How many rounds to run, in place of those that fit into the time.
        on_progress: Called with the share that is done.
    """
    start = perf_counter()
    tokens = torch.randint(model.vocabulary, (1, model.length), generator=torch.Generator())
    builds = {**WAYS, **{subject.label: _named(subject) for subject in named}}
    ways: dict[str, Way] = {}
    problems: dict[str, str | None] = dict.fromkeys(builds)
    for name, build in builds.items():
        with _guard(name, problems):
            ways[name] = Way(model, build)
            ways[name].iterate(tokens)
    for name, way in ways.items():
        problems[name] = problems[name] or _problem(way, ways[TORCH], model)
    for name, way in ways.items():
        if problems[name] is None:
            with _guard(name, problems):
                way.iterate(tokens)
        way.phases.clear()
    shuffled = random.Random(0)
    turn = 0
    try:
        while turn < (rounds or MOST_ROUNDS):
            if rounds is None and turn >= LEAST_ROUNDS and perf_counter() > until:
                break
            running = [name for name, problem in problems.items() if problem is None]
            for name in shuffled.sample(running, len(running)):
                with _guard(name, problems):
                    ways[name].iterate(tokens)
            turn += 1
            by_time = (perf_counter() - start) / max(until - start, 1e-9)
            on_progress(turn / rounds if rounds else min(1.0, max(by_time, turn / MOST_ROUNDS)))
    finally:
        training.results += [
            _result(name, ways[name].phases if name in ways else [], problem)
            for name, problem in problems.items()
        ]
        torch_total = training.results[0].total
        for result in training.results:
            if result.total is not None and torch_total is not None:
                result.to_torch = result.total.median / torch_total.median


def _named(subject: Subject) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: build_named(subject, OPTIMIZER, list(model.parameters()))


@contextmanager
def _guard(name: str, problems: dict[str, str | None]) -> Iterator[None]:
    """Notes what a way raises: it is not trained any further."""
    try:
        yield
    except FAILURES as error:
        problems[name] = failure(error)


def _problem(way: Way, torch_way: Way, start: nn.Module) -> str | None:
    """What is wrong after the first iteration, held against torch's."""
    for param, wanted, before in zip(
        way.model.parameters(), torch_way.model.parameters(), start.parameters(), strict=True
    ):
        if not close(param.detach(), wanted.detach(), (wanted - before).detach()):
            return "wrong result: parameters unlike torch's"
    return None


def _result(name: str, phases: list[Phases], problem: str | None) -> TrainingResult:
    if problem is not None or not phases:
        return TrainingResult(name, problem)
    forward, backward, step, zero_grad = (
        Timing.of(list(each)) for each in zip(*phases, strict=True)
    )
    # The forward pass is everybody's, and no part of what is compared.
    total = Timing.of([sum(phase) - phase.forward for phase in phases])
    return TrainingResult(name, None, backward, step, zero_grad, total, forward=forward)
