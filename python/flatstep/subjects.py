"""An optimizer class that a user names on a command line, for ``verify`` and ``profile``."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# What a class that calls itself so is expected to do; the first that fits.
RULES_BY_NAME = (
    ("adamw", "adamw"),
    ("adam", "adam"),
    ("rmsprop", "rmsprop"),
    ("sgd", "sgd"),
)
RULES = tuple(rule for _, rule in RULES_BY_NAME)


@dataclass(frozen=True)
class Subject:
    """An optimizer class under test, or beside which something is measured.

    Attributes:
        path: As it was named, "package.module:Class".
        rule: The rule that it claims to follow, as "adamw".
        options: What it is always built with, beside the parameters.
    """

    path: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def build(self) -> Any:
        """The class, or whatever else makes an optimizer of parameters."""
        return resolve(self.path)

    @property
    def label(self) -> str:
        """Its name and options, for people."""
        name = self.path.replace(":", ".")
        return ", ".join([name, *(f"{key}={value}" for key, value in self.options.items())])

    def accepts(self, option: str) -> bool:
        """Whether its signature has an option of this name."""
        parameters = inspect.signature(self.build).parameters.values()
        return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """An optimizer over parameters; ``options`` come before those of the subject."""
        optimizer: torch.optim.Optimizer = self.build(params, **{**self.options, **options})
        return optimizer


def subject(
    path: str,
    options: Sequence[str] = (),
    rule: str | None = None,
    *,
    say_rule: str = "say it with --rule",
) -> Subject:
    """The optimizer that ``path``, as ``package.module:Class``, names.

    The working directory is searched for the module too.

    Args:
        path: Such as "torch.optim:AdamW".
        options: Each as "name=value", the value in Python's notation.
        rule: One of :data:`RULES`; None for the one that the class's name says.
        say_rule: How the user says the rule, for the message where the name does not.

    Raises:
        ValueError: There is no such class, an option cannot be read, or no rule is known.
    """
    found = resolve(path)
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}, not an optimizer class")
    if rule is None:
        name = path.rpartition(":")[2].lower()
        rule = next((known for part, known in RULES_BY_NAME if part in name), None)
        if rule is None:
            raise ValueError(
                f"the name of {path} does not say which rule it follows; {say_rule}, "
                f"one of {', '.join(RULES)}"
            )
    if rule not in RULES:
        raise ValueError(f"no rule '{rule}'; there are {', '.join(RULES)}")
    return Subject(path, rule, dict(map(option, options)))


def subject_of(text: str) -> Subject:
    """The optimizer of one word: ``[rule=]package.module:Class[,name=value]...``.

    >>> subject_of("torch.optim:AdamW,fused=True").label
    'torch.optim.AdamW, fused=True'
    >>> subject_of("adam=mine:Fast,betas=(0.9, 0.95)").options
    {'betas': (0.9, 0.95)}

    Raises:
        ValueError: There is no such class, an option cannot be read, or no rule is known.
    """
    path, *options = _outside_brackets(text)
    rule, equals, after = path.partition("=")
    if equals:
        return subject(after, options, rule)
    return subject(path, options, say_rule=f"say it before, as in RULE={path}")


def _outside_brackets(text: str) -> list[str]:
    """The parts between commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def option(text: str) -> tuple[str, Any]:
    """The name and the value of an option such as "betas=(0.9, 0.95)".

    What is not a value in Python's notation is a string; "torch.float32" is a dtype.

    Raises:
        ValueError: There is no name, or no "=".
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise ValueError(f"'{text}' is not of the form name=value")
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if value.startswith("torch.") and isinstance(dtype, torch.dtype):
        return name, dtype
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def resolve(path: str) -> Any:
    """What ``package.module:callable`` names; the working directory is searched for the module too.

    Raises:
        ValueError: The path is of another form, or nothing has this name.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"'{path}' is not of the form package.module:callable")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # whatever the module raises as it is imported
        raise ValueError(f"{path} cannot be found: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
