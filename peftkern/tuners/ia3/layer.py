"""IA3's layers: what wraps one layer of the base model and scales its input or its output by learned vectors.

`y = base(x) * l`, or `y = base(x * l)` for a feed-forward layer, with l the product of the active adapters' vectors
(Liu et al. 2022, arXiv:2205.05638). Attribute and parameter names are PEFT 0.21.2's, so state dicts are the same.
Forward is one call of `peftkern.ops`; where the base layer does more than a linear layer does, it is called as it is
and scaled by plain PyTorch. `explain_row` says which of the two, and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.backend import current_backend
from peftkern.ops import ia3_linear, multi_ia3_linear
from peftkern.ops.ia3_linear import ia3_linear_by_parameter, plan_for
from peftkern.ops.plan import Plan
from peftkern.tuners.fusing import (
    ExplainRow,
    bare_weight,
    base_alone,
    compute_dtype,
    describe_weight,
    is_nested,
    plain_weight,
    quantized_forward,
    quantized_weight,
    weight_by_rows,
    why_base_alone,
    why_called_as_is,
    why_plain,
)
from peftkern.tuners.ia3.config import IA3Config
from peftkern.tuners.ia3.merging import merge_adapters, unmerge_adapters
from peftkern.tuners.ia3.mixed import linear_forward
from peftkern.tuners.targets import linear_sizes
from peftkern.tuners.tuner_layer import BaseTunerLayer, check_adapter_name, refuse_adapter_names
from peftkern.utils.linear_layers import conv1d_class
from peftkern.utils.other import batch_in_force
from peftkern.weights import Weight


class IA3Layer(BaseTunerLayer):
    """What IA3's layers share: named vectors over the input's or the output's features.

    Args:
        base_layer: The layer to wrap.
        is_feedforward: Whether the input is scaled rather than the output, by every adapter of this layer.
    """

    adapter_layer_names: tuple[str, ...] = ("ia3_l",)

    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, is_feedforward: bool, in_features: int, out_features: int) -> None:
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: IA3Config, **_: Any) -> None:
        """Adds an adapter, or makes an existing one anew.

        Args:
            adapter_name: Its name: not empty, without a dot.
            config: Its initialization and inference mode.

        Raises:
            ValueError: A name that cannot be part of a state-dict key, or a merged adapter's name.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before making it anew")
        # Drawn whether it is used or not, as PEFT does: torch's generator then stands where it stands there.
        self.ia3_l[adapter_name] = nn.Parameter(torch.randn(self._vector_shape()))
        if config.init_ia3_weights:
            self.reset_ia3_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make_anew(self, adapter_name: str, config: IA3Config) -> None:
        self.update_layer(adapter_name, config)

    def _vector_shape(self) -> tuple[int, ...]:
        """The shape of an adapter's parameter, as PEFT stores it."""
        return (1, self.in_features) if self.is_feedforward else (self.out_features, 1)

    def reset_ia3_parameters(self, adapter_name: str) -> None:
        """Sets the adapter's vector to ones, which change nothing."""
        if adapter_name in self.ia3_l:
            nn.init.ones_(self.ia3_l[adapter_name])

    def vector(self, adapter: str) -> torch.Tensor:
        """The adapter's vector [in_features] or [out_features], a view of its parameter."""
        return self.ia3_l[adapter].flatten()

    def weight_factor(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """What merging `adapter` multiplies the base weight by: the vector in a shape that broadcasts against it."""
        raise NotImplementedError(type(self).__name__)

    def merge_weight(self, weight: torch.Tensor, adapter: str) -> None:
        """Merges `adapter` into a dense copy [out_features, in_features] of the base weight, in place."""
        vector = self.vector(adapter)
        weight *= vector if self.is_feedforward else vector[:, None]

    def merged_bias(self, bias: torch.Tensor, adapter: str) -> torch.Tensor:
        """The base bias with `adapter` merged."""
        return bias if self.is_feedforward else (bias * self.vector(adapter)).to(bias.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiplies the base weight (and bias) by adapters, in place; a quantized one is replaced by a dense layer.

        Args:
            safe_merge: Check that the products are finite before the weight is touched.
            adapter_names: Which; None for the active ones.

        Raises:
            TypeError: The weight is no plain floating-point tensor.
            ValueError: A product is not finite (`safe_merge`).
        """
        merge_adapters(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Divides the base weight by every merged adapter, or restores what dividing would not bring back."""
        unmerge_adapters(self)

    def _active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.ia3_l]

    def _scale(self, names: list[str]) -> torch.Tensor:
        """The product of these adapters' vectors."""
        scale = self.vector(names[0])
        for name in names[1:]:
            scale = scale * self.vector(name)
        return scale

    def _why_not_fused(self, names: list[str]) -> str:
        """Why forward with these adapters cannot be one operation, or ""."""
        raise NotImplementedError(type(self).__name__)

    def explain_row(self, name: str = "") -> ExplainRow:
        """How forward would run now."""
        names = self._active_here()
        reason = why_base_alone(self, names) or self._why_not_fused(names)
        base = self.get_base_layer()
        weight = quantized_weight(base) or getattr(base, "weight", None)
        kind = f"{type(base).__name__} (IA3{', feed-forward' if self.is_feedforward else ''})"
        sizes = (self.in_features, self.out_features, 0)
        return ExplainRow(name, kind, *sizes, getattr(weight, "dtype", None), not reason, reason)

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` rows of x: "unfused", or that of `ia3_linear`."""
        raise NotImplementedError(type(self).__name__)

    def _scaled_plain(self, x: torch.Tensor, scale: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer called as it is, its input or output times `scale`, which broadcasts; in their dtypes."""
        if self.is_feedforward:
            return self.base_layer((x * scale).to(x.dtype), *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return (y * scale).to(y.dtype)

    def __repr__(self) -> str:
        return "ia3." + super().__repr__()


class Linear(IA3Layer, nn.Module):
    """IA3 on a linear layer: `nn.Linear`, a quantized one, or transformers' Conv1D, whose weight is stored transposed.

    Args:
        base_layer: The layer to wrap: any that has `in_features`, `out_features` and `forward(x)`; fused if it is one
            of those above.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        is_feedforward: Whether its input is scaled rather than its output.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: IA3Config, is_feedforward: bool = False, **_: Any
    ) -> None:
        nn.Module.__init__(self)
        conv1d = conv1d_class(base_layer)
        # PEFT's two names for the same thing: the weight is stored [in_features, out_features].
        self.is_target_conv_1d_layer = self.fan_in_fan_out = conv1d is not None
        # A base layer whose class computes anything else is called as it is.
        self._plain_forward = nn.Linear.forward if conv1d is None else conv1d.forward
        IA3Layer.__init__(self, base_layer, is_feedforward, *linear_sizes(base_layer, "IA3"))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def weight_factor(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        vector = self.vector(adapter)
        return vector if self.is_feedforward != self.fan_in_fan_out else vector[:, None]

    def _why_not_fused(self, names: list[str]) -> str:
        base: Any = self._modules["base_layer"]
        quantized = quantized_weight(base)
        reason = why_called_as_is(base, self._plain_forward if quantized is None else quantized_forward(base))
        if reason:
            return f"base layer: {reason}"
        weight = plain_weight(base) if quantized is None else quantized
        if weight is None:
            return f"base layer: its weight is {describe_weight(base)}"
        for name in names:
            part = self.ia3_l[name]
            if type(part) is not nn.Parameter or part.is_meta:
                return f"adapter {name!r}: its vector is a {type(part).__name__} on {part.device}"
            if quantized is None and part.dtype not in (weight.dtype, torch.float32):
                return f"adapter {name!r}: {part.dtype} beside a base weight of {weight.dtype}"
        return ""

    def plan(self, tokens: int) -> Plan:
        row = self.explain_row()
        return self._fused_plan(tokens, gathers=False) if row.fused else Plan("unfused", row.reason)

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` rows of a batch whose rows want different adapters."""
        names = list(self.ia3_l)
        if not names:
            return Plan("unfused", "no adapter here: the base layer runs alone")
        reason = self._why_not_fused(names)
        if reason:
            return Plan("unfused", f"{reason}; each row is scaled by its adapter's vector in plain PyTorch")
        return self._fused_plan(tokens, gathers=True)

    def _fused_plan(self, tokens: int, gathers: bool) -> Plan:
        base: Any = self._modules["base_layer"]
        weight = weight_by_rows(base, self.fan_in_fan_out)
        dtype = compute_dtype(base, weight.dtype)
        # One row seen `tokens` times: the plan looks at sizes, strides and dtype only.
        x = torch.empty(1, 1, self.in_features, dtype=dtype, device=weight.device).expand(tokens, 1, -1)
        return plan_for(x, weight, self.is_feedforward, current_backend(), gathers=gathers)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._mixed is not None or self._mixed_before is not None:
            mixed = batch_in_force(self)
            if mixed is not None:
                return linear_forward(self, mixed, x, args, kwargs)
        if not (args or kwargs or self._disable_adapters or self.merged_adapters or is_nested(x)):
            names = self._active_here()
            # The quick answer of `_why_not_fused`, for the route that nearly every call takes.
            weight = bare_weight(self._modules["base_layer"])  # type: ignore[arg-type]
            if len(names) == 1 and weight is not None and not why_plain():
                vector: Any = self._modules["ia3_l"]._parameters.get(names[0])
                if type(vector) is nn.Parameter and vector.dtype in (weight.dtype, torch.float32):
                    bias: Any = self._modules["base_layer"]._parameters["bias"]
                    return ia3_linear_by_parameter(x, weight, vector, bias, self.is_feedforward)
        return self._forward_in_general(x, *args, **kwargs)

    def _forward_in_general(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return base_alone(self, x, *args, **kwargs)
        refuse_adapter_names(kwargs)
        names = self._active_here()
        if self.merged_adapters or not names:
            return base_alone(self, x, *args, **kwargs)
        scale = self._scale(names)
        if args or kwargs or is_nested(x) or self._why_not_fused(names):
            return self._scaled_plain(x, scale, *args, **kwargs)
        return self._fused(x, scale)

    def _fused(self, x: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The base and its scaling as one operation; with `ids`, by the row of `scale` that each row of x names."""
        base: Any = self._modules["base_layer"]
        weight = weight_by_rows(base, self.fan_in_fan_out)
        if isinstance(weight, torch.Tensor):
            if scale.dtype not in (weight.dtype, torch.float32):  # adapters of two dtypes multiplied
                scale = scale.to(weight.dtype)
            return self._operation(x, weight, scale, ids, base.bias)
        # As a quantized layer does by itself: computed in its own dtype, whatever x has.
        dtype = compute_dtype(base, x.dtype)
        if scale.dtype not in (dtype, torch.float32):
            scale = scale.to(dtype)
        bias = base.bias
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
        return self._operation(x.to(dtype), weight, scale, ids, bias).to(x.dtype)

    def _operation(self, x: torch.Tensor, weight: Weight, scale: torch.Tensor, ids: Any, bias: Any) -> torch.Tensor:
        if ids is None:
            return ia3_linear(x, weight, scale, bias, is_feedforward=self.is_feedforward)
        return multi_ia3_linear(x, weight, scale, ids, bias, is_feedforward=self.is_feedforward)
