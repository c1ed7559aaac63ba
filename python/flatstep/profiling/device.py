"""Where updates are measured: how time, memory and the limit are found on a CPU and on a GPU."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from flatstep import _core
from flatstep.profiling import memory
from flatstep.profiling.limit import COPIED_AT_ONCE, Copies, Streams, Traffic
from flatstep.profiling.measure import Stopwatch, on_the_gpu, on_the_host


class Device(ABC):
    """A kind of device, as the profile needs it.

    Attributes:
        name: As it is chosen.
        left_out: What a profile has on another device only, and why not here.
        seconds_per_gigabyte: What an array of the parameters adds to a case's time, roughly.
        limit_bytes: What the limit takes, however large the parameters are.
        where: Where the tensors are.
        title: The hardware's name, where it is not the host's.
        stopwatch: Times a call there.
    """

    name: ClassVar[str]
    left_out: ClassVar[tuple[str, ...]] = ()
    seconds_per_gigabyte: ClassVar[float]
    limit_bytes: ClassVar[int] = 0
    where: torch.device
    title: str | None = None
    stopwatch: Stopwatch

    @staticmethod
    @abstractmethod
    def absence() -> str | None:
        """Why nothing can be measured there, and what to do; None where it can."""

    @abstractmethod
    def traffic(self, size: int) -> Traffic:
        """The limit for arrays of ``size`` bytes."""

    @abstractmethod
    def limit_arrays(self, states: int) -> int:
        """How many arrays as large as the parameters the limit takes."""

    @abstractmethod
    def bytes_available(self) -> int | None:
        """What the device can give, or None where it does not tell."""

    @abstractmethod
    def start_watching(self) -> None:
        """From now on the memory in use is watched, where that can be done."""

    @abstractmethod
    def most_bytes(self) -> int | None:
        """The most memory since :meth:`start_watching`, over what was in use then."""

    def tidy(self) -> None:
        """Gives back what nobody uses any more."""
        gc.collect()


class Cpu(Device):
    """The host."""

    name = "cpu"
    seconds_per_gigabyte = 6.0

    def __init__(self) -> None:
        self.where = torch.device("cpu")
        self.stopwatch = on_the_host
        self._watch: memory.Watch

    @staticmethod
    def absence() -> None:
        """None: it is always there."""

    def traffic(self, size: int) -> Streams:
        """Streams through memory, on each kind of pages."""
        return Streams(size)

    def limit_arrays(self, states: int) -> int:
        """Those of an update, on two kinds of pages."""
        return 2 * (2 + states)

    def bytes_available(self) -> int | None:
        """What the system can give, or None where it does not tell."""
        return memory.bytes_available()

    def start_watching(self) -> None:
        """From now on the memory of this process is watched."""
        self._watch = memory.Watch()

    def most_bytes(self) -> int | None:
        """The most that this process had since then, over what it had then; only Linux tells."""
        return self._watch.most_bytes()


class Cuda(Device):
    """torch's current GPU."""

    name = "cuda"
    left_out = (
        "the whole step: its model is made for a CPU, and would time the launches of backward here",
        "the passes: what they replace, and their limit, are the CPU's here",
        "threads and pages: a GPU divides the work itself, and does not show its pages",
    )
    seconds_per_gigabyte = 0.3
    limit_bytes = 2 * COPIED_AT_ONCE

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self.title = torch.cuda.get_device_name(self.where)
        self.stopwatch = on_the_gpu
        self._before = 0

    @staticmethod
    def absence() -> str | None:
        """Without a GPU, or without kernels for it, torch's own operations would be measured."""
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA: install a build with it "
                "(pytorch.org says how), or leave the device at cpu"
            )
        if not torch.cuda.is_available():
            return (
                "torch finds no GPU here: see that nvidia-smi lists one and that "
                "CUDA_VISIBLE_DEVICES does not hide it, or leave the device at cpu"
            )
        if _core.gpu_count() == 0:
            return (
                f"flatstep has nothing to run there: {_core.gpu_absence()}; a build finds nvcc on "
                "the PATH, and -C cmake.define.FLATSTEP_CUDA=ON insists on it"
            )
        return None

    def traffic(self, size: int) -> Copies:
        """Copies on the device."""
        return Copies(size, self.where)

    def limit_arrays(self, states: int) -> int:
        """None: it takes :attr:`limit_bytes` at most."""
        return 0

    def bytes_available(self) -> int:
        """What the GPU can give: what is free, and what torch holds there without need."""
        free, _ = torch.cuda.mem_get_info(self.where)
        reserved = torch.cuda.memory_reserved(self.where)
        return free + reserved - torch.cuda.memory_allocated(self.where)

    def start_watching(self) -> None:
        """From now on the memory of torch's allocator is watched."""
        torch.cuda.reset_peak_memory_stats(self.where)
        self._before = torch.cuda.memory_allocated(self.where)

    def most_bytes(self) -> int:
        """The most that torch's allocator gave since then, over what was in use then."""
        return torch.cuda.max_memory_allocated(self.where) - self._before

    def tidy(self) -> None:
        """Gives back what nobody uses any more, to the GPU too."""
        super().tidy()
        torch.cuda.empty_cache()


DEVICES: dict[str, type[Device]] = {device.name: device for device in (Cpu, Cuda)}


def device_named(name: str) -> Device:
    """One of :data:`DEVICES`.

    Raises:
        ValueError: For another name, with those that there are, and for one that is not here, with
            what to do.
    """
    if name not in DEVICES:
        raise ValueError(f"no device '{name}'; there are {', '.join(DEVICES)}")
    kind = DEVICES[name]
    absence = kind.absence()
    if absence is not None:
        raise ValueError(f"device '{name}' cannot be measured: {absence}")
    return kind()
