"""How a new adapter starts, by `LoraConfig.init_lora_weights`; LoftQ is in peftkern/tuners/lora/loftq.py.

With W [N, K], B [N, r], A [r, K] and s the adapter's scaling:

    pissa        W = U S V^T:  B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T    (Meng et al. 2024, arXiv:2404.02948)
    olora        W = Q R:      B = Q_r, A = R_r                          (Bueyuekakyuez 2024, arXiv:2406.01775)
    corda        peftkern/tuners/lora/corda.py
    lora_ga      peftkern/tuners/lora/loraga.py
    orthogonal   B = X Q_even / 10, A = Q_odd^T Y / 10, Q a random orthogonal [r, r]:  B A = 0
    eva          B = 0, A as a new nn.Linear's until peftkern/tuners/lora/eva.py gives it values
    mica         B the r left singular vectors of the smallest singular values, A = 0    (arXiv:2604.01694)

U_r, Q_r the first r columns, S_r, V_r^T, R_r the first r values and rows. The first four leave W - s B A in the base
layer, so that the model is the one that it was. `pissa_niter_<n>` finds U, S and V by n subspace iterations from random
vectors (`torch.svd_lowrank`). Under MiCA A alone trains.

Decompositions are in float32. A weight of 16 bits is rounded once, after A and B in float32 were subtracted (LoRA-GA's
rounded to 16 bits), as in PEFT 0.21.2: a file of either library then finds the same base in the other.
"""

from __future__ import annotations

import math
import warnings
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
from peftkern.tuners.lora.found_factors import GRADIENT, factors_of_eigens, factors_of_gradient
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
        _take_out_of_base(layer, adapter_name, config)
    elif init == "orthogonal" and is_linear:
        _initialize_orthogonal(layer, adapter_name)
    elif init == "eva" and is_linear:
        layer.lora_B[adapter_name].weight.zero_()
    else:
        layer.reset_lora_parameters(adapter_name, init)


# -- those that take a part out of the base weight ---------------------------------------------------------------------


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


def _take_out_of_base(layer: Any, adapter_name: str, config: LoraConfig) -> None:
    """PiSSA, OLoRA, CorDA and LoRA-GA."""
    init, base = str(config.init_lora_weights), layer.get_base_layer()
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    known = layer._unread_factors.pop(adapter_name, None)
    if known is not None:  # the base has been replaced, and no file had values for this layer
        write_factors(A, B, *known)
        return
    if init == "lora_ga" and not hasattr(base, GRADIENT):
        _start_without_gradient(layer, adapter_name)
        return
    refuse_merged_base(layer, init)
    W, quantized = _to_take_from(layer, adapter_name, init)
    # A caller may have made the meta device the default, for the adapter's own parameters.
    with torch.device(W.device):
        if not bool(W.isfinite().all()):
            raise ValueError(f"init_lora_weights={init!r}: the weight of a {type(base).__name__} has NaN or infinity")
        a, b = _factors(layer, adapter_name, config, W)
        residual = W - layer.scaling[adapter_name] * (b @ a)
        if quantized is None:
            replace_weight(layer, adapter_name, residual.to(base.weight.dtype), f"init_lora_weights={init!r}")
        else:
            replace_quantized_weight(layer, adapter_name, residual, quantized, f"init_lora_weights={init!r}")
    for waiting in ("eigens", GRADIENT) if init in ("corda", "lora_ga") else ():
        base.__dict__.pop(waiting, None)  # it was for the weight that is gone
    if A.is_meta:
        layer._unread_factors[adapter_name] = a.contiguous(), b.contiguous()
    else:
        write_factors(A, B, a, b)


def _to_take_from(layer: Any, adapter_name: str, init: str) -> tuple[torch.Tensor, Any]:
    """The base weight, float32 [out_features, in_features], and the quantized one if it is that."""
    scaling, base = layer.scaling[adapter_name], layer.get_base_layer()
    quantized = weight_of(base)
    if init.lower() == "olora":
        if quantized is not None:
            return dequantize(quantized, quantized.dtype).float(), quantized
    elif scaling <= 0 and init != "lora_ga":
        raise ValueError(f"init_lora_weights={init!r} needs a scaling above 0, got {scaling:g}: change lora_alpha")
    elif quantized is not None:
        raise TypeError(
            f"init_lora_weights={init!r} needs a dense weight, but a {type(base).__name__} holds a quantized one, "
            "which the residual would be rounded to once more: adapt the dense model, and quantize it then"
        )
    return by_rows(layer, _to_decompose(base, init)).float(), None


def _factors(layer: Any, adapter_name: str, config: LoraConfig, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    init, base = str(config.init_lora_weights), layer.get_base_layer()
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    if init == "corda":
        return factors_of_eigens(base, W.shape, r, scaling)
    if init == "lora_ga":
        return factors_of_gradient(base, W, by_rows(layer, getattr(base, GRADIENT)), r, scaling, config)
    return principal_part(W, r, scaling, init)


def _start_without_gradient(layer: Any, adapter_name: str) -> None:
    """LoRA-GA where no gradient waits: as with True, which is what a file's values are loaded into."""
    warnings.warn(
        "init_lora_weights='lora_ga': no gradient of preprocess_loraga waits on the layer: its base weight stays, and "
        "the adapter starts as with True. A saved adapter goes over the base model that was saved with it, or see "
        "path_initial_model_for_weight_conversion",
        stacklevel=3,
    )
    layer.reset_lora_parameters(adapter_name, True)


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
