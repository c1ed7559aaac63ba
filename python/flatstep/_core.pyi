"""
The kernels of flatstep. Addresses and sizes are taken at their word: the Python package checks them.
"""

from __future__ import annotations
import collections.abc
import typing

__all__: list[str] = [
    "Plan",
    "connect",
    "connect_dtensor",
    "connect_handles",
    "gpu_absence",
    "gpu_count",
    "isa",
    "isas",
    "layouts",
    "rules",
    "traffic",
    "update",
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
        states: list,
        step: typing.Any,
        first_step: bool,
        cleared: typing.Any,
    ) -> None: ...
    def add_other(
        self,
        group: typing.SupportsInt | typing.SupportsIndex,
        param: typing.Any,
        without_gradient: bool,
    ) -> None: ...
    def begin(
        self, flags: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> None: ...
    def devices(self) -> list[int]: ...
    def end(self, state: dict) -> None: ...
    def matches(
        self,
        groups: list,
        state: dict,
        flags: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> bool: ...
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
            ],
        ] = {},
    ) -> None: ...
    def updated(self) -> list: ...
    @property
    def segments(self) -> int: ...

def connect(exchange: typing.Any, tensor_type: typing.Any, parameter_type: typing.Any) -> None: ...
def connect_dtensor(dtensor_type: typing.Any) -> None: ...
def connect_handles(library: str | None, open_handles: typing.Any) -> None: ...
def gpu_absence() -> str: ...
def gpu_count() -> int: ...
def isa() -> str: ...
def isas() -> list: ...
def layouts() -> list: ...
def rules() -> list: ...
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
) -> None: ...
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
) -> None: ...
def use_isa(name: str) -> None: ...
def use_torch_threads(library: str | None) -> bool: ...
