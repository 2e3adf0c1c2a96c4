"""What DoRA adds to `lora_linear`'s products in plain PyTorch: row norms, the scaling of columns, the mixing by a mask.

    norms       V = W + scaling * B A, norm = row lengths of V, in blocks of rows, each widened for its own length
    output      y = round(c * u + bias + rest)
    dropout     x' = keep * x / (1 - p);   dX = keep / (1 - p) * h + (1 - keep / (1 - p)) * t

Everything is worked out in fp32 (float64 for that) and rounded once, in blocks of rows where it has to be widened.
"""

from __future__ import annotations

import torch

from peftkern.ops._ia3_linear_torch import _row_blocks
from peftkern.ops._lora_linear_torch import _as_number, apply_mask

# Elements of V that are there at once: 4 MB in fp32, which stay in a core's cache between product and sum.
BLOCK_ELEMENTS = 2**20


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over numbers of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_norms(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The length of each row of W + scaling * B A, [N] in fp32 (float64 for that).

    By blocks of V's rows. |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B> would need no V at all, but where B A works against
    W three large terms leave a small one, and the error is theirs.
    """
    N, K = weight.shape
    wide = wide_dtype(weight.dtype)
    norms = weight.new_empty(N, dtype=wide)
    a, b = lora_A.to(wide), lora_B.to(wide)
    step = max(1, BLOCK_ELEMENTS // K)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        v = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scaling)
        torch.linalg.vector_norm(v, dim=1, out=norms[rows])
    return norms


def factors(magnitude: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c = magnitude / norm and 1 / norm, [N] in norm's dtype; both 0 where the norm is: such a row points nowhere."""
    inverse = norm.reciprocal().masked_fill_(norm == 0, 0.0)
    return magnitude.to(norm.dtype) * inverse, inverse


def combined(
    u: torch.Tensor, c: torch.Tensor, bias: torch.Tensor | None, rest: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out [M, N] = round(c * u + bias + rest); `out` may be `u` or `rest`."""
    if bias is None and rest is None:
        return torch.mul(u, c, out=out)
    if bias is not None and rest is None and u.dtype is c.dtype:
        return torch.addcmul(bias, u, c, out=out)
    for rows in _row_blocks(u.shape[0]):
        added = bias if rest is None else rest[rows]
        part = torch.addcmul(added.to(c.dtype), u[rows].to(c.dtype), c)  # type: ignore[union-attr]
        if rest is not None and bias is not None:
            part += bias
        out[rows] = part
    return out


def dropped(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """keep * x / (1 - p), a new tensor."""
    return apply_mask(x, mask).mul_(1.0 / (1.0 - p))


def mixed(h: torch.Tensor, t: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """keep / (1 - p) * h + (1 - keep / (1 - p)) * t, in h's memory."""
    wide = wide_dtype(h.dtype)
    for rows in _row_blocks(h.shape[0]):
        share = _as_number(mask[rows], wide).mul_(1.0 / (1.0 - p))
        h[rows] = share * h[rows] + (1.0 - share) * t[rows]
    return h
