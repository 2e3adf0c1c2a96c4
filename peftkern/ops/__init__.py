"""Differentiable operations, one file each, and quantized weights; CONTRIBUTING.md tells how they fit together."""

from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.grouped_lora_linear import grouped_linear, grouped_lora_linear
from peftkern.ops.ia3_linear import ia3_linear, multi_ia3_linear
from peftkern.ops.linear_cross_entropy import linear_cross_entropy
from peftkern.ops.lora_embedding import lora_embedding
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_linear_shared import lora_linear_shared
from peftkern.ops.lora_mlp import Projection, lora_mlp
from peftkern.ops.multi_lora_linear import multi_lora_linear
from peftkern.ops.multi_lora_linear_shared import multi_lora_linear_shared
from peftkern.ops.quantize import dequantize, dequantize_4bit, dequantize_8bit, quantize_4bit, quantize_8bit

__all__ = [
    "Projection",
    "dequantize",
    "dequantize_4bit",
    "dequantize_8bit",
    "gated_lora_linear",
    "grouped_linear",
    "grouped_lora_linear",
    "ia3_linear",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "lora_linear_shared",
    "lora_mlp",
    "multi_ia3_linear",
    "multi_lora_linear",
    "multi_lora_linear_shared",
    "quantize_4bit",
    "quantize_8bit",
]
