"""The implementations of a rule that are on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatstep.accuracy.truth import CLASSES
from flatstep.subjects import Subject
from flatstep.torch_paths import paths_of

# Of flatstep's options those that keep more of a 16-bit weight; f32: in float32 states.
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "bfloat16": {
        "split": {"master": "split"},
        "split, f32": {"master": "split", "state_dtype": torch.float32},
        "stochastic, f32": {"rounding": "stochastic", "state_dtype": torch.float32},
    },
    "float16": {
        "master, f32": {"master": "float32", "state_dtype": torch.float32},
    },
}
# Classes of other packages, by rule and name; taken where the package is installed.
PEERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "adam": {
        "DeepSpeedCPUAdam": ("deepspeed.ops.adam:DeepSpeedCPUAdam", {"adamw_mode": False}),
        "bitsandbytes Adam32bit": ("bitsandbytes.optim:Adam32bit", {}),
    },
    "adamw": {
        "DeepSpeedCPUAdam": ("deepspeed.ops.adam:DeepSpeedCPUAdam", {"adamw_mode": True}),
        "bitsandbytes AdamW32bit": ("bitsandbytes.optim:AdamW32bit", {}),
    },
    "rmsprop": {"bitsandbytes RMSprop32bit": ("bitsandbytes.optim:RMSprop32bit", {})},
    "sgd": {"bitsandbytes SGD32bit": ("bitsandbytes.optim:SGD32bit", {})},
}


@dataclass(frozen=True)
class Implementation:
    """A class with its options, under the name that tables give it."""

    name: str
    subject: Subject

    @property
    def package(self) -> str:
        """The package that it is from."""
        return self.subject.path.partition(":")[0].partition(".")[0]


def implementations(
    rule: str, dtype: str, subjects: Sequence[Subject] = ()
) -> list[Implementation]:
    """flatstep's, torch's paths, other packages' that are installed, and those of ``subjects``.

    No package but torch is imported.
    """
    cls = CLASSES[rule].__name__
    modes: dict[str, dict[str, Any]] = {"flatstep": {}}
    modes |= {f"flatstep {name}": options for name, options in MODES.get(dtype, {}).items()}
    torchs = paths_of(getattr(torch.optim, cls))
    paths = {f"torch {name}": options for name, options in torchs.items()}
    named = {
        **{name: Subject(f"flatstep:{cls}", rule, options) for name, options in modes.items()},
        **{name: Subject(f"torch.optim:{cls}", rule, options) for name, options in paths.items()},
        **{name: Subject(path, rule, options) for name, (path, options) in PEERS[rule].items()},
        **{subject.label: subject for subject in subjects if subject.rule == rule},
    }
    found = [Implementation(name, subject) for name, subject in named.items()]
    return [one for one in found if one.subject in subjects or _is_installed(one.package)]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
