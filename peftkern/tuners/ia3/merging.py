"""Multiplying IA3 adapters into the base weight and taking them out again.

`W <- W * l` along the scaled axis and, where the output is scaled, `b <- b * l`: taken in the wider of the two dtypes
and rounded once, into the weight's own storage, so that what is tied to the weight stays tied. Taking out divides by
the same l. That cannot bring back everything (l may be 0, products may leave the dtype's range), so rows or columns
that division would not give back within two roundings are kept aside while the adapter is merged: usually none. A
quantized weight is merged in another way: see peftkern/tuners/merging_quantized.py.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftkern.tuners.merging_quantized import is_merged_into_dense, merge_quantized, merged_sum, unmerge_quantized
from peftkern.tuners.tuner_layer import check_adapters_to_merge, check_mergeable_base
from peftkern.utils.quantized_modules import weight_of

if TYPE_CHECKING:
    from peftkern.tuners.ia3.layer import IA3Layer

# The name under which a layer keeps what is needed to take adapters out again: in no state dict.
_UNDO = "_ia3_undo"


@dataclass
class _Undo:
    """How to undo one multiplication: divide by `factor`, then put `kept` back at flat positions `where`."""

    factor: torch.Tensor
    where: torch.Tensor
    kept: torch.Tensor

    def apply(self, t: torch.Tensor) -> None:
        """Undo it in place."""
        t.copy_(t / self.factor.to(t.device))
        t[torch.unravel_index(self.where.to(t.device), t.shape)] = self.kept.to(t.device, t.dtype)


def _multiply(t: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, _Undo]:
    """round(t * factor) as a new tensor, and how to undo it."""
    factor = factor.detach().clone()
    product = (t * factor).to(t.dtype)
    lost = ~(((product / factor).to(t.dtype) - t).abs() <= 2 * torch.finfo(t.dtype).eps * t.abs())
    where = lost.reshape(-1).nonzero().squeeze(1)
    return product, _Undo(factor, where, t.reshape(-1)[where])


@torch.no_grad()
def checked_merge(layer: IA3Layer, names: list[str]) -> None:
    """Raises ValueError if merging `names` would make the weight or bias not finite; changes nothing."""
    base = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    if weight_of(base) is not None:
        weight = merged_sum(layer, names)
    else:
        weight = base.weight
        for name in names:
            weight = (weight * layer.weight_factor(name, weight)).to(weight.dtype)
    for name in names:
        bias = None if bias is None else layer.merged_bias(bias, name)
    for what, t in (("weight", weight), ("bias", bias)):
        if t is not None and not torch.isfinite(t).all():
            raise ValueError(f"merging {names} would make the {what} not finite: nothing was merged here")


@torch.no_grad()
def merge_adapters(layer: IA3Layer, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Merges the adapters that `layer` has among `adapter_names` (default: the active ones).

    Raises:
        ValueError, TypeError: See `check_mergeable_base`; or, with `safe_merge`, a merged weight would not be finite.
    """
    available = layer._get_available_adapters()
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in available]
    if not names:
        return
    check_mergeable_base(layer)
    base = layer.get_base_layer()
    if is_merged_into_dense(layer) or weight_of(base) is not None:
        merge_quantized(layer, names, safe_merge, False)
        layer.merged_adapters.extend(names)
        return
    if safe_merge:
        checked_merge(layer, names)
    undo = layer.__dict__.setdefault(_UNDO, [])
    bias = None if layer.is_feedforward else getattr(base, "bias", None)
    for name in names:
        weight, weight_undo = _multiply(base.weight.data, layer.weight_factor(name, base.weight))
        base.weight.data.copy_(weight)
        bias_undo = None
        if bias is not None:
            merged, bias_undo = _multiply(bias.data, layer.vector(name))
            bias.data.copy_(merged)
        undo.append((weight_undo, bias_undo))
        layer.merged_adapters.append(name)


@torch.no_grad()
def unmerge_adapters(layer: IA3Layer) -> None:
    """Takes out what was merged, last first; a quantized weight comes back as it was."""
    if not layer.merged:
        warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=3)
        return
    if is_merged_into_dense(layer):
        unmerge_quantized(layer)
        return
    base, undo = layer.get_base_layer(), layer.__dict__[_UNDO]
    while layer.merged_adapters:
        weight_undo, bias_undo = undo[-1]
        weight_undo.apply(base.weight.data)
        if bias_undo is not None:
            bias_undo.apply(base.bias.data)
        undo.pop()
        layer.merged_adapters.pop()
