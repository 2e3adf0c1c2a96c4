"""Differentiable operations, one file each; CONTRIBUTING.md tells how they fit together."""

from peftkern.ops.lora_embedding import lora_embedding
from peftkern.ops.lora_linear import lora_linear

__all__ = ["lora_embedding", "lora_linear"]
