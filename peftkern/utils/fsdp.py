"""`fsdp_auto_wrap_policy`: which modules of an adapted model FSDP1 wraps by themselves, as in PEFT 0.21.2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A policy for `FullyShardedDataParallel(auto_wrap_policy=...)`: transformer blocks, and leaves that are trained.

    FSDP1 flattens what it wraps into one tensor, of which either all requires gradients or nothing; so the adapter's
    layers are wrapped apart from the frozen weights beside them.

    Args:
        model: the adapted model. Its blocks are those that `_no_split_modules` names; or, by class names with commas
            between them, the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP.

    Raises:
        TypeError: the variable, or none of the model's own names, names a class that is in the model.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    own: Any = getattr(model, "_no_split_modules", None) or ()
    names = [name for name in (given.split(",") if given is not None else sorted(own)) if name]
    here = {type(module).__name__: type(module) for module in model.modules()}
    unknown = [name for name in names if name not in here]
    # A model may know blocks that this configuration of it has none of; a name that a user gave is meant.
    if unknown and (given is not None or len(unknown) == len(names)):
        source = "_no_split_modules of the model" if given is None else "FSDP_TRANSFORMER_CLS_TO_WRAP"
        raise TypeError(f"{source}: no module of the model is a {', '.join(unknown)}")
    blocks = {here[name] for name in names if name in here}
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    whole = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    return functools.partial(_or_policy, policies=[leaves, whole])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(True for _ in module.children()) and weight is not None and weight.requires_grad
