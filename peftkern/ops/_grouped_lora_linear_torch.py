"""`grouped_lora_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

    y_t = x_t W_e^T + b_e + S_t B_e^T,   S_t = scaling * x_t A_e^T        e the expert of row t
    dS_t = scaling * dY_t B_e,   dX_t = dY_t W_e + dS_t A_e,   dA_e = dS^T X,   dB_e = dY^T S   over e's rows

Written for speed: products go into slices of one output, x and y are neither copied nor widened, experts without rows
cost nothing, and S is scaled once for all. The experts' ends are read on the host, for which a CPU waits for nothing.
Path "torch_fp32": 16-bit tensors on a CPU without 16-bit matrix instructions, an expert's products in fp32 (see
`_lora_linear_fp32`). "grouped_mm:torch": the frozen products of all experts are one `torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import grouped_mm

from peftkern.ops import _base_product, _lora_linear_fp32
from peftkern.ops._lora_linear_torch import dense_rows

Kept = Any  # a tensor that forward kept, or None where no gradient asks for it
Groups = list[tuple[int, int, int]]  # expert, first row, the row past its last
Needs = tuple[bool, bool, bool, bool, bool]  # x, weight, lora_A, lora_B, bias


def groups_of(offsets: torch.Tensor, T: int) -> tuple[Groups, int]:
    """The experts that have rows, and the number of rows that have an expert.

    Raises:
        ValueError: the ends decrease, or pass the last row.
    """
    groups: Groups = []
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if not start <= stop <= T:
            raise ValueError(
                f"grouped_lora_linear: offsets: expected non-decreasing ends of at most {T}, x's rows, got {stop} "
                f"at {expert} after {start}"
            )
        if stop > start:
            groups.append((expert, start, stop))
        start = stop
    return groups, start


def _pieces(t: torch.Tensor, groups: Groups) -> Sequence[torch.Tensor]:
    """The rows of t [T, columns] that are each group's, views."""
    if not groups:
        return ()
    sizes = [stop - start for _, start, stop in groups]
    return t.split_with_sizes([*sizes, t.shape[0] - groups[-1][2]])[:-1]


def _matrices(stack: torch.Tensor, groups: Groups, dtype: torch.dtype) -> Iterable[torch.Tensor]:
    """Each group's matrix of a stack, a view, or cast to `dtype` when its turn comes."""
    every = len(groups) == stack.shape[0]  # then one call for all, for a call costs as much as a small product
    held = stack.unbind(0) if every else [stack[expert] for expert, _, _ in groups]
    return held if stack.dtype is dtype else (matrix.to(dtype) for matrix in held)


def _packed(factor: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A factor whose experts' matrices a BLAS reads as they lie: PEFT's lora_B has the experts innermost.

    Where few experts have rows, copying those on the way into each product costs less.
    """
    few = 4 * len(groups) < factor.shape[0]
    return factor if few or 1 in factor.stride()[1:] else factor.contiguous()


def _wide(x: torch.Tensor) -> bool:
    """Whether an adapter's products are taken in fp32, an expert's rows at a time.

    In 16 bits on a CPU oneDNN compiles a product anew for each number of rows, which is another in every batch and for
    every expert: 0.7 ms where a product with the rank takes 0.03 (Zen 4).
    """
    return x.is_cpu and x.dtype.itemsize == 2


def _mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wide: bool) -> None:
    """out = a b"""
    if wide:
        out.copy_(torch.mm(a.float(), b.float()))
    else:
        torch.mm(a, b, out=out)


def _mm_onto(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wide: bool) -> None:
    """out += a b, rounded once"""
    if wide:
        out.add_(torch.mm(a.float(), b.float()))
    else:
        out.addmm_(a, b)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    scaling: float,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    path: str,
) -> tuple[torch.Tensor, Kept]:
    """x [T, K], weight [E, N, K] -> y [T, N] and S [T, R], scaling in it but on "torch_fp32"; None without lora_A.

    Weight, adapters and bias in any float dtype: an expert's are cast to x's where they are used.
    """
    x = dense_rows(x)
    groups, known = groups_of(offsets, x.shape[0])
    if path == "grouped_mm:torch":
        y = grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=offsets)
    else:
        y = x.new_empty(x.shape[0], weight.shape[1])
    y[known:] = 0
    s = None if lora_A is None else x.new_empty(x.shape[0], lora_A.shape[1])
    if s is not None:
        s[known:] = 0
    if path == "torch_fp32":
        _forward_fp32(x, weight, lora_A, lora_B, scaling, bias, groups, y, s)
        return y, s
    dtype, rows, outs = x.dtype, _pieces(x, groups), _pieces(y, groups)
    weights = _matrices(weight.transpose(1, 2), groups, dtype)
    biases = None if bias is None else _matrices(bias, groups, dtype)
    if path == "grouped_mm:torch":
        for out, b in zip(outs, biases or (), strict=False):
            out += b
    elif biases is None:
        for row, out, w in zip(rows, outs, weights, strict=True):
            torch.mm(row, w, out=out)
    else:
        for row, out, w, b in zip(rows, outs, weights, biases, strict=True):
            torch.addmm(b, row, w, out=out)
    if s is None:
        return y, s
    parts, wide = _pieces(s, groups), _wide(x)
    for row, part, a in zip(rows, parts, _matrices(lora_A.transpose(1, 2), groups, dtype), strict=True):
        _mm_into(part, row, a, wide)
    s.mul_(scaling)
    for part, out, b in zip(
        parts, outs, _matrices(_packed(lora_B, groups).transpose(1, 2), groups, dtype), strict=True
    ):
        _mm_onto(out, part, b, wide)
    return y, s


def _forward_fp32(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    scaling: float,
    bias: torch.Tensor | None,
    groups: Groups,
    y: torch.Tensor,
    s: Kept,
) -> None:
    """Write y and S, here without the scaling, of the experts' rows, each expert's products in fp32."""
    for expert, start, stop in groups:
        rows, bias_of = x[start:stop], None if bias is None else bias[expert]
        if s is None:
            y[start:stop] = _base_product.base(rows, weight[expert], bias_of, "torch_fp32")
            continue
        factors = (lora_A[expert], lora_B[expert], scaling)
        out, part, _ = _lora_linear_fp32.forward(rows, weight[expert], *factors, bias_of, 0.0, None)
        y[start:stop], s[start:stop] = out, part


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    scaling: float,
    offsets: torch.Tensor,
    path: str,
    needs: Needs,
) -> tuple[Kept, Kept, Kept, Kept, Kept]:
    """dy [T, N] -> gradients of (x, weight, lora_A, lora_B, bias), contiguous, None where `needs` does not ask; those
    of experts without rows, and of rows without an expert, are 0. In dy's dtype, or on "torch_fp32" wider."""
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    dy = dense_rows(dy)
    groups, known = groups_of(offsets, dy.shape[0])
    if path == "torch_fp32":
        dx, da, db = _backward_fp32(dy, x, weight, lora_A, lora_B, s, scaling, groups, (needs_x, needs_a, needs_b))
    else:
        dx, da, db = _backward(
            dy, x, weight, lora_A, lora_B, s, scaling, offsets, path, groups, (needs_x, needs_a, needs_b)
        )
    if dx is not None:
        dx[known:] = 0
    dw, dbias = base_gradients(dy, x, weight, groups, needs_w, needs_bias)
    return dx, dw, da, db, dbias


def base_gradients(
    dy: torch.Tensor, x: Kept, weight: torch.Tensor, groups: Groups, needs_w: bool, needs_b: bool
) -> tuple[Kept, Kept]:
    """Gradients of the weight [E, N, K] in dy's dtype, and of the bias [E, N] in fp32 or wider."""
    wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
    dw = dy.new_zeros(weight.shape) if needs_w else None
    dbias = dy.new_zeros(weight.shape[:2], dtype=wide) if needs_b else None
    for expert, start, stop in groups:
        if dw is not None:
            torch.mm(dy[start:stop].t(), x[start:stop], out=dw[expert])
        if dbias is not None:
            torch.sum(dy[start:stop], 0, dtype=wide, out=dbias[expert])
    return dw, dbias


def _backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    scaling: float,
    offsets: torch.Tensor,
    path: str,
    groups: Groups,
    needs: tuple[bool, bool, bool],
) -> tuple[Kept, Kept, Kept]:
    needs_x, needs_a, needs_b = needs
    dtype, rows, wide = dy.dtype, _pieces(dy, groups), _wide(dy)
    dx = da = db = ds = None
    if needs_x and path == "grouped_mm:torch":
        # A gradient may be an expanded one, or part of another.
        held = dy.contiguous() if dy.data_ptr() % 16 == 0 else dy.clone(memory_format=torch.contiguous_format)
        dx = grouped_mm(held, weight.to(dtype), offs=offsets)
    elif needs_x:
        dx = dy.new_empty(dy.shape[0], weight.shape[2])
        for row, out, w in zip(rows, _pieces(dx, groups), _matrices(weight, groups, dtype), strict=True):
            torch.mm(row, w, out=out)
    if lora_A is not None and (needs_x or needs_a):
        ds = dy.new_empty(dy.shape[0], lora_A.shape[1])
        parts = _pieces(ds, groups)
        for row, part, b in zip(rows, parts, _matrices(_packed(lora_B, groups), groups, dtype), strict=True):
            _mm_into(part, row, b, wide)
        ds.mul_(scaling)
        if dx is not None:
            for part, out, a in zip(parts, _pieces(dx, groups), _matrices(lora_A, groups, dtype), strict=True):
                _mm_onto(out, part, a, wide)
        if needs_a:
            da = dy.new_zeros(lora_A.shape)
            for part, row, out in zip(parts, _pieces(x, groups), _matrices(da, groups, dtype), strict=True):
                _mm_into(out, part.t(), row, wide)
    if needs_b:
        db = dy.new_zeros(lora_B.shape)
        for row, part, out in zip(rows, _pieces(s, groups), _matrices(db, groups, dtype), strict=True):
            _mm_into(out, row.t(), part, wide)
    return dx, da, db


def _backward_fp32(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    scaling: float,
    groups: Groups,
    needs: tuple[bool, bool, bool],
) -> tuple[Kept, Kept, Kept]:
    """As `_backward`, from the S of `_forward_fp32`; dA and dB in fp32."""
    needs_x, needs_a, needs_b = needs
    dx = dy.new_empty(dy.shape[0], weight.shape[2]) if needs_x else None
    da = dy.new_zeros(lora_A.shape, dtype=torch.float32) if needs_a else None
    db = dy.new_zeros(lora_B.shape, dtype=torch.float32) if needs_b else None
    for expert, start, stop in groups:
        rows = slice(start, stop)
        if lora_A is None:
            parts: Any = (_base_product.add_base_backward(None, dy[rows], weight[expert], "torch_fp32"), None, None)
        else:
            kept = (None if s is None else s[rows], None, scaling, 0.0, needs)
            inputs = (None if x is None else x[rows], weight[expert], lora_A[expert], lora_B[expert])
            parts = _lora_linear_fp32.backward(dy[rows], *inputs, *kept)
        for whole, at, part in ((dx, rows, parts[0]), (da, expert, parts[1]), (db, expert, parts[2])):
            if whole is not None:
                whole[at] = part
    return dx, da, db
