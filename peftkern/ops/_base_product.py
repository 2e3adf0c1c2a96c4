"""The frozen part of a linear layer in plain PyTorch, whatever the weight is: `x W^T + bias`, and `dY W` in backward.

A quantized weight is written out dense, in blocks where it is large, for as long as one product takes. `path` is that
of the dense operation: "torch_fp32" multiplies in fp32, block by block (see `_lora_linear_fp32`), any other by torch's
own products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.ops._dense_blocks import dense_blocks
from peftkern.ops._lora_linear_fp32 import _row_blocks
from peftkern.ops._lora_linear_torch import dense_rows


def base(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, path: str) -> torch.Tensor:
    """x [M, K], a weight [N, K] dense (cast to x's dtype) or quantized, bias [N] or None -> x W^T + bias [M, N]."""
    if isinstance(weight, torch.Tensor):
        return _product(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), bias, path)
    y: Any = None
    for part, dense in dense_blocks(weight, x.dtype, path):
        added = _product(x, dense, None if bias is None else bias[part], path)
        if dense.shape[0] == weight.shape[0]:
            return added
        y = x.new_empty(x.shape[0], weight.shape[0]) if y is None else y
        y[:, part] = added
    return y


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, path: str) -> torch.Tensor:
    if path != "torch_fp32":
        return linear(dense_rows(x), weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    with torch.autocast("cpu", enabled=False):
        wide = weight.float()
        wide_bias = None if bias is None else bias.float()
        for rows in _row_blocks(x.shape[0]):
            y[rows] = linear(x[rows].float(), wide, wide_bias)
    return y


def add_base_backward(dx: torch.Tensor | None, dy: torch.Tensor, weight: Any, path: str) -> torch.Tensor:
    """dY [M, N] -> dY W [M, K], added to dx in place if there is one."""
    if isinstance(weight, torch.Tensor):
        return _add_product(dx, dy, weight if weight.dtype == dy.dtype else weight.to(dy.dtype), path)
    total: Any = dx
    for part, dense in dense_blocks(weight, dy.dtype, path):
        total = _add_product(total, dy[:, part], dense, path)
    return total


def _add_product(dx: torch.Tensor | None, dy: torch.Tensor, weight: torch.Tensor, path: str) -> torch.Tensor:
    if path != "torch_fp32":
        return dense_rows(dy).mm(weight) if dx is None else dx.addmm_(dense_rows(dy), weight)
    total = dy.new_empty(dy.shape[0], weight.shape[1]) if dx is None else dx
    with torch.autocast("cpu", enabled=False):
        wide = weight.float()
        for rows in _row_blocks(dy.shape[0]):
            part = dy[rows].float()
            total[rows] = part.mm(wide) if dx is None else torch.addmm(total[rows].float(), part, wide)
    return total
