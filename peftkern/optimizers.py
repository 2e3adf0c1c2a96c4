"""`create_loraplus_optimizer`: LoRA+, under the name and the groups of PEFT 0.21.2's `peft.optimizers`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from peftkern.ops._common import number
from peftkern.tuners.lora import Embedding
from peftkern.utils.other import check_is_module

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer whose steps of B are `loraplus_lr_ratio` times those of A (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354).

    Its four groups, in PEFT's order: A and whatever else is trained; LoRA on embeddings, both factors; B and vectors
    that decay; biases and layer norms, which do not. PEFT's own function does not know our embedding layers: it would
    train them at `lr`.

    Args:
        model: any module with adapters; parameters that do not require grad are left out.
        optimizer_cls: such as `torch.optim.AdamW`.
        lr: the learning rate of A.
        loraplus_lr_ratio: that of B over that of A, at least 1 by the paper.
        loraplus_lr_embedding: that of LoRA on embeddings.
        loraplus_weight_decay: of all groups but the last.
        kwargs: the optimizer's own.

    Returns:
        The optimizer. With 8 bits of bitsandbytes, the states of embeddings trained whole have 32, as they should.

    Raises:
        TypeError, ValueError: `model` is no module, or a rate is no number, negative or not finite; torch's optimizers
            check those of no group.
    """
    check_is_module("model", model)
    rates = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio, "loraplus_lr_embedding": loraplus_lr_embedding}
    for rate, value in (rates | {"loraplus_weight_decay": loraplus_weight_decay}).items():
        if not 0 <= number(rate, value) < math.inf:
            raise ValueError(f"{rate}: expected a finite number of at least 0, got {value!r}")
    a: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, owner, parameter in _trained(model):
        if isinstance(owner, Embedding):
            embedding.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            decays = "bias" not in name and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
            (b if decays else no_decay).append(parameter)
        else:
            a.append(parameter)
    lr_of_b = lr * loraplus_lr_ratio
    groups = [
        {"params": a, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": b, "lr": lr_of_b, "weight_decay": loraplus_weight_decay},
        {"params": no_decay, "lr": lr_of_b, "weight_decay": 0.0},
    ]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    if optimizer_cls.__module__.startswith("bitsandbytes.") and "8bit" in optimizer_cls.__name__:
        from peftkern.integrations.bitsandbytes_optimizers import embeddings_in_32_bits

        embeddings_in_32_bits(model)
    return optimizer


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, nn.Parameter]]:
    """Names and parameters that require grad, each with the adapted layer that it would be an adapter of: a container
    of the layer holds what belongs to an adapter's name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            levels = name.split(".")[:-2]
            yield name, model.get_submodule(".".join(levels)) if levels else None, parameter
