"""What an autograd function keeps for its backward: activations as saved tensors, parameters by hand.

With hooks in force, as in each region that is checkpointed, Python runs three times for each tensor that torch saves.
A parameter exists anyway and is no activation, so there `keep` leaves those on the context, with the versions that they
had, and `kept` refuses one that was changed since, as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Optional = torch.Tensor | None
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def keep(ctx: Any, activations: int, *tensors: Optional) -> None:
    """Keep all of these, of which so many are activations. The others are kept by hand where torch would call Python
    for each and all of them are parameters, or None."""
    if _top_hooks(False) is not None:
        others = tensors[activations:]
        if all(t is None or (type(t) is nn.Parameter and not t.is_inference()) for t in others):
            ctx.save_for_backward(*tensors[:activations])
            ctx.held = others, [None if t is None else t._version for t in others]
            return
    ctx.save_for_backward(*tensors)


def kept(ctx: Any, count: int) -> Sequence[Any]:
    """The tensors, `count` of them, that `keep` was given.

    Raises:
        RuntimeError: one of them was changed in place since.
    """
    saved = ctx.saved_tensors
    if len(saved) == count:
        return saved
    others, told = ctx.held
    for t, version in zip(others, told, strict=True):
        if t is not None and t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter {list(t.shape)} of a LoRA layer, at version {t._version} where forward used version "
                f"{version}. Step the optimizer, and change parameters, after backward"
            )
    return *saved, *others
