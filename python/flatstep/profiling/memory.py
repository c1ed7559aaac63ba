"""How much memory a case needs, and how much there is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flatstep.profiling.implementations import states_kept
from flatstep.profiling.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from flatstep.profiling.device import Device


def arrays_needed(optimizer: str, device: Device) -> int:
    """How many arrays as large as the parameters are alive at once at most."""
    states = states_kept(optimizer)
    tensors_and_gradients = 2 * 2  # apart and in the flat buffer
    kept = 3 * states  # flatstep's two, and one for all of torch's paths
    temporaries = 2  # of torch's foreach path
    return tensors_and_gradients + kept + temporaries + device.limit_arrays(states)


def bytes_needed(workload: Workload, optimizer: str, dtype: torch.dtype, device: Device) -> int:
    """What a case needs at once at most."""
    arrays = arrays_needed(optimizer, device)
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


def refusal(
    workload: Workload,
    optimizer: str,
    dtype: torch.dtype,
    device: Device,
    names: Sequence[str] = tuple(WORKLOADS),
) -> str | None:
    """Why a case does not fit and what would, or None where it fits."""
    needed = bytes_needed(workload, optimizer, dtype, device)
    available = device.bytes_available()
    if available is None or needed <= available:
        return None
    spare = max(0, available - device.limit_bytes)
    most = spare // (dtype.itemsize * arrays_needed(optimizer, device))
    fitting = [name for name in names if WORKLOADS[name].parameters <= most]
    choices = [f"a model of up to {most / 1e6:.3g} M parameters"]
    if fitting:
        choices.append(f"--workload {' or '.join(fitting)}")
    if dtype.itemsize > 2 and workload.parameters <= most * dtype.itemsize // 2:
        choices.append("--dtype bfloat16")
    return (
        f"needs {needed / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are available; "
        f"what fits: {', '.join(choices)}"
    )
