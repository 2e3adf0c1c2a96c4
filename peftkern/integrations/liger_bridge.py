"""Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), where it is installed.

Its Triton kernel turns a block of logits into their gradient in one pass. liger_kernel is imported here only, and only
when its loss is due.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch


def liger_missing(hidden: torch.Tensor) -> str:
    """Why Liger's loss cannot take `hidden`, or "" if it can."""
    if hidden.device.type != "cuda":
        return f"Liger's kernels run on CUDA and ROCm devices, not on {hidden.device.type}"
    if hidden.dtype not in (torch.bfloat16, torch.float32):
        # It divides by the number of tokens before it rounds the gradient: in float16 what is left is often zero.
        return f"Liger's loss is used for bfloat16 and float32, not for {hidden.dtype}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return ""


def liger_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The loss of hidden [M, K] against targets [M], by Liger's kernel.

    Its function takes its arguments by position, and releases differ in what stands between them; so they are given by
    name to its signature.

    Raises:
        ImportError: liger-kernel is not installed, or its function lacks one of the arguments.
    """
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    Function = module.LigerFusedLinearCrossEntropyFunction
    named: dict[str, Any] = {"_input": hidden, "weight": weight, "target": targets, "bias": bias}
    named |= {"ignore_index": ignore_index, "reduction": reduction}
    parameters = list(inspect.signature(Function.forward).parameters.values())[1:]  # without ctx
    unknown = sorted(set(named) - {p.name for p in parameters})
    if unknown:
        raise ImportError(
            f"liger_kernel: its fused linear cross-entropy takes no {', '.join(unknown)}; this release is not supported"
        )
    last = max(i for i, p in enumerate(parameters) if p.name in named)
    result = Function.apply(*(named.get(p.name, p.default) for p in parameters[: last + 1]))
    return result[0] if isinstance(result, tuple) else result
