"""`lora_mlp`: a gated MLP (SwiGLU, GeGLU) with an adapter on each of its three projections."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from peftkern.ops._common import dropout_in_force, dropout_seed
from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.lora_linear_shared import lora_linear_shared
from peftkern.weights import Weight


class Projection(NamedTuple):
    """A frozen linear layer with its adapter: the arguments of `lora_linear` after x, of the same names."""

    weight: Weight
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = down(act(gate(x)) * up(x))`, each of the three a `lora_linear` (Shazeer 2020, arXiv:2002.05202).

    gate and up share one pass over x (`lora_linear_shared`); down takes `act(gate) * up`, which is not kept for
    backward (`gated_lora_linear`). Kept are x, gate(x) and up(x) by reference, and each S [M, r].

    Args:
        x: [..., in_features], as for `lora_linear`.
        gate, up: from in_features to the width of the MLP.
        down: from that width to out_features.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).
        dropout_p, training: as for `lora_linear`; gate and up drop the same elements of x.
        seed: fixes the masks; that of down is drawn from `seed + 1`.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`, and for an activation that is none of these.
    """
    for name, projection in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(projection, tuple) or len(projection) not in (4, 5):
            kind = type(projection).__name__
            raise TypeError(f"lora_mlp: {name}: expected a Projection, or a tuple of its fields, got {kind}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"lora_mlp: x: expected a tensor, got {type(x).__name__}")
    gate, up, down = Projection(*gate), Projection(*up), Projection(*down)
    p = dropout_in_force(dropout_p, training)
    seed_down = None
    if p and seed is not None:
        seed_down = dropout_seed(seed, x.device) + 1
    operands: Any = zip(gate, up, strict=True)
    rows = lora_linear_shared(x, *operands, dropout_p=p, seed=seed)
    return gated_lora_linear(rows[0], rows[1], *down, activation=activation, dropout_p=p, seed=seed_down)
