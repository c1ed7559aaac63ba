"""
The kernels of flatstep. Addresses and sizes are taken at their word: the Python package checks them.
"""

from __future__ import annotations
import collections.abc
import typing

__all__: list[str] = [
    "EXTRAS",
    "Plan",
    "connect",
    "connect_dtensor",
    "connect_handles",
    "gpu_absence",
    "gpu_count",
    "isa",
    "isas",
    "judge_norm_on_gpu",
    "layouts",
    "norms",
    "norms_on_gpu",
    "rules",
    "tile_norms",
    "total_of_tiles",
    "traffic",
    "update",
    "update_group",
    "update_on_gpu",
    "use_isa",
    "use_torch_threads",
]

class Plan:
    def __init__(self, rule: str) -> None: ...
    def add(
        self,
        group: typing.SupportsInt | typing.SupportsIndex,
        param: typing.Any,
        first: typing.SupportsInt | typing.SupportsIndex,
        states: list,
        step: typing.Any,
        first_step: bool | None,
        cleared: typing.Any,
    ) -> None: ...
    def add_other(
        self,
        group: typing.SupportsInt | typing.SupportsIndex,
        param: typing.Any,
        without_gradient: bool,
    ) -> None: ...
    def begin(
        self, variants: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> None: ...
    def devices(self) -> list[int]: ...
    def end(self, state: dict) -> None: ...
    def matches(
        self,
        groups: list,
        state: dict,
        variants: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> bool: ...
    def norm(
        self,
        largest: bool,
        others: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> float: ...
    def norm_on_gpu(
        self,
        device: typing.SupportsInt | typing.SupportsIndex,
        largest: bool,
        stream: typing.SupportsInt | typing.SupportsIndex,
        room: typing.SupportsInt | typing.SupportsIndex,
        found: typing.SupportsInt | typing.SupportsIndex,
        overflow: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def norm_room(self, device: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def release(self) -> None: ...
    def step(
        self,
        hyper: collections.abc.Sequence[
            collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]
        ],
        scales: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        threads: typing.SupportsInt | typing.SupportsIndex,
        inputs: collections.abc.Mapping[
            typing.SupportsInt | typing.SupportsIndex,
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[
                    collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, bool]]
                ],
                typing.SupportsInt | typing.SupportsIndex,
                bool,
            ],
        ] = {},
        extras: collections.abc.Sequence[
            tuple[
                typing.SupportsFloat | typing.SupportsIndex,
                typing.SupportsFloat | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsFloat | typing.SupportsIndex,
            ]
        ] = [],
    ) -> None: ...
    def updated(self) -> list: ...
    def write_norms(
        self,
        slots: typing.SupportsInt | typing.SupportsIndex,
        places: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        owns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        largest: bool,
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> list[int]: ...
    @property
    def has_stepped(self) -> bool: ...
    @property
    def segments(self) -> int: ...

def connect(exchange: typing.Any, tensor_type: typing.Any, parameter_type: typing.Any) -> None: ...
def connect_dtensor(dtensor_type: typing.Any) -> None: ...
def connect_handles(library: str | None, open_handles: typing.Any) -> None: ...
def gpu_absence() -> str: ...
def gpu_count() -> int: ...
def isa() -> str: ...
def isas() -> list: ...
def judge_norm_on_gpu(
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    found: typing.SupportsInt | typing.SupportsIndex,
    largest: bool,
    skips: bool,
    grad_scale: typing.SupportsInt | typing.SupportsIndex,
    found_inf: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def layouts() -> list: ...
def norms(
    grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    dtypes: collections.abc.Sequence[str],
    counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    largest: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> list[float]: ...
def norms_on_gpu(
    grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    dtypes: collections.abc.Sequence[str],
    counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    largest: bool,
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    room: typing.SupportsInt | typing.SupportsIndex,
    found: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def rules() -> list: ...
def tile_norms(
    grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    dtypes: collections.abc.Sequence[str],
    counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    largest: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> bytes: ...
def total_of_tiles(
    tiles: typing.SupportsInt | typing.SupportsIndex,
    counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    largest: bool,
) -> float: ...
def traffic(
    streams: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    written: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def update(
    rule: str,
    flags: typing.SupportsInt | typing.SupportsIndex,
    layout: typing.SupportsInt | typing.SupportsIndex,
    param: typing.SupportsInt | typing.SupportsIndex,
    grad: typing.SupportsInt | typing.SupportsIndex,
    states: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    count: typing.SupportsInt | typing.SupportsIndex,
    hyper: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    step: typing.SupportsInt | typing.SupportsIndex,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    master: typing.SupportsInt | typing.SupportsIndex = 0,
    average: typing.SupportsInt | typing.SupportsIndex = 0,
    unscale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    average_decay: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    seed: typing.SupportsInt | typing.SupportsIndex = 0,
    count_of_step: typing.SupportsInt | typing.SupportsIndex = 1,
    first: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def update_group(
    rule: str,
    flags: typing.SupportsInt | typing.SupportsIndex,
    params: list,
    grads: list,
    states: list,
    steps: list,
    fresh: list,
    hyper: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    average_decay: typing.SupportsFloat | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    firsts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> bool: ...
def update_on_gpu(
    rule: str,
    flags: typing.SupportsInt | typing.SupportsIndex,
    layout: typing.SupportsInt | typing.SupportsIndex,
    param: typing.SupportsInt | typing.SupportsIndex,
    grad: typing.SupportsInt | typing.SupportsIndex,
    states: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    count: typing.SupportsInt | typing.SupportsIndex,
    hyper: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    step: typing.SupportsInt | typing.SupportsIndex,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    master: typing.SupportsInt | typing.SupportsIndex = 0,
    average: typing.SupportsInt | typing.SupportsIndex = 0,
    unscale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    average_decay: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    seed: typing.SupportsInt | typing.SupportsIndex = 0,
    count_of_step: typing.SupportsInt | typing.SupportsIndex = 1,
    first: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def use_isa(name: str) -> None: ...
def use_torch_threads(library: str | None) -> bool: ...

EXTRAS: dict = {
    "master_copy": 256,
    "master_split": 512,
    "stochastic": 1024,
    "average": 2048,
    "writes_grad": 4096,
}
