"""Adding LoRA adapters to the base weight and taking them out again.

`W <- W + scaling * B A`, and with `lora_bias` also `b <- b + scaling * b_B`. The sum is taken in the wider of the two
dtypes and rounded once, into the weight's own storage, so that what is tied to the weight stays tied. With `use_dora`
its rows are scaled too, `W <- c o (W + scaling * B A)`. A quantized weight is merged in another way: see
peftkern/tuners/merging_quantized.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftkern.tuners.lora.dora import scales_to_merge, with_adapter, without_adapter
from peftkern.tuners.merging_quantized import (
    is_merged_into_dense,
    merge_quantized,
    merged_sum,
    unmerge_quantized,
)
from peftkern.tuners.tuner_layer import check_adapters_to_merge, check_mergeable_base, parameters_of
from peftkern.utils.quantized_modules import weight_of

if TYPE_CHECKING:
    from peftkern.tuners.lora.layer import LoraLayer


def delta_weight(A: torch.Tensor, B: torch.Tensor, scaling: float, transposed: bool) -> torch.Tensor:
    """`scaling * B A`, transposed if asked, in the adapters' dtype.

    Sixteen-bit adapters are multiplied in float32 and the result is rounded once.

    Args:
        A: [R, K].
        B: [N, R].
        scaling: The adapter's scaling.
        transposed: Whether the weight that this is added to is stored [K, N].
    """
    dtype = B.dtype
    if dtype.itemsize < 4:
        A, B = A.float(), B.float()
    delta = B @ A
    return ((delta.T if transposed else delta) * scaling).to(dtype)


def check_mergeable(layer: LoraLayer, adapter_names: list[str]) -> None:
    """Raises for a base layer whose weight cannot be changed in place, before anything is changed.

    Raises:
        TypeError, ValueError: See `check_mergeable_base`.
        ValueError: There is no bias to merge a `lora_bias` into, or an adapter is on the meta device.
        NotImplementedError: What the adapters do is no change of the weight: see `LoraLayer.why_no_delta`.
    """
    base = layer.get_base_layer()
    reason = layer.why_no_delta()
    if reason:
        raise NotImplementedError(f"cannot merge adapters {adapter_names}: {reason}")
    check_mergeable_base(layer)
    for name in adapter_names:
        if any(p.is_meta for c in layer._containers() if name in c for p in parameters_of(c[name])):
            raise ValueError(f"cannot merge adapter {name!r}, which is on the meta device: load its values first")
        if layer.lora_bias.get(name) and getattr(base, "bias", None) is None:
            raise ValueError(f"cannot merge adapter {name!r} with lora_bias=True: the base layer has no bias")


@torch.no_grad()
def merge_adapters(
    layer: LoraLayer, safe_merge: bool, adapter_names: list[str] | None, requantize: bool = False
) -> None:
    """Merges the adapters that `layer` has among `adapter_names` (default: the active ones).

    With `safe_merge` all sums are computed and checked before the weight is touched. `requantize`: see
    `merge_quantized`; it says nothing of a dense weight.

    Raises:
        ValueError, TypeError: See `check_mergeable`; or, with `safe_merge`, a merged weight would not be finite.
    """
    available = layer._get_available_adapters()
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in available]
    if not names:
        return
    check_mergeable(layer, names)
    if is_merged_into_dense(layer) or weight_of(layer.get_base_layer()) is not None:
        merge_quantized(layer, names, safe_merge, requantize)
    else:
        scales = scales_to_merge(layer, names)
        if safe_merge:
            weight, bias = checked_merge(layer, names)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.get_base_layer().bias.data.copy_(bias)
        else:
            for name in names:
                _add(layer, name, 1, scales.get(name))
        layer._merged_scales |= scales
    layer.merged_adapters.extend(names)


@torch.no_grad()
def unmerge_adapters(layer: LoraLayer) -> None:
    """Subtracts what was merged, last first; adapters that were changed since leave the difference behind.

    A quantized weight comes back as it was.
    """
    if is_merged_into_dense(layer):
        unmerge_quantized(layer)
        return
    while layer.merged_adapters:
        name = layer.merged_adapters[-1]
        _add(layer, name, -1, layer._merged_scales.get(name))
        layer._merged_scales.pop(layer.merged_adapters.pop(), None)


@torch.no_grad()
def checked_merge(layer: LoraLayer, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias with `names` merged, as new tensors.

    Raises:
        ValueError: One of them is not finite.
    """
    base = layer.get_base_layer()
    weight, bias = layer.weight, getattr(base, "bias", None)
    if weight_of(base) is not None:
        if not torch.isfinite(merged_sum(layer, names)).all():
            raise ValueError(f"merging {names} would make the weight not finite: nothing was merged here")
        return weight, bias
    scales = scales_to_merge(layer, names)
    for name in names:
        scale = scales.get(name)
        merged = weight + layer.get_delta_weight(name) if scale is None else with_adapter(layer, weight, name, scale)
        weight = merged.to(weight.dtype)
        bias_delta = layer.get_delta_bias(name)
        if bias is not None and bias_delta is not None:
            bias = (bias + bias_delta).to(bias.dtype)
        for what, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"merging adapter {name!r} would make the {what} not finite: nothing was merged here")
    return weight, bias


def _add(layer: LoraLayer, name: str, sign: int, scale: torch.Tensor | None) -> None:
    """Adds an adapter, or takes it out (-1); `scale` is DoRA's c, None of an adapter without."""
    weight = layer.weight.data
    if scale is None:
        weight.add_(layer.get_delta_weight(name), alpha=sign)
    else:
        weight.copy_(with_adapter(layer, weight, name, scale) if sign > 0 else without_adapter(layer, weight, name))
    bias_delta = layer.get_delta_bias(name)
    if bias_delta is not None:
        layer.get_base_layer().bias.data.add_(bias_delta, alpha=sign)
