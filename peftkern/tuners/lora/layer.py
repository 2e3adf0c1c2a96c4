"""LoRA on linear layers: one call of `peftkern.ops` where the base layer is no more than a linear layer.

Where it does more (hooks, a parametrization, a forward of its own), it is called as it is and the adapter is added by
plain PyTorch. `explain_row` says which of the two, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftkern.backend import current_backend
from peftkern.ops import lora_linear
from peftkern.ops._common import autocast_dtype, without_autocast
from peftkern.ops.dora_linear import plan_for as plan_for_dora
from peftkern.ops.lora_linear import multiply, plan_for
from peftkern.ops.lora_linear_quantized import plan_for as plan_for_quantized
from peftkern.ops.multi_lora_linear import plan_for as plan_for_many
from peftkern.ops.plan import Plan
from peftkern.tuners.fusing import (
    bare_quantized_weight,
    bare_weight,
    base_alone,
    compute_dtype,
    describe_weight,
    has_own_bias,
    is_bare,
    is_nested,
    plain_weight,
    quantized_forward,
    quantized_weight,
    weight_by_rows,
    why_called_as_is,
    why_plain,
)
from peftkern.tuners.lora import dora
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.lora_layer import LoraLayer
from peftkern.tuners.lora.merging import delta_weight
from peftkern.tuners.lora.mixed import linear_forward
from peftkern.tuners.lora.simple_call import SimpleCall
from peftkern.tuners.targets import linear_sizes
from peftkern.utils.linear_layers import conv1d_class
from peftkern.utils.other import batch_in_force
from peftkern.weights import DENSE_DTYPES, Weight


class Linear(LoraLayer, nn.Module):
    """LoRA on a linear layer: `nn.Linear`, or transformers' Conv1D, whose weight is stored transposed.

    Args:
        base_layer: The layer to wrap: any that has `in_features`, `out_features` and `forward(x)`; fused if it is one
            of the two above.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        r: Its rank; 0 for the configuration's.
        lora_alpha: None for the configuration's.
    """

    is_pooled = True
    # The `SharedInput` of layers that are called with the same x, if this is one of them.
    _shared_input: Any = None
    # What the last forward found, where the next may be the same.
    _simple_call: SimpleCall | None = None
    # What `gated_mlp` knows of the MLP whose last projection this is, if it took the MLP's forward over.
    _ends_mlp: Any = None
    # Whether the A that an operation takes is a parameter, rather than made of some at each forward.
    factors_are_kept: bool = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int | float | None = None,
        **_: Any,
    ) -> None:
        nn.Module.__init__(self)
        conv1d = conv1d_class(base_layer)
        # PEFT's two names for the same thing: the weight is stored [in_features, out_features].
        self.is_target_conv_1d_layer = self.fan_in_fan_out = conv1d is not None
        # A base layer whose class computes anything else is called as it is.
        self._plain_forward = nn.Linear.forward if conv1d is None else conv1d.forward
        in_features, out_features = linear_sizes(base_layer, "LoRA")
        LoraLayer.__init__(self, base_layer, in_features, out_features)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r or config.r, config.lora_alpha if lora_alpha is None else lora_alpha, config)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return delta_weight(A.weight, B.weight, self.scaling[adapter], self.fan_in_fan_out)

    def _why_not_fused(self, names: list[str]) -> str:
        # Runs at every forward: dicts rather than attributes, which nn.Module looks up slowly.
        held: dict[str, Any] = self._modules
        base = held["base_layer"]
        quantized = quantized_weight(base)
        reason = why_called_as_is(base, self._plain_forward if quantized is None else quantized_forward(base))
        if reason:
            return f"base layer: {reason}"
        weight = plain_weight(base) if quantized is None else quantized
        if weight is None:
            return f"base layer: its weight is {describe_weight(base)}"
        for name in names:
            reason = self._why_no_factors(name, weight.dtype if quantized is None else None)
            if reason:
                return f"adapter {name!r}: {reason}"
            dropout = held["lora_dropout"]._modules[name]
            if type(dropout) not in (nn.Dropout, nn.Identity):
                return f"adapter {name!r}: its dropout is a {type(dropout).__name__}"
            if not is_bare(dropout):
                return f"adapter {name!r}: its dropout has hooks, or a forward of its own"
        return dora.why_not_fused(self, names, weight)

    def _why_no_factors(self, name: str, dtype: torch.dtype | None) -> str:
        """Why an operation cannot take an adapter's A and B as they are, or ""; beside a dense weight of `dtype`."""
        for kind in ("lora_A", "lora_B"):
            module: Any = self._modules[kind]._modules[name]
            if has_own_bias(module) and not (kind == "lora_B" and self.lora_bias[name]):
                return f"its {kind} has a bias"
            reason = why_called_as_is(module, nn.Linear.forward)
            if reason:
                return reason
            part = plain_weight(module)
            if part is None:
                return f"its weight is {describe_weight(module)}"
            if dtype is not None and part.dtype != dtype and part.dtype != torch.float32:
                return f"{part.dtype} beside a base weight of {dtype}"
        return ""

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """An adapter's A, B and scaling, as an operation takes them."""
        held: dict[str, Any] = self._modules
        return held["lora_A"]._modules[name].weight, held["lora_B"]._modules[name].weight, self.scaling[name]

    def _bare_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """`_factors` where A and B are bare modules without a bias; None elsewhere. Told at little cost."""
        if self.lora_bias.get(name, True) or self.use_dora[name]:  # not here, or with a bias of its own
            return None
        held: dict[str, Any] = self._modules
        into, out_of = held["lora_A"]._modules[name], held["lora_B"]._modules[name]
        A, B = bare_weight(into), bare_weight(out_of)
        if A is None or B is None or has_own_bias(into) or has_own_bias(out_of):
            return None
        return A, B, self.scaling[name]

    def _told_by(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parameters of the active adapter that its factors A and B are made of."""
        return A, B

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` rows of x: "unfused", or that of `lora_linear`."""
        plan = self.plan_alone(tokens)
        if self._shared_input is not None:
            plan = self._shared_input.plan(plan, tokens)
        if self._ends_mlp is not None and plan.path != "unfused" and self._ends_mlp.is_in_force(tokens):
            plan = Plan(plan.path, f"{plan.reason}; its input, act(gate) * up, is made again in backward, not kept")
        return plan

    def plan_alone(self, tokens: int) -> Plan:
        """`plan`, were there no other layers with the same x."""
        row = self.explain_row()
        if not row.fused:
            return Plan("unfused", row.reason)
        weight = self._weight_by_rows()
        dtype = compute_dtype(self.base_layer, weight.dtype)
        # One row seen `tokens` times: the plan looks at sizes, strides and dtype only.
        x = torch.empty(1, 1, self.in_features, dtype=dtype, device=weight.device).expand(tokens, 1, -1)
        if self.use_dora[self._active_here()[0]]:
            return plan_for_dora(x, weight, row.r, current_backend(), norm_is_known=dora.norms_are_kept(self))
        if isinstance(weight, torch.Tensor):
            return plan_for(x, weight, row.r, current_backend())
        return plan_for_quantized(x, weight, row.r, current_backend())

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` rows of a batch whose rows want different adapters."""
        names = [name for name in self.scaling if not self.use_dora[name]]
        if len(names) < len(self.scaling) and not names:
            return Plan("refused", "adapters with DoRA cannot be mixed in a batch")
        reason = self._why_not_fused(names) if names else "no adapter here: the base layer runs alone"
        if len({A.weight.dtype for A in self.lora_A.values()}) > 1:
            reason = reason or "adapters of several dtypes"
        if reason:
            return Plan("unfused", f"{reason}; each adapter is added for its rows" if names else reason)
        weight = self._weight_by_rows()
        dtype = compute_dtype(self._modules["base_layer"], weight.dtype)  # type: ignore[arg-type]
        x = torch.empty(1, 1, self.in_features, dtype=dtype, device=weight.device).expand(tokens, 1, -1)
        return plan_for_many(x, weight, max(self.r[name] for name in names), current_backend())

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer makes of x with a weight [out_features, in_features], without its bias."""
        return F.linear(x, weight)

    def _weight_by_rows(self) -> Weight:
        """The base weight as [out_features, in_features]."""
        return weight_by_rows(self._modules["base_layer"], self.fan_in_fan_out)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and not args and not kwargs:
            known = self._simple_call
            operands = None if known is None else known.operands(self.__dict__, x)
            if operands is not None:
                return multiply(x, *operands)
        if self._mixed is not None or self._mixed_before is not None:
            mixed = batch_in_force(self)
            if mixed is not None:
                return linear_forward(self, mixed, x, args, kwargs)
        if not args and not kwargs and not is_nested(x):
            if self._shared_input is not None:
                y = self._shared_input.forward(self, x)
                if y is not None:
                    return y
            operands = self._operands_if_simple()
            if operands is not None:
                weight, A, B, scaling, bias, p = operands
                if not compiling and SimpleCall.can_be(x, operands, self._shared_input):
                    self.__dict__["_simple_call"] = SimpleCall(self, operands, x.dtype)
                if type(weight) is nn.Parameter or self._casts_nothing(x, A, bias):
                    return lora_linear(x, weight, A, B, scaling, bias, dropout_p=p)
        if not compiling:
            self.__dict__.pop("_simple_call", None)  # which would keep what has been deleted or replaced
        return self._forward_in_general(x, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of a forward: a copy's, or a pickle's, would be the original's."""
        return {name: value for name, value in self.__dict__.items() if name != "_simple_call"}

    def _casts_nothing(self, x: Any, A: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the quantized base layer, which computes in a dtype of its own, finds x, A, B and bias in it (A and B
        may be fp32), and autocast asks for no other."""
        if not isinstance(x, torch.Tensor) or x.dtype not in DENSE_DTYPES:
            return False
        dtype = x.dtype
        if autocast_dtype(x) not in (None, dtype):
            return False
        fits = A.dtype is dtype or A.dtype is torch.float32
        own = self._modules["base_layer"].__dict__.get("compute_dtype")
        return fits and (own is None or own is dtype) and (bias is None or bias.dtype is dtype)

    def _operands_if_simple(self) -> tuple[Any, ...] | None:
        """What `lora_linear` takes where one adapter is active on a bare `nn.Linear` or quantized layer; None in all
        other cases.

        The general route finds the same, at twice the cost, which shows where tensors are small.
        """
        if self._disable_adapters or self.merged_adapters or self.fan_in_fan_out or why_plain():
            return None
        name = self._active_adapter
        if type(name) is not str:
            if len(name) != 1:
                return None
            name = name[0]
        factors = self._bare_factors(name)
        if factors is None:
            return None
        A, B, scaling = factors
        held: dict[str, Any] = self._modules
        base, dropout = held["base_layer"], held["lora_dropout"]._modules[name]
        weight: Weight | None = bare_weight(base)
        if A.dtype is not B.dtype:
            return None
        if weight is None:
            weight = bare_quantized_weight(base)
            if weight is None:
                return None
        elif A.dtype is not weight.dtype and A.dtype is not torch.float32:
            return None
        kind, switches = type(dropout), dropout.__dict__
        if kind not in (nn.Dropout, nn.Identity) or not is_bare(dropout):
            return None
        p = switches["p"] if kind is nn.Dropout and switches["training"] else 0.0
        return weight, A, B, scaling, base._parameters["bias"], p

    def _operands(self) -> tuple[Any, ...] | None:
        """(weight, A, B, scaling, bias, dropout) where forward is one `lora_linear` of one adapter; None elsewhere."""
        simple = self._operands_if_simple()
        if simple is not None:
            return simple
        names = self._active_here()
        if self._disable_adapters or self.merged_adapters or len(names) != 1:
            return None
        name = names[0]
        if self.lora_bias[name] or self.use_dora[name] or self._why_not_fused(names):
            return None
        held: dict[str, Any] = self._modules
        dropout = held["lora_dropout"]._modules[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return self._weight_by_rows(), *self._factors(name), held["base_layer"].bias, p

    def _forward_in_general(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = self._names_to_add(kwargs)
        if not names:
            return base_alone(self, x, *args, **kwargs)
        if args or kwargs or is_nested(x) or self._why_not_fused(names):
            return self._add_plain(self.base_layer(x, *args, **kwargs), x, names)
        if self.use_dora[names[0]]:
            return dora.fused(self, x, names[0])
        held: dict[str, Any] = self._modules
        dropouts = [held["lora_dropout"]._modules[name] for name in names]
        if len(names) > 1 and any(type(d) is nn.Dropout and d.training and d.p > 0 for d in dropouts):
            # Each adapter drops elements of its own, so they share no shrink.
            return self._add_plain(self._fused(x, names[:1], dropouts[0]), x, names[1:])
        return self._fused(x, names, dropouts[0])

    def _fused(self, x: torch.Tensor, names: list[str], dropout: nn.Module) -> torch.Tensor:
        """The base and these adapters, which all see x through `dropout`, as one operation."""
        held: dict[str, Any] = self._modules
        As, Bs, scalings = zip(*map(self._factors, names), strict=True)
        bias = held["base_layer"].bias
        for name in names:
            if self.lora_bias[name]:
                added = held["lora_B"]._modules[name].bias * self.scaling[name]
                bias = added if bias is None else bias + added
        if len(names) == 1:
            A, B, scaling = As[0], Bs[0], scalings[0]
        else:
            # Joined along the rank, the adapters are one; its scaling is in B.
            A, B = _joined(As, Bs, scalings)
            scaling = 1.0
        p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        weight = self._weight_by_rows()
        options: dict[str, Any] = {"dropout_p": p, "training": dropout.training}
        if isinstance(weight, torch.Tensor):
            return lora_linear(x, weight, A, B, scaling, bias, **options)
        # As a quantized layer does by itself: computed in its own dtype, whatever x has.
        dtype = compute_dtype(self.base_layer, x.dtype)
        if A.dtype not in (dtype, torch.float32):
            A, B = A.to(dtype), B.to(dtype)
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
        return lora_linear(x.to(dtype), weight, A, B, scaling, bias, **options).to(x.dtype)


@without_autocast  # which has no dtype for what is joined in the other one of 16 bits
def _joined(As: tuple[Any, ...], Bs: tuple[Any, ...], scalings: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Adapters as one along the rank: A [sum of r, K], and B [N, sum of r] with the scalings in it."""
    return torch.cat(As), torch.cat([B * scaling for B, scaling in zip(Bs, scalings, strict=True)], dim=1)
