"""SGD with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from flatstep.optim.base import Optimizer, validate_implementation
from flatstep.optim.extras import Extras
from flatstep.optim.rules import Variant, flag_bits

_FLAGS = flag_bits("sgd")
_MOMENTUM, _NESTEROV, _L2 = _FLAGS["momentum"], _FLAGS["nesterov"], _FLAGS["l2"]


class SGD(Optimizer):
    r"""SGD with momentum in one pass over memory, in place of :class:`torch.optim.SGD`.

    With :math:`g` the gradient (negated under ``maximize``; plus :math:`\lambda p` for weight
    decay):

    .. math::
        b &\leftarrow \mu b + (1 - \tau) g \quad (b \leftarrow g \text{ the first time}) \\
        p &\leftarrow p - \gamma b

    with ``nesterov`` the last line is :math:`p \leftarrow p - \gamma (g + \mu b)`, without momentum
    :math:`p \leftarrow p - \gamma g`. Source: Sutskever et al., 2013 ("On the importance of
    initialization and momentum in deep learning"); the form and the order of operations are
    torch's.

    Args:
        params: As in :class:`flatstep.Adam`; gradients may be sparse (through torch's operations).
        lr: Learning rate, a number or a tensor of one element.
        momentum: Momentum :math:`\mu`.
        dampening: Dampening :math:`\tau` of momentum.
        weight_decay: L2 weight decay :math:`\lambda`.
        nesterov: Whether to look ahead.
        maximize: Whether to go up the gradient.
        foreach: Accepted and validated as in torch; changes nothing.
        differentiable: Whether autograd follows the step (through torch's operations, unfused).
        fused: As in torch, True lets ``GradScaler`` leave unscaling and overflow checks to the
            step; otherwise changes nothing, every step is fused.
        **options: What torch does not have, each in all groups or in one: see
            :class:`flatstep.Extras`.

    Raises:
        ValueError: An option out of range, in torch's words, or two that exclude each other.
        RuntimeError: Options that exclude each other, in torch's words.
    """

    rule = "sgd"
    sparse_message = None
    counts_steps = False
    later_options: ClassVar = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    @staticmethod
    def validate(options: dict[str, Any]) -> None:
        """Raises torch's errors for options that are out of range."""
        lr, momentum, dampening = options["lr"], options["momentum"], options["dampening"]
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for name in ("momentum", "weight_decay"):
            if not options[name] >= 0.0:
                raise ValueError(f"Invalid {name} value: {options[name]}")
        if dampening != dampening:
            raise ValueError(f"Invalid dampening value: {dampening}")
        if options["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        validate_implementation(options)

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        momentum, decay = group["momentum"], group["weight_decay"]
        flags = 0
        if momentum != 0:
            flags = _MOMENTUM | (_NESTEROV if group["nesterov"] else 0)
        if decay != 0:
            flags |= _L2
        return Variant(flags, [group["lr"], momentum, group["dampening"], decay])
