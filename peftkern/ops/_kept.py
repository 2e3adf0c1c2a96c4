"""What an autograd function keeps for its backward: activations as saved tensors, parameters by hand.

torch saves each tensor at a price: with hooks in force, as in each region that is checkpointed, Python runs for it
three times. A parameter exists anyway and is no activation, so `keep` leaves those on the context, with the versions
that they had, and `kept` refuses one that was changed since, as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Optional = torch.Tensor | None


def keep(ctx: Any, activations: Sequence[Optional], others: Sequence[Optional]) -> None:
    """Keep all of these; `others` by hand where they are parameters, or None."""
    by_hand = all(t is None or (type(t) is nn.Parameter and not t.is_inference()) for t in others)
    if not by_hand:
        ctx.save_for_backward(*activations, *others)
        ctx.held = None, len(activations)
        return
    ctx.save_for_backward(*activations)
    ctx.held = others, [None if t is None else t._version for t in others]


def kept(ctx: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """(activations, others), as `keep` was given them.

    Raises:
        RuntimeError: one of them was changed in place since.
    """
    saved = ctx.saved_tensors
    others, told = ctx.held
    if others is None:
        return saved[:told], saved[told:]
    for t, version in zip(others, told, strict=True):
        if t is not None and t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter {list(t.shape)} of a LoRA layer, at version {t._version} where forward used version "
                f"{version}. Step the optimizer, and change parameters, after backward"
            )
    return saved, others
