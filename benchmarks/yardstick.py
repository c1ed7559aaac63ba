"""Holds the hand-written value types against the compiler's own vectorisation.

    python benchmarks/yardstick.py [--rule adam] [--dtype float32] [--isa avx512] [--json FILE]

Builds the extension, with the scalar loop compiled for each instruction set besides, in a
temporary directory, and runs both on one thread: in the second-level cache and from memory. Says
where the compiler's is faster by more than 3 %; the exit code is 1 if it is anywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import pybind11
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flatstep._torch import zeros_flat

if TYPE_CHECKING:
    from flatstep.profiling.measure import Timing

ROOT = Path(__file__).parent.parent
AUTO = "-auto"
TOLERATED = 0.03
CACHE_BYTES = 1 << 19  # of all arrays together: most second-level caches hold them
MEMORY_ELEMENTS = 1 << 24
SECONDS = 0.25  # for one comparison
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
         "alpha": 0.99, "momentum": 0.9, "dampening": 0.1}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel: a rule with its flags, on one dtype."""

    rule: dict[str, Any]
    flags: int
    states: int
    layout: int
    dtype: str

    def __str__(self) -> str:
        flags = [name for bit, name in enumerate(self.rule["flags"]) if self.flags >> bit & 1]
        return " ".join([self.rule["name"], *flags])


@dataclass
class Comparison:
    """A kernel by hand and by the compiler, on the same arrays."""

    isa: str
    variant: str
    dtype: str
    place: str
    hand: Timing
    auto: Timing

    @property
    def medians(self) -> float:
        return self.hand.median / self.auto.median

    @property
    def least(self) -> float:
        return self.hand.least / self.auto.least

    @property
    def slower(self) -> bool:
        """By the medians and by the shortest times: one of them may be another process's doing."""
        return min(self.medians, self.least) > 1 + TOLERATED


def build(into: Path) -> ModuleType:
    """Builds the extension with the compiler's instruction sets, in place of flatstep's own."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        raise typer.BadParameter("this needs cmake: pip install cmake")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(into), "-DFLATSTEP_YARDSTICK=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", str(into), "--parallel", str(os.cpu_count())]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [library] = into.glob("_core*.so")
    spec = importlib.util.spec_from_file_location("flatstep._core", library)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    sys.modules["flatstep._core"] = core
    spec.loader.exec_module(core)
    return core


def variants(core: ModuleType, rules: list[str] | None, dtypes: list[str] | None) -> list[Variant]:
    """Every kernel, or those of the given rules and dtypes; those of one dtype side by side."""
    return [
        Variant(rule, flags, len(states), layout, dtype)
        for layout, (dtype, *others) in enumerate(core.layouts())
        if {dtype} == {*others} and (not dtypes or dtype in dtypes)
        for rule in core.rules()
        if not rules or rule["name"] in rules
        for flags, states in rule["variants"]
    ]


def pairs(core: ModuleType, isas: list[str] | None) -> list[str]:
    """The instruction sets that have both kinds of kernels here."""
    supported = {name for name, there in core.isas() if there}
    both = sorted(name for name in supported if name + AUTO in supported)
    return [name for name in both if not isas or name in isas]


class Arrays:
    """A parameter, its gradient and states."""

    def __init__(self, core: ModuleType, dtype: str, states: int, count: int):
        self.core, self.count = core, count
        self.all = [zeros_flat(count, getattr(torch, dtype)) for _ in range(2 + states)]
        for array in self.all:
            array.uniform_(0.5, 1)

    def step(self, variant: Variant, isa: str) -> Callable[[], None]:
        """An update on this thread, by one instruction set's kernel."""
        use, update = self.core.use_isa, self.core.update
        param, grad, *states = (array.data_ptr() for array in self.all)
        hyper = [HYPER[name] for name in variant.rule["hyper"]]
        how = (variant.rule["name"], variant.flags, variant.layout)

        def call() -> None:
            use(isa)
            update(*how, param, grad, states[: variant.states], self.count, hyper, 5, 1.0, 1)

        return call

    def check(self, variant: Variant, isa: str) -> None:
        """Makes sure that both kernels give the same bytes."""
        start = [array.clone() for array in self.all]
        after = []
        for name in (isa, isa + AUTO):
            for array, values in zip(self.all, start, strict=True):
                array.copy_(values)
            self.step(variant, name)()
            after.append([array.clone() for array in self.all])
        for hand, auto in zip(*after, strict=True):
            if not torch.equal(hand.view(torch.uint8), auto.view(torch.uint8)):
                raise SystemExit(f"{variant}, {variant.dtype}: {isa} and {isa}{AUTO} disagree")


def compare(core: ModuleType, chosen: list[Variant], isas: list[str]) -> Iterator[Comparison]:
    from flatstep.profiling.measure import Race

    for place in ("cache", "memory"):
        arrays: dict[tuple[str, int], Arrays] = {}
        for variant in track(chosen, f"from {place}", transient=True):
            key = (variant.dtype, variant.states)
            if key not in arrays:
                size = getattr(torch, variant.dtype).itemsize * (2 + variant.states)
                count = CACHE_BYTES // size if place == "cache" else MEMORY_ELEMENTS
                arrays = {k: a for k, a in arrays.items() if k[0] == variant.dtype}
                arrays[key] = Arrays(core, variant.dtype, variant.states, count)
            for isa in isas:
                arrays[key].check(variant, isa)
                names = (isa, isa + AUTO)
                for seconds in (SECONDS, 5 * SECONDS):  # look twice before saying slower
                    race = Race({name: arrays[key].step(variant, name) for name in names})
                    race.run(seconds, None, lambda done: None)
                    hand, auto = (race.timings()[name] for name in names)
                    found = Comparison(isa, str(variant), variant.dtype, place, hand, auto)
                    if not found.slower:
                        break
                yield found


def show(console: Console, comparisons: list[Comparison]) -> None:
    """A line for each kernel, worst first, of those where the compiler wins; else the extremes."""
    table = Table("isa", "rule", "dtype", "from", "hand ÷ auto", "of the least", box=None)
    ordered = sorted(comparisons, key=lambda c: min(c.medians, c.least), reverse=True)
    slower = [c for c in ordered if c.slower]
    for c in slower or ordered[:5]:
        ratios = (f"{c.medians:.3f}", f"{c.least:.3f}")
        table.add_row(c.isa, c.variant, c.dtype, c.place, *ratios, style="red" if c.slower else "")
    console.print(table)
    if not slower:
        console.print(
            f"by hand is nowhere more than {TOLERATED:.0%} slower in {len(comparisons)} "
            "comparisons; above are the five closest"
        )


def main(
    rule: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    isa: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """Compare the hand-written kernels with the compiler's vectorisation of the scalar loop."""
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        with console.status("building"):
            core = build(Path(directory))
        chosen, isas = variants(core, rule, dtype), pairs(core, isa)
        if not chosen or not isas:
            raise typer.BadParameter("nothing to compare on this processor")
        comparisons = list(compare(core, chosen, isas))
    show(console, comparisons)
    if json_file is not None:
        found = [{**asdict(c), "medians": c.medians, "least": c.least} for c in comparisons]
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if any(c.slower for c in comparisons):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
