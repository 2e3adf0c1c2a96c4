"""`LoraLayer`: what the layers of LoRA have in common, whatever they wrap.

`y = base(x) + sum over active adapters of scaling * dropout(x) A^T B^T` (Hu et al. 2021, arXiv:2106.09685). Attribute
and parameter names are PEFT 0.21.2's, so state dicts are the same. What an adapter with `use_dora` has beside A and B
is in peftkern/tuners/lora/dora.py.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import nn

from peftkern.tuners.fusing import ExplainRow, quantized_weight, why_base_alone
from peftkern.tuners.lora import dora
from peftkern.tuners.lora.config import PLAIN_START, LoraConfig
from peftkern.tuners.lora.initial_values import initialize
from peftkern.tuners.lora.merging import merge_adapters, unmerge_adapters
from peftkern.tuners.tuner_layer import BaseTunerLayer, check_adapter_name, refuse_adapter_names
from peftkern.utils.peft_types import PeftType
from peftkern.utils.warning import PeftWarning


class LoraLayer(BaseTunerLayer):
    """What LoRA's layers share: named adapters with a rank, a scaling and a dropout each.

    Args:
        base_layer: The layer to wrap.
    """

    adapter_layer_names: tuple[str, ...] = (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    )
    other_param_names: tuple[str, ...] = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias"),
        "swaps_in_place",
        *("frozen_peft_weight_names", "_unread_factors"),
    )

    # The method whose configurations these adapters follow, and the smallest rank that it knows.
    peft_type: PeftType = PeftType.LORA
    least_rank: int = 1

    # Whether A and B are matrices that a batch of many adapters can keep in a pool.
    is_pooled: bool = False
    # The groups of a convolution, each of which has a part of the rank of its own.
    rank_groups: int = 1

    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, int | float] = {}
        self.scaling: dict[str, float] = {}
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        # Adapters that others may take the place of without another rank or scaling here (`utils.hotswap`).
        self.swaps_in_place: dict[str, bool] = {}
        self.frozen_peft_weight_names = {}
        # What PiSSA and its like took out of the base weight, until a file gives A and B values.
        self._unread_factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        # DoRA's c of the merged adapters that have one.
        self._merged_scales: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._add_containers()

    def _add_containers(self) -> None:
        """Makes what adapters of another method of this family have otherwise."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int | float, config: LoraConfig, **_: Any) -> None:
        """Adds an adapter, or makes an existing one anew.

        Args:
            adapter_name: Its name: not empty, without a dot.
            r: Its rank (the configuration's, or that of a pattern).
            lora_alpha: Likewise.
            config: The rest: dropout, bias, scaling rule, initialization, inference mode.

        Raises:
            ValueError: A rank below 1, a name that cannot be part of a state-dict key, or a merged adapter's name.
        """
        if not isinstance(r, int) or r < self.least_rank:
            raise ValueError(f"r must be an int of at least {self.least_rank}, got {r!r}")
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before making it anew")
        self._check_adapter(config, r)
        self.r[adapter_name] = r
        self.swaps_in_place.pop(adapter_name, None)
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_dora[adapter_name] = config.use_dora
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = self._initial_scaling(adapter_name)
        p = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self._make_weights(adapter_name, r, config.lora_bias)
        self.frozen_peft_weight_names.pop(adapter_name, None)
        self._initialize(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            dora.add_magnitude(self, adapter_name)
        elif adapter_name in self.lora_magnitude_vector:
            del self.lora_magnitude_vector[adapter_name]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make_anew(self, adapter_name: str, config: LoraConfig) -> None:
        if config.init_lora_weights == "loftq":  # the base weight is quantized already
            config = dataclasses.replace(config, **PLAIN_START)
        self.update_layer(adapter_name, self.r[adapter_name], self.lora_alpha[adapter_name], config)

    def _fill_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        super()._fill_adapter(adapter_name, config)
        self._unread_factors.pop(adapter_name, None)

    def _check_adapter(self, config: LoraConfig, r: int) -> None:
        """Raises for a configuration, or a rank, that this kind of layer cannot follow."""
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            kind = type(self.get_base_layer()).__name__
            message = f"lora_bias=True on a {kind} without a bias: the adapter can be trained but not merged"
            warnings.warn(message, PeftWarning, stacklevel=2)

    def _make_weights(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        """Makes the adapter's parameters, drawing from torch's generator exactly as PEFT does."""
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=lora_bias)

    def _initialize(self, adapter_name: str, config: LoraConfig) -> None:
        """Gives a new adapter its values, by `config.init_lora_weights`."""
        initialize(self, adapter_name, config)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Gives the adapter its initial values: see `LoraConfig.init_lora_weights`."""
        if init_lora_weights is False:
            return
        A: Any = self.lora_A[adapter_name]
        B: Any = self.lora_B[adapter_name]
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        elif isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian":
            nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
        else:
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
        nn.init.zeros_(B.weight)
        if B.bias is not None:
            nn.init.zeros_(B.bias)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging `adapter` adds to the base weight, in the weight's layout and the adapter's dtype."""
        raise NotImplementedError(type(self).__name__)

    def why_no_delta(self) -> str:
        """Why no change of the base weight does what its adapters do, or ""."""
        return ""

    def get_delta_bias(self, adapter: str) -> torch.Tensor | None:
        """What merging `adapter` adds to the base bias: None without `lora_bias`."""
        if adapter not in self.lora_B:
            return None
        B: Any = self.lora_B[adapter]
        return None if B.bias is None else B.bias * self.scaling[adapter]

    def merge_weight(self, weight: torch.Tensor, adapter: str) -> None:
        """Merges `adapter` into a dense copy [out_features, in_features] of a quantized base weight, in place."""
        weight += self.get_delta_weight(adapter)
        if self.use_dora[adapter]:
            weight *= dora.scales_to_merge(self, [adapter])[adapter][:, None]

    def merged_bias(self, bias: torch.Tensor, adapter: str) -> torch.Tensor:
        """The base bias with `adapter` merged."""
        delta = self.get_delta_bias(adapter)
        return bias if delta is None else (bias + delta).to(bias.dtype)

    def _initial_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scaling of `adapter`, if it is here, to `scale` times its initial one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters by `scale`."""
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters by `scale`; None gives them their initial one back."""
        for name in self._active_here():
            self.scaling[name] = self._initial_scaling(name) if scale is None else self.scaling[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False) -> None:
        """Adds adapters to the base weight, in place; to a quantized one by putting a dense layer in its place.

        Args:
            safe_merge: Check that the sums are finite before the weight is touched.
            adapter_names: Which; None for the active ones.
            requantize: Quantize what is merged into a quantized base again; a warning tells the measured error.

        Raises:
            TypeError: The weight is no plain floating-point tensor.
            ValueError: A sum is not finite (`safe_merge`), or there is no bias to merge a `lora_bias` into.
        """
        merge_adapters(self, safe_merge, adapter_names, requantize)

    def unmerge(self) -> None:
        """Subtracts every merged adapter from the base weight."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
            return
        unmerge_adapters(self)

    def _active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def _magnitude_shape(self) -> tuple[int, ...]:
        """The shape of a magnitude of DoRA's, as PEFT stores it."""
        return (self.out_features,)

    def _per_output(self, numbers: torch.Tensor) -> torch.Tensor:
        """A number for each output, [out_features], in a shape that broadcasts against the layer's output."""
        return numbers

    def _names_to_add(self, kwargs: dict[str, Any]) -> list[str]:
        """The adapters that this forward adds to what the base layer gives; where all are disabled, what is merged is
        taken out first."""
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return []
        refuse_adapter_names(kwargs)
        return [] if self.merged_adapters else self._active_here()

    def _add_plain(self, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """`y` plus each adapter's part, by calling the modules; in y's dtype."""
        if not isinstance(y, torch.Tensor):
            kind = type(self.base_layer).__name__
            raise TypeError(
                f"LoRA adds to a tensor, and the base layer, a {kind}, returned a {type(y).__name__} (as some routers "
                "do): keep it out with exclude_modules"
            )
        total = y
        for name in names:
            total = dora.linear_with(self, total, x, name) if self.use_dora[name] else total + self._part(x, name)
        return total.to(y.dtype)

    def _part(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What an adapter adds, by calling its modules; in its own dtype.

        Raises:
            ValueError: It is on the meta device, and x is not: torch would multiply by whatever is in memory.
        """
        A: Any = self.lora_A[name]
        if A.weight.is_meta and not x.is_meta and not hasattr(A, "_hf_hook"):
            raise ValueError(f"adapter {name!r} is on the meta device (low_cpu_mem_usage): load its values first")
        return (
            self.lora_B[name](A(self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype))))
            * self.scaling[name]
        )

    def _why_not_fused(self, names: list[str]) -> str:
        """Why forward with these adapters cannot be one operation, or ""."""
        raise NotImplementedError(type(self).__name__)

    def explain_row(self, name: str = "") -> ExplainRow:
        """How forward would run now."""
        names = self._active_here()
        reason = why_base_alone(self, names) or self._why_not_fused(names)
        base = self.get_base_layer()
        weight = quantized_weight(base) or getattr(self, "weight", None)
        return ExplainRow(
            name,
            type(base).__name__,
            self.in_features,
            self.out_features,
            sum(self.r[n] for n in names),
            getattr(weight, "dtype", None),
            not reason,
            reason,
        )

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
