"""Adam and AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from flatstep.optim.base import Optimizer, validate_implementation
from flatstep.optim.extras import Extras
from flatstep.optim.rules import Variant, flag_bits

_FLAGS = flag_bits("adam")
_AMSGRAD, _L2 = _FLAGS["amsgrad"], _FLAGS["l2"]
_TENSOR_LR = "lr as a Tensor is not supported for capturable=False and foreach=True"


class Adam(Optimizer):
    r"""Adam in one pass over memory, in place of :class:`torch.optim.Adam`.

    With :math:`g` the gradient (negated under ``maximize``; plus :math:`\lambda p` for a weight
    decay that is not decoupled) and :math:`t` the number of the step:

    .. math::
        p &\leftarrow p (1 - \gamma\lambda) \quad\text{(decoupled decay)} \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t}
                      \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    ``amsgrad`` takes the largest :math:`v` so far in the last line. Source: Kingma and Ba, 2015
    (arXiv:1412.6980); Reddi et al., 2018 (arXiv:1904.09237); the order of operations is torch's.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either, of any shape and strides;
            float32, float64, bfloat16, float16, complex64 or complex128, with gradients of the
            same dtype, or 16-bit beside 32-bit ones. States have the parameter's dtype unless
            ``state_dtype`` says otherwise; 16-bit values are computed in float32 and rounded once.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two averages, both floats or both tensors of one element.
        eps: Added to the denominator.
        weight_decay: Weight decay :math:`\lambda`, L2 unless decoupled.
        amsgrad: Whether to divide by the largest second moment so far.
        foreach: Accepted and validated as in torch; changes nothing.
        maximize: Whether to go up the gradient.
        capturable: Accepted as in torch.
        differentiable: Whether autograd follows the step (through torch's operations, unfused).
        fused: As in torch, True lets ``GradScaler`` leave unscaling and overflow checks to the
            step; otherwise changes nothing, every step is fused.
        decoupled_weight_decay: Whether the decay is AdamW's.
        **options: What torch does not have, each in all groups or in one: see
            :class:`flatstep.Extras`.

    Raises:
        ValueError: An option out of range, in torch's words, or two that exclude each other.
        RuntimeError: Options that exclude each other, in torch's words.
    """

    rule = "adam"
    sparse_message = "Adam does not support sparse gradients, please consider SparseAdam instead"
    later_options: ClassVar = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "decoupled_weight_decay": False,
        "fused": None,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(b.squeeze() if isinstance(b, torch.Tensor) else b for b in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    @staticmethod
    def validate(options: dict[str, Any]) -> None:
        """Raises torch's errors for options that are out of range."""
        lr, betas, foreach = options["lr"], options["betas"], options["foreach"]
        unfit = foreach and not options["capturable"]
        if isinstance(lr, torch.Tensor):
            if unfit:
                raise ValueError(_TENSOR_LR)
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not options["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        for index, beta in enumerate(betas):
            if isinstance(beta, torch.Tensor) and beta.numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not options["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
        if not any(all(isinstance(beta, kind) for beta in betas) for kind in (float, torch.Tensor)):
            raise ValueError("betas must be either both floats or both Tensors")
        for index, beta in enumerate(betas):
            if isinstance(beta, torch.Tensor) and unfit:
                raise ValueError(
                    f"betas[{index}] as a Tensor is not supported for capturable=False and "
                    "foreach=True"
                )
        validate_implementation(options)

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        if group["foreach"] and not group["capturable"] and isinstance(group["lr"], torch.Tensor):
            raise RuntimeError(_TENSOR_LR)
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        flags = _AMSGRAD if group["amsgrad"] else 0
        if decay != 0 and not group["decoupled_weight_decay"]:
            flags |= _L2
        return Variant(flags, [group["lr"], beta1, beta2, group["eps"], decay])


class AdamW(Adam):
    """Adam with decoupled weight decay, in place of :class:`torch.optim.AdamW`.

    Source: Loshchilov and Hutter, 2019 (arXiv:1711.05101). Arguments as in :class:`Adam`; the decay
    is always decoupled, also after loading a state that says otherwise.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over pickled or loaded state."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
