"""A Llama in 4 bits with random weights, made layer by layer: no dense model exists at any time.

Codes are random bytes, and scales random numbers quantized in turn, so making 8 billion weights takes seconds and as
much memory as the result. The same seed gives the same bytes, whether peftkern's modules hold them or bitsandbytes'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.decoder import set_linear
from peftkern.ops._quantize_torch import code_4bit, quantize_scales
from peftkern.utils.quantized_modules import Linear4bit
from peftkern.weights import Weight4bit

BLOCKSIZE = 64
STD = 0.02  # of a weight, as Llama is initialised


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes; the defaults are those of Llama 3 8B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            use_cache=False,
            attn_implementation="sdpa",
        )


TINY = Shape(hidden=128, intermediate=192, layers=2, heads=4, kv_heads=2, vocabulary=384)


def random_weight(N: int, K: int, generator: torch.Generator, dtype: torch.dtype) -> Weight4bit:
    """NF4, blocks of 64, double-quantized; weights of standard deviation 0.02 or so."""
    device, numel = generator.device, N * K
    packed = torch.randint(256, (-(-numel // 2),), dtype=torch.uint8, device=device, generator=generator)
    code = code_4bit("nf4").to(device)
    scale = STD / code.square().mean().sqrt()
    absmax = torch.rand(-(-numel // BLOCKSIZE), device=device, generator=generator).add_(0.5).mul_(scale)
    absmax, nested_absmax, nested_code, offset = quantize_scales(absmax)
    nested = (nested_absmax, nested_code, offset)
    return Weight4bit(packed, absmax, code, torch.Size((N, K)), BLOCKSIZE, "nf4", dtype, *nested)


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, modules: str) -> nn.Module:
    """The model on `device`, its linear layers but lm_head in 4 bits, everything else in `dtype`.

    Args:
        modules: whose layers hold the 4-bit weights, "peftkern" or "bitsandbytes".
    """
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = shape.config()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no parameters
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            weight = random_weight(module.out_features, module.in_features, generator, dtype)
            set_linear(model, name, _layer(weight, modules))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        parent, _, leaf = name.rpartition(".")
        made = torch.empty(parameter.shape, dtype=dtype, device=device)
        made = made.normal_(0, STD, generator=generator) if parameter.dim() > 1 else made.fill_(1.0)
        model.get_submodule(parent).register_parameter(leaf, nn.Parameter(made, requires_grad=False))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what a model loaded by transformers says, and PEFT looks for
    model.is_quantized = True
    return model


def _layer(weight: Weight4bit, modules: str) -> nn.Module:
    if modules == "peftkern":
        return Linear4bit.from_weight(weight)
    from bench.quantized_rivals import bitsandbytes_layer

    return bitsandbytes_layer(weight)


def set_adapters(model: nn.Module) -> list[nn.Parameter]:
    """Give A and B values, the same by name for every library and B not zero (dA would be); returns them by name."""
    found = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in found:
            random = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            parameter.copy_((0.1 * random).to(torch.bfloat16))
    return [p for _, p in found]
