"""`linear_cross_entropy`: a language model's last layer and its loss, without the logits of all tokens at once.

At 8192 tokens the logits of a 128k vocabulary are 2 GB in bfloat16 and, with what cross-entropy needs beside them, 13
to 15 GB. Here a block of tokens at a time has its logits computed, its loss taken, and its logits turned in place into
their own gradient, which is multiplied into the hidden states' gradient at once; only that one, [tokens, features], is
kept for backward. The products are those of the unfused layer, three with a trained weight and two with a frozen one.

Gradients of the sum are kept, and scaled in backward: what divides them (the number of tokens) and what multiplies them
(a loss scale) meet there, in float32, so that float16 gradients do not vanish on the way.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.functional import linear, pad

from peftkern.backend import device_info
from peftkern.ops._common import FLOATS, apply_directly, autocast_dtype, needs_operator, number, refuse_double_backward

# Of float32 logits in a block; their 16-bit form adds half. Each block reads the weight (1 GB for a 128k vocabulary),
# and with fewer than about 200 rows its products take less time than that.
CHUNK_BYTES = 128 << 20

Needs = tuple[bool, bool, bool]  # hidden, weight, bias
Sums = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def chunk_rows(vocabulary: int) -> int:
    """Tokens in a block for a vocabulary of that size: `CHUNK_BYTES` of float32 logits, whole tiles of 64 if it can."""
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    return rows if rows < 64 else rows // 64 * 64


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "mean",
    chunk_size: int | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """`sum_t (log sum_v exp z[t, v] - z[t, labels[t]]) / n` with `z = hidden W^T + bias`, in blocks of tokens.

    The sum runs over tokens whose label is not `ignore_index`; n is their number. The softmax is in float32 (float64
    for float64), of logits rounded to hidden's dtype, as a linear layer before `torch.nn.functional.cross_entropy`
    rounds them. Gradients flow to whichever of hidden, weight and bias require them, and are computed in forward: those
    alone are kept for backward. A weight's is summed in float32. Under autocast hidden, weight and bias are cast
    to its dtype. On a CPU without 16-bit matrix instructions 16-bit operands are multiplied in float32. Double backward
    is not supported.

    Args:
        hidden: [..., features], float32, float16, bfloat16 or float64.
        weight: [vocabulary, features] in hidden's dtype.
        labels: [...] int64 or int32 ids in [0, vocabulary), or `ignore_index`; hidden's shape without its last size.
        bias: [vocabulary] in hidden's dtype, or None.
        ignore_index: the label of tokens that do not count.
        shift: a token's label is that of the next place along labels' last dimension, and the last place has none, as
            in a causal language model whose labels are its input.
        reduction: "mean" divides by the number of tokens that count (NaN if there are none, as in torch), "sum" by 1.
        chunk_size: tokens in a block; chosen from the vocabulary if None (see `CHUNK_BYTES`).
        num_items_in_batch: divides the sum in place of the number of tokens that count, for a loss over several batches
            (gradient accumulation); with reduction "mean" only.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices, reduction or a number do not fit; on a CPU, a label outside the vocabulary.
    """
    cast = autocast_dtype(hidden) if isinstance(hidden, torch.Tensor) else None
    if cast is not None:
        hidden, weight, bias = (_cast(t, cast) for t in (hidden, weight, bias))
    _check(hidden, weight, labels, bias)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError("num_items_in_batch: expected None with reduction 'sum', which divides by nothing")
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            got = list(num_items_in_batch.shape)
            raise ValueError(f"num_items_in_batch: expected a number or a tensor of one element, got shape {got}")
    elif num_items_in_batch is not None:
        num_items_in_batch = number("num_items_in_batch", num_items_in_batch)
    if chunk_size is None:
        chunk_size = chunk_rows(weight.shape[0])
    elif isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, got {chunk_size!r}")
    if shift:
        if labels.dim() == 0:
            raise ValueError("shift: expected labels of at least one dimension, got a scalar")
        labels = shifted(labels, ignore_index)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    arguments = (rows, weight, bias, targets, ignore_index, chunk_size)
    grad = torch.is_grad_enabled()
    needs = [grad and hidden.requires_grad, grad and weight.requires_grad]
    needs.append(grad and bias is not None and bias.requires_grad)
    if needs_operator(hidden, weight, labels):
        total = _operator(*arguments, needs)[0]
    elif any(needs):
        total = apply_directly(_LinearCrossEntropy, *arguments)
    else:
        total = _forward(*arguments, (False, False, False))[0]
    if reduction == "sum":
        return total
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        return total / num_items_in_batch.reshape(()).to(total.device)
    return total / num_items_in_batch


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """t in `dtype`, if it is a tensor of floats at all."""
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def shifted(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Each place's label is the next one's along the last dimension; the last has `ignore_index`."""
    return pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> None:
    where = "linear_cross_entropy"
    named = [("hidden", hidden), ("weight", weight), ("labels", labels)] + ([] if bias is None else [("bias", bias)])
    for name, t in named:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{where}: {name}: expected a tensor, got {type(t).__name__}")
        if t.device != hidden.device:
            raise ValueError(f"{where}: {name}: expected device {hidden.device} as hidden, got {t.device}")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{where}: hidden: expected float32, float16, bfloat16 or float64, got {hidden.dtype}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != hidden.dtype:
            raise TypeError(f"{where}: {name}: expected hidden's dtype {hidden.dtype}, got {operand.dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: labels: expected int64 or int32, got {labels.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{where}: weight: expected [vocabulary, features], each at least 1, got {list(weight.shape)}")
    V, K = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != K:
        raise ValueError(f"{where}: hidden: expected shape [..., {K}] to fit weight, got {list(hidden.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{where}: labels: expected shape {list(hidden.shape[:-1])}, got {list(labels.shape)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"{where}: bias: expected shape [{V}], got {list(bias.shape)}")


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    chunk_size: int,
    needs: Needs,
) -> Sums:
    """The sum of the losses of hidden [M, K], and its gradients for hidden, weight and bias where `needs` asks."""
    needs_h, needs_w, needs_b = needs
    dtype, (V, K) = hidden.dtype, weight.shape
    if targets.is_cpu:  # elsewhere asking would wait for the device, whose own assertion stops the program
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if outside.any():
            raise ValueError(f"labels: expected ids in [0, {V}) or {ignore_index}, got {int(targets[outside][0])}")
    wide = dtype if dtype == torch.float64 else torch.float32
    widen = hidden.is_cpu and dtype in device_info(hidden.device).scalar_matmul
    if widen:
        weight = weight.float()
        bias = None if bias is None else bias.float()
    total = hidden.new_zeros((), dtype=wide)
    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_h else None
    dw = hidden.new_zeros(V, K, dtype=wide) if needs_w else None
    db = hidden.new_zeros(V, dtype=wide) if needs_b else None
    # Operands have the dtypes that they should have; autocast would round the widened ones again.
    off = torch.autocast(hidden.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else None
    with off or contextlib.nullcontext():
        for start in range(0, hidden.shape[0], chunk_size):
            block = slice(start, start + chunk_size)
            rows = hidden[block].float() if widen else hidden[block]
            # Rounded to hidden's dtype, as the layer's output would be.
            logits = linear(rows, weight, bias).to(dtype).to(wide)
            total += _block_loss(logits, targets[block], ignore_index, any(needs))
            if db is not None:
                db += logits.sum(0)
            logits_grad = logits.to(rows.dtype) if any(needs) else logits
            if dh is not None:
                dh[block] = logits_grad @ weight
            if dw is not None:
                dw += logits_grad.t() @ rows
            del logits, logits_grad  # or they would stand beside the next block's
    return total, dh, None if dw is None else dw.to(dtype), None if db is None else db.to(dtype)


def _block_loss(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, with_grad: bool) -> torch.Tensor:
    """The sum of the losses of logits [m, V], which are overwritten: with `with_grad` by its gradient (softmax minus
    one-hot, zero where a token does not count)."""
    counts = (targets != ignore_index).unsqueeze(1)
    index = targets.unsqueeze(1).masked_fill(~counts, 0)
    logits.sub_(logits.amax(1, keepdim=True))
    of_target = logits.gather(1, index)
    logits.exp_()
    sums = logits.sum(1, keepdim=True)
    loss = (sums.log() - of_target).masked_fill(~counts, 0.0).sum()
    if with_grad:
        logits.mul_(counts / sums)
        logits.scatter_(1, index, logits.gather(1, index) - counts.to(logits.dtype))
    return loss


def _times(gradient: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
    """gradient * factor, multiplied in float32, in gradient's dtype."""
    if gradient is None:
        return None
    # With as many dimensions as the gradient the factor takes part in the choice of dtype; a scalar would be rounded to
    # float16 first, where a loss scale of 65536 is infinite.
    return (gradient * factor.reshape([1] * gradient.dim())).to(gradient.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_size: int,
    ) -> torch.Tensor:
        total, *gradients = _forward(hidden, weight, bias, targets, ignore_index, chunk_size, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("linear_cross_entropy")
        return (*(_times(g, factor) for g in ctx.saved_tensors), None, None, None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    chunk_size: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of losses, its gradients for hidden, weight and bias); a gradient that is not asked for is empty."""
    wanted = (needs[0], needs[1], needs[2])
    total, *gradients = _forward(hidden, weight, bias, targets, ignore_index, chunk_size, wanted)
    dh, dw, db = (hidden.new_empty(0) if g is None else g for g in gradients)
    return total, dh, dw, db


@_operator.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    chunk_size: int,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = (hidden.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))
    return (hidden.new_empty((), dtype=wide), *gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _operator_autograd(
    ctx: Any, factor: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("linear_cross_entropy")
    if factor is None:
        return (None,) * 7
    asked = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    grads = (_times(g if need else None, factor) for g, need in asked)  # an empty one is right for no tokens
    return (*grads, None, None, None, None)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
