"""How a new adapter starts, by `LoraConfig.init_lora_weights`; LoftQ is in peftkern/tuners/lora/loftq.py.

With W [N, K], B [N, r], A [r, K] and s the adapter's scaling:

    pissa        W = U S V^T:  B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T    (Meng et al. 2024, arXiv:2404.02948)
    olora        W = Q R:      B = Q_r, A = R_r                          (Bueyuekakyuez 2024, arXiv:2406.01775)
    orthogonal   B = X Q_even / 10, A = Q_odd^T Y / 10, Q a random orthogonal [r, r]:  B A = 0
    eva          B = 0, A as a new nn.Linear's until peftkern/tuners/lora/eva.py gives it values
    mica         B the r left singular vectors of the smallest singular values, A = 0    (arXiv:2604.01694)

U_r, Q_r the first r columns, S_r, V_r^T, R_r the first r values and rows. PiSSA and OLoRA leave W - s B A in the base
layer, so that the model is the one that it was. `pissa_niter_<n>` finds U, S and V by n subspace iterations from random
vectors (`torch.svd_lowrank`). Under MiCA A alone trains.

Decompositions are in float32. A weight of 16 bits is rounded once, after A and B in float32 were subtracted, as in PEFT
0.21.2: a file of either library then finds the same base in the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from peftkern.ops import dequantize
from peftkern.tuners.lora.base_weight import (
    by_rows,
    dense_weight,
    low_rank_factors,
    refuse_merged_base,
    replace_quantized_weight,
    replace_weight,
    write_factors,
)
from peftkern.tuners.lora.config import LoraConfig, leaves_residual, pissa_iterations
from peftkern.tuners.lora.loftq import initialize_loftq
from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import DENSE_DTYPES


@torch.no_grad()
def initialize(layer: Any, adapter_name: str, config: LoraConfig) -> None:
    """Gives a new adapter its values, and the base layer its new weight where the initialization asks for one.

    An adapter on the meta device waits for values from a file; its base weight is replaced all the same. Embeddings
    start as with True under all but "mica" and False, as in PEFT.

    Args:
        layer: A `LoraLayer`.
        adapter_name: One of its adapters, with the values of new modules.
        config: Its configuration.

    Raises:
        ValueError: The rank or the scaling is none that the initialization knows, an adapter is merged into the weight
            that is to be replaced, or that is on the meta device or not finite.
        TypeError: The weight is quantized (but for OLoRA), sharded, parametrized, or of another dtype than float32,
            float16 and bfloat16.

    Warns:
        UserWarning: The base weight of other adapters on the layer changes.
    """
    init = config.init_lora_weights
    is_linear = adapter_name in layer.lora_A
    if init == "loftq":
        initialize_loftq(layer, adapter_name, config)
    elif init == "mica":
        _initialize_mica(layer, adapter_name)
    elif leaves_residual(init) and is_linear:
        _initialize_by_principal_part(layer, adapter_name, str(init))
    elif init == "orthogonal" and is_linear:
        _initialize_orthogonal(layer, adapter_name)
    elif init == "eva" and is_linear:
        layer.lora_B[adapter_name].weight.zero_()
    else:
        layer.reset_lora_parameters(adapter_name, init)


# -- PiSSA and OLoRA ---------------------------------------------------------------------------------------------------


def principal_part(weight: torch.Tensor, r: int, scaling: float, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k, K] and B [N, k], float32, for which the base keeps `weight - scaling * B A`; k <= r.

    Args:
        weight: W [N, K], float32.
        r: Rank, at least 1; k is less where N or K is.
        scaling: The adapter's; above 0 for PiSSA.
        init: "pissa", "pissa_niter_<n>" or "olora".
    """
    if init.lower() == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    iterations = pissa_iterations(init)
    if iterations is None:
        A, B = low_rank_factors(weight, r)
    else:
        U, S, V = torch.svd_lowrank(weight, min(r, *weight.shape), iterations)
        A, B = S.sqrt()[:, None] * V.t(), U * S.sqrt()
    return A / math.sqrt(scaling), B / math.sqrt(scaling)


def _initialize_by_principal_part(layer: Any, adapter_name: str, init: str) -> None:
    """PiSSA and OLoRA."""
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    known = layer._unread_factors.pop(adapter_name, None)
    if known is not None:  # the base has been replaced, and no file had values for this layer
        write_factors(A, B, *known)
        return
    scaling = layer.scaling[adapter_name]
    base = layer.get_base_layer()
    refuse_merged_base(layer, init)
    quantized = weight_of(base)
    if init.lower() != "olora":
        if scaling <= 0:
            raise ValueError(f"init_lora_weights={init!r} needs a scaling above 0, got {scaling:g}: change lora_alpha")
        if quantized is not None:
            raise TypeError(
                f"init_lora_weights={init!r} needs a dense weight, but a {type(base).__name__} holds a quantized one, "
                "which the residual would be rounded to once more: adapt the dense model, and quantize it then"
            )
    # A caller may have made the meta device the default, for the adapter's own parameters.
    if quantized is not None:
        W = dequantize(quantized, quantized.dtype).float()
    else:
        W = by_rows(layer, _to_decompose(base, init)).float()
    with torch.device(W.device):
        if not bool(W.isfinite().all()):
            raise ValueError(f"init_lora_weights={init!r}: the weight of a {type(base).__name__} has NaN or infinity")
        a, b = principal_part(W, layer.r[adapter_name], scaling, init)
        residual = W - scaling * (b @ a)
        if quantized is None:
            replace_weight(layer, adapter_name, residual.to(base.weight.dtype), f"init_lora_weights={init!r}")
        else:
            replace_quantized_weight(layer, adapter_name, residual, quantized, f"init_lora_weights={init!r}")
    if A.is_meta:
        layer._unread_factors[adapter_name] = a.contiguous(), b.contiguous()
    else:
        write_factors(A, B, a, b)


def _to_decompose(base: Any, init: str) -> torch.Tensor:
    """The dense weight of a base layer, if it is of a dtype that can be decomposed."""
    if weight_of(base) is not None:
        raise TypeError(f"init_lora_weights={init!r} needs a dense weight, but a {type(base).__name__} holds none")
    weight = dense_weight(base, init)
    if weight.dtype not in DENSE_DTYPES:
        raise TypeError(
            f"init_lora_weights={init!r}: the weight of a {type(base).__name__} must be float32, float16 or bfloat16, "
            f"got {weight.dtype}"
        )
    return weight


# -- those that leave the base weight alone ----------------------------------------------------------------------------


def _initialize_mica(layer: Any, adapter_name: str) -> None:
    is_linear = adapter_name in layer.lora_A
    if is_linear:
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    else:
        A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    layer.frozen_peft_weight_names[adapter_name] = ("lora_B" if is_linear else "lora_embedding_B",)
    if B.is_meta:  # the file has B
        return
    weight = _to_decompose(layer.get_base_layer(), "mica")
    weight = (by_rows(layer, weight) if is_linear else weight.t()).float()
    r = layer.r[adapter_name]
    if r > min(weight.shape):
        raise ValueError(
            "init_lora_weights='mica' takes r singular vectors of the weight, so r must be at most its smaller size: "
            f"got r={r} for {list(weight.shape)}"
        )
    if not bool(weight.isfinite().all()):
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(f"init_lora_weights='mica': the weight of a {kind} has NaN or infinity")
    B.copy_(torch.linalg.svd(weight, full_matrices=False).U[:, -r:])
    A.zero_()


def _initialize_orthogonal(layer: Any, adapter_name: str) -> None:
    r = layer.r[adapter_name]
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even r (half of it for A and half for B), got r={r}")
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if A.is_meta:
        return
    # Drawn in the order and the shapes of PEFT, so that the same seed gives the same adapter.
    Q = torch.linalg.qr(torch.randn(r, r)).Q
    Y, X = torch.randn(layer.in_features, r // 2), torch.randn(r // 2, layer.out_features)
    A.copy_((Y @ Q[0::2]).t() / 10)
    B.copy_(X.t() @ Q[1::2] / 10)
