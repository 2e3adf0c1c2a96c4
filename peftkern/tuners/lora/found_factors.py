"""A and B from what was found before adapters were made, and waits on the base layers: CorDA's and LoRA-GA's.

The formulas are in peftkern/tuners/lora/corda.py and loraga.py, which leave it there.
"""

from __future__ import annotations

from typing import Any

import torch

# The attribute that holds a layer's gradient; CorDA's is `eigens`. PEFT's names.
GRADIENT = "_peft_loraga_grad"
_ITERATIONS = 4


def factors_of_eigens(base: Any, shape: torch.Size, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r] from what `preprocess_corda` left on a layer with a weight of this shape [N, K].

    Raises:
        ValueError: It was not called, or for another rank or weight; or what it left is not finite.
    """
    held = getattr(base, "eigens", None)
    if held is None:
        raise ValueError(
            f"init_lora_weights='corda': no eigens on a {type(base).__name__}: call preprocess_corda first (to load a "
            "saved adapter too, with the same cache_file; or load it over the saved base with init_lora_weights=True)"
        )
    wanted = {"S_WC": [r], "U_WC": [shape[0], r], "V_WC": [shape[1], r]}
    for name, size in wanted.items():
        part = getattr(held, name)
        if list(part.shape) != size:
            raise ValueError(
                f"init_lora_weights='corda': {name} must have shape {size}, got {list(part.shape)}: was "
                "preprocess_corda called with this configuration?"
            )
        if not bool(part.isfinite().all()):
            raise ValueError(f"init_lora_weights='corda': {name} has NaN or infinity")
    root = (held.S_WC / scaling).sqrt()
    return held.V_WC.t() * root[:, None], held.U_WC * root


def factors_of_gradient(
    base: Any, W: torch.Tensor, gradient: torch.Tensor, r: int, scaling: float, config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r] for a weight W [N, K], float32, rounded to the dtype that the layer has.

    Args:
        base: The layer, whose weight's dtype A and B are rounded to.
        W: Its weight, as rows.
        gradient: Of the same shape.
        r: At most half of the smaller size.
        scaling: The adapter's.
        config: With `lora_ga_config`.

    Raises:
        ValueError: The gradient has another shape or is not finite, or r is too large.
    """
    if gradient.shape != W.shape or not bool(gradient.isfinite().all()):
        raise ValueError(
            f"init_lora_weights='lora_ga': the gradient must be finite and of shape {list(W.shape)}, got one of "
            f"{list(gradient.shape)}: was preprocess_loraga called on this model?"
        )
    if 2 * r > min(W.shape):
        raise ValueError(
            "init_lora_weights='lora_ga' takes 2r singular vectors of the gradient, so 2r must be at most the weight's "
            f"smaller size: got r={r} for {list(W.shape)}"
        )
    settings = config.lora_ga_config
    U, S, V = torch.svd_lowrank(gradient.float(), min(4 * r, *W.shape), _ITERATIONS)
    first, second, every = slice(0, r), slice(r, 2 * r), slice(0, 2 * r)
    mine: dict[str, tuple[Any, Any]] = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }
    if settings.direction == "random":
        chosen = torch.randperm(2 * r, device="cpu")[:r]  # as PEFT draws
        of_A, of_B = chosen, chosen
    else:
        of_A, of_B = mine[settings.direction]
    A, values = V[:, every].t()[of_A], S[every][of_B]
    B = U[:, every][:, of_B] * values
    if settings.scale == "stable":
        B = B * (W.shape[0] ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd":
        largest = torch.svd_lowrank(W, r, _ITERATIONS)[1][0]
        B = B * (largest / values[0]) if values[0] > 0 else B
    elif settings.scale == "gd_scale":
        A, B = A / scaling, B / scaling
    dtype = base.weight.dtype
    return A.to(dtype).float(), B.to(dtype).float()
