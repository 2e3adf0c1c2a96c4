"""`grouped_lora_linear`: a stack of frozen experts and their low-rank adapters as one differentiable operation.

Rows come sorted by expert, as a mixture of experts has them once they are routed; `offsets` says where each expert's
end. W + scaling * B A of an expert is never written out: adapters of a whole stack cost what their rows cost. Doors and
paths are as in `lora_linear`; `grouped_linear` is the same without adapters, through the same operator.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _grouped_lora_linear_torch
from peftkern.ops._common import (
    FLOATS,
    apply_directly,
    ask,
    autocast_dtype,
    fake_gradients,
    kept_s,
    needs_operator,
    number,
    refuse_double_backward,
    taken_s,
    two_dtypes,
    without_autocast,
)
from peftkern.ops._grouped_lora_linear_torch import Kept, Needs
from peftkern.ops.plan import Plan, plan_grouped_lora_linear


def grouped_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y_t = x_t W_e^T + b_e + scaling * (x_t A_e^T) B_e^T`, e the expert of row t (LoRA, arXiv:2106.09685).

    Gradients flow to whichever of x, weight, lora_A, lora_B and bias require them; only those are computed, in a fixed
    order; those of an expert without rows are 0. Kept for backward: x by reference and S = scaling * x A^T [T, r].
    Under autocast, x, weight and bias are cast to its dtype. Double backward is not supported. Kernels read `offsets`
    on the device; plain PyTorch, and gradients of weight and bias, read them on the host.

    Args:
        x: [T, in_features], rows sorted by expert; float32, float16 or bfloat16 (float64 on the plain path); any
            strides.
        weight: [experts, out_features, in_features] in x's dtype; any strides: of a stack that is stored as
            [experts, in_features, out_features], pass `weight.transpose(1, 2)`.
        lora_A: [experts, r, in_features], in x's dtype or float32 (master weights, rounded to x's dtype where they are
            used); any strides.
        lora_B: [experts, out_features, r], likewise.
        scaling: multiplies the adapters' output, lora_alpha / r in PEFT's terms; not NaN.
        offsets: int32 [experts] on x's device: the end of each expert's rows (cumulative counts), non-decreasing and at
            most T. Rows from the last one on belong to no expert: y there is 0, and so are their gradients.
        bias: [experts, out_features] or None.

    Returns:
        [T, out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or a number do not fit; on the plain path, offsets that decrease or pass T.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    if type(scaling) is not float or scaling != scaling:
        scaling = number("grouped_lora_linear: scaling", scaling)
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factor, torch.Tensor):
            raise TypeError(f"grouped_lora_linear: {name}: expected a tensor, got {type(factor).__name__}")
    return _apply("grouped_lora_linear", x, weight, lora_A, lora_B, bias, offsets, scaling)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`y_t = x_t W_e^T + b_e`, e the expert of row t: experts without adapters, on the paths of `grouped_lora_linear`.

    Args, returns, raises: as for `grouped_lora_linear`.
    """
    return _apply("grouped_linear", x, weight, None, None, bias, offsets, 0.0)


def _apply(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
    _check(operation, x, weight, lora_A, lora_B, bias, offsets, mixed=cast is not None)
    path = plan_for(x, weight, backend_in_force()).path
    tensors = [t for t in (x, weight, lora_A, lora_B, bias) if t is not None]
    if needs_operator(*tensors, offsets):
        return _operator(x, weight, lora_A, lora_B, bias, offsets, scaling, path)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return apply_directly(_GroupedLoraLinear, x, weight, lora_A, lora_B, bias, offsets, scaling, path)
    return _forward(x, weight, lora_A, lora_B, bias, offsets, scaling, path)[0]


def plan_for(x: torch.Tensor, weight: torch.Tensor, backend: str) -> Plan:
    """The plan for x [T, K] and weight [E, N, K]."""
    (T, K), N = x.shape, weight.shape[1]
    aligned = True
    if not x.is_cpu:
        least, *rows = sorted(weight.stride())
        aligned = x.stride(1) == least == 1
        aligned = aligned and all(stride * x.element_size() % 16 == 0 for stride in (x.stride(0), N, *rows))
        if aligned and not needs_operator(x, weight):  # where something looks at operators there may be no address
            aligned = x.stride(0) >= K and all(t.data_ptr() % 16 == 0 for t in (x, weight))
    return ask(plan_grouped_lora_linear, T, N, K, x.dtype, device_info(x.device), aligned, backend)


def _check(
    operation: str, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, offsets: Any, *, mixed: bool
) -> None:
    """Refuse what the operation cannot mean; `mixed` allows other float dtypes beside x's (autocast)."""
    for name, t in (("x", x), ("weight", weight), ("offsets", offsets)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{operation}: {name}: expected a tensor, got {type(t).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{operation}: x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(
            f"{operation}: weight: expected shape [experts, out_features, in_features], each at least 1, "
            f"got {list(weight.shape)}"
        )
    E, N, K = weight.shape
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(f"{operation}: x: expected shape [T, {K}] to fit weight {[E, N, K]}, got {list(x.shape)}")
    if weight.dtype != x.dtype and not (mixed and weight.dtype in FLOATS):
        raise two_dtypes(operation, x, weight)
    if offsets.dtype != torch.int32:
        raise TypeError(f"{operation}: offsets: expected int32, got {offsets.dtype}")
    tensors = [("weight", weight), ("offsets", offsets)]
    shapes: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [("offsets", offsets, (E,))]
    if lora_A is not None:
        R = lora_A.shape[1] if lora_A.dim() == 3 else -1
        if R < 1 or lora_A.shape != (E, R, K):
            raise ValueError(
                f"{operation}: lora_A: expected shape [{E}, r, {K}] with r at least 1, got {list(lora_A.shape)}"
            )
        shapes.append(("lora_B", lora_B, (E, N, R)))
        tensors += [("lora_A", lora_A), ("lora_B", lora_B)]
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"{operation}: bias: expected a tensor or None, got {type(bias).__name__}")
        shapes.append(("bias", bias, (E, N)))
        tensors.append(("bias", bias))
    for name, t, shape in shapes:
        if t.shape != shape:
            raise ValueError(f"{operation}: {name}: expected shape {list(shape)}, got {list(t.shape)}")
    for name, t in tensors:
        allowed = FLOATS if mixed else (x.dtype, torch.float32)
        if name not in ("weight", "offsets") and t.dtype not in allowed:
            raise TypeError(f"{operation}: {name}: expected x's dtype {x.dtype} or torch.float32, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{operation}: {name}: expected device {x.device} as x, got {t.device}")


@without_autocast
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    scaling: float,
    path: str,
) -> tuple[torch.Tensor, Kept]:
    """y [T, N] and S [T, R], None without adapters."""
    if path == "triton":
        from peftkern.ops import _grouped_lora_linear_triton as kernels

        return kernels.forward(x, weight, lora_A, lora_B, scaling, bias, offsets)
    return _grouped_lora_linear_torch.forward(x, weight, lora_A, lora_B, scaling, bias, offsets, path)


@without_autocast
def _backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    offsets: torch.Tensor,
    scaling: float,
    path: str,
    needs: Needs,
    bias_dtype: torch.dtype | None,
) -> tuple[Kept, ...]:
    """Gradients of (x, weight, lora_A, lora_B, bias), None where `needs` does not ask."""
    grads: tuple[Kept, ...]
    if path == "triton":
        from peftkern.ops import _grouped_lora_linear_triton as kernels

        grads = kernels.backward(dy, x, weight, lora_A, lora_B, s, scaling, offsets, needs)
    else:
        plain = _grouped_lora_linear_torch.backward
        grads = plain(dy, x, weight, lora_A, lora_B, s, scaling, offsets, path, needs)
    like = (None, weight, lora_A, lora_B, None)
    dx, dw, da, db, dbias = (
        g if g is None or t is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in zip(grads, like, strict=True)
    )
    return dx, dw, da, db, None if dbias is None else dbias.to(bias_dtype)


class _GroupedLoraLinear(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, weight, lora_A, lora_B, bias, offsets, scaling, path):
        y, s = _forward(x, weight, lora_A, lora_B, bias, offsets, scaling, path)
        needs: Needs = ctx.needs_input_grad[:5]
        _, needs_w, needs_a, needs_b, _ = needs
        # Only x and S are activations: the rest exists anyway and is kept by reference.
        ctx.save_for_backward(
            x if needs_a or needs_w else None,
            weight,
            lora_A,
            lora_B,
            kept_s(s, path) if needs_b else None,
            offsets,
        )
        ctx.numbers = (scaling, path, needs, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("grouped_lora_linear")
        x, weight, lora_A, lora_B, s, offsets = ctx.saved_tensors
        grads = _backward(dy, x, weight, lora_A, lora_B, taken_s(s), offsets, *ctx.numbers)
        return (*grads, None, None, None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::grouped_lora_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    scaling: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, S); S is empty without adapters."""
    y, s = _forward(x, weight, lora_A, lora_B, bias, offsets, scaling, path)
    return y, x.new_empty(0) if s is None else s


@_operator.register_fake
def _(x, weight, lora_A, lora_B, bias, offsets, scaling, path):
    s_shape = (0,) if lora_A is None else (x.shape[0], lora_A.shape[1])
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(s_shape)


@torch.library.custom_op("peftkern::grouped_lora_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    s: torch.Tensor | None,
    offsets: torch.Tensor,
    scaling: float,
    path: str,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, bias), empty where not asked for."""
    wanted: Any = tuple(needs)
    grads = _backward(dy, x, weight, lora_A, lora_B, s, offsets, scaling, path, wanted, bias_dtype)
    dx, dw, da, db, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dw, da, db, dbias


@_operator_backward.register_fake
def _(dy, x, weight, lora_A, lora_B, s, offsets, scaling, path, needs, bias_dtype):
    E, N, K = weight.shape
    full = (
        ((dy.shape[0], K), dy.dtype),
        ((E, N, K), weight.dtype),
        ((0,), dy.dtype) if lora_A is None else (lora_A.shape, lora_A.dtype),
        ((0,), dy.dtype) if lora_B is None else (lora_B.shape, lora_B.dtype),
        ((E, N), bias_dtype),
    )
    return fake_gradients(dy, full, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, lora_A, lora_B, bias, offsets, scaling, path = inputs
    _, needs_w, needs_a, needs_b, _ = ctx.needs_input_grad[:5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if needs_a or needs_w else None, weight, lora_A, lora_B, output[1] if needs_b else None, offsets
    )
    ctx.numbers = (scaling, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    refuse_double_backward("grouped_lora_linear")
    if dy is None:
        return (None,) * 8
    grads = _operator_backward(dy, *ctx.saved_tensors, *ctx.numbers, needs, ctx.bias_dtype)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
