"""The command line: ``flatstep profile``, ``compare``, ``verify`` and ``info``."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

TOOLS = ("typer", "rich", "matplotlib", "plotly", "jinja2")  # what the extra `tools` brings
CPUINFO = Path("/proc/cpuinfo")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main() -> None:
    """Runs the command that the arguments name."""
    missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
    if missing:
        print(f"This needs {', '.join(missing)}: pip install 'flatstep[tools]'", file=sys.stderr)
        raise SystemExit(2)
    application()()


def application() -> typer.Typer:
    """The commands, with their options."""
    import typer

    from flatstep.profiling.command import profile
    from flatstep.profiling.compare_command import compare_profiles
    from flatstep.verify.command import verify

    app = typer.Typer(
        help="Optimizers that update a model's parameters in one trip through memory.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    commands: dict[str, Callable[..., None]] = {
        "profile": profile,
        "compare": compare_profiles,
        "verify": verify,
        "info": info,
    }
    for name, command in commands.items():
        app.command(name)(command)
    return app


def info() -> None:
    """Show what flatstep found on this machine, and what it uses."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts().items():
        table.add_row(f"[bold]{name}[/]", value)
    Console(highlight=False).print(table)


def facts() -> dict[str, str]:
    """What flatstep found on this machine, and what it uses, by name."""
    import numpy as np
    import torch

    import flatstep
    from flatstep import _core, _torch

    isas = dict(_core.isas())
    has_table = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    has_pool = _core.use_torch_threads(str(_torch.LIBRARY))
    return {
        "flatstep": flatstep.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "instruction set": f"{flatstep.cpu_isa()} (FLATSTEP_ISA chooses another)",
        "in this build": ", ".join(isas),
        "on this processor": ", ".join(name for name, supported in isas.items() if supported),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads chooses)",
        "pool": "torch's" if has_pool else "flatstep's own: this torch does not lend its threads",
        "tensors": "read through torch's exchange table"
        if has_table
        else "read through their attributes: torch 2.10 and newer have a faster way",
        "huge pages": _huge_pages(),
        "GPUs": str(_core.gpu_count()) if _core.gpu_count() else f"none: {_core.gpu_absence()}",
    }


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        names = re.findall(r"^model name\s*: (.+)", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _huge_pages() -> str:
    try:
        text = HUGE_PAGES.read_text()
    except OSError:
        return "this system does not say"
    setting = "".join(re.findall(r"\[(\w+)\]", text))
    advice = {
        "madvise": "large buffers ask for them",
        "always": "all memory gets them",
        "never": f"to let large buffers have them: echo madvise | sudo tee {HUGE_PAGES}",
    }
    return f"{setting} ({advice[setting]})" if setting in advice else text.strip()
