"""How much memory a case needs, and how much there is."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flatstep.profiling.implementations import states_kept
from flatstep.profiling.workloads import WORKLOADS, Workload

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
TELLABLE = 4_000_000

if TYPE_CHECKING:
    from flatstep.profiling.device import Device


def arrays_needed(optimizer: str, device: Device, named: int = 0) -> int:
    """How many arrays as large as the parameters are alive at once at most.

    Args:
        optimizer: The optimizer's name.
        device: Where they are.
        named: How many optimizers beside ours and torch's have tensors and states of their own.
    """
    states = states_kept(optimizer)
    tensors_and_gradients = 2 * 2  # apart and in the flat buffer
    kept = 3 * states  # flatstep's two, and one for all of torch's paths
    temporaries = 2  # of torch's foreach path
    kept += (2 + states) * named
    return tensors_and_gradients + kept + temporaries + device.limit_arrays(states)


def bytes_needed(
    workload: Workload, optimizer: str, dtype: torch.dtype, device: Device, named: int = 0
) -> int:
    """What a case needs at once at most."""
    arrays = arrays_needed(optimizer, device, named)
    return workload.parameters * dtype.itemsize * arrays + device.limit_bytes


def bytes_available() -> int | None:
    """What the host's system can give, or None where it does not tell."""
    found = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        found += [1024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+) kB", meminfo)]
        group = Path("/sys/fs/cgroup")  # of a container
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        found.append(int((group / "memory.max").read_text()) - int(used[1] if used else 0))
    except (OSError, ValueError):
        pass
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


class Watch:
    """The most memory that this process has had since the watch began.

    Linux keeps the highest count of a process's pages, and lets the process set it back: what a
    step takes and gives back within itself is seen too, whoever allocates it. Free memory that the
    C library holds goes back to the system first: what a step takes out of it is then seen as well.
    The count is exact to some pages for each core, and code that is run for the first time takes
    pages too: less than :data:`TELLABLE` is nothing.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError):
            return  # of a system with another C library
        trim(0)
        try:
            CLEAR_REFS.write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            return

    def most_bytes(self) -> int | None:
        """What was in use at most, over what was in use at first; None where nobody can tell."""
        if self._before is None:
            return None
        taken = (_status("VmHWM") or 0) - self._before
        return taken if taken >= TELLABLE else 0


def _status(name: str) -> int | None:
    """One of the counts of memory that Linux has of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def refusal(
    workload: Workload,
    optimizer: str,
    dtype: torch.dtype,
    device: Device,
    named: int = 0,
) -> str | None:
    """Why a case does not fit and what would, or None where it fits."""
    missing = shortage(workload, optimizer, dtype, device, named)
    available = device.bytes_available()
    if missing is None or available is None:
        return None
    spare = max(0, available - device.limit_bytes)
    most = spare // (dtype.itemsize * arrays_needed(optimizer, device, named))
    fitting = [name for name, known in WORKLOADS.items() if known.parameters <= most]
    choices = [f"a model of up to {most / 1e6:.3g} M parameters"]
    if fitting:
        choices.append(f"--workload {' or '.join(fitting)}")
    if dtype.itemsize > 2 and workload.parameters <= most * dtype.itemsize // 2:
        choices.append("--dtype bfloat16")
    return f"{missing}; what fits: {', '.join(choices)}"


def shortage(
    workload: Workload, optimizer: str, dtype: torch.dtype, device: Device, named: int = 0
) -> str | None:
    """How much memory is wanted and how much is there, or None where it is enough."""
    needed = bytes_needed(workload, optimizer, dtype, device, named)
    available = device.bytes_available()
    if available is None or needed <= available:
        return None
    return f"needs {needed / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are available"
