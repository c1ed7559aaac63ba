"""The paths of torch's own optimizers, beside which ``verify`` and ``profile`` set flatstep."""

from __future__ import annotations

import inspect

import torch

PATHS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def paths_of(optimizer: type[torch.optim.Optimizer]) -> dict[str, dict[str, bool]]:
    """Those paths that an optimizer of torch's has, with the options that choose them."""
    accepted = inspect.signature(optimizer).parameters.keys()
    return {path: options for path, options in PATHS.items() if options.keys() <= accepted}
