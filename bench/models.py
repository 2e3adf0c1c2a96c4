"""A small Llama for the CPU, and LoRA or DoRA on it by PEFT and by peftkern, with equal weights and adapters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RANK = 16
ALPHA = 32


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's sizes and the batch that it is trained on."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    heads: int = 8
    vocabulary: int = 4096
    batch: int = 4
    tokens: int = 128


def llama(size: Size, dtype: torch.dtype) -> nn.Module:
    """A randomly initialised Llama in `dtype`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def batch(size: Size) -> torch.Tensor:
    """Token ids [batch, tokens], the same for everybody."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(size.vocabulary, (size.batch, size.tokens), generator=generator)


def adapt(library: Any, base: nn.Module, dropout: float, fp32_adapters: bool, use_dora: bool = False) -> nn.Module:
    """LoRA of rank 16 on all linear layers of a copy of `base` by `library` (peft or peftkern), ready to be trained.

    A, B and DoRA's magnitudes are drawn from the same generator whichever library it is, rounded to the base's dtype,
    and B is not zero: dA would be. `fp32_adapters` is PEFT's `autocast_adapter_dtype`, on by default there.
    """
    config = library.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=use_dora,
    )
    model = library.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=fp32_adapters)
    dtype = next(base.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters_of(model):
            if parameter.dim() == 1:  # a magnitude, about the length of a row: the base's deviation is 0.02
                length = 0.02 * math.sqrt(base.config.hidden_size)
                around = 0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)
                parameter.copy_((length * around).to(dtype))
                continue
            random = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            parameter.copy_((0.1 * random).to(dtype))
    return model.train()


def learn_from_embeddings(model: Any) -> None:
    """Have a frozen model's embeddings give what asks for a gradient, so that backward goes through all layers."""
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())


def adapters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that is trained, in order of name."""
    return sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold an adapter."""
    return [m for m in model.modules() if "lora_A" in m._modules]
