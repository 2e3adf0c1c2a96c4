"""Merging adapters into a base layer whose weight is quantized.

Four bits do not hold a merged weight: what an adapter changes is smaller than a step between two codes. So merging
makes a dense layer, in the dtype that the weight was quantized from, and puts it in the base layer's place:

    W = round(dequantize(W_q) + sum of scaling * B A)        LoRA; in float32, rounded once
    W = round(c o (dequantize(W_q) + scaling * B A))         DoRA, see peftkern/tuners/lora/dora.py
    W = round(dequantize(W_q) * l)                           IA3

The layer is of the class that was quantized: an `nn.Linear`, or transformers' Conv1D with its weight turned back, so
that a merged GPT-2 is saved in the layout that its class reads.

When a whole model is unloaded, such layers take the dtype of the rest (`peftkern.tuners.merged_models`).

The quantized layer is kept beside it (an eighth to a quarter of the dense one) and comes back when adapters are taken
out again, to the bit. On request the sum is quantized anew, with the settings of the old weight, and a warning says
what that cost: one for each layer, or one for all layers of a model (`one_warning_for_all`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from peftkern.ops import dequantize, quantize_4bit, quantize_8bit
from peftkern.utils.linear_layers import dense_linear, source_conv1d
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from peftkern.weights import Weight4bit, Weight8bit


class MergingLayer(Protocol):
    """What a layer of a method must have so that its adapters can be merged here."""

    merged_adapters: list[str]
    base_layer: nn.Module
    in_features: int
    out_features: int

    def get_base_layer(self) -> Any:
        """The wrapped layer."""

    def merge_weight(self, weight: torch.Tensor, adapter: str) -> None:
        """Merges `adapter` into a dense float32 copy [out_features, in_features] of the base weight, in place."""

    def merged_bias(self, bias: torch.Tensor, adapter: str) -> torch.Tensor:
        """The base bias with `adapter` merged."""


# The name under which a merged layer keeps its quantized base: no submodule, so it is in no state dict.
_KEPT = "_quantized_base"
# Likewise, what quantizing anew cost it.
_LOSS = "_requantizing_loss"


class Loss(NamedTuple):
    """What quantizing a merged weight anew cost; Frobenius norms."""

    error: float  # of what it moved the weight by
    change: float  # of what the adapters changed
    norm: float  # of the weight

    def __str__(self) -> str:
        return (
            f"moved it by {self.error:.3g} (norm of the difference; the weight's is {self.norm:.3g}), where the "
            f"adapters changed it by {self.change:.3g}"
        )


class RequantizedWarning(UserWarning):
    """A merged weight was quantized anew; the text says what was lost."""


def is_merged_into_dense(layer: Any) -> bool:
    """Whether a merged, dense (or requantized) layer stands in the place of the layer's quantized base."""
    return _KEPT in layer.__dict__


def quantized_base(layer: Any) -> Any:
    """The quantized base layer in whose place a merged one stands; None of a layer without."""
    return layer.__dict__.get(_KEPT)


def merged_sum(layer: MergingLayer, names: list[str]) -> torch.Tensor:
    """The base weight, which is quantized, with `names` merged: float32 [out_features, in_features]."""
    total = _dense(layer.get_base_layer())
    for name in names:
        layer.merge_weight(total, name)
    return total


def _dense(base: nn.Module) -> torch.Tensor:
    weight: Any = weight_of(base)
    return dequantize(weight, torch.float32)


@torch.no_grad()
def merge_quantized(layer: MergingLayer, names: list[str], safe_merge: bool, requantize: bool) -> None:
    """Puts a layer with `names` merged in the place of the layer's quantized base.

    Args:
        layer: Its base is quantized, or was when adapters were merged before.
        names: Adapters of the layer that are not merged yet.
        safe_merge: Check that the sum is finite first.
        requantize: Quantize the sum again, rather than keep it dense.

    Raises:
        ValueError: The sum is not finite (`safe_merge`), or adapters are merged already the other way.
    """
    base: Any = layer.__dict__.get(_KEPT) or layer.get_base_layer()
    weight: Any = weight_of(base)
    if is_merged_into_dense(layer) and requantize != (weight_of(layer.get_base_layer()) is not None):
        raise ValueError(
            f"requantize={requantize}: {layer.merged_adapters} are merged the other way; unmerge them first"
        )
    all_names = [*layer.merged_adapters, *names]
    total = dequantize(weight, torch.float32)
    for name in all_names:
        layer.merge_weight(total, name)
    bias = _merged_bias(layer, base, all_names)
    for what, t in (("weight", total), ("bias", bias)):
        if safe_merge and t is not None and not t.isfinite().all():
            raise ValueError(f"merging {names} would make the {what} not finite: nothing was merged here")
    merged = _requantized(layer, weight, total, bias, base) if requantize else _dense_layer(weight, total, bias, base)
    merged.train(base.training)
    layer.__dict__[_KEPT] = base
    layer.base_layer = merged


def unmerge_quantized(layer: MergingLayer) -> None:
    """Puts the quantized base back, on the device where its stand-in was."""
    base = layer.__dict__.pop(_KEPT)
    layer.__dict__.pop(_LOSS, None)
    layer.base_layer = base.to(layer.get_base_layer().weight.device)
    layer.merged_adapters.clear()


def _merged_bias(layer: MergingLayer, base: Any, names: list[str]) -> torch.Tensor | None:
    bias = None if base.bias is None else base.bias.detach().clone()
    for name in names:
        bias = None if bias is None else layer.merged_bias(bias, name)
    return bias


def _dense_layer(
    weight: Weight4bit | Weight8bit, total: torch.Tensor, bias: torch.Tensor | None, base: nn.Module
) -> nn.Module:
    dtype = weight.dtype
    return dense_linear(total.to(dtype), None if bias is None else bias.to(dtype), source_conv1d(base))


def _requantized(
    layer: MergingLayer, weight: Weight4bit | Weight8bit, total: torch.Tensor, bias: torch.Tensor | None, base: Any
) -> nn.Module:
    """A layer with the sum in the format of `weight`; warns with the measured error."""
    made: Any
    if isinstance(weight, Weight4bit):
        again: Any = quantize_4bit(total.to(weight.dtype), weight.quant_type, weight.blocksize, weight.nested)
        storage = base.weight.dtype  # FSDP wants its parameters in one dtype
        made = Linear4bit.from_weight(again, bias, compute_dtype=base.compute_dtype, quant_storage=storage)
    else:
        again = quantize_8bit(total.to(weight.dtype))
        made = Linear8bit.from_weight(again, bias, compute_dtype=getattr(base, "compute_dtype", None))
    made.source_cls = getattr(base, "source_cls", None)
    error = (dequantize(again, torch.float32) - total).norm().item()
    change = (total - dequantize(weight, torch.float32)).norm().item()
    loss = layer.__dict__[_LOSS] = Loss(error, change, total.norm().item())
    warnings.warn(
        f"requantizing a merged {layer.out_features} x {layer.in_features} weight {loss}: "
        f"{'more' if error > change else 'less'} was lost than was merged. Merge into a dense layer to keep it all "
        "(requantize=False)",
        RequantizedWarning,
        stacklevel=5,
    )
    return made


@contextlib.contextmanager
def one_warning_for_all(layers: Mapping[str, Any]) -> Iterator[None]:
    """Within the block these layers, by name, are merged; what requantizing them cost is told afterwards, and once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequantizedWarning)
        yield
    losses = {name: layer.__dict__[_LOSS] for name, layer in layers.items() if _LOSS in layer.__dict__}
    if not losses:
        return
    worst = max(losses, key=lambda name: losses[name].error / max(losses[name].change, 1e-30))
    more = sum(loss.error > loss.change for loss in losses.values())
    warnings.warn(
        f"merged layers requantized: {len(losses)}; more was lost than was merged in {more} of them. The worst is "
        f"{worst!r}: requantizing {losses[worst]}. Merge into dense layers to keep it all (requantize=False)",
        RequantizedWarning,
        stacklevel=4,
    )
