"""Differentiable operations, one file each. See DESIGN in CONTRIBUTING.md for how they fit together."""

from peftkern.ops.lora_linear import lora_linear

__all__ = ["lora_linear"]
