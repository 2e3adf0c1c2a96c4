"""LoRA on `nn.MultiheadAttention`, which reads its weights and calls no layer: it is called with others in their place.

in_proj's W [3 E, E], for embeddings of size E, gets `scaling * B A`, and out_proj's W [E, E] twice that of its own A
and B. Twice is PEFT 0.21.2's number: it adds out_proj's delta in two places, so that its adapters were trained with it.
Names are PEFT's too: in_proj's factors are the layer's own, out_proj's are of the layer around `base_layer.out_proj`.
Gradients are those of what is computed; PEFT's of out_proj's factors are half of them, and of several active adapters
it gives the last one's alone.

`nn.TransformerEncoderLayer` has a fast path that takes the weights past this layer, with which PEFT's adapters do
nothing in evaluation. This layer keeps it from that, by `_qkv_same_embed_dim`, where an adapter is in force.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftkern.ops._common import without_autocast
from peftkern.ops.plan import Plan
from peftkern.tuners.lora.config import LoraConfig, starts_plain
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.merging import delta_weight
from peftkern.tuners.lora.replaced_parameter import call_with
from peftkern.tuners.tuner_layer import of_base_layer
from peftkern.utils.other import batch_in_force
from peftkern.utils.quantized_modules import holds_quantized
from peftkern.utils.warning import PeftWarning

OUT_PROJ = ".base_layer.out_proj"  # after the name of the attention, the name of the layer around its out_proj


def check_attention(base: Any, config: LoraConfig, name: str = "") -> None:
    """Raises for an adapter that an `nn.MultiheadAttention` cannot have.

    Args:
        base: The attention.
        config: The adapter's configuration.
        name: The attention's name in the model, for messages.

    Raises:
        ValueError: query, key and value have weights of their own (other sizes), or the configuration has `use_dora`,
            `lora_bias` or an initialization other than True, False or "gaussian".
        TypeError: out_proj is no dense linear layer.
    """
    kind = f"{name!r}, a {type(base).__name__}" if name else f"a {type(base).__name__}"
    if not base._qkv_same_embed_dim or base.in_proj_weight is None:
        raise ValueError(f"{kind}: expected query, key and value of one size, whose weights are one parameter")
    out_proj = base.out_proj.get_base_layer() if isinstance(base.out_proj, LoraLayer) else base.out_proj
    if not isinstance(out_proj, nn.Linear) or holds_quantized(out_proj):
        raise TypeError(f"{kind}: expected an out_proj that is a dense nn.Linear, got a {type(out_proj).__name__}")
    init = config.init_lora_weights
    if not starts_plain(init):
        raise ValueError(f"init_lora_weights={init!r} does not go with {kind}: expected True, False or 'gaussian'")
    for field, reason in (
        ("use_dora", "a magnitude is that of a layer's outputs"),
        ("lora_bias", "the adapter is added to weights that the attention reads, not to outputs"),
    ):
        if getattr(config, field):
            raise ValueError(f"{field}=True does not go with {kind}: {reason}")


class _WeightThatIsRead(LoraLayer, nn.Module):
    """LoRA on a weight [out_features, in_features] of an attention, which reads it: `W + factor * scaling * B A`."""

    fan_in_fan_out = False
    # What PEFT multiplies the delta by besides the scaling.
    factor: int = 1

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return delta_weight(A.weight, B.weight, self.factor * self.scaling[adapter], False)

    @without_autocast
    def _sum(self, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
        """`weight` plus what these adapters add, in its dtype; rounded once.

        Raises:
            ValueError: The weight is on the meta device and an accelerate hook brings it, or an adapter is there.
        """
        total = weight
        for name in names:
            delta = self.get_delta_weight(name)
            if delta.is_meta != weight.is_meta:
                what = f"adapter {name!r}" if delta.is_meta else "a weight"
                raise ValueError(f"{what} of an attention is on the meta device: load it, or keep it on a device")
            total = total + delta
        return total.to(weight.dtype)

    @property
    def weight_is_settled(self) -> bool:
        """Whether the base weight is, as it is, what forward would take."""
        if self._disable_adapters:
            return not self.merged_adapters
        return bool(self.merged_adapters) or not self._active_here()

    def _why_not_fused(self, names: list[str]) -> str:
        return "nn.MultiheadAttention reads its weights: it is called with W + BA in their place"

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes, "unfused"; `tokens` is taken as other layers take it."""
        return Plan("unfused", self.explain_row().reason)

    def plan_mixed(self, tokens: int) -> Plan:
        """Adapters that are part of a weight are not mixed in a batch, as in PEFT."""
        return Plan("refused", "an adapter on nn.MultiheadAttention cannot be mixed in a batch")


class AttentionOutput(_WeightThatIsRead):
    """LoRA on the out_proj of an attention, which reads `weight` and `bias` and does not call it."""

    factor = 2

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int | float) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, base_layer.in_features, base_layer.out_features)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What an attention that called this layer would get from it."""
        return F.linear(x, self._sum(self.weight, self._names_to_add({})), self.bias)


class MultiheadAttention(_WeightThatIsRead):
    """LoRA on an `nn.MultiheadAttention`: on its in_proj, and on its out_proj by an `AttentionOutput` of the same rank.

    Args:
        base_layer: The attention to wrap; its out_proj is wrapped inside it.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        r: Its rank; 0 for the configuration's.
        lora_alpha: None for the configuration's.

    Raises:
        ValueError, TypeError: See `check_attention`.

    Warns:
        PeftWarning: The configuration has `lora_dropout`, which does nothing here.
    """

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
        check_attention(base, config)
        r, lora_alpha = r or config.r, config.lora_alpha if lora_alpha is None else lora_alpha
        LoraLayer.__init__(self, base_layer, base.embed_dim, 3 * base.embed_dim)
        self._active_adapter = adapter_name
        out_proj = AttentionOutput(base.out_proj, adapter_name, config, r, lora_alpha)
        # Both again where PEFT makes both again, so that torch's generator gives the same values.
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha, config)
        out_proj.update_layer(adapter_name, r, lora_alpha, config)
        base.out_proj = out_proj

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int | float, config: LoraConfig, **_: Any) -> None:
        """Adds an adapter to in_proj and out_proj, or makes an existing one anew: see `LoraLayer.update_layer`."""
        super().update_layer(adapter_name, r, lora_alpha, config)
        self.get_base_layer().out_proj.update_layer(adapter_name, r, lora_alpha, config)

    def _make_anew(self, adapter_name: str, config: LoraConfig) -> None:
        # in_proj alone: out_proj is asked by itself, and may have what in_proj lacks.
        LoraLayer.update_layer(self, adapter_name, self.r[adapter_name], self.lora_alpha[adapter_name], config)

    def _check_adapter(self, config: LoraConfig, r: int) -> None:
        check_attention(self.get_base_layer(), config)
        if config.lora_dropout > 0:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} does nothing in nn.MultiheadAttention, as in PEFT: the adapter is "
                "added to the weights, so there is no input of its own to drop elements of",
                PeftWarning,
                stacklevel=3,
            )

    @property
    def weight(self) -> torch.Tensor:
        """in_proj's weight, as other layers' `weight` is the base layer's."""
        return self.get_base_layer().in_proj_weight

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        return self.weight.device, self.weight.dtype

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention's output and weights, in the query's dtype as in PEFT, also under autocast.

        Raises:
            NotImplementedError: A batch whose rows want different adapters, as in PEFT.
        """
        if kwargs.pop("adapter_names", None) is not None or batch_in_force(self) is not None:
            raise NotImplementedError("adapter_names: an adapter on nn.MultiheadAttention cannot be mixed in a batch")
        base = self.get_base_layer()
        output = base.out_proj
        names, of_output = self._names_to_add({}), output._names_to_add({})
        if names or of_output:
            within = _WithOutput(base, lambda weight: output._sum(weight, of_output))
            path = "attention.in_proj_weight"
            made = call_with(within, path, lambda weight: self._sum(weight, names), (query, *args), kwargs)
        else:
            made = base(query, *args, **kwargs)
        y, weights = made
        return y.to(query.dtype), None if weights is None else weights.to(query.dtype)

    # -- what model code asks an attention for -------------------------------------------------------------------------

    embed_dim, kdim, vdim = of_base_layer("embed_dim"), of_base_layer("kdim"), of_base_layer("vdim")
    num_heads, head_dim = of_base_layer("num_heads"), of_base_layer("head_dim")
    dropout, batch_first = of_base_layer("dropout"), of_base_layer("batch_first")
    in_proj_weight, in_proj_bias = of_base_layer("in_proj_weight"), of_base_layer("in_proj_bias")
    bias_k, bias_v = of_base_layer("bias_k"), of_base_layer("bias_v")
    add_zero_attn = of_base_layer("add_zero_attn")

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether the weights may be taken past this layer: not where its forward would change them."""
        return all(layer.weight_is_settled for layer in (self, self.get_base_layer().out_proj))

    @property
    def out_proj(self) -> nn.Module:
        return self.get_base_layer().out_proj.get_base_layer()

    def merge_masks(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's own."""
        return self.get_base_layer().merge_masks(*args, **kwargs)


class _WithOutput(nn.Module):
    """An attention that is called with another weight of out_proj."""

    def __init__(self, attention: nn.Module, change: Any) -> None:
        super().__init__()
        self.attention, self.change = attention, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return call_with(self.attention, "out_proj.base_layer.weight", self.change, args, kwargs)
