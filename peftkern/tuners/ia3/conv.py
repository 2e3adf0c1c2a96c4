"""IA3 on convolutions: the vector scales input or output channels, by plain PyTorch around the base layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.ops.plan import Plan
from peftkern.tuners.ia3.config import IA3Config
from peftkern.tuners.ia3.layer import IA3Layer
from peftkern.tuners.ia3.mixed import conv_forward
from peftkern.tuners.tuner_layer import refuse_adapter_names
from peftkern.utils.other import batch_in_force


class _ConvNd(IA3Layer, nn.Module):
    """IA3 on a convolution with `_kernel_dim - 2` axes of space: `y = base(x) * l`, or `base(x * l)` if feed-forward.

    Args:
        base_layer: The convolution to wrap; any groups, strides and padding.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        is_feedforward: Whether its input is scaled rather than its output.

    Raises:
        ValueError: The weight has another number of axes.
    """

    _kernel_dim: int

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: IA3Config, is_feedforward: bool = False, **_: Any
    ) -> None:
        nn.Module.__init__(self)
        base: Any = base_layer
        if base.weight.dim() != self._kernel_dim:
            raise ValueError(
                f"base_layer: expected a weight with {self._kernel_dim} axes, got a {type(base).__name__} with "
                f"{base.weight.dim()}"
            )
        self.fan_in_fan_out = config.fan_in_fan_out
        IA3Layer.__init__(self, base_layer, is_feedforward, base.in_channels, base.out_channels)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _vector_shape(self) -> tuple[int, ...]:
        channels = self.in_features if self.is_feedforward else self.out_features
        return (1, channels, *(1,) * (self._kernel_dim - 2))

    def weight_factor(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        vector, space = self.vector(adapter), (1,) * (self._kernel_dim - 2)
        if not self.is_feedforward:
            return vector.view(-1, 1, *space)
        # weight [out_channels, in_channels / groups, ...]: each group of outputs sees channels of its own.
        groups, per_group = self.get_base_layer().groups, weight.shape[1]
        of_outputs = vector.view(groups, per_group).repeat_interleave(weight.shape[0] // groups, dim=0)
        return of_outputs.view(weight.shape[0], per_group, *space)

    def _why_not_fused(self, names: list[str]) -> str:
        return "a convolution: scaled by plain PyTorch"

    def plan(self, tokens: int) -> Plan:
        return Plan("unfused", self.explain_row().reason)

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for a batch whose rows want different adapters."""
        return Plan("unfused", "a convolution: each row is scaled by its adapter's vector in plain PyTorch")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mixed = batch_in_force(self)
        if mixed is not None:
            return conv_forward(self, mixed, x, args, kwargs)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        refuse_adapter_names(kwargs)
        names = self._active_here()
        if self.merged_adapters or not names:
            return self.base_layer(x, *args, **kwargs)
        # Without the axis of the batch, which an input need not have.
        scale = self._scale(names).view(-1, *(1,) * (self._kernel_dim - 2))
        return self._scaled_plain(x, scale, *args, **kwargs)


class Conv2d(_ConvNd):
    """IA3 on an `nn.Conv2d`; see `_ConvNd`."""

    _kernel_dim = 4


class Conv3d(_ConvNd):
    """IA3 on an `nn.Conv3d`; see `_ConvNd`."""

    _kernel_dim = 5
