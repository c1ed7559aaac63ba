"""The two doors into torch that need none of its headers: its tensors' memory and its threads."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from flatstep import _core

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
LIBRARY = (
    Path(torch.__file__).parent
    / "lib"
    / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
)

# torch.dtype of each name in _core.layouts(); complex numbers are pairs of their parts.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for layout in _core.layouts() for name in layout
}
STORED: dict[torch.dtype, str] = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.complex64: "float32",
    torch.complex128: "float64",
}
LAYOUT: dict[tuple[str, str, str], int] = {
    layout: index for index, layout in enumerate(_core.layouts())
}

HUGE_PAGE = 2 << 20  # bytes

# Of mmap.mmap; elsewhere than on Unix every mapping without a file is like this.
_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)

dtensor: type | None = None

_increments_many = "Iterable" in str(
    getattr(torch.autograd.graph.increment_version, "__annotations__", {}).get("tensor", "")
)


def connect() -> None:
    """Finds both doors; where torch is too old for one, another way serves."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    _core.connect(exchange, torch.Tensor, torch.nn.Parameter)
    open_handles = getattr(
        getattr(torch._C, "_aoti", None), "unsafe_alloc_void_ptrs_from_tensors", None
    )
    _core.connect_handles(str(LIBRARY), open_handles)
    _core.use_torch_threads(str(LIBRARY))


def connect_dtensor() -> None:
    """Learns of DTensor once torch has loaded it: that takes a second that few need."""
    global dtensor
    module = sys.modules.get("torch.distributed.tensor")
    if not hasattr(module, "DTensor"):
        module = sys.modules.get("torch.distributed._tensor")  # its name in torch 2.4
    dtensor = getattr(module, "DTensor", None)
    if dtensor is not None:
        _core.connect_dtensor(dtensor)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor, as far as that class was known at the last step."""
    return type(tensor) is dtensor


def _increment_each(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


# Tells autograd that the tensors' memory has changed, so that it refuses a stale backward.
increment_version: Callable[[Iterable[torch.Tensor]], None] = (
    torch.autograd.graph.increment_version if _increments_many else _increment_each
)


Arguments = tuple[str, int, int, int, int, Sequence[int], int, Sequence[float], int, float]


def update_memory(device: torch.device, arguments: Arguments, **extras: Any) -> None:
    """One update of plain memory on a device; the arguments are those of ``_core.update``."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        index = torch.cuda.current_device() if device.index is None else device.index
        _core.update_on_gpu(*arguments, index, stream, **extras)
    else:
        _core.update(*arguments, torch.get_num_threads(), **extras)


def _forget_interrupted_backward() -> None:
    """Empties the queue in which torch before 2.13 leaves what a backward that raised was doing.

    What is in it outlives the interpreter, and a buffer of :func:`zeros_flat` would then wait for
    ever for the lock of an interpreter that has gone.
    """
    with torch.inference_mode(False), torch.enable_grad():
        torch.ones((), requires_grad=True).backward()


if VERSION < (2, 13):
    atexit.register(_forget_interrupted_backward)


def zeros_flat(
    count: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    huge_pages: bool = True,
) -> torch.Tensor:
    """Zeros, 1-D and 64-byte aligned, on 2 MiB pages where the system grants them.

    On the CPU it is a mapping of its own, whose pages the system clears when they are first
    touched: by the thread that will use them, and in no pass of their own. Memory from the
    allocator may have been in use before, and then keeps its small pages.

    Raises:
        MemoryError: There is no such amount of memory.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    size = count * dtype.itemsize
    margin = HUGE_PAGE if size >= HUGE_PAGE else 0
    try:
        mapping = mmap.mmap(-1, size + margin, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"{size} bytes for a flat buffer cannot be had: {error}") from error
    start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    offset = -start % HUGE_PAGE if margin else 0
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a system built without them
            mapping.madvise(advice, offset, size)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
