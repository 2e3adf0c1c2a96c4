"""A tiny model on disk, and the same quantized by peftkern and by transformers with bitsandbytes."""

from __future__ import annotations

from pathlib import Path

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


def read(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def ours(dense: Path, name: str) -> nn.Module:
    return quantize_model(read(dense), transformers.BitsAndBytesConfig(**CONFIGS[name]), progress=False)


def theirs(dense: Path, name: str) -> nn.Module:
    config = transformers.BitsAndBytesConfig(**CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16)
