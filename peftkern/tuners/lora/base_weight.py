"""What initializations share that decompose the base weight, and of those that replace it (LoftQ, PiSSA, OLoRA).

A replaced weight is a new parameter, the old one is not written to. So where adapting a model fails half-way, putting
the old parameters back (`peftkern.utils.model_snapshot`) undoes it.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from peftkern.ops import quantize_4bit, quantize_8bit
from peftkern.tuners.fusing import plain_weight
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit
from peftkern.weights import Weight4bit, Weight8bit


@torch.no_grad()
def low_rank_factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k, K] and B [N, k], float32, whose product B A is the nearest matrix of rank k to `matrix` [N, K].

    k = r, or less where the matrix has fewer singular values above 0. Each pair of singular vectors has the sign that
    makes the largest element of B's column positive, so that A and B do not hang on the library that finds them.

    Raises:
        ValueError: The matrix holds NaN or infinity.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("matrix: expected finite numbers, got NaN or infinity")
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    k = int((S[:r] > 0).sum())
    U, root, Vh = U[:, :k], S[:k].sqrt(), Vh[:k]
    if k:
        sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)[0]
        root_signed = root * sign
        return root_signed[:, None] * Vh, U * root_signed
    return Vh, U


@torch.no_grad()
def write_factors(A: torch.Tensor, B: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Makes `B A` equal to `b a`, in place.

    Directions that are left where `a` has fewer rows than A get zeros in B and keep what A holds: both zero, they would
    never train.

    Args:
        A, B: The adapter's weights, [r, K] and [N, r].
        a, b: As from `low_rank_factors`, [k, K] and [N, k], k <= r.
    """
    k = a.shape[0]
    A[:k].copy_(a)
    B[:, :k].copy_(b)
    B[:, k:].zero_()


def dense_weight(base: Any, init: str) -> torch.Tensor:
    """The weight of a base layer, as it is stored, if it is dense and can be replaced.

    Args:
        base: The layer.
        init: The initialization that wants it, for messages.

    Raises:
        ValueError: The weight is on the meta device.
        TypeError: It is sharded, parametrized or otherwise no plain floating-point tensor.
    """
    kind, weight = type(base).__name__, getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        raise ValueError(f"init_lora_weights={init!r}: the weight of a {kind} is on the meta device: load it first")
    plain = plain_weight(base) if "parametrizations" not in base._modules else None
    if plain is None or "weight" not in base._parameters or not plain.is_floating_point():
        found = f"a {type(weight).__name__} of {weight.dtype}" if isinstance(weight, torch.Tensor) else repr(weight)
        raise TypeError(
            f"init_lora_weights={init!r}: the weight of a {kind} must be a plain floating-point parameter, got {found}"
            f"{' (parametrized)' if 'parametrizations' in base._modules else ''}"
        )
    return plain


def by_rows(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's stored weight as [out_features, in_features]; and the other way round."""
    return weight.t().contiguous() if layer.fan_in_fan_out else weight


def refuse_merged_base(layer: Any, init: str) -> None:
    """Raises ValueError where adapters are in the base weight, which `init` is about to replace."""
    if layer.merged_adapters:
        raise ValueError(f"init_lora_weights={init!r} changes the base weight: unmerge {layer.merged_adapters} first")


def warn_other_adapters(layer: Any, adapter_name: str, init: str) -> None:
    """Warns of other adapters on a layer whose base weight `init` replaced."""
    others = sorted(set(layer.scaling) - {adapter_name})
    if others:
        warnings.warn(f"{init} changes the base weight, which the adapters {others} stand on too", stacklevel=3)


def replace_weight(layer: Any, adapter_name: str, weight: torch.Tensor, init: str) -> None:
    """Gives a layer another dense base weight [out_features, in_features], and warns if other adapters stand on it."""
    base = layer.get_base_layer()
    old = base.weight
    new = by_rows(layer, weight)
    if not torch.equal(new, old):
        warn_other_adapters(layer, adapter_name, init)
    base.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def replace_quantized_weight(layer: Any, adapter_name: str, weight: torch.Tensor, held: Any, init: str) -> None:
    """Gives a layer whose base is quantized, to `held`, another weight: quantized anew with the same settings.

    Args:
        layer: Its base is a quantized layer of peftkern or bitsandbytes, which gets a new parameter.
        adapter_name: The adapter that wants it; others are warned of.
        weight: float32 [out_features, in_features].
        held: What the base holds now, a `Weight4bit` or a `Weight8bit`.
        init: The initialization that wants it, for messages.
    """
    base = layer.get_base_layer()
    if isinstance(base, Linear4bit | Linear8bit):
        # The dtype that the old one was quantized from stays: forward computes in it.
        new = dataclasses.replace(_quantized_like(held, weight), dtype=held.dtype)
        base._take(new, keep_parameter=False)  # type: ignore[arg-type]
    else:
        base.weight = _bitsandbytes_parameter(base, weight)
    warn_other_adapters(layer, adapter_name, init)


def _quantized_like(held: Weight4bit | Weight8bit, weight: torch.Tensor) -> Weight4bit | Weight8bit:
    if isinstance(held, Weight4bit):
        return quantize_4bit(weight, held.quant_type, held.blocksize, held.nested)
    return rounded_to_int8(weight)


def rounded_to_int8(weight: torch.Tensor) -> Weight8bit:
    """`weight` in LLM.int8's format: from float16, as bitsandbytes has it, where that holds its values."""
    half = weight.to(torch.float16)
    return quantize_8bit(half if bool(half.isfinite().all()) else weight)


def _bitsandbytes_parameter(base: Any, weight: torch.Tensor) -> nn.Parameter:
    """`weight` as a parameter like the one that bitsandbytes' layer has; moving it to a device quantizes it."""
    old = base.weight
    if not hasattr(base, "quant_state"):
        made = type(old)(weight, requires_grad=False, has_fp16_weights=False)
        return made.to(old.device)
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    settings = {name: getattr(old, name) for name in names if hasattr(old, name)}
    state = getattr(old, "quant_state", None) or base.quant_state
    made = type(old)(weight, requires_grad=False, module=base, **settings).to(old.device)
    made.quant_state.dtype = state.dtype
    return made
