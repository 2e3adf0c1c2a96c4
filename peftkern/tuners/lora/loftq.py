"""LoftQ: adapters that start as what quantizing the base weight loses (Li et al. 2023, arXiv:2310.08659).

    Q_t = dequantize(quantize(W - B_{t-1} A_{t-1})),  B_0 A_0 = 0
    B_t A_t = the nearest matrix of rank r to W - Q_t = U S V^T:  B_t = U sqrt(S), A_t = sqrt(S) V^T

for t = 1 to `loftq_iter`, with W [N, K], B [N, r], A [r, K]. The base weight becomes Q, the adapter A and B.

All in float32, but Q is rounded to W's dtype before the residual is taken, so that the adapter makes up for that too;
PEFT 0.21.2 rounds it afterwards (the two agree where W is float32). What is quantized is rounded to that dtype as well.
That makes Q a fixed point of 4 bits: saved in W's dtype and quantized to NF4 again, without double quantization, it is
the same Q.

As in PEFT, the adapter's scaling is not divided out: with any but 1 forward adds `scaling * B A`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from peftkern.ops import dequantize, quantize_4bit
from peftkern.tuners.lora.base_weight import (
    by_rows,
    dense_weight,
    low_rank_factors,
    refuse_merged_base,
    replace_weight,
    rounded_to_int8,
    write_factors,
)
from peftkern.tuners.lora.config import LoraConfig
from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import Weight


@torch.no_grad()
def rounded_to_bits(w: torch.Tensor, bits: int) -> torch.Tensor:
    """`w` quantized and dequantized, in its dtype.

    Args:
        w: [N, K], float32, float16 or bfloat16.
        bits: 4 for NF4 in blocks of 64 without double quantization; 8 for LLM.int8's rows, which start from float16
            where that holds w, as in `Linear8bitLt`.

    Raises:
        ValueError: w holds NaN or infinity, or bits is neither.
    """
    if bits == 4:
        quantized: Weight = quantize_4bit(w, "nf4", 64, double_quant=False)
    elif bits == 8:
        quantized = rounded_to_int8(w)
    else:
        raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
    return dequantize(quantized, w.dtype)


@torch.no_grad()
def loftq(
    weight: torch.Tensor, r: int, bits: int = 4, iterations: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [N, K] in the weight's dtype, and A [k, K] and B [N, k] in float32, k <= r: see the module's formula.

    Args:
        weight: W [N, K], float32, float16 or bfloat16; not changed.
        r: Rank, at least 1.
        bits: 4 or 8, see `rounded_to_bits`.
        iterations: At least 1. More mostly bring the residual down, each at the cost of a singular value decomposition.

    Raises:
        ValueError, TypeError: The weight is no matrix of finite numbers of such a dtype, or bits is not 4 or 8.
    """
    W = weight.detach().float()
    target = weight.detach()
    for t in range(iterations):
        Q = rounded_to_bits(target, bits)
        A, B = low_rank_factors(W - Q.float(), r)
        if t + 1 < iterations:
            target = (W - B @ A).to(weight.dtype)
    return Q, A, B


@torch.no_grad()
def initialize_loftq(layer: Any, adapter_name: str, config: LoraConfig) -> None:
    """Starts an adapter by LoftQ, and puts the dequantized weight in the place of the layer's dense one.

    The base layer gets a new parameter, the old one is not written to. An adapter on the meta device, which waits for
    values from a file, is left to them; its base weight becomes Q all the same.

    Args:
        layer: A `LoraLayer` over a linear layer or a Conv1D with a dense weight.
        adapter_name: One of its adapters, with the values of a new `nn.Linear`.
        config: Its configuration, with `loftq_config`.

    Raises:
        ValueError: The weight is quantized already, so that the original is gone; or on the meta device; or an adapter
            is merged into it; or the layer is an embedding.
        TypeError: The weight is sharded, parametrized or otherwise no plain floating-point tensor.

    Warns:
        UserWarning: The scaling is not 1, or another adapter's base changes.
    """
    if adapter_name not in layer.lora_A:
        raise ValueError("init_lora_weights='loftq' goes with linear layers, got an embedding: do not target it")
    base, A, B = layer.get_base_layer(), layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if weight_of(base) is not None:
        if A.is_meta:
            return
        raise ValueError(
            f"init_lora_weights='loftq' needs the original weight, but a {type(base).__name__} holds a quantized one: "
            "make the adapter with init_lora_weights=True, then call peftkern.replace_lora_weights_loftq, which reads "
            "the original from its checkpoint (to load a saved adapter: pass its config with init_lora_weights=True)"
        )
    weight = dense_weight(base, "loftq")
    refuse_merged_base(layer, "loftq")
    if layer.scaling[adapter_name] != 1 and not A.is_meta:
        warnings.warn(
            "LoftQ's adapters make up for the quantization error where their scaling is 1, got "
            f"{layer.scaling[adapter_name]:g}: set lora_alpha to {'sqrt(r)' if config.use_rslora else 'r'}",
            stacklevel=2,
        )
    settings: Any = config.loftq_config
    bits, iterations = settings["loftq_bits"], settings["loftq_iter"]
    # A caller may have made the meta device the default, for the adapter's own parameters.
    with torch.device(weight.device):
        if A.is_meta and iterations == 1:
            Q = rounded_to_bits(by_rows(layer, weight), bits)
        else:
            Q, a, b = loftq(by_rows(layer, weight), layer.r[adapter_name], bits, iterations)
    if not A.is_meta:
        write_factors(A, B, a, b)
    replace_weight(layer, adapter_name, Q, "LoftQ")
