"""Parameters that lie on several ranks: where a shard is in the whole, and the norm over all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatstep import _core
from flatstep._torch import is_dtensor
from flatstep.optim import clipping
from flatstep.optim.routes import local_of
from flatstep.reference import tile_count


class Share(NamedTuple):
    """What a rank has of a parameter.

    Attributes:
        first_element: Of the rank's first element, its number among the parameter's.
        slots: How many partial norms the parameter has on all ranks together.
        first: Of this rank's partial norms, the first.
        own: How many they are.
        groups: The process groups over which the parameter is sharded.
        device: The type of device on which they communicate.
    """

    first_element: int
    slots: int
    first: int
    own: int
    groups: tuple[Any, ...] = ()
    device: str = "cpu"


def share_of(param: torch.Tensor) -> Share:
    """This rank's share of a parameter.

    One that is cut along its first dimension, as FSDP2 does, has a partial norm for each tile of
    each shard, in the order of the ranks. One that is cut otherwise has one for each rank.
    """
    parts = 2 if param.is_complex() else 1
    cut: list[int] = []
    if is_dtensor(param):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut:
        count = tile_count(param.numel() * parts)
        return Share(0, count, 0, count)
    groups = tuple(mesh.get_group(dim) for dim in cut)
    ranks, rank = 1, 0
    for dim in cut:
        ranks, rank = ranks * mesh.size(dim), rank * mesh.size(dim) + mesh.get_local_rank(dim)
    if len(cut) > 1 or not _is_by_rows(placements[cut[0]]):
        own = min(1, local_of(param).numel())
        return Share(rank * -(-param.numel() // ranks), ranks, rank, own, groups, mesh.device_type)
    rows = param.shape[0]
    row = math.prod(param.shape[1:])
    chunk = -(-rows // ranks)  # as torch.chunk: the last ranks may have fewer rows, or none
    full, rest = divmod(rows, chunk) if chunk else (0, 0)
    tiles, tiles_of_rest = tile_count(chunk * row * parts), tile_count(rest * row * parts)
    return Share(
        min(rank * chunk, rows) * row,
        full * tiles + tiles_of_rest,
        rank * tiles,
        tiles if rank < full else tiles_of_rest if rank == full else 0,
        groups,
        mesh.device_type,
    )


def first_element_of(param: torch.Tensor) -> int:
    """The number of this rank's first element among the parameter's."""
    return share_of(param).first_element if is_dtensor(param) else 0


def _is_by_rows(placement: Any) -> bool:
    """Whether it is just ``Shard(0)``; a strided one is of another class, or a subclass."""
    return type(placement).__name__ == "Shard" and placement.dim == 0


class Norms:
    """The partial norms of all gradients, on all ranks, added up in one order.

    Each rank writes its own into a vector of zeros with a place for every one of them, and the
    vectors are added up over the ranks: one collective call for each process group. A zero changes
    no bit of what it is added to, so that the order in which ranks are added does not matter; the
    order that does is that of the vector, tile after tile and gradient after gradient. Every rank
    joins, whatever it has of the parameters and whether they have gradients.
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = list(params)
        shares = [share_of(param) for param in params]
        self._counts = [share.slots for share in shares]
        *starts, self._count = itertools.accumulate(self._counts, initial=0)
        self._firsts = [start + share.first for start, share in zip(starts, shares, strict=True)]
        self._owns = [share.own for share in shares]
        places: dict[Any, list[np.ndarray]] = {}
        self._devices: dict[Any, str] = {}
        for start, share in zip(starts, shares, strict=True):
            for group in share.groups:
                places.setdefault(group, []).append(np.arange(start, start + share.slots))
                self._devices[group] = share.device
        self._places = {group: np.concatenate(of) for group, of in places.items()}

    @property
    def are_shared(self) -> bool:
        """Whether any parameter is sharded over ranks."""
        return bool(self._places)

    def total(self, largest: bool, plan: _core.Plan | None = None) -> float:
        """The sum of squares, or the largest magnitude, of all gradients on all ranks.

        Args:
            largest: Whether it is the latter.
            plan: Of these parameters, which has just matched: it reads those that it updates.
        """
        slots = np.zeros(self._count)
        threads = torch.get_num_threads()
        which: Iterable[int] = range(len(self._params))
        if plan is not None:
            at = slots.ctypes.data
            which = plan.write_norms(at, self._firsts, self._owns, largest, threads)
        self._write(slots, which, largest, threads)
        for group, places in self._places.items():
            there = torch.from_numpy(slots[places]).to(self._devices[group])
            torch.distributed.all_reduce(there, group=group)
            slots[places] = there.cpu().numpy()
        return _core.total_of_tiles(slots.ctypes.data, self._counts, largest)

    def _write(self, slots: np.ndarray, which: Iterable[int], largest: bool, threads: int) -> None:
        """Writes the partial norms of some of the parameters to their places."""
        by_kernels: dict[torch.device, dict[int, torch.Tensor]] = {}
        for index in which:
            param, at = self._params[index], self._firsts[index]
            if param.grad is None or not self._owns[index]:
                continue
            grad = _placed_alike(param)
            memory = clipping.memory_of(grad, local_of(param))
            if memory is None:
                slots[at] = float(clipping.by_operations(grad, largest))
            else:
                by_kernels.setdefault(memory.device, {})[index] = memory
        for device, memories in by_kernels.items():
            tiles, counts = clipping.tiles_of([*memories.values()], largest, device)
            begin = 0
            for index, count in zip(memories, counts, strict=True):
                at, mine = self._firsts[index], tiles[begin : begin + count]
                begin += count
                if self._owns[index] == count:
                    slots[at : at + count] = mine
                else:
                    slots[at] = _core.total_of_tiles(mine.ctypes.data, [count], largest)


def _placed_alike(param: torch.Tensor) -> torch.Tensor:
    """What lies on this rank of a gradient, once it is placed as its parameter is."""
    grad: Any = param.grad
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local_of(grad)


def norms_of(params: Sequence[torch.Tensor]) -> Norms | None:
    """The norms of parameters some of which are sharded over ranks, or None where none is."""
    norms = Norms(params) if any(map(is_dtensor, params)) else None
    return norms if norms is not None and norms.are_shared else None


def total(params: Sequence[torch.Tensor], largest: bool) -> float:
    """The sum of squares, or the largest magnitude, of the gradients that there are."""
    norms = norms_of(params)
    return clipping.total(params, largest) if norms is None else norms.total(largest)
