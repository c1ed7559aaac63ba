"""PyTorch's distributed engine, in two processes; the checks are in `distributed_cases`.

On gloo, or with ``pytest tests/test_distributed.py --device cuda`` on NCCL, a GPU for each.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_pair import WORLD, Pair
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch_versions import DTensor, Shard, needs_fully_shard

import flatstep
from flatstep import reference
from flatstep.optim import sharding

if needs_fully_shard.args[0]:
    pytest.skip(needs_fully_shard.kwargs["reason"], allow_module_level=True)

import distributed_cases

ROOT = Path(__file__).parents[1]
TILE = reference.TILE


class Pairs:
    """One pair for all tests, made again where one has died."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pair: Pair | None = None

    def get(self) -> Pair:
        if self._pair is None or not self._pair.is_alive:
            self.close()
            self._pair = Pair(self._device)
        return self._pair

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()


@pytest.fixture(scope="module")
def pairs(pytestconfig: pytest.Config) -> Iterator[Pairs]:
    device = pytestconfig.getoption("--device")
    if device == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"{WORLD} ranks need as many GPUs; there are {torch.cuda.device_count()}")
    pairs = Pairs(device)
    yield pairs
    pairs.close()


@pytest.mark.parametrize("name", distributed_cases.CHECKS)
def test_on_two_ranks(name: str, pairs: Pairs) -> None:
    answers = pairs.get().run(name)
    assert not any(answers), "\n".join(f"rank {r}: {text}" for r, text in enumerate(answers))


# ---- more ranks than two, one after the other in this process


@contextmanager
def pretended_rank(rank: int, world: int) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def shards_of(fulls: list[Tensor], rank: int, mesh: DeviceMesh) -> list[Tensor]:
    """Of each tensor the rows that this rank has, as torch deals them out."""
    found = []
    for full in fulls:
        rows = full.chunk(mesh.size())
        own = rows[rank] if rank < len(rows) else full[:0]
        found.append(
            DTensor.from_local(
                own.clone(),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=full.shape,
                stride=full.stride(),
            )
        )
    return found


def norm_on_every_rank(
    fulls: list[Tensor], world: int, norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """Each rank's ``grad_norm``; what they send is added up in the order of the ranks reversed."""
    sent: list[Tensor] = []
    norms: list[float] = []

    def step(rank: int) -> None:
        with pretended_rank(rank, world) as mesh:
            params = [Parameter(shard) for shard in shards_of(fulls, rank, mesh)]
            for param, grad in zip(params, shards_of(fulls, rank, mesh), strict=True):
                param.grad = grad
            opt = flatstep.SGD(params, max_grad_norm=1.0, norm_type=norm_type)
            opt.step()
            assert opt.grad_norm is not None
            norms.append(opt.grad_norm.item())

    def send(tensor: Tensor, group: object) -> None:
        sent.append(tensor.clone())

    def receive(tensor: Tensor, group: object) -> None:
        tensor.copy_(sum(reversed(sent), torch.zeros_like(tensor)))

    for do in (send, receive):
        monkeypatch.setattr(dist, "all_reduce", do)
        for rank in range(world):
            step(rank)
    assert len(sent) == world
    return norms[world:]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_does_not_depend_on_the_number_of_ranks(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where shards are cut at tile boundaries; 3, 5 and 6 ranks leave some with fewer rows."""
    torch.set_default_dtype(torch.float64)  # of grad_norm: all its bits
    fulls = [torch.randn(8, TILE), torch.randn(2, 3, TILE), torch.randn(7, TILE // 2, 2)]
    alone = reference.norm([(full.numpy(), "float64") for full in fulls], norm_type)
    for world in (1, 2, 3, 4, 5, 6, 8):
        assert norm_on_every_rank(fulls, world, norm_type, monkeypatch) == [alone] * world


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_uneven_shards_are_added_rank_after_rank(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(5, 3), (1,), (7, TILE // 3), (0, 2), (3, 0), (11,)]
    fulls = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    shards = [list(full.chunk(world)) for full in fulls]
    expected = distributed_cases.defined_norm(shards, 2.0)
    assert norm_on_every_rank(fulls, world, 2.0, monkeypatch) == [expected] * world
    for rank in range(world):
        with pretended_rank(rank, world) as mesh:
            for full, shard in zip(fulls, shards_of(fulls, rank, mesh), strict=True):
                before = sum(part.numel() for part in full.chunk(world)[:rank])
                assert sharding.share_of(shard).first_element == before


@pytest.mark.slow  # ten processes, one after the other in pairs
def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    options = {"layers": 1, "vocabulary": 64, "tensors": 5, "rounds": 2, "json": kept}
    line = [sys.executable, str(ROOT / "benchmarks" / "distributed.py")]
    line += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    found = json.loads(kept.read_text())
    met = [f["target"] is None or f["found"] <= f["target"] for f in found["figures"]]
    assert ended.returncode == (not all(met)), ended.stderr
    assert found["setting"]["ranks"] == 2
    measured = found["seconds and bytes"]
    assert {*measured} == {"update", "many", "whole", "memory"}
    assert all(value > 0 for of in measured.values() for value in of.values())
    assert "flatstep" in ended.stdout


def test_the_benchmark_refuses_gpus_that_are_not_there() -> None:
    line = [sys.executable, str(ROOT / "benchmarks" / "distributed.py")]
    line += ["--device", "cuda", "--ranks", str(torch.cuda.device_count() + 1)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 2
    assert "--device" in ended.stderr
