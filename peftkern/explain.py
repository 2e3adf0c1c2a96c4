"""`peftkern.explain(model)`: which path each adapted layer takes, and why. Nothing is silently slow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkern.ops.plan import Plan


@dataclass(frozen=True, slots=True)
class LayerPath:
    """One adapted layer: its name and kind, its sizes, and the path that `plan` gives it."""

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int
    dtype: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` returns: rows to work with, a table to print.

    Attributes:
        tokens: rows of x that the plans were made for.
        mixed: whether the rows of a batch want different adapters.
        rows: a `LayerPath` for each adapted layer, in the model's order.
    """

    tokens: int
    rows: tuple[LayerPath, ...]
    mixed: bool = False

    @property
    def paths(self) -> Counter[str]:
        """How many layers take each path."""
        return Counter(row.path for row in self.rows)

    def summary(self) -> str:
        """One line for each pair of path and reason."""
        if not self.rows:
            return "no adapted layers"
        groups = Counter((row.path, row.reason) for row in self.rows)
        return "\n".join(f"{count} layers: {path} ({reason})" for (path, reason), count in groups.items())

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layers"
        head = ("layer", "kind", "in", "out", "r", "dtype", "path", "why")
        numbers = {reason: str(i) for i, reason in enumerate(dict.fromkeys(r.reason for r in self.rows), 1)}
        table = [head] + [
            (r.name, r.kind, *map(str, (r.in_features, r.out_features, r.r or "-")), r.dtype, r.path, numbers[r.reason])
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        what = f"{self.tokens} tokens a call" + (", an adapter for each row of the batch" if self.mixed else "")
        why = [f"{number}  {reason}" for reason, number in numbers.items()]
        return "\n".join([f"for {what}:", lines[0], "-" * len(lines[0]), *lines[1:], "why:", *why])


def explain(model: nn.Module, tokens: int = 2048, mixed: bool = False) -> Explanation:
    """Tell which path each adapted layer of `model` would take, and why.

    Args:
        model: any module; its adapted layers are found wherever they are.
        tokens: rows of x in a call (batch times sequence). Few tokens take other paths than many.
        mixed: for a batch whose rows want different adapters (`AdapterBank.batch`, `adapter_names`); the rank that is
            listed is then the largest, and "refused" is a layer that has no way to do it.

    Returns:
        An `Explanation`, which prints as a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `tokens` is not a positive int.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens: expected a positive int, got {tokens!r}")
    rows = []
    for name, module in model.named_modules():
        if not hasattr(module, "explain_row"):
            continue
        row = module.explain_row(name)
        plan: Plan = _plan_mixed(module, tokens) if mixed else module.plan(tokens)
        dtype = "" if row.dtype is None else str(row.dtype).removeprefix("torch.")
        r = max(module.r.values(), default=0) if mixed and hasattr(module, "r") else row.r
        sizes = (row.in_features, row.out_features, r)
        rows.append(LayerPath(name or "(itself)", row.kind, *sizes, dtype, plan.path, plan.reason))
    return Explanation(tokens, tuple(rows), mixed)


def _plan_mixed(module: Any, tokens: int) -> Plan:
    """The path of a layer's forward for a batch of many adapters."""
    if not hasattr(module, "plan_mixed"):
        return Plan("refused", f"{type(module).__name__} cannot mix adapters in a batch")
    return module.plan_mixed(tokens)
