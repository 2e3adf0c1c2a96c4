"""What the prompt methods have in common: sizes, the encoder of virtual tokens, and the check of its file."""

from peftkern.tuners.prompt_learning.encoder import VirtualTokens

__all__ = ["VirtualTokens"]
