"""`ia3_linear`: a frozen linear layer and the vector that IA3 learns for it, as one differentiable operation.

    output scaling (k, v)     y = (x W^T + b) * l         l [N]
    feed-forward (down)       y = (x * l) W^T + b         l [K]

What backward needs, and why it is kept. Feed-forward: dl = sum over rows of x * (dy W) takes x, by reference, and a
product that dX needs anyway. Output scaling: dl = sum over rows of dy * z takes z = x W^T + b, so z [M, N] is kept:
x instead would be K / N times as large (4 for the k and v projections of an 8B Llama) and cost a third product to have
z again, half as much as both others; y / l is wrong where l is 0, and in float16 where y is subnormal. Where l needs no
gradient nothing is kept.

`multi_ia3_linear` is the same with a vector for each row, picked by an id. One operator serves all, over dense and
quantized weights: see `lora_linear_quantized` for how a weight crosses it, and `lora_linear` for its two doors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _ia3_linear_torch
from peftkern.ops._common import (
    FLOATS,
    apply_in_two,
    ask,
    autocast_dtype,
    calls_are_changed,
    fake_gradients,
    is_plain,
    needs_operator,
    refuse_double_backward,
    two_dtypes,
    unflattened,
    without_autocast,
)
from peftkern.ops._dense_blocks import dense_blocks
from peftkern.ops.lora_linear_quantized import flatten, unflatten
from peftkern.ops.plan import Plan, plan_ia3_linear
from peftkern.weights import DENSE_DTYPES, Weight, Weight4bit, Weight8bit

Needs = tuple[bool, bool, bool, bool]  # x, weight, scale, bias
SHORT_ROWS = 1024  # up to which torch's own operations are the quicker ones on a CPU
DENSE = [0]  # a dense weight's numbers: not none, for torch takes an empty list for one of tensors


def ia3_linear(
    x: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """`y = (x W^T + bias) * scale`, or `y = (x * scale) W^T + bias` (IA3, Liu et al. 2022, arXiv:2205.05638).

    Gradients flow to whichever of x, weight, scale and bias require them; only those are computed, in a fixed order,
    and are right where scale is 0. Kept for backward if scale learns: x W^T + bias [M, out_features], or x by reference
    for a feed-forward layer. Under autocast, x, weight and bias are cast to its dtype. Double backward is not
    supported.

    Args:
        x: [..., in_features], float32, float16 or bfloat16 (float64 on the plain path); any strides.
        weight: [out_features, in_features] in x's dtype; any strides, so a transposed view will do. Or a `Weight4bit`
            or `Weight8bit`: decoded to x's dtype for each product, never kept dense, and frozen.
        scale: [out_features], or [in_features] for a feed-forward layer; in x's dtype or float32 (a master, which is
            multiplied as it is: the product is rounded once).
        bias: [out_features] or None.
        is_feedforward: scale x rather than the output.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes or devices do not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    return _apply("ia3_linear", x, weight, scale, bias, None, is_feedforward)


def multi_ia3_linear(
    x: torch.Tensor,
    weight: Weight,
    scales: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """`ia3_linear` with a vector for each row: row m is scaled by `scales[ids[m]]`, or not at all if that is no slot.

    The gradient of a slot is that of its own rows run alone; of a slot without rows it is 0.

    Args:
        x, weight, bias, is_feedforward: as for `ia3_linear`.
        scales: [slots, out_features], or [slots, in_features] for a feed-forward layer; at least one slot.
        ids: int32 or int64 of x's shape but for the last axis, on x's device: the slot of each row; -1 (or any number
            that is no slot) for none. Read on the device only.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as for `ia3_linear`.
    """
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"multi_ia3_linear: ids: expected a tensor, got {type(ids).__name__}")
    return _apply("multi_ia3_linear", x, weight, scales, bias, ids, is_feedforward)


def _apply(
    operation: str,
    x: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    by_parameter: bool = False,
) -> torch.Tensor:
    """The operations; `by_parameter` where `scale` is as PEFT stores it."""
    # In the common case, told by a few comparisons, nothing more is to be checked or converted.
    common = ids is None and _fits(x, weight, scale, bias, is_feedforward, by_parameter) and not calls_are_changed()
    path = plan_for(x, weight, is_feedforward, backend_in_force()).path if common else ""
    if common and isinstance(weight, torch.Tensor) and _is_short(x, weight, scale, bias, path):
        return _multiply(x, weight, scale, bias, is_feedforward)
    if by_parameter:
        scale = scale.flatten()
    if not common:
        cast = autocast_dtype(x)
        if cast is not None:
            x = x.to(cast)
        _check(operation, x, weight, scale, bias, ids, is_feedforward, mixed=cast is not None)
        path = plan_for(x, weight, is_feedforward, backend_in_force(), gathers=ids is not None).path
    dense = weight if isinstance(weight, torch.Tensor) else None
    learns = torch.is_grad_enabled()
    weight_learns = learns and dense is not None and dense.requires_grad
    keep_x = weight_learns or (learns and is_feedforward and scale.requires_grad)
    keep_z = learns and not is_feedforward and scale.requires_grad
    if not common:
        tensors, numbers = _flatten(weight)
        if needs_operator(x, scale, *tensors):
            return _operator(x, tensors, scale, bias, ids, numbers, is_feedforward, path, keep_x, keep_z)[0]
    base_learns = weight_learns or (bias is not None and bias.requires_grad)
    if learns and (x.requires_grad or scale.requires_grad or base_learns):
        rest = (weight, is_feedforward, path, keep_x, keep_z)
        return apply_in_two(_IA3Linear, scale, x, dense, scale, bias, ids, rest)
    return _forward(x, weight, scale, bias, ids, is_feedforward, path, False)[0]


def ia3_linear_by_parameter(
    x: torch.Tensor, weight: torch.Tensor, vector: torch.Tensor, bias: torch.Tensor | None, is_feedforward: bool
) -> torch.Tensor:
    """`ia3_linear` with the vector as PEFT stores it: [out_features, 1], or [1, in_features] if feed-forward."""
    return _apply("ia3_linear", x, weight, vector, bias, None, is_feedforward, by_parameter=True)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, is_feedforward: bool
) -> torch.Tensor:
    """`ia3_linear` by torch's own operations, of operands that `_is_short` holds for; scale of any shape.

    They keep for backward what the operation keeps."""
    row = scale if is_feedforward or scale.dim() == 1 else scale.t()
    if is_feedforward:
        u = x * row
        return linear(u if u.dtype is x.dtype else u.to(x.dtype), weight, bias)
    z = linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return z.mul_(row)
    y = z * row
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _is_short(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, path: str) -> bool:
    """Whether x, of operands that fit, has so few rows on the plain path that an autograd function costs more than it
    saves, which is that products are widened block by block. Weight and bias must be frozen, and a scale of 16 bits
    would not widen them."""
    if path != "torch" or not x.is_cpu or scale.dtype.itemsize < 4 or x.dim() < 2 or not x.is_contiguous():
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return x.numel() <= SHORT_ROWS * x.shape[-1]


def _fits(x: Any, weight: Any, scale: Any, bias: Any, is_feedforward: bool, by_parameter: bool) -> bool:
    """Whether the common case holds: plain tensors, one dtype or an fp32 scale, shapes that agree."""
    for t in (x, weight, scale):
        if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return False
    dtype, device = x.dtype, x.device
    if dtype is not weight.dtype or dtype not in FLOATS or scale.dtype not in (dtype, torch.float32):
        return False
    if weight.dim() != 2 or x.dim() == 0 or weight.device != device or scale.device != device:
        return False
    N, K = weight.shape
    shape: tuple[int, ...] = (K,) if is_feedforward else (N,)
    if by_parameter:
        shape = (1, K) if is_feedforward else (N, 1)
    if N == 0 or K == 0 or x.shape[-1] != K or scale.shape != shape:
        return False
    if bias is None:
        return True
    plain = type(bias) is torch.Tensor or type(bias) is torch.nn.Parameter
    return plain and bias.dtype is dtype and bias.shape == (N,) and bias.device == device


def _check(
    operation: str,
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    *,
    mixed: bool,
) -> None:
    """Refuse what the operation cannot mean; `mixed` allows a weight, bias or scale in another float dtype."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{operation}: x: expected a tensor, got {type(x).__name__}")
    if not isinstance(weight, (torch.Tensor, Weight4bit, Weight8bit)):
        raise TypeError(
            f"{operation}: weight: expected a tensor, a Weight4bit or a Weight8bit, got {type(weight).__name__}"
        )
    dense = isinstance(weight, torch.Tensor)
    if x.dtype not in (FLOATS if dense else DENSE_DTYPES):
        kinds = "float32, float16, bfloat16 or float64" if dense else "float32, float16 or bfloat16"
        raise TypeError(f"{operation}: x: expected {kinds}, got {x.dtype}")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(
            f"{operation}: weight: expected shape [out_features, in_features], each at least 1, "
            f"got {list(weight.shape)}"
        )
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{operation}: x: expected shape [..., {K}] to fit weight {[N, K]}, got {list(x.shape)}")
    if dense and weight.dtype != x.dtype and not (mixed and weight.dtype in FLOATS):
        raise two_dtypes(operation, x, weight)
    name = "scale" if ids is None else "scales"
    C, meaning = (K, "in_features") if is_feedforward else (N, "out_features")
    for what, t, size in ((name, scale, C), ("bias", bias, N)):
        if t is None and what == "bias":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{operation}: {what}: expected a tensor, got {type(t).__name__}")
        if what == "scales":
            if t.dim() != 2 or t.shape[0] < 1 or t.shape[1] != C:
                raise ValueError(
                    f"{operation}: scales: expected shape [slots, {C}] ({meaning}), at least one slot, "
                    f"got {list(t.shape)}"
                )
        elif t.shape != (size,):
            raise ValueError(f"{operation}: {what}: expected shape [{size}], got {list(t.shape)}")
        if t.dtype not in (x.dtype, torch.float32) and not (mixed and t.dtype in FLOATS):
            raise TypeError(f"{operation}: {what}: expected x's dtype {x.dtype} or torch.float32, got {t.dtype}")
    if ids is not None:
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{operation}: ids: expected int32 or int64, got {ids.dtype}")
        if ids.shape != x.shape[:-1]:
            raise ValueError(
                f"{operation}: ids: expected shape {list(x.shape[:-1])} as x's rows, got {list(ids.shape)}"
            )
    for what, t in (("weight", weight), (name, scale), ("bias", bias), ("ids", ids)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{operation}: {what}: expected device {x.device} as x, got {t.device}")


def _flatten(weight: Weight) -> tuple[list[torch.Tensor], list[int]]:
    """A weight's tensors and numbers; of a dense one itself and a number that says so."""
    return ([weight], DENSE) if isinstance(weight, torch.Tensor) else flatten(weight)


def _unflatten(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> Weight:
    return tensors[0] if len(numbers) == len(DENSE) else unflatten(tensors, numbers)


def _sizes(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> tuple[Any, Any]:
    """N, K."""
    N, K = tensors[0].shape if len(numbers) == len(DENSE) else numbers[:2]
    return N, K


def plan_for(x: torch.Tensor, weight: Weight, is_feedforward: bool, backend: str, *, gathers: bool = False) -> Plan:
    """The plan for x [..., K] and weight [N, K]; `gathers` for a vector for each row."""
    N, K = weight.shape
    dense = isinstance(weight, torch.Tensor)
    aligned = True
    if not x.is_cpu:
        rows = [x.stride(-2) if x.dim() > 1 else K, N]
        rows.append(max(weight.stride()) if isinstance(weight, torch.Tensor) else K)
        aligned = all(row % 16 == 0 for row in rows)
    options = (is_feedforward, gathers, not dense, x.dtype, device_info(x.device), aligned, backend)
    return ask(plan_ia3_linear, x.numel() // K, N, K, *options)


@without_autocast
def _forward(
    x: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [..., N], and z [M, N] if it is to be kept."""
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    flat_ids = None if ids is None else ids.reshape(-1)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y, z = _forward_rows(rows, weight, scale, bias, flat_ids, is_feedforward, path, keep_z)
    return (y if flat else unflattened(y, x.shape[:-1])), z


def _forward_rows(
    x: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `_forward` for x [M, K]; on plain paths a quantized weight is made dense in blocks of its rows."""
    if not is_plain(path):
        from peftkern.ops import _ia3_linear_triton as kernels

        return kernels.forward(x, weight, scale, bias, ids, is_feedforward, path, keep_z)
    if isinstance(weight, torch.Tensor):
        weight = weight if weight.dtype is x.dtype else weight.to(x.dtype)
        return _ia3_linear_torch.forward(x, weight, scale, bias, ids, is_feedforward, path, keep_z)
    dense_path = path.partition(":")[2]
    N = weight.shape[0]
    y: Any = None
    z: Any = None
    for rows, dense in dense_blocks(weight, x.dtype, dense_path):
        l_rows = scale if is_feedforward else scale[..., rows]
        b_rows = None if bias is None else bias[rows]
        part, part_z = _forward_rows(x, dense, l_rows, b_rows, ids, is_feedforward, dense_path, keep_z)
        if dense.shape[0] == N:
            return part, part_z
        y = x.new_empty(x.shape[0], N) if y is None else y
        y[:, rows] = part
        if part_z is not None:
            z = x.new_empty(x.shape[0], N) if z is None else z
            z[:, rows] = part_z
    return y, z


@without_autocast
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: Weight,
    scale: torch.Tensor,
    z: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    needs: Needs,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x [..., K], weight, scale, bias), None where `needs` does not ask."""
    N, K = weight.shape
    flat = dy.dim() == 2
    rows = x if x is None or flat else x.reshape(-1, K)
    flat_ids = None if ids is None else ids.reshape(-1)
    grad = dy if flat else dy.reshape(-1, N)
    dx, dw, dscale, dbias = _backward_rows(grad, rows, weight, scale, z, flat_ids, is_feedforward, path, needs)
    if dx is not None and not flat:
        dx = dx.view(*dy.shape[:-1], K)
    if dw is not None and isinstance(weight, torch.Tensor):
        dw = dw.to(weight.dtype)
    return dx, dw, dscale, None if dbias is None else dbias.to(bias_dtype)


def _backward_rows(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: Weight,
    scale: torch.Tensor,
    z: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    needs: Needs,
) -> tuple[Any, Any, Any, Any]:
    """As `_backward` for dy [M, N] and x [M, K]; the bias's gradient is wide."""
    needs_x, needs_w, needs_scale, needs_bias = needs
    on_kernels = not is_plain(path)
    if on_kernels or isinstance(weight, torch.Tensor):
        rest: Any = (scale, z, ids, is_feedforward, path, (needs_x, needs_scale, needs_w or needs_bias))
        if isinstance(weight, torch.Tensor) and not on_kernels:
            dx, dscale, g = _ia3_linear_torch.backward(dy, x, weight.to(dy.dtype), *rest)
        else:
            from peftkern.ops import _ia3_linear_triton as kernels

            dx, dscale, g = kernels.backward(dy, x, weight, *rest)
        dw = dbias = None
        if needs_w and x is not None and g is not None:
            dw = g.t() @ (_ia3_linear_torch.scaled(x, scale, ids) if is_feedforward else x)
        if needs_bias and g is not None:
            dbias = g.sum(0, dtype=torch.float32 if g.dtype.itemsize == 2 else g.dtype)
        return dx, dw, dscale, dbias
    dense_path = path.partition(":")[2]
    needs_dense = needs_x or (is_feedforward and needs_scale)
    if not needs_dense:  # no gradient here needs the weight: a stand-in of its shape will do
        stand_in = dy.new_empty(()).expand(weight.shape)
        return _backward_rows(dy, x, stand_in, scale, z, ids, is_feedforward, dense_path, needs)
    parts: list[Any] = []
    total: Any = None
    for rows, dense in dense_blocks(weight, dy.dtype, dense_path):
        l_rows, z_rows = (scale, None) if is_feedforward else (scale[..., rows], None if z is None else z[:, rows])
        saved: Any = (dy[:, rows], x, dense, l_rows, z_rows, ids, is_feedforward, dense_path, needs)
        dx, _, dscale, dbias = _backward_rows(*saved)
        parts.append((dscale, dbias))
        # The sum of h over blocks of W's rows, times l or not, is the sum of what each block gives.
        total = dx if total is None else total + dx
    scales, biases = zip(*parts, strict=True)
    dscale = None
    if needs_scale:
        dscale = sum(scales[1:], scales[0]) if is_feedforward else torch.cat(scales, dim=-1)
    return total, None, dscale, torch.cat(biases) if needs_bias else None


class _IA3Linear(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, dense, scale, bias, ids, rest, later):
        weight, is_feedforward, path, keep_x, keep_z = rest
        arguments = (x, weight, scale, bias, ids, is_feedforward, path, keep_z)
        if later is None or not is_feedforward:
            y, z = _forward(*arguments)
        else:  # all that is kept is there already
            y, z = x.new_empty(*x.shape[:-1], weight.shape[0]), None
            later.append(lambda: y.copy_(_forward(*arguments)[0]))
        ctx.save_for_backward(x if keep_x else None, dense, scale, z, ids)
        ctx.weight = None if dense is not None else weight  # quantized: frozen, no activation, and here anyway
        ctx.numbers = (is_feedforward, path, ctx.needs_input_grad[:4], None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("ia3_linear")
        x, dense, scale, z, ids = ctx.saved_tensors
        weight = dense if ctx.weight is None else ctx.weight
        return (*_backward(dy, x, weight, scale, z, ids, *ctx.numbers), None, None, None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::ia3_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    numbers: Sequence[int],
    is_feedforward: bool,
    path: str,
    keep_x: bool,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, z); z is empty unless it is kept."""
    y, z = _forward(x, _unflatten(tensors, numbers), scale, bias, ids, is_feedforward, path, keep_z)
    return y, x.new_empty(0) if z is None else z


@_operator.register_fake
def _(x, tensors, scale, bias, ids, numbers, is_feedforward, path, keep_x, keep_z):
    N, K = _sizes(tensors, numbers)
    z_shape = (x.numel() // K, N) if keep_z else (0,)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(z_shape)


@torch.library.custom_op("peftkern::ia3_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    scale: torch.Tensor,
    z: torch.Tensor,
    ids: torch.Tensor | None,
    numbers: Sequence[int],
    is_feedforward: bool,
    path: str,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, scale, bias), empty where not asked for."""
    rest: Any = (is_feedforward, path, tuple(needs), bias_dtype)
    keeps_z = needs[2] and not is_feedforward  # also of no rows, when it is as empty as one that was not kept
    grads = _backward(dy, x, _unflatten(tensors, numbers), scale, z if keeps_z else None, ids, *rest)
    dx, dw, dscale, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dw, dscale, dbias


@_operator_backward.register_fake
def _(dy, x, tensors, scale, z, ids, numbers, is_feedforward, path, needs, bias_dtype):
    N, K = _sizes(tensors, numbers)
    full = (
        ((*dy.shape[:-1], K), dy.dtype),
        ((N, K), tensors[0].dtype),
        (scale.shape, scale.dtype),
        ((N,), bias_dtype),
    )
    return fake_gradients(dy, full, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, tensors, scale, bias, ids, numbers, is_feedforward, path, keep_x, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if keep_x else None, scale, output[1], ids, *tensors)
    ctx.numbers = (list(numbers), is_feedforward, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    refuse_double_backward("ia3_linear")
    x, scale, z, ids, *tensors = ctx.saved_tensors
    numbers, is_feedforward, path = ctx.numbers
    frozen: list[Any] = [None] * len(tensors)
    if dy is None:
        return None, frozen, *(None,) * 8
    needs_x, needs_tensors, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    dense = len(numbers) == len(DENSE)
    needs = [needs_x, dense and any(needs_tensors), needs_scale, needs_bias]
    rest: Any = (is_feedforward, path, needs, ctx.bias_dtype)
    grads = _operator_backward(dy, x, tensors, scale, z, ids, numbers, *rest)
    dx, dw, dscale, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, frozen if dw is None else [dw], dscale, dbias, *(None,) * 6


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
