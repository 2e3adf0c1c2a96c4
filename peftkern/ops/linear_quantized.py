"""`linear_quantized`: a frozen linear layer whose weight is 4- or 8-bit, by itself, without an adapter.

Forward and backward each make the weight dense for as long as one product takes, but that few rows on a GPU are
multiplied by kernels that decode the weight themselves. Nothing of x and no dense weight is kept between them: backward
is dX = dY W, and W is decoded again. Two doors lead to the same code: see `lora_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.backend import backend_in_force, device_info
from peftkern.ops._common import (
    apply_directly,
    autocast_dtype,
    needs_operator,
    refuse_double_backward,
    unflattened,
    without_autocast,
)
from peftkern.ops._dense_blocks import Quantized
from peftkern.ops.lora_linear_quantized import flatten, plan_for, unflatten
from peftkern.ops.quantize import dequantize
from peftkern.weights import DENSE_DTYPES, Weight4bit


def linear_quantized(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`y = x dequantize(W)^T + bias`, W decoded to x's dtype.

    Gradients flow to x and bias, the weight is frozen. Under autocast, x and bias are cast to its dtype. Backward is
    plain PyTorch, which can be differentiated again, as `use_backend("unfused")` over a quantized base does; not where
    something looks at operators.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        weight: [out_features, in_features] in a format of `peftkern.weights`, on x's device.
        bias: [out_features] of any of those dtypes, or None; rounded to x's dtype.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes or devices do not fit.
    """
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
    _check(x, weight, bias)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    tensors = [t for t in weight.tensors() if t is not None]
    if needs_operator(x, *tensors):
        return _operator(x, *flatten(weight), bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return apply_directly(_LinearQuantized, x, bias, weight)
    return _product(x, weight, bias)


def _product(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """y [..., N]; nothing is checked."""
    if isinstance(weight, Weight4bit) and plan_for(x, weight, 1, backend_in_force()).path == "decode_4bit":
        from peftkern.ops import _lora_linear_triton as kernels

        # An adapter of rank 0: its programs and products fall away.
        N, K = weight.shape
        rows, nothing = x.reshape(-1, K), x.new_empty(0)
        arch = device_info(x.device).arch
        adapter = (nothing.view(0, K), nothing.view(N, 0))
        y, _ = kernels.forward(rows, weight, *adapter, 1.0, bias, None, "decode_4bit", arch)
        return unflattened(y, x.shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = linear(rows, dequantize(weight, x.dtype), bias)
    return y if x.dim() == 2 else unflattened(y, x.shape[:-1])


def _check(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None) -> None:
    if not isinstance(weight, Quantized):
        raise TypeError(f"weight: expected a Weight4bit or a Weight8bit, got {type(weight).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DENSE_DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16 beside a quantized weight, got {x.dtype}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [..., {K}] to fit weight {[N, K]}, got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"weight: expected device {x.device} as x, got {weight.device}")
    if bias is None:
        return
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias: expected a tensor [out_features] or None, got {type(bias).__name__}")
    if bias.shape != (N,):
        raise ValueError(f"bias: expected shape [{N}], got {list(bias.shape)}")
    if bias.dtype not in DENSE_DTYPES:
        raise TypeError(f"bias: expected float32, float16 or bfloat16, got {bias.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias: expected device {x.device} as x, got {bias.device}")


@without_autocast
def _backward(dy: torch.Tensor, weight: Quantized, needs_x: bool, needs_bias: bool) -> tuple[Any, Any]:
    """Gradients of x [..., K] and bias [N], None where not asked for; the bias's is summed in fp32."""
    dx = dy @ dequantize(weight, dy.dtype) if needs_x else None
    dbias = dy.reshape(-1, weight.shape[0]).sum(0, dtype=torch.float32).to(dy.dtype) if needs_bias else None
    return dx, dbias


class _LinearQuantized(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: Quantized) -> torch.Tensor:
        ctx.weight = weight  # frozen, no activation, and here anyway
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return (*_backward(dy, ctx.weight, *ctx.needs_input_grad[:2]), None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::linear_quantized", mutates_args=())
def _operator(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], numbers: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    return _product(x, unflatten(tensors, numbers), bias)


@_operator.register_fake
def _(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], numbers: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], numbers[0])


@torch.library.custom_op("peftkern::linear_quantized_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor, tensors: Sequence[torch.Tensor], numbers: Sequence[int], needs_x: bool, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of (x, bias), empty where not asked for."""
    dx, dbias = _backward(dy, unflatten(tensors, numbers), needs_x, needs_bias)
    return dy.new_empty(0) if dx is None else dx, dy.new_empty(0) if dbias is None else dbias


@_operator_backward.register_fake
def _(
    dy: torch.Tensor, tensors: Sequence[torch.Tensor], numbers: Sequence[int], needs_x: bool, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    N, K, _ = numbers
    dx = dy.new_empty(*dy.shape[:-1], K) if needs_x else dy.new_empty(0)
    return dx, dy.new_empty(N if needs_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, tensors, numbers, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = list(numbers)


def _operator_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    refuse_double_backward("linear_quantized")
    needs_x, _, _, needs_bias = ctx.needs_input_grad
    tensors = list(ctx.saved_tensors)
    dx, dbias = _operator_backward(dy, tensors, ctx.numbers, needs_x, needs_bias)
    return dx if needs_x else None, [None] * len(tensors), None, dbias if needs_bias else None


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
