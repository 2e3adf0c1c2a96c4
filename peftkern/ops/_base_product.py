"""The frozen part of a linear layer in plain PyTorch, whatever the weight is: `x W^T + bias`, and `dY W` in backward.

A quantized weight is written out dense, in blocks where it is large, for as long as one product takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.ops._lora_linear_torch import dense_rows
from peftkern.ops.lora_linear_quantized import _dense_blocks as dense_blocks


def base(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, path: str) -> torch.Tensor:
    """x [M, K], a weight [N, K] dense (cast to x's dtype) or quantized, bias [N] or None -> x W^T + bias [M, N].

    `path` is that of the dense operation, which says by what a quantized weight is decoded.
    """
    x = dense_rows(x)
    if isinstance(weight, torch.Tensor):
        return linear(x, weight.to(x.dtype), bias)
    y: Any = None
    for part, dense in dense_blocks(weight, x.dtype, path):
        added = linear(x, dense, None if bias is None else bias[part])
        if dense.shape[0] == weight.shape[0]:
            return added
        y = x.new_empty(x.shape[0], weight.shape[0]) if y is None else y
        y[:, part] = added
    return y


def base_backward(dy: torch.Tensor, weight: Any, path: str, onto: torch.Tensor | None = None) -> torch.Tensor:
    """dY [M, N] -> dY W [M, K]; added to `onto`, in place, where that is given."""
    dx: Any = onto
    blocks = (
        [(slice(None), weight.to(dy.dtype))]
        if isinstance(weight, torch.Tensor)
        else dense_blocks(weight, dy.dtype, path)
    )
    for part, dense in blocks:
        rows = dense_rows(dy[:, part])
        dx = rows.mm(dense) if dx is None else dx.addmm_(rows, dense)
    return dx
