"""`lora_linear` as a list of kernel launches, forward and backward.

`forward_calls` and `backward_calls` allocate outputs and return them with the `Call`s that fill them; nothing runs
there: the static check compiles the list from meta tensors for every architecture, a benchmark adds up its bytes.
`forward` and `backward`, which the operation calls, run the list, from a recording once a situation has been met.
The weight is dense on the paths "triton", "cublas" and "decode", a `Weight4bit` on "fused_4bit" and "decode_4bit", and
on "dequantize:PATH" a quantized one that is written out for the launches of PATH (_weight_calls.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from peftkern.ops._common import Later
from peftkern.ops._lora_linear_torch import dense_rows
from peftkern.ops._rank_rows import new_s, scratch_s
from peftkern.ops._weight_calls import WRITTEN_OUT, Calls, Part, is_whole_on, packed, parts_of, stored
from peftkern.ops.plan import DECODE_PATHS
from peftkern_kernels import replay
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import TorchCall, nbytes
from peftkern_kernels.lora_decode import decode_calls
from peftkern_kernels.lora_decode_4bit import decode_4bit_calls
from peftkern_kernels.lora_dy_pass import ONE_PASS_RANK, dy_pass_calls
from peftkern_kernels.lora_expand import expand_calls
from peftkern_kernels.lora_linear import base_plus_expand_calls, waits_late
from peftkern_kernels.lora_linear_4bit import base_4bit_plus_expand_calls, base_4bit_transposed_plus_expand_calls
from peftkern_kernels.lora_shrink import shrink_calls
from peftkern_kernels.weight_gradient import weight_gradient_calls

FUSED_4BIT_PATHS = ("fused_4bit", "decode_4bit")
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # of x, lora_A, lora_B
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def dropout(seed: torch.Tensor | None, p: float) -> Dropout | None:
    """The kernels' dropout argument, None where nothing is dropped."""
    return None if seed is None else Dropout(seed, p)


def add_base(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> TorchCall:
    """`out += x weight^T` by cuBLAS (in tests by oneDNN), in place."""
    moved = nbytes(x, weight, out, out)
    operands = (out, dense_rows(x), weight.t())
    return TorchCall("base (cuBLAS)", torch.Tensor.addmm_, operands, moved, 2 * x.shape[0] * weight.numel())


def _write(out: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, weight_t: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight_t, out=out)
    else:
        torch.addmm(bias, x, weight_t, out=out)


def write_base(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> TorchCall:
    """`out = x weight^T + bias` by cuBLAS (in tests by oneDNN)."""
    moved, flops = nbytes(x, weight, bias, out), 2 * x.shape[0] * weight.numel()
    return TorchCall("base (cuBLAS)", _write, (out, bias, dense_rows(x), weight.t()), moved, flops)


def precision() -> str:
    """How fp32 products are taken: as torch's own setting for matmuls says. On AMD exactly: Triton refuses to compile
    "tf32" for most of its architectures, for 16-bit products too."""
    # Under its newer name, which shows what was set under either. The older one, `allow_tf32`, raises as soon as
    # anybody has used the newer, as transformers' Trainer does.
    return "tf32" if torch.version.hip is None and _fp32_precision() == "tf32" else "ieee"


# What `torch.backends.cuda.matmul.fp32_precision` asks, at half the price: each recording's key has it.
_fp32_precision = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def _outputs(
    x: torch.Tensor, weight: Any, lora_A: torch.Tensor, path: str, arch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] and S [M, R], uninitialised."""
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), new_s(x, M, lora_A.shape[0], path, arch)


def _gradients(
    dy: torch.Tensor, weight: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """dX [M, K], dA [R, K] and dB [N, R], uninitialised, None where not asked for."""
    needs_x, needs_a, needs_b = needs
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs_x else None
    da = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs_a else None
    db = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_b else None
    return dx, da, db


def forward(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    path: str,
    arch: int,
    later: Later = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the launches of `forward_calls`; y [M, N] and S [M, R]. `later`: see `apply_in_two`; the decode paths make S
    together with y."""
    frozen = stored(weight)
    seed, p = (None, 0.0) if dropout is None else (dropout.seed, dropout.p)
    in_two = later is not None and path.removeprefix(WRITTEN_OUT) not in DECODE_PATHS

    def build() -> Any:
        make = begun_calls if in_two else forward_calls
        y, s, calls = make(x, weight, lora_A, lora_B, scaling, bias, dropout, path, arch)
        return (y, s), calls

    key = ("lora_linear", in_two, scaling, p, path, precision(), frozen.key)
    y, s = replay.produce(key, (x, *frozen.seen, lora_A, lora_B, bias, seed), build, x.device, frozen.told)
    if later is None or not in_two:
        return y, s

    def fill() -> None:
        key = ("lora_linear, the product", path, precision(), frozen.key)
        tensors = (x, *frozen.seen, lora_B, bias, s, y)
        replay.run(key, tensors, lambda: product_calls(x, parts(), s, lora_B, y, bias, arch), x.device, frozen.told)

    def parts() -> Iterable[Part]:
        return parts_of(weight, path, x, arch)

    later.append(fill)
    return y, s


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    scaling: float,
    dropout: Dropout | None,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Run the launches of `backward_calls`; dX [M, K], dA [R, K] and dB [N, R], None where not asked for."""
    frozen = stored(weight)
    seed, p = (None, 0.0) if dropout is None else (dropout.seed, dropout.p)

    def build() -> Any:
        *gradients, calls = backward_calls(dy, x, weight, lora_A, lora_B, s, scaling, dropout, path, arch, needs)
        return gradients, calls

    key = ("lora_linear backward", scaling, p, path, needs, precision(), frozen.key)
    tensors = (dy, x, *frozen.seen, lora_A, lora_B, s, seed)
    dx, da, db = replay.produce(key, tensors, build, dy.device, frozen.told)
    return dx, da, db


def forward_calls(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    path: str,
    arch: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Calls]:
    """x [M, K] -> y [M, N], S [M, R] (scaling applied in fp32, then rounded to x's dtype; both `out` if it is given),
    and the launches."""
    y, s = _outputs(x, weight, lora_A, path, arch) if out is None else out
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    if path == "decode_4bit":
        options = {"bias": bias, "dropout": dropout, **common}
        return y, s, [*decode_4bit_calls(x, packed(weight), lora_A, lora_B, scaling, y, s, **options)]
    parts = list(parts_of(weight, path, x, arch))
    if is_whole_on(parts, "decode"):
        options = {"bias": bias, "dropout": dropout, **common}
        dense, calls = parts[0].weight, parts[0].calls
        return y, s, [*calls, *decode_calls(x, dense, lora_A, lora_B, scaling, y, s, **options)]
    calls, late = _s_calls(x, parts, lora_A, lora_B, scaling, dropout, arch, y, s)
    calls += product_calls(x, parts, s, lora_B, y, bias, arch, late=late)
    return y, s, calls


def begun_calls(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    path: str,
    arch: int,
) -> tuple[torch.Tensor, torch.Tensor, Calls]:
    """`forward_calls` up to S: its launches alone, the same ones."""
    y, s = _outputs(x, weight, lora_A, path, arch)
    dense = isinstance(weight, torch.Tensor) and weight.dtype == x.dtype  # taken as it is, perhaps beside S's launches
    parts = [*parts_of(weight, path, x, arch)] if dense else []
    return y, s, _s_calls(x, parts, lora_A, lora_B, scaling, dropout, arch, y, s)[0]


def _s_calls(
    x: torch.Tensor,
    parts: Sequence[Part],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropout: Dropout | None,
    arch: int,
    y: torch.Tensor,
    s: torch.Tensor,
) -> tuple[Calls, bool]:
    """Launches of S, and whether the product may run beside them."""
    late = dropout is None and _waits_late(x, parts, s, lora_B, y, arch)
    common: dict[str, Any] = {"arch": arch, "precision": precision(), "beside": late}
    return [*shrink_calls(x, lora_A, s, scaling=scaling, dropout=dropout, **common)], late


def _waits_late(
    x: torch.Tensor,
    parts: Sequence[Part],
    s: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    arch: int,
    turn: bool = False,
) -> bool:
    """Whether the product may run beside the launches that make `s`, and is the faster for it: over a weight that none
    writes in between. `turn`: it multiplies by W, not by its transpose."""
    if not is_whole_on(parts, "triton") or parts[0].calls:
        return False
    weight = parts[0].weight
    return waits_late(x, weight.t() if turn else weight, s, b, out, arch)


def product_calls(
    x: torch.Tensor,
    parts: Iterable[Part],
    s: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    arch: int,
    *,
    late: bool = False,
) -> Calls:
    """Launches of `y = x W^T + bias + S B^T`, S given, part after part of W. `late`: see `base_plus_expand_calls`."""
    calls: Calls = []
    for part in parts:
        own = (s, part.of_rows(lora_B), part.of_columns(y), part.of_rows(bias))
        calls += [*part.calls, *output_calls(x, part.weight, *own, part.path, arch, late=late)]
    return calls


def output_calls(
    x: torch.Tensor,
    weight: Any,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    path: str,
    arch: int,
    *,
    late: bool = False,
) -> Calls:
    """Launches of `y = x W^T + bias + S B^T`, S given. `late`: see `base_plus_expand_calls`."""
    common: dict[str, Any] = {"bias": bias, "arch": arch, "precision": precision()}
    if path == "cublas":
        return [*expand_calls(s, lora_B, y, **common), add_base(x, weight, y)]
    if path in FUSED_4BIT_PATHS:
        return [*base_4bit_plus_expand_calls(x, packed(weight), s, lora_B, y, **common)]
    return [*base_plus_expand_calls(x, weight, s, lora_B, y, late=late, **common)]


def input_gradient_calls(
    dy: torch.Tensor,
    weight: Any,
    ds: torch.Tensor,
    lora_A: torch.Tensor,
    dx: torch.Tensor,
    dropout: Dropout | None,
    path: str,
    arch: int,
    *,
    late: bool = False,
) -> Calls:
    """Launches of `dX = dY W + keep / (1 - p) * (dS A)`, dS given. `late`: see `base_plus_expand_calls`."""
    common: dict[str, Any] = {"dropout": dropout, "arch": arch, "precision": precision()}
    if path == "cublas":
        return [*expand_calls(ds, lora_A.t(), dx, **common), add_base(dy, weight.t(), dx)]
    if path in FUSED_4BIT_PATHS:
        return [*base_4bit_transposed_plus_expand_calls(dy, packed(weight), ds, lora_A, dx, **common)]
    return [*base_plus_expand_calls(dy, weight.t(), ds, lora_A.t(), dx, late=late, **common)]


def dx_calls(
    products: Iterable[tuple[torch.Tensor, Part]],
    ds: torch.Tensor,
    lora_A: torch.Tensor,
    dx: torch.Tensor,
    dropout: Dropout | None,
    arch: int,
    *,
    late: bool = False,
) -> Calls:
    """Launches of `dX = dY W + keep / (1 - p) * (dS A)`, the sum of `dY W` over parts of W, and over weights, each with
    the dY that it multiplies. The first writes dX with the low-rank part in it; cuBLAS adds the others. `late`: see
    `base_plus_expand_calls`."""
    calls: Calls = []
    begun = False
    for dy, part in products:
        own_dy = part.of_columns(dy)
        calls += part.calls
        if begun:
            calls.append(add_base(own_dy, part.weight.t(), dx))
        else:
            calls += input_gradient_calls(own_dy, part.weight, ds, lora_A, dx, dropout, part.path, arch, late=late)
        begun = True
    return calls


def thin_calls(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    ds: torch.Tensor,
    db: torch.Tensor | None,
    scaling: float,
    arch: int,
    *,
    beside: bool = False,
) -> tuple[Calls, bool]:
    """Launches of `dS = scaling * dY B`, and whether they write `dB = dY^T S` too, from the same pass over dY.
    `beside`: see `shrink_calls`."""
    common: dict[str, Any] = {"scaling": scaling, "arch": arch, "precision": precision(), "beside": beside}
    if db is not None and lora_B.shape[1] <= ONE_PASS_RANK:
        return [*dy_pass_calls(dy, lora_B, s, ds, db, **common)], True
    return [*shrink_calls(dy, lora_B.t(), ds, **common)], False


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    scaling: float,
    dropout: Dropout | None,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Calls]:
    """dy [M, N] -> (dX [M, K], dA [R, K], dB [N, R], launches), each gradient only if `needs` asks for it.

    `x` may be None if dA is not asked for, `s` if dB is not. dA and dB are in the adapters' own dtypes.
    """
    dx, da, db = _gradients(dy, weight, lora_A, lora_B, needs)
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    ds: Kept = None
    if dx is not None or da is not None:
        ds = scratch_s(dy, dy.shape[0], lora_A.shape[0], path, arch)
    calls: Calls = []
    parts = [] if dx is None else list(parts_of(weight, path, dy, arch))
    db_done = False
    if dx is not None and dropout is None and is_whole_on(parts, "decode"):
        # dX = dY W + (dY B) A has the form of a forward pass, with dS in S's place.
        factors = (lora_B.t(), lora_A.t(), scaling)
        calls += [*parts[0].calls, *decode_calls(dy, parts[0].weight.t(), *factors, dx, ds, bias=None, **common)]
    else:
        late = False
        if dx is not None and dropout is None:
            late = _waits_late(dy, parts, ds, lora_A.t(), dx, arch, turn=True)
        if ds is not None:
            thin, db_done = thin_calls(dy, lora_B, s, ds, db, scaling, arch, beside=late)
            calls += thin
        if dx is not None:
            calls += dx_calls([(dy, part) for part in parts], ds, lora_A, dx, dropout, arch, late=late)
    if da is not None or (db is not None and not db_done):
        left_b = None if db_done or db is None else s
        calls += weight_gradient_calls(
            ds if da is not None else None,
            x if da is not None else None,
            left_b,
            dy if left_b is not None else None,
            da,
            db if left_b is not None else None,
            dropout=dropout,
            **common,
        )
    return dx, da, db, calls
