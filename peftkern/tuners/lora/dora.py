"""DoRA in LoRA's layers: beside A and B a trained magnitude for each output (Liu et al. 2024, arXiv:2402.09353).

With V = W + scaling * B A [N, K], norm [N] the lengths of its rows, constant in backward, and c = magnitude / norm [N]:

    y = c o (x W^T + scaling * x A^T B^T) + bias
    y = x W^T + (c - 1) o (x' W^T) + c o (scaling * x' A^T B^T) + bias      in training, x' = dropout(x)

so that merging makes W into c o V. The magnitude starts as the norm, which changes nothing; a scaling that is changed
later turns the rows and leaves their lengths. On an embedding, whose weight is W^T [K, N], c scales what is looked up,
`y = c o (W^T[i] + scaling * (A[:, i])^T B^T)`. On a convolution a row is all that makes one output channel.

Several active adapters act one after another, each on what the last one made, as in PEFT 0.21.2: in the first formula
the next adapter's x W^T is the last one's y - bias, and merging them in that order gives the same. A row of V that is
zero has c = 0, where PEFT divides by zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from peftkern.ops import dequantize, dora_linear, dora_norm
from peftkern.ops._common import without_autocast
from peftkern.ops.adapter_route import is_capturing
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.tuners.fusing import compute_dtype, plain_weight, why_called_as_is, why_plain
from peftkern.tuners.merging_quantized import quantized_base
from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import Weight

# `peftkern.helpers.DoraCaching`, for the thread that asks for it.
keeps_norms: ContextVar[bool] = ContextVar("peftkern_keeps_norms", default=False)


class Magnitude(nn.Module):
    """An adapter's magnitude, [N]. A module, since its parameter's name in the model is PEFT's: `<adapter>.weight`.

    Args:
        weight: Its values.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._kept_norm = _KeptNorm()

    def forward(self) -> torch.Tensor:
        """The magnitude; a call rather than an attribute, so that what gathers a sharded one by hooks can do so."""
        return self.weight

    def extra_repr(self) -> str:
        return f"out_features={self.weight.numel()}"

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


def add_magnitude(layer: Any, adapter: str) -> None:
    """Gives an adapter that has its A and B the magnitude that changes nothing: the norm; in the dtype of A, in the
    shape that the layer's kind has for it in PEFT.

    One on the meta device, which waits for values from a file, gets its magnitude there.
    """
    A, _ = _factors(layer, adapter)
    if A.is_meta or getattr(layer.get_base_layer().weight, "is_meta", False):
        norm = torch.empty(layer.out_features, dtype=A.dtype, device="meta")
    else:
        norm = weight_norm(layer, adapter).to(A.dtype)
    layer.lora_magnitude_vector[adapter] = Magnitude(norm.view(layer._magnitude_shape()))


# -- norms and scales --------------------------------------------------------------------------------------------------


def _factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter as they are held: [R, K] and [N, R], or those of a convolution."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def matrices(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R / groups]; of a convolution K counts the elements of its kernel for all input channels."""
    A, B = _factors(layer, adapter)
    return (A, B) if A.dim() == 2 else (A.flatten(1), B.flatten(1))


def _magnitude(layer: Any, adapter: str) -> torch.Tensor:
    """The magnitude of an adapter, [N]."""
    magnitude: torch.Tensor = layer.lora_magnitude_vector[adapter]()
    return magnitude.flatten()


def _stored_transposed(layer: Any) -> bool:
    """Whether the base weight is stored [K, N]: that of an embedding, and of a dense Conv1D."""
    return getattr(layer, "fan_in_fan_out", True)


def _base_weight(layer: Any) -> Weight:
    """The base weight [N, K] without adapters, also where some are merged into it; a convolution's as a matrix.

    Raises:
        ValueError: It is on the meta device, where it has no values.
    """
    base = quantized_base(layer) or layer.get_base_layer()
    quantized = weight_of(base)
    if quantized is not None:
        return quantized
    weight = base.weight
    if weight.is_meta:
        raise ValueError(
            f"use_dora=True needs the weight of a {type(base).__name__} that is on the meta device (an accelerate hook "
            "brings it for the layer's own forward only): keep adapted layers on a device"
        )
    for name in reversed(layer.merged_adapters):
        weight = without_adapter(layer, weight, name)
    if weight.dim() > 2:
        return weight.flatten(1)
    return weight.t() if _stored_transposed(layer) else weight


@torch.no_grad()
def weight_norm(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The norms of the rows of W + scaling * B A, without gradient: [N], float32 (float64 of such a weight).

    A quantized weight is decoded to `dtype`, by default that which the layer computes in, float32 if it has none.
    """
    weight = _base_weight(layer)
    A, B = matrices(layer, adapter)
    if not isinstance(weight, torch.Tensor):
        dtype = dtype or compute_dtype(layer.get_base_layer(), torch.float32)
        if why_plain():
            return _plain_norm(dequantize(weight, dtype), A, B, layer.scaling[adapter])
        return dora_norm(weight, A, B, layer.scaling[adapter], dtype=dtype)
    if type(weight) not in (torch.Tensor, nn.Parameter) or why_plain():
        return _plain_norm(weight, A, B, layer.scaling[adapter])
    return dora_norm(weight, A, B, layer.scaling[adapter])


@without_autocast
def _plain_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """`dora_norm` for sharded weights and transforms: in operations that these know, constant to all derivatives."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, A, B = (t.detach().to(wide) for t in (weight, A, B))
    return torch.linalg.vector_norm(weight + scaling * (B @ A), dim=1)


class _KeptNorm:
    """The norms of an adapter, and what they were made of. A copy of its layer, or a pickled one, starts empty."""

    __slots__ = ("_held", "_norm", "_state")

    def __init__(self) -> None:
        self._norm: torch.Tensor | None = None
        self._held: list[Any] = []
        self._state: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _KeptNorm, ()

    def get(self, layer: Any, adapter: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The norms, made anew if the weight, A, B or the scaling are others or were written to; None of inference
        tensors, which do not tell."""
        base = layer.get_base_layer()
        quantized = weight_of(base)
        holders = [base.weight, *_factors(layer, adapter)]
        parts = holders if quantized is None else [*quantized.tensors(), *holders]
        tensors = [t for t in parts if t is not None]
        if any(t.is_inference() for t in tensors):
            return None
        state = (layer.scaling[adapter], dtype, *((t.data_ptr(), t._version) for t in tensors))
        same = state == self._state and all(held() is t for held, t in zip(self._held, holders, strict=False))
        if self._norm is None or not same:
            self._norm, self._state = weight_norm(layer, adapter, dtype), state
            self._held = [weakref.ref(t) for t in holders]  # an address alone may be another's by now
        return self._norm


def norms_are_kept(layer: Any) -> bool:
    """Whether a forward of `layer` now takes norms that are kept from one to the next."""
    if torch.compiler.is_compiling() or layer.training or torch.is_grad_enabled():
        return False
    # Norms that a CUDA graph makes are not there before its replays; those of before it would find freed, or as they
    # once were.
    return keeps_norms.get() and not is_capturing(layer.get_base_layer().weight)


def row_scale(layer: Any, adapter: str) -> torch.Tensor:
    """c = magnitude / norm, [N], in the wider dtype of the two; 0 where the norm is."""
    norm = weight_norm(layer, adapter)
    return _magnitude(layer, adapter) / norm.masked_fill(norm == 0, torch.inf)


# -- forward -----------------------------------------------------------------------------------------------------------


def why_not_fused(layer: Any, adapters: list[str], weight: Weight) -> str:
    """Why a linear layer's forward with these adapters, which is one operation of LoRA, is none of DoRA's, or ""."""
    with_magnitude = [name for name in adapters if layer.use_dora[name]]
    if not with_magnitude:
        return ""
    name = with_magnitude[0]
    if len(adapters) > 1:
        return f"{len(adapters)} active adapters, {name!r} with DoRA, which act one after another"
    module = layer._modules["lora_magnitude_vector"]._modules[name]
    reason = why_called_as_is(module, Magnitude.forward)
    if reason:
        return f"adapter {name!r}: {reason}"
    magnitude = plain_weight(module)
    if magnitude is None:
        return f"adapter {name!r}: its magnitude is a {type(module.weight).__name__} on {module.weight.device}"
    if isinstance(weight, torch.Tensor) and magnitude.dtype not in (weight.dtype, torch.float32):
        return f"adapter {name!r}: a magnitude of {magnitude.dtype} beside a base weight of {weight.dtype}"
    return ""


def fused(layer: Any, x: torch.Tensor, adapter: str) -> torch.Tensor:
    """Forward of a linear layer whose one active adapter is of DoRA, as one operation."""
    held = layer._modules
    base, dropout = held["base_layer"], held["lora_dropout"]._modules[adapter]
    A, B = _factors(layer, adapter)
    magnitude, scaling = held["lora_magnitude_vector"]._modules[adapter].weight, layer.scaling[adapter]
    p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    options: dict[str, Any] = {"dropout_p": p, "training": dropout.training}
    weight, bias = layer._weight_by_rows(), base.bias
    # As a quantized layer does by itself: computed in its own dtype, whatever x has.
    dtype = x.dtype if isinstance(weight, torch.Tensor) else compute_dtype(base, x.dtype)
    if norms_are_kept(layer):
        options["norm"] = held["lora_magnitude_vector"]._modules[adapter]._kept_norm.get(layer, adapter, dtype)
    if isinstance(weight, torch.Tensor):
        return dora_linear(x, weight, A, B, magnitude, scaling, bias, **options)
    A, B, magnitude = (t if t.dtype in (dtype, torch.float32) else t.to(dtype) for t in (A, B, magnitude))
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    return dora_linear(x.to(dtype), weight, A, B, magnitude, scaling, bias, **options).to(x.dtype)


def linear_with(layer: Any, y: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
    """The output of a layer with one more adapter, by calling modules; in the widest dtype.

    Args:
        layer: A `Linear` of `peftkern.tuners.lora`, or a convolution.
        y: The output without this adapter: the base layer's, or that with the adapters before.
        x: The layer's input.
        adapter: One with a magnitude.
    """
    A, B, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    c = layer._per_output(row_scale(layer, adapter))
    x = layer._cast_input_dtype(x, A.weight.dtype)
    if isinstance(dropout, nn.Identity) or not layer.training:
        bias = getattr(layer.get_base_layer(), "bias", None)
        product = y if bias is None else y - layer._per_output(bias)
    else:
        x = dropout(x)
        product = _base_product(layer, x)
    return y + (c - 1) * product + c * (B(A(x)) * layer.scaling[adapter])


def _base_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`x W^T`, or the convolution of x with the weight, in x's dtype."""
    weight = _base_weight(layer)
    if isinstance(weight, torch.Tensor):
        return layer._product(x, weight.to(x.dtype))
    return linear_quantized(x, weight)


# -- merging -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scales_to_merge(layer: Any, adapters: Iterable[str]) -> dict[str, torch.Tensor]:
    """c of those of these adapters that have one, from the base weight without any adapter; 1 where V's row is zero."""
    scales = {}
    for name in adapters:
        if layer.use_dora[name]:
            norm = weight_norm(layer, name)
            scales[name] = torch.where(norm > 0, _magnitude(layer, name) / norm, 1.0)
    return scales


def _wide(layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in at least float32, and c beside it."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = scale.to(wide.device, wide.dtype)
    return wide, scale if _stored_transposed(layer) else scale.view(-1, *(1,) * (wide.dim() - 1))


def with_adapter(layer: Any, weight: torch.Tensor, adapter: str, scale: torch.Tensor) -> torch.Tensor:
    """c o (weight + scaling * B A), as a new tensor of at least float32."""
    wide, scale = _wide(layer, weight, scale)
    return (wide + layer.get_delta_weight(adapter)).mul_(scale)


def without_adapter(layer: Any, weight: torch.Tensor, adapter: str) -> torch.Tensor:
    """The weight, in the layout that it is stored in, with a merged adapter taken out: a new tensor, at least float32.

    Raises:
        ValueError: An element of the magnitude was 0, so that merging left nothing of that row.
    """
    delta = layer.get_delta_weight(adapter)
    scale = layer._merged_scales.get(adapter)
    if scale is None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) - delta
    wide, scale = _wide(layer, weight, scale)
    if not bool(scale.all()):
        rows = int((scale == 0).sum())
        raise ValueError(
            f"cannot take adapter {adapter!r} out again: its magnitude was 0 in {rows} rows, of which merging left "
            "nothing; load the base weight anew"
        )
    return (wide / scale).sub_(delta)
