"""The bytes that a recorded step moves, and how fast this machine can move as many."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flatstep.flat import clearing_buffer
from flatstep.optim import extras
from flatstep.optim.finding import VARIANTS
from flatstep.optim.routes import local_of

if TYPE_CHECKING:
    from flatstep.optim.base import Optimizer
    from flatstep.optim.table import Table

SECONDS = 0.3  # of measuring the limit, after its arrays have been made
MOST_BYTES = 256 << 20  # of these arrays: far more than most caches hold, and soon made
LEAST_BYTES = 4096


@dataclass(frozen=True)
class Traffic:
    """What the kernels move in one step, by the rule's count.

    Attributes:
        tensors: The parameters that they update.
        elements: The numbers in them.
        elsewhere: The parameters that are updated one by one instead.
        params: Bytes read and written of parameters, and of gradients that a step writes.
        grads: Bytes of gradients that are only read.
        states: Bytes read and written of states, masters and averages.
        norm: Bytes of gradients that a norm reads.
        gpu: The GPU that they are on, or None for the host.
    """

    tensors: int
    elements: int
    elsewhere: int
    params: int
    grads: int
    states: int
    norm: int
    gpu: int | None

    @property
    def update(self) -> int:
        """The bytes of the update, without a norm's."""
        return self.params + self.grads + self.states


def count(optimizer: Optimizer, table: Table, updated: Collection[torch.Tensor]) -> Traffic:
    """Counts what an update of these parameters moves, from the arrays that it has left."""
    wanted = set(map(id, updated))
    elements = params = grads = states = norm = 0
    for group, bits in zip(optimizer.param_groups, table.flags, strict=True):
        names = (
            *VARIANTS[optimizer.rule][bits & extras.RULE_FLAGS],
            *extras.names(group),
        )
        for param in group["params"]:
            if id(param) not in wanted:
                continue
            own = local_of(param)
            grad = own if param.grad is None else local_of(param.grad)  # a hook may have freed it
            elements += own.numel()
            # Behind a float32 copy a parameter is only written.
            params += own.nbytes * (1 if extras.MASTER in names else 2)
            if bits & extras.WRITES_GRAD or clearing_buffer(param) is not None:
                params += 2 * grad.nbytes
            else:
                grads += grad.nbytes
            norm += grad.nbytes
            states += sum(2 * local_of(optimizer.state[param][name]).nbytes for name in names)
    return Traffic(
        tensors=len(updated),
        elements=elements,
        elsewhere=len(table.others),
        params=params,
        grads=grads,
        states=states,
        norm=norm,
        gpu=table.gpus[0] if table.gpus else None,
    )


def measure_limit(
    traffic: Traffic, *, norm: bool, params: list[torch.Tensor], states: list[torch.Tensor]
) -> float:
    """How many bytes a second this machine moves of as many, in the same proportions, in 1e9.

    On the host on memory pages like those of the parameters and states, and on torch's threads.
    Of large models less is moved: what counts is that it is far more than a cache holds. Of a
    handful of numbers more, so that there is something to time.
    """
    from flatstep.profiling.limit import Copies, Mix, Moved, Streams
    from flatstep.profiling.measure import Race, on_the_gpu, on_the_host

    walks = [Moved(traffic.params, traffic.grads, traffic.states)]
    if norm:
        walks.insert(0, Moved(grads=traffic.norm))
    call: Callable[[], None]
    if traffic.gpu is not None:
        moved = sum(sum(walk) for walk in walks)
        call = Copies(round(moved / 3), torch.device("cuda", traffic.gpu)).traffic(0)
    else:
        largest = max(Mix.of(walk).nbytes for walk in walks)
        share = min(max(1.0, LEAST_BYTES / largest), MOST_BYTES / largest)
        walks = [Moved(*(share * own for own in walk)) for walk in walks]
        streams = Streams(max(Mix.of(walk).nbytes for walk in walks))
        moved = sum(sum(walk) for walk in walks)
        call = streams.walks(walks, streams.pages(params, states))
    race = Race({"limit": call}, on_the_host if traffic.gpu is None else on_the_gpu)
    race.run(SECONDS, None, lambda _: None)
    return moved / race.timings()["limit"].median / 1e9
