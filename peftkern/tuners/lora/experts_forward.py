"""Forward of a mixture's stacked experts with LoRA, as products of rows sorted by expert.

    h = gate(grouped(x_sorted, gate_up_proj)),  y[t] = sum of weights[t, j] * grouped(h, down_proj)

where `grouped` is `ops.grouped_lora_linear`: W + scaling * B A is never made. It stands for the forward of the classes
that transformers 5 decorates with `use_experts_implementation`, which say by attributes how they are built (`has_gate`,
`has_bias`, `is_transposed`, `has_post_expert_norm`, `_apply_gate`); they are known by that forward, so transformers
need not be imported. Some releases (5.17 is one) know neither `has_post_expert_norm` nor `_is_expert_parallel`: there
no experts are normed, and experts that are spread over devices have a forward of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peftkern.backend import current_backend
from peftkern.ops import grouped_linear, grouped_lora_linear
from peftkern.ops._common import autocast_dtype
from peftkern.ops.expert_rows import expert_order, rows_by_expert, sum_by_token
from peftkern.ops.grouped_lora_linear import plan_for
from peftkern.ops.plan import Plan
from peftkern.tuners.fusing import why_called_as_is

# The module of transformers whose decorator makes such a forward, and the implementations that it knows: they all
# compute the same. Another one is somebody's own.
_DECORATED_IN = "transformers.integrations.moe"
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


class Factors(NamedTuple):
    """The active adapters of one parameter as one: A [E, R, in], B [E, out, R]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def projections(base: Any) -> tuple[str, str]:
    """The names of the parameters that the experts' two products take."""
    return ("gate_up_proj" if base.has_gate else "up_proj"), "down_proj"


def why_not_grouped(base: nn.Module) -> str:
    """Why the experts `base` have to be called as they are; "" where `forward` computes the same."""
    kind: Any = type(base)
    forward = kind.forward
    if getattr(forward, "__globals__", {}).get("__name__") != _DECORATED_IN or not hasattr(forward, "__wrapped__"):
        return f"{kind.__name__} is no class of experts that transformers runs by its `use_experts_implementation`"
    reason = why_called_as_is(base, forward)
    if reason:
        return reason
    held: Any = base
    if getattr(held, "_is_expert_parallel", False):
        return "its experts are spread over devices (expert parallelism)"
    chosen = getattr(held.config, "_experts_implementation", None)
    if chosen not in _IMPLEMENTATIONS:
        return f"experts_implementation={chosen!r} is none of transformers' own"
    names = projections(held)
    dtypes = set()
    for name in (*names, *(f"{name}_bias" for name in names if held.has_bias)):
        parameter = held._parameters.get(name, held.__dict__.get(name))
        if not _is_plain(parameter) or parameter.is_meta or parameter.dtype not in _FLOATS:
            return f"its {name} is {_described(parameter)}"
        dtypes.add(parameter.dtype)
    if len(dtypes) > 1:
        return f"its parameters are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return ""


def _is_plain(parameter: Any) -> bool:
    """Whether it is an ordinary tensor, or one without memory that stands for one (as in an estimate)."""
    return type(parameter) in _PLAIN_TENSORS or type(parameter).__name__ == "FakeTensor"


def _described(parameter: Any) -> str:
    if not isinstance(parameter, torch.Tensor):
        return "no parameter of it"
    return f"a {type(parameter).__name__} of {parameter.dtype} on {parameter.device}"


def weight_of(base: Any, name: str) -> torch.Tensor:
    """A projection of all experts as [E, out, in]."""
    weight: torch.Tensor = getattr(base, name)
    return weight.transpose(1, 2) if base.is_transposed else weight


def takes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is one of tokens [T, hidden], their experts [T, k] and those experts' weights [T, k]."""
    if kwargs or len(args) != 3 or not all(isinstance(arg, torch.Tensor) for arg in args):
        return False
    return all(arg.dim() == 2 for arg in args) and args[1].shape == args[2].shape


def forward(
    base: Any, adapters: dict[str, Factors], x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' output [T, hidden] in x's dtype.

    Args:
        base: experts of which `why_not_grouped` says "".
        adapters: a projection's name -> its adapter; of one that has none the base product alone is taken.
        x: tokens [T, hidden].
        top_k_index, top_k_weights: [T, k], what the router chose for each.
    """
    up, down = projections(base)
    by_expert = expert_order(top_k_index, getattr(base, down).shape[0])
    h = _product(base, up, rows_by_expert(x, by_expert), by_expert.offsets, adapters)
    h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
    y = _product(base, down, h, by_expert.offsets, adapters)
    if getattr(base, "has_post_expert_norm", False):
        y = base.post_expert_norm(y)
    return sum_by_token(y, top_k_weights, by_expert).to(x.dtype)


def _product(
    base: Any, name: str, rows: torch.Tensor, offsets: torch.Tensor, adapters: dict[str, Factors]
) -> torch.Tensor:
    weight = weight_of(base, name)
    bias = getattr(base, f"{name}_bias") if base.has_bias else None
    if autocast_dtype(rows) is None:
        rows = rows.to(weight.dtype)  # as transformers' grouped product does
    if name not in adapters:
        return grouped_linear(rows, weight, offsets, bias)
    A, B, scaling = adapters[name]
    return grouped_lora_linear(rows, weight, A, B, scaling, offsets, bias)


def plan(base: Any, name: str, tokens: int) -> Plan:
    """The path that the product with the parameter `name` takes for `tokens` tokens."""
    weight = weight_of(base, name)
    # One row seen as often as tokens have choices: the plan looks at sizes, strides and dtype only.
    rows = torch.empty(1, weight.shape[2], dtype=weight.dtype, device=weight.device)
    return plan_for(rows.expand(tokens * choices_of(base.config), -1), weight, current_backend())


def choices_of(config: Any) -> int:
    """How many experts each token takes, as the model's configuration names it; 1 where it does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
    found = next((value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), 1)
    return max(1, found)
