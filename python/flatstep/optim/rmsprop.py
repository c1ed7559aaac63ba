"""RMSprop."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from flatstep.optim.base import Optimizer, validate_implementation
from flatstep.optim.extras import Extras
from flatstep.optim.rules import Variant, flag_bits

_FLAGS = flag_bits("rmsprop")
_MOMENTUM, _CENTERED, _L2 = _FLAGS["momentum"], _FLAGS["centered"], _FLAGS["l2"]


class RMSprop(Optimizer):
    r"""RMSprop in one pass over memory, in place of :class:`torch.optim.RMSprop`.

    With :math:`g` the gradient (negated under ``maximize``; plus :math:`\lambda p` for weight
    decay):

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        a &\leftarrow a + (1 - \alpha)(g - a), \quad
            \tilde v = \max(v - a^2, 0) \quad\text{(centered; else } \tilde v = v) \\
        b &\leftarrow \mu b + g / (\sqrt{\tilde v} + \epsilon) \\
        p &\leftarrow p - \gamma b

    without momentum the last two lines are :math:`p \leftarrow p - \gamma g / (\sqrt{\tilde v} +
    \epsilon)`. torch does not clamp :math:`v - a^2` at zero and reaches NaN on constant gradients;
    that is the one deviation from it. Source: Hinton, lecture 6 of "Neural Networks for Machine
    Learning", 2012; centered: Graves, 2013 (arXiv:1308.0850); the order of operations is torch's.

    Args:
        params: As in :class:`flatstep.Adam`.
        lr: Learning rate, a number or a tensor of one element.
        alpha: Decay rate of the averages.
        eps: Added to the root.
        weight_decay: L2 weight decay :math:`\lambda`.
        momentum: Momentum :math:`\mu`.
        centered: Whether to divide by the standard deviation rather than the root mean square.
        capturable: Accepted as in torch.
        foreach: Accepted as in torch; changes nothing.
        maximize: Whether to go up the gradient.
        differentiable: Whether autograd follows the step (through torch's operations, unfused).
        fused: Which torch's RMSprop does not have: True lets ``GradScaler`` leave unscaling and
            overflow checks to the step.
        **options: What torch does not have, each in all groups or in one: see
            :class:`flatstep.Extras`.

    Raises:
        ValueError: An option out of range, in torch's words, or two that exclude each other.
    """

    rule = "rmsprop"
    sparse_message = "RMSprop does not support sparse gradients"
    later_options: ClassVar = {
        "momentum": 0,
        "centered": False,
        "foreach": None,
        "maximize": False,
        "differentiable": False,
        "capturable": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[Extras],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        if fused is not None:  # torch's groups have no such key
            defaults["fused"] = fused
            validate_implementation(defaults)
        super().__init__(params, defaults, options)

    @staticmethod
    def validate(options: dict[str, Any]) -> None:
        """Raises torch's errors for options that are out of range."""
        lr = options["lr"]
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not options["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        for name in ("momentum", "weight_decay", "alpha"):
            if not options[name] >= 0.0:
                raise ValueError(f"Invalid {name} value: {options[name]}")

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        momentum, decay = group["momentum"], group["weight_decay"]
        flags = _MOMENTUM if momentum > 0 else 0
        if group["centered"]:
            flags |= _CENTERED
        if decay != 0:
            flags |= _L2
        return Variant(flags, [group["lr"], group["alpha"], group["eps"], decay, momentum])
