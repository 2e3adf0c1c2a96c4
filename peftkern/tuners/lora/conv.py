"""LoRA on convolutions: `y = base(x) + scaling * B(A(dropout(x)))`, by plain PyTorch around the base layer.

A [r, in_channels, *kernel] is a convolution with all of the base layer's settings but the groups, B [out_channels,
r / groups, 1, ...] one of single pixels with its groups: names and shapes are PEFT 0.21.2's. Without groups the sum is
one convolution, of W + scaling * B A, and can be merged. With groups each group of outputs sees all input channels
through A, which W [out_channels, in_channels / groups, *kernel] has no place for, so that nothing can be merged.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from peftkern.ops.plan import Plan
from peftkern.tuners.lora import dora
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.merging import delta_weight
from peftkern.tuners.lora.mixed import add_parts
from peftkern.tuners.mixed import check_batch_axis
from peftkern.tuners.tuner_layer import of_base_layer
from peftkern.utils.other import batch_in_force
from peftkern.utils.warning import PeftWarning

_KINDS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, or of a class that is made from one."""
    return isinstance(module, _KINDS)


def check_convolution(base: Any, config: LoraConfig, r: int, name: str = "") -> None:
    """Raises for an adapter that a convolution cannot have.

    Args:
        base: The convolution.
        config: The adapter's configuration.
        r: Its rank.
        name: The convolution's name in the model, for messages.

    Raises:
        ValueError: A rank that the groups do not divide, an initialization that is made for linear layers, or a lazy
            layer that has no weight yet.
        NotImplementedError: `use_dora` with groups.
    """
    kind = f"{name!r}, a {type(base).__name__}" if name else f"a {type(base).__name__}"
    if is_lazy(base.weight):
        raise ValueError(f"{kind}, has no weight yet: call the model once before it is adapted")
    if r % base.groups:
        raise ValueError(
            f"r={r} does not go with {kind} with groups={base.groups}: each group needs an equal part of the rank "
            "(give it another by rank_pattern, or keep it out with exclude_modules)"
        )
    init = config.init_lora_weights
    if not isinstance(init, bool) and init.lower() not in ("gaussian", "lora_ga"):
        raise ValueError(
            f"init_lora_weights={init!r} does not go with {kind}: convolutions start as with True, False or 'gaussian' "
            "('lora_ga' leaves them as with True)"
        )
    if config.use_dora and base.groups > 1:
        raise NotImplementedError(
            f"use_dora=True does not go with {kind} with groups={base.groups}: with the adapter its outputs see input "
            "channels that its weight has no rows for, so there is no weight whose norms the magnitude would stand for"
        )


class _ConvNd(LoraLayer, nn.Module):
    """LoRA on a convolution with `_kernel_dim - 2` axes of space.

    x is [batch, in_channels, *space] or [in_channels, *space], y likewise with out_channels, in the base layer's dtype;
    the adapter computes in its own. A base layer whose class has a forward of its own is called as it is, and A and B
    are of its class, as in PEFT.

    Args:
        base_layer: The convolution to wrap; any stride, padding, dilation and padding mode, groups that divide r.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        r: Its rank; 0 for the configuration's.
        lora_alpha: None for the configuration's.

    Raises:
        ValueError: The weight has another number of axes; or see `check_convolution`.
        NotImplementedError: See `check_convolution`.
        TypeError: The base layer's class has a forward of its own and is not made as `nn.Conv2d` and its like are.

    Warns:
        PeftWarning: PEFT's adapter of this layer computes something else, see `_warn_of_peft`; or there is no bias to
            merge that of `lora_bias` into.
    """

    _kernel_dim: int
    fan_in_fan_out = False

    # What model code asks a convolution for, as Whisper's encoder does. PEFT's layers do not have it.
    in_channels, out_channels = of_base_layer("in_channels"), of_base_layer("out_channels")
    kernel_size, stride, dilation = of_base_layer("kernel_size"), of_base_layer("stride"), of_base_layer("dilation")
    padding, padding_mode, groups = of_base_layer("padding"), of_base_layer("padding_mode"), of_base_layer("groups")

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
        base: Any = base_layer
        if not is_lazy(base.weight) and base.weight.dim() != self._kernel_dim:
            raise ValueError(
                f"base_layer: expected a weight with {self._kernel_dim} axes, got a {type(base).__name__} with "
                f"{base.weight.dim()}"
            )
        LoraLayer.__init__(self, base_layer, base.in_channels, base.out_channels)
        self.rank_groups = base.groups
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r or config.r, config.lora_alpha if lora_alpha is None else lora_alpha, config)

    # -- the adapters --------------------------------------------------------------------------------------------------

    def _check_adapter(self, config: LoraConfig, r: int) -> None:
        check_convolution(self.get_base_layer(), config, r)
        super()._check_adapter(config, r)

    def _make_weights(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        base: Any = self.get_base_layer()
        plain = _KINDS[self._kernel_dim - 3]
        settings: dict[str, Any] = {}
        if base.padding_mode != "zeros":
            settings["padding_mode"] = base.padding_mode
        if any(d != 1 for d in base.dilation):
            settings["dilation"] = base.dilation
        if settings:
            self._warn_of_peft(settings)
        made: Any = type(base) if _has_own_forward(base, plain) else plain
        ones = (1,) * (self._kernel_dim - 2)
        try:
            A = made(self.in_features, r, base.kernel_size, base.stride, base.padding, bias=False, **settings)
            B = made(r, self.out_features, ones, ones, groups=base.groups, bias=lora_bias)
        except TypeError as error:
            raise TypeError(
                f"LoRA makes its parts of a {made.__name__}, which has a forward of its own, by the arguments of "
                f"{plain.__name__}, and it does not take them: {error}"
            ) from error
        self.lora_A[adapter_name], self.lora_B[adapter_name] = A, B

    def _warn_of_peft(self, settings: dict[str, Any]) -> None:
        """Says that an adapter file means something else in PEFT 0.21.2, whose A pads with zeros and is not dilated."""
        said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        warnings.warn(
            f"a {type(self.get_base_layer()).__name__} with {said}: the adapter has this too, so that merging it "
            "changes nothing; PEFT's has not, so until it is merged one library's adapter is another in the other",
            PeftWarning,
            stacklevel=2,
        )

    def _initialize(self, adapter_name: str, config: LoraConfig) -> None:
        # LoRA-GA has no gradients of convolutions, and leaves them as with True.
        init = config.init_lora_weights
        self.reset_lora_parameters(adapter_name, True if init == "lora_ga" else init)

    # -- merging -------------------------------------------------------------------------------------------------------

    def why_no_delta(self) -> str:
        if self.rank_groups == 1:
            return ""
        return (
            f"a convolution with groups={self.rank_groups} has no weights for all that the adapter's outputs see, "
            "which is every input channel"
        )

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        reason = self.why_no_delta()
        if reason:
            raise NotImplementedError(f"adapter {adapter!r} changes no weight: {reason}")
        A, B = dora.matrices(self, adapter)
        return delta_weight(A, B, self.scaling[adapter], False).view(self.weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False) -> None:
        """Adds adapters to the base weight, in place: see `LoraLayer.merge`.

        Raises:
            NotImplementedError: The convolution has groups.

        Warns:
            UserWarning: The base layer's class has a forward of its own, which may not be linear in its weight.
        """
        base = self.get_base_layer()
        if _has_own_forward(base, _KINDS[self._kernel_dim - 3]):
            warnings.warn(
                f"merging into a {type(base).__name__}, which has a forward of its own: the merged layer computes the "
                "same only if that is linear in the weight (one that normalizes it is not)",
                stacklevel=2,
            )
        super().merge(safe_merge, adapter_names, requantize)

    # -- running -------------------------------------------------------------------------------------------------------

    def _magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *(1,) * (self._kernel_dim - 2))

    def _per_output(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.view(-1, *(1,) * (self._kernel_dim - 2))  # no axis of the batch, which x need not have

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        if _has_own_forward(base, _KINDS[self._kernel_dim - 3]):
            y = self.base_layer(x.to(base.weight.dtype))  # forward adds adapters only where none is merged
            return (y if base.bias is None else y - self._per_output(base.bias)).to(x.dtype)
        return base._conv_forward(x, weight.view(base.weight.shape), None)

    def _why_not_fused(self, names: list[str]) -> str:
        return "a convolution: adapters are added by plain PyTorch"

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes, "unfused"; `tokens` is taken as other layers take it."""
        return Plan("unfused", self.explain_row().reason)

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for a batch whose rows want different adapters."""
        if self.scaling and all(self.use_dora.values()):
            return Plan("refused", "adapters with DoRA cannot be mixed in a batch")
        return Plan("unfused", "a convolution: each adapter is added for its rows by plain PyTorch")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mixed = batch_in_force(self)
        if mixed is not None:
            check_batch_axis(mixed.batch, x, self._kernel_dim)
            return add_parts(self, self.base_layer(x, *args, **kwargs), x, mixed)
        names = self._names_to_add(kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return self._add_plain(y, x, names) if names else y


def _has_own_forward(base: Any, plain: Any) -> bool:
    """Whether a convolution's class computes something else than torch's own, `plain`, does."""
    kind = type(base)
    return kind.forward is not plain.forward or kind._conv_forward is not plain._conv_forward


class Conv1d(_ConvNd):
    """LoRA on an `nn.Conv1d`; see `_ConvNd`."""

    _kernel_dim = 3


class Conv2d(_ConvNd):
    """LoRA on an `nn.Conv2d`; see `_ConvNd`."""

    _kernel_dim = 4


class Conv3d(_ConvNd):
    """LoRA on an `nn.Conv3d`; see `_ConvNd`."""

    _kernel_dim = 5


def conv_layer(base: nn.Module) -> type[_ConvNd]:
    """The class of the layer that goes around a convolution."""
    made: tuple[type[_ConvNd], ...] = (Conv1d, Conv2d, Conv3d)
    return next(layer for layer, kind in zip(made, _KINDS, strict=True) if isinstance(base, kind))
