"""A tiny model on disk, and the same quantized by peftkern and by transformers with bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from peftkern import quantize_model
from tiny_models import tiny_llama

BITS4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
NESTED = BITS4 | dict(bnb_4bit_use_double_quant=True)
BITS8 = dict(load_in_8bit=True)
CONFIGS = {
    "nf4": BITS4,
    "nested": NESTED,
    "fp4": BITS4 | dict(bnb_4bit_quant_type="fp4"),
    "storage": BITS4 | dict(bnb_4bit_quant_storage="bfloat16"),
    "int8": BITS8,
}


def saved_llama(folder: Path) -> Path:
    """Save a tiny dense Llama in bfloat16. 128: bitsandbytes' CPU kernel needs whole blocks in a row."""
    tiny_llama(intermediate_size=128, attention_bias=True).to(torch.bfloat16).save_pretrained(folder)
    return folder


def tiny_gpt2(**config: Any) -> nn.Module:
    """A two-layer GPT-2 of hidden size 64, whose layers are Conv1D; without dropout."""
    fields = dict(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=64, pad_token_id=0)
    fields |= dict(bos_token_id=1, eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(fields | config))).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model


def saved_gpt2(folder: Path) -> Path:
    """Save a tiny dense GPT-2 in bfloat16."""
    tiny_gpt2().to(torch.bfloat16).save_pretrained(folder)
    return folder


def read(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def ours(dense: Path, name: str) -> nn.Module:
    return quantize_model(read(dense), transformers.BitsAndBytesConfig(**CONFIGS[name]), progress=False)


def theirs(dense: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    config = transformers.BitsAndBytesConfig(**CONFIGS[name])
    if dtype == torch.float32:
        config.bnb_4bit_compute_dtype = dtype
    return transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)


# bitsandbytes' CPU library searches the 8-bit map of scales otherwise than its `default` backend.
NOT_ON_CPU = ("weight.absmax",)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    """Equal names, dtypes, shapes and bits, save for names with one of the endings `but`."""
    assert sorted(a) == sorted(b)
    for key in a:
        if not key.endswith(but or ("\0",)):
            assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
            raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[key], b[key])]
            assert torch.equal(*raw), key
