"""LoRA on a parameter of a module, rather than on a layer: experts that are stacked in one parameter, foremost.

`W_e + scaling * B_e A_e` for each expert e, with `target_parameters` of `LoraConfig` and PEFT 0.21.2's names: a
`ParamWrapper` takes the module's place, and a second one is put around it for a second parameter of the module. For E
experts A [r * E, in] holds one expert's rank rows after the other's, and B [out, r * E] has the experts innermost.

The outermost wrapper of experts that transformers runs by its own function runs them by `experts_forward`. Any other
module is called as it is, with W + scaling * B A in the parameter's place for the time of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.ops._common import without_autocast
from peftkern.ops.plan import Plan
from peftkern.tuners.fusing import ExplainRow, describe_weight, plain_weight, why_base_alone, why_called_as_is
from peftkern.tuners.lora import experts_forward
from peftkern.tuners.lora.config import LoraConfig, starts_plain
from peftkern.tuners.lora.experts_forward import Factors
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.replaced_parameter import call_with
from peftkern.utils.other import batch_in_force

# Fields that have no meaning where the adapter is part of the weight and no x goes through it by itself; as in PEFT.
_REFUSED = {
    "lora_dropout": "the adapter is added to the weight, so there is no input of its own to drop elements of",
    "fan_in_fan_out": "how a parameter is stored is told by its module",
    "lora_bias": "a parameter has no bias to add one to",
    "use_dora": "a magnitude is that of a layer's outputs",
}


def check_parameter_config(config: Any) -> None:
    """Raises ValueError for a field that does not go with `target_parameters`, by name."""
    for name, reason in _REFUSED.items():
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)!r} does not go with target_parameters: {reason}")
    init = config.init_lora_weights
    if not starts_plain(init):
        raise ValueError(
            f"init_lora_weights={init!r} does not go with target_parameters, whose adapters start as with True, False "
            "or 'gaussian'"
        )


def check_parameter(name: str, parameter: Any) -> None:
    """Raises ValueError for a parameter that no adapter can be added to."""
    if not isinstance(parameter, torch.Tensor) or not parameter.is_floating_point():
        kind = type(parameter).__name__
        found = f"a {kind} of {parameter.dtype}" if isinstance(parameter, torch.Tensor) else f"a {kind}"
        raise ValueError(f"target_parameters names {name!r}, {found}: LoRA adapts floating-point parameters")
    if parameter.dim() not in (2, 3):
        raise ValueError(
            f"target_parameters names {name!r} of shape {list(parameter.shape)}: expected a matrix [out, in] or "
            "stacked ones [experts, out, in]"
        )


class ParamWrapper(LoraLayer, nn.Module):
    """LoRA on one parameter of `base_layer`: a matrix [out, in], or stacked ones [experts, out, in].

    A module that says `is_transposed` stores those [experts, in, out]. Reading the parameter from the module gives it
    without the adapters.

    Args:
        base_layer: The module, or the wrapper of another parameter of it.
        adapter_name: Name of the first adapter, which becomes active.
        parameter_name: The parameter's name in the module.
        config: The adapter's configuration.
        r: Its rank, for each expert; 0 for the configuration's.
        lora_alpha: None for the configuration's.

    Raises:
        ValueError: The parameter is no floating-point tensor of two or three dimensions, or the configuration has
            dropout, `lora_bias`, `fan_in_fan_out` or an initialization that is made for layers.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int | float | None = None,
        **_: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        innermost: Any = base_layer
        while isinstance(innermost, ParamWrapper):
            innermost = innermost.base_layer
        parameter = getattr(innermost, parameter_name, None)
        check_parameter(parameter_name, parameter)
        sizes = list(parameter.shape) if parameter.dim() == 3 else [1, *parameter.shape]
        # PEFT's names. A matrix is [out, in] whatever its module says.
        self.num_experts = sizes[0]
        self.is_transposed = parameter.dim() == 3 and bool(getattr(innermost, "is_transposed", False))
        out_features, in_features = sizes[:0:-1] if self.is_transposed else sizes[1:]
        LoraLayer.__init__(self, base_layer, in_features, out_features)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r or config.r, config.lora_alpha if lora_alpha is None else lora_alpha, config)

    # -- the parameter and its adapters --------------------------------------------------------------------------------

    def get_param(self) -> torch.Tensor:
        """The parameter, without the adapters that are not merged into it."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter, as other layers' `weight` is the base layer's."""
        return self.get_param()

    def _check_adapter(self, config: LoraConfig, r: int) -> None:
        check_parameter_config(config)

    def _make_weights(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = self.get_param()
        where = getattr(getattr(self.get_base_layer(), "_hf_hook", None), "execution_device", None)
        device = torch.device(where) if parameter.is_meta and where is not None else parameter.device
        return device, parameter.dtype if parameter.dtype.itemsize > 1 else None  # eight bits hold no adapter

    def _factors(self, names: list[str]) -> Factors:
        """These adapters as one, joined along the rank: A [E, R, in] and B [E, out, R], views where there is one."""
        E = self.num_experts
        As = [self.lora_A[name].weight.view(E, -1, self.in_features) for name in names]
        Bs = [self.lora_B[name].weight.view(self.out_features, -1, E).permute(2, 0, 1) for name in names]
        if len(names) == 1:
            return Factors(As[0], Bs[0], self.scaling[names[0]])
        scaled = [B * self.scaling[name] for name, B in zip(names, Bs, strict=True)]
        return Factors(torch.cat(As, 1), torch.cat(scaled, 2), 1.0)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        A, B, scaling = self._factors([adapter])
        dtype = B.dtype
        if dtype.itemsize < 4:
            A, B = A.float(), B.float()
        delta = A.transpose(1, 2) @ B.transpose(1, 2) if self.is_transposed else B @ A
        return (delta * scaling).to(dtype).view(self.get_param().shape)

    @without_autocast
    def _sum(self, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
        """`weight` plus what these adapters add, in its dtype; the sum is rounded once.

        Raises:
            ValueError: An adapter is on the meta device and the weight is not: the sum would be of no values.
        """
        for name in names if not weight.is_meta else ():
            if self.lora_A[name].weight.is_meta or self.lora_B[name].weight.is_meta:
                raise ValueError(
                    f"adapter {name!r} of {self.parameter_name!r} is on the meta device (an accelerate hook brings it "
                    "for calls of lora_A and lora_B, which a parameter's adapter has none of): keep it on a device"
                )
        A, B, scaling = self._factors(names)
        lhs, rhs = (A.transpose(1, 2), B.transpose(1, 2)) if self.is_transposed else (B, A)
        stacked = weight.view(self.num_experts, *weight.shape[-2:])
        if weight.dtype.itemsize > 1:
            lhs, rhs = lhs.to(weight.dtype), rhs.to(weight.dtype)
            return torch.baddbmm(stacked, lhs, rhs, alpha=scaling).view(weight.shape)
        # Of eight bits: no arithmetic of its own, and a cast that does not stop at the largest number.
        wide = torch.baddbmm(stacked.float(), lhs.float(), rhs.float(), alpha=scaling).view(weight.shape)
        return wide.clamp(*(getattr(torch.finfo(weight.dtype), end) for end in ("min", "max"))).to(weight.dtype)

    # -- running -------------------------------------------------------------------------------------------------------

    def _chain(self) -> list[ParamWrapper]:
        """This wrapper and those inside it, the outermost first."""
        chain, layer = [self], self._modules["base_layer"]
        while isinstance(layer, ParamWrapper):
            chain.append(layer)
            layer = layer._modules["base_layer"]
        return chain

    def _names_in_force(self) -> list[str]:
        """The adapters that forward adds: none where they are disabled or, as in PEFT, where any is merged."""
        return [] if self._disable_adapters or self.merged_adapters else self._active_here()

    def _why_not_fused(self, names: list[str]) -> str:
        base = self.get_base_layer()
        reason = experts_forward.why_not_grouped(base)
        if reason:
            return f"base module: {reason}"
        for wrapper in self._chain():
            if wrapper.parameter_name not in experts_forward.projections(base):
                return f"{wrapper.parameter_name!r} of {type(base).__name__} is adapted too, and is no projection"
            if wrapper is not self and why_called_as_is(wrapper, ParamWrapper.forward):
                return f"the wrapper of {wrapper.parameter_name!r}: {why_called_as_is(wrapper, ParamWrapper.forward)}"
            dtype = wrapper.get_param().dtype
            for name in names if wrapper is self else wrapper._names_in_force():
                for module in (wrapper.lora_A[name], wrapper.lora_B[name]):
                    part = plain_weight(module)
                    reason = why_called_as_is(module, nn.Linear.forward)
                    if not reason and part is None:
                        reason = f"its weight is {describe_weight(module)}"
                    if not reason and part is not None and part.dtype not in (dtype, torch.float32):
                        reason = f"{part.dtype} beside a parameter of {dtype}"
                    if reason:
                        return f"adapter {name!r} of {wrapper.parameter_name!r}: {reason}"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixed = kwargs.pop("adapter_names", None) is not None or batch_in_force(self) is not None
        if mixed and self.scaling:
            raise NotImplementedError("adapter_names: an adapter on a parameter (target_parameters) cannot be mixed")
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        in_force = {wrapper: wrapper._names_in_force() for wrapper in self._chain()}
        if any(in_force.values()) and experts_forward.takes(args, kwargs) and not self._why_not_fused(in_force[self]):
            adapters = {w.parameter_name: w._factors(names) for w, names in in_force.items() if names}
            return experts_forward.forward(self.get_base_layer(), adapters, *args)
        if not in_force[self]:
            return self.base_layer(*args, **kwargs)
        # Wrappers inside this one see to their own parameters.
        path = "base_layer." * (len(in_force) - 1) + self.parameter_name
        return call_with(self.base_layer, path, lambda weight: self._sum(weight, in_force[self]), args, kwargs)

    def explain_row(self, name: str = "") -> ExplainRow:
        names = self._active_here()
        reason = why_base_alone(self, names) or self._why_not_fused(names)
        kind = f"{type(self.get_base_layer()).__name__}.{self.parameter_name}"
        r = sum(self.r[n] for n in names)
        dtype = self.get_param().dtype
        return ExplainRow(name, kind, self.in_features, self.out_features, r, dtype, not reason, reason)

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` tokens: "unfused", or that of `grouped_lora_linear`."""
        row = self.explain_row()
        if not row.fused:
            return Plan("unfused", row.reason)
        return experts_forward.plan(self.get_base_layer(), self.parameter_name, tokens)

    def plan_mixed(self, tokens: int) -> Plan:
        """Adapters of parameters are not mixed in a batch, as in PEFT."""
        return Plan("refused", "an adapter on a parameter (target_parameters) cannot be mixed in a batch")

    def __repr__(self) -> str:
        # Which parameter: wrappers of two parameters of a module would look alike.
        head, _, tail = super().__repr__().partition("(")
        return f"{head}(\n  parameter_name={self.parameter_name!r},{tail}"
