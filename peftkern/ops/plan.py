"""Which path an operation takes, and why: pure functions of sizes, dtypes, alignment and device.

The same arguments always give the same plan, so forward and backward agree and a test can ask for any device. Launch
parameters (tiles, warps) are not chosen here but in the tables of `peftkern_kernels`.

Paths of `lora_linear`:
    "torch"   plain PyTorch: cuBLAS or oneDNN for every product.
    "torch_fp32"  the same with products in fp32, block by block, for 16-bit tensors on a CPU without 16-bit
              matrix instructions.
    "triton"  shrink; base GEMM with the expand in its accumulator.
    "cublas"  shrink and expand as Triton kernels, the base GEMM by cuBLAS into the expand's output.
    "decode"  at most 16 tokens: two launches with K split over programs, for up to four projections of one x.
and over a quantized weight:
    "fused_4bit"  "triton", the weight decoded inside the GEMM: forward and backward.
    "decode_4bit"  "decode", likewise.
    "dequantize:PATH"  the weight written out dense by one launch, then PATH.

Paths of `grouped_lora_linear`, over a stack of experts:
    "torch", "torch_fp32"  an expert after the other.
    "grouped_mm:torch"  the frozen products of all experts by torch's grouped_mm, the low-rank ones as on "torch".
    "triton"  a table of the experts' tiles; shrink; the base GEMMs of all experts, each with its expand, in one launch.

Paths of `ia3_linear`: "torch" and "torch_fp32" as above;
    "cublas"  cuBLAS for the products; one elementwise kernel scales, in backward with the column sums of dl on the way.
    "triton"  the product beside the scaling as a GEMM with an epilogue: z and y = z * l stored together in forward, or
              for a feed-forward layer dX = (dY W) * l with dl's sums in backward. The other product is as on "cublas".
              On Hopper the GEMM's programs are persistent, and it is taken where there are large tiles enough.
and "dequantize:PATH" over a quantized weight.

`dora_linear` takes the paths of `lora_linear` for its products, between a pass over the weight for its norms and one
that scales the output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftkern.backend import DeviceInfo
from peftkern_kernels.gemm_tables_4bit import fused_4bit_fits
from peftkern_kernels.launch import MOST_PROJECTIONS, cdiv

DECODE_TOKENS = 16
# Multiply-adds up to which a scalar loop over 16-bit numbers beats the casts around fp32 products: about 100 us of
# casts and allocations against 0.15 to 1 multiply-add a nanosecond.
SMALL_PRODUCT = 2**14
# On an H200 the GEMM with the expand inside took less time than cuBLAS on top of the expand's output, with dropout too;
# but it wants a tile of 128 x 256 for most of the multiprocessors.
HOPPER = "bench/results/nvidia-h200/headline.json"
HOPPER_TILES = 99
HOPPER_MANY = "bench/results/nvidia-h200/many-train.json"
FOLDED = "expand inside the base GEMM's accumulator, y written once"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """A path and the reason for it, in words."""

    path: str
    reason: str


def _why_plain(
    operation: str, size: int, dtype: torch.dtype, device: DeviceInfo, backend: str, empty: str = "empty input"
) -> str:
    """Why an operation on `size` rows or elements takes plain PyTorch; "" where kernels run.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    if backend in ("torch", "unfused"):
        return f"use_backend('{backend}')"
    if size == 0:
        return empty
    why_not = device.triton
    if not why_not and dtype not in KERNEL_DTYPES:
        why_not = f"no kernel for {str(dtype).removeprefix('torch.')}"
    if why_not and backend == "triton":
        raise RuntimeError(f"{operation}: use_backend('triton') is in force, but {why_not}")
    if not why_not and device.type == "cpu" and backend == "auto":
        return "on a CPU plain PyTorch is faster than Triton's interpreter"
    return why_not


def _plain(reason: str, dtype: torch.dtype, device: DeviceInfo, products: int) -> Plan:
    if dtype in device.scalar_matmul and products > SMALL_PRODUCT:
        name = str(dtype).removeprefix("torch.")
        return Plan("torch_fp32", f"{reason}; this CPU has no {name} matrix instructions: products in fp32 blocks")
    return Plan("torch", reason)


@functools.lru_cache(maxsize=4096)
def plan_lora_linear(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, device: DeviceInfo, aligned: bool = True, backend: str = "auto"
) -> Plan:
    """The path of `lora_linear`, forward and backward.

    Args:
        M, N, K, R: tokens, out_features, in_features, rank.
        dtype: of x and y.
        device: where the tensors are.
        aligned: whether rows of x and weight start on 16-byte boundaries.
        backend: "auto", "triton", "torch" or "unfused", see `peftkern.use_backend`.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    reason = _why_plain("lora_linear", M, dtype, device, backend)
    if reason:
        return _plain(reason, dtype, device, M * N * K)
    if M <= DECODE_TOKENS:
        return Plan("decode", f"{M} tokens: bound by reading the weight, K split over programs")
    if dtype == torch.float32 and device.arch:
        # Predicted: exact fp32 products run on FFMA, where cuBLAS's hand-scheduled kernels lead.
        return Plan("cublas", "fp32: cuBLAS for the base, Triton for the adapter (predicted)")
    if not aligned and M >= 512:
        # Predicted: without 16-byte rows Triton loses asynchronous copies; cuBLAS has kernels for it.
        return Plan("cublas", "rows of x or weight are not 16-byte aligned: cuBLAS for the base (predicted)")
    if device.arch == 90:
        if cdiv(M, 128) * cdiv(min(N, K), 256) < HOPPER_TILES:
            return Plan("cublas", f"fewer than {HOPPER_TILES} large tiles: cuBLAS for the base ({HOPPER})")
        return Plan("triton", f"{FOLDED} ({HOPPER})")
    return Plan("triton", f"{FOLDED} (predicted)")


APART = "apart"  # as a path: each projection is a call of its own


# Elements of x up to which, in eager plain PyTorch, tying projections together costs more than their fewer products
# save: on two cores about 100 us a group, forward and backward, against 3 ns an element at 512 x 512.
JOINED_ELEMENTS = 2**15
DECODE_PATHS = ("decode", "decode_4bit")


# Paths that projections of one x may take beside one another: they differ in how a base product is multiplied alone.
BESIDE = ("triton", "cublas")


def path_of_all(paths: Sequence[str]) -> str:
    """The path of projections that are computed together, from each one's: "triton", or "triton,cublas,cublas"."""
    return paths[0] if len(set(paths)) == 1 else ",".join(paths)


def path_of_each(path: str, count: int) -> list[str]:
    """The inverse of `path_of_all` for `count` projections."""
    each = path.split(",")
    return each * count if len(each) == 1 else each


def plan_shared(plans: Sequence[Plan], elements: int | None, unlike: str = "") -> Plan:
    """The path of `lora_linear_shared`, from those that its projections would take by themselves: that of all
    (`path_of_all`) if its launches can be shared, else `APART`.

    Args:
        plans: of each projection.
        elements: of x; None where operators are called, one of which costs less than several however few there are.
        unlike: what keeps them from one launch on the decode paths, in words; "" for nothing.
    """
    paths = sorted({plan.path for plan in plans})
    if len(paths) > 1:
        ends = [path.rpartition(":") for path in paths]
        if any(end not in BESIDE for _, _, end in ends) or len({how for how, _, _ in ends}) > 1:
            return Plan(APART, f"the projections take different paths: {', '.join(paths)}")
        reason = f"each projection's base product by itself ({', '.join(plan.path for plan in plans)})"
        path = path_of_all([plan.path for plan in plans])
        return Plan(path, f"{reason}; one shrink, one dX and one dA of {len(plans)} projections")
    (path,) = paths
    if path in DECODE_PATHS:
        if len(plans) > MOST_PROJECTIONS:
            unlike = f"{len(plans)} are more than the {MOST_PROJECTIONS} that a launch takes"
        if unlike:
            return Plan(APART, f"{plans[0].reason}; two launches a projection: {unlike}")
        return Plan(path, f"{plans[0].reason}; two launches for {len(plans)} projections, one dX and one dA")
    if path.endswith("torch_fp32"):
        return Plan(APART, f"{plans[0].reason}; x is widened block by block for each projection")
    if elements is not None and elements <= JOINED_ELEMENTS and path.endswith("torch"):
        return Plan(APART, f"{plans[0].reason}; x so small that tying projections together costs more than it saves")
    return Plan(path, f"{plans[0].reason}; one shrink, one dX and one dA of {len(plans)} projections")


# Tokens up to which many adapters' parts are two launches of small programs, K split between them (predicted): what
# the kernels allow.
MULTI_DECODE_TOKENS = 64

# Tokens up to which decoding a 4-bit weight inside the GEMM beats writing it out first (predicted). Decoding repeats
# for each tile of rows, about 10 instructions an element, against 4.5 bytes an element written and read once: a card
# with little bandwidth for its arithmetic fuses longer.
FUSED_4BIT_TOKENS = {80: 512, 86: 1024, 89: 1024, 90: 256, 100: 256, 120: 1024, 942: 256, 1100: 512}
FUSED_4BIT_TOKENS_ELSEWHERE = 256


@functools.lru_cache(maxsize=4096)
def plan_lora_linear_quantized(
    M: int,
    N: int,
    K: int,
    R: int,
    blocksize: int,
    dtype: torch.dtype,
    device: DeviceInfo,
    aligned: bool = True,
    backend: str = "auto",
) -> Plan:
    """The path of `lora_linear` over a quantized weight, forward and backward.

    Args:
        M, N, K, R, dtype, device, backend: as for `plan_lora_linear`.
        blocksize: elements that share a scale in the 4-bit format; 0 for the 8-bit one.
        aligned: whether rows of x start on 16-byte boundaries.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    rows_aligned = aligned and K * dtype.itemsize % 16 == 0
    # Without its cache, which torch.compile cannot trace: this function has one.
    dense = plan_lora_linear.__wrapped__(M, N, K, R, dtype, device, rows_aligned, backend)
    if dense.path in ("torch", "torch_fp32"):
        return Plan(f"dequantize:{dense.path}", f"{dense.reason}; the weight is written out dense for each product")
    if not blocksize:
        return Plan(f"dequantize:{dense.path}", f"8-bit weight written out dense for each product; {dense.reason}")
    unfit = fused_4bit_fits(N, K, blocksize, dtype)
    if unfit:
        return Plan(f"dequantize:{dense.path}", f"{unfit}: the weight is written out by one launch; {dense.reason}")
    if M <= DECODE_TOKENS:
        return Plan("decode_4bit", f"{M} tokens: bound by reading the 4-bit weight, K split over programs")
    most = FUSED_4BIT_TOKENS.get(device.arch, FUSED_4BIT_TOKENS_ELSEWHERE)
    if most >= M:
        return Plan("fused_4bit", f"at most {most} tokens: decoded inside the GEMM (predicted)")
    return Plan(f"dequantize:{dense.path}", f"more than {most} tokens: written out by one launch; {dense.reason}")


@functools.lru_cache(maxsize=4096)
def plan_multi_lora_linear(
    M: int,
    N: int,
    K: int,
    R: int,
    blocksize: int | None,
    dtype: torch.dtype,
    device: DeviceInfo,
    aligned: bool = True,
    backend: str = "auto",
) -> Plan:
    """The path of `multi_lora_linear`, forward and backward.

    Args:
        M, N, K, dtype, device, aligned, backend: as for `plan_lora_linear`.
        R: the largest rank that there is room for.
        blocksize: None over a dense weight; over a quantized one as for `plan_lora_linear_quantized`.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    rows_aligned = aligned and (blocksize is None or K * dtype.itemsize % 16 == 0)
    dense = plan_lora_linear.__wrapped__(M, N, K, R, dtype, device, rows_aligned, backend)
    if dense.path in ("torch", "torch_fp32"):
        where = "" if device.type == "cpu" else ", ids read on the host"
        reason = f"{dense.reason}; rows grouped by adapter, batched products{where}"
        if blocksize is None:
            return Plan(dense.path, reason)
        return Plan(f"dequantize:{dense.path}", f"{reason}; the weight is written out dense for each product")
    path, reason = dense.path, f"{dense.reason}; rows grouped by adapter"
    if path == "triton" and device.arch == 90:
        path, reason = "cublas", f"rows grouped by adapter, the base by cuBLAS on top ({HOPPER_MANY})"
    if M <= MULTI_DECODE_TOKENS:
        path, reason = "decode", f"{M} tokens: the adapters, and the base of at most {DECODE_TOKENS}, in two launches"
    if blocksize is None:
        return Plan(path, reason)
    unfit = "8-bit weight" if not blocksize else fused_4bit_fits(N, K, blocksize, dtype)
    most = FUSED_4BIT_TOKENS.get(device.arch, FUSED_4BIT_TOKENS_ELSEWHERE)
    if unfit or most < M:
        return Plan(f"dequantize:{path}", f"{unfit or f'more than {most} tokens'}: written out by one launch; {reason}")
    if M <= DECODE_TOKENS:
        return Plan("decode_4bit", f"{M} tokens: bound by reading the 4-bit weight, base and adapters in two launches")
    return Plan("fused_4bit", f"at most {most} tokens: decoded inside the GEMM, rows grouped by adapter (predicted)")


@functools.lru_cache(maxsize=4096)
def plan_multi_lora_linear_shared(plans: tuple[Plan, ...], unlike: str = "") -> Plan:
    """Whether the projections of `multi_lora_linear_shared` share their work: the path of all, or `APART`.

    Args:
        plans: what `plan_multi_lora_linear` says of each projection.
        unlike: what keeps them apart beside that, in words; "" for nothing.
    """
    paths = dict.fromkeys(plan.path for plan in plans)
    if not unlike and len(plans) == 1:
        unlike = "there is but one"
    if not unlike and len(paths) > 1:
        unlike = f"their paths differ ({', '.join(paths)})"
    if unlike:
        return Plan(APART, f"each projection by itself: {unlike}")
    path, reason = plans[0].path, plans[0].reason
    if path.rpartition(":")[2] in ("torch", "torch_fp32"):
        shared = "x's rows taken and masked once"
    elif path.rpartition(":")[2] in DECODE_PATHS:
        shared = "the two launches of all are two"
    else:
        shared = "one shrink"
    return Plan(path, f"{len(plans)} projections of one x: {shared}, one dX; {reason}")


@functools.lru_cache(maxsize=4096)
def plan_grouped_lora_linear(
    T: int, N: int, K: int, dtype: torch.dtype, device: DeviceInfo, aligned: bool = True, backend: str = "auto"
) -> Plan:
    """The path of `grouped_lora_linear`, forward and backward.

    Args:
        T, N, K: rows of all experts, out_features, in_features.
        dtype, device, backend: as for `plan_lora_linear`.
        aligned: whether rows of x, of each expert's weight and of y are contiguous and start on 16-byte boundaries.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    reason = _why_plain("grouped_lora_linear", T, dtype, device, backend)
    if not reason and dtype == torch.float32 and backend == "auto" and device.arch:
        reason = "fp32: cuBLAS has the faster exact products (predicted)"
    if not reason:
        return Plan("triton", "all experts in one GEMM with the expand in its accumulator, y written once (predicted)")
    if device.type == "cuda" and T:
        # torch's own kernel; for other dtypes it is a loop as ours, and so it is on older cards.
        if dtype == torch.bfloat16 and 80 <= device.arch < 900 and aligned:
            return Plan("grouped_mm:torch", f"{reason}; frozen experts by grouped_mm, offsets read on the host")
        return Plan("torch", f"{reason}; an expert after the other, offsets read on the host")
    plan = _plain(reason, dtype, device, T * N * K)
    return Plan(plan.path, f"{plan.reason}; an expert after the other")


@functools.lru_cache(maxsize=1024)
def plan_lora_embedding(tokens: int, dtype: torch.dtype, device: DeviceInfo, backend: str = "auto") -> Plan:
    """The path of `lora_embedding`: "triton" (gather and expand in one kernel, sorted scatter) or "torch".

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    reason = _why_plain("lora_embedding", tokens, dtype, device, backend)
    if reason:
        return Plan("torch", reason)
    return Plan("triton", "rows gathered and adapted in one kernel, sorted scatter in backward (predicted)")


@functools.lru_cache(maxsize=1024)
def plan_dequantize(numel: int, dtype: torch.dtype, device: DeviceInfo, backend: str = "auto") -> Plan:
    """The path of `dequantize_4bit` to `numel` elements of `dtype`: "triton" (one launch) or "torch".

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    reason = _why_plain("dequantize_4bit", numel, dtype, device, backend, "empty weight")
    if reason:
        return Plan("torch", reason)
    return Plan("triton", "one launch, scales worked out on the way (predicted)")


# Rows from which a Triton GEMM with IA3's epilogue fills a device (predicted); on Hopper tiles are counted.
IA3_GEMM_TOKENS = 512
_IA3_FOLDED = {
    False: "y is scaled in the epilogue of the base GEMM",
    True: "dX is scaled and dl summed in the epilogue of the dX GEMM",
}


@functools.lru_cache(maxsize=4096)
def plan_ia3_linear(
    M: int,
    N: int,
    K: int,
    is_feedforward: bool,
    gathers: bool,
    quantized: bool,
    dtype: torch.dtype,
    device: DeviceInfo,
    aligned: bool = True,
    backend: str = "auto",
) -> Plan:
    """The path of `ia3_linear` and `multi_ia3_linear`, forward and backward.

    Args:
        M, N, K: tokens, out_features, in_features.
        is_feedforward: whether x is scaled rather than the output.
        gathers: whether each row has a vector of its own.
        quantized: whether the weight has to be made dense first.
        dtype, device, backend: as for `plan_lora_linear`.
        aligned: whether rows of x, weight and y start at multiples of 16 elements.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    plan = _plan_ia3_dense(M, N, K, is_feedforward, gathers, dtype, device, aligned, backend)
    if quantized:
        return Plan(f"dequantize:{plan.path}", f"the weight is written out dense for each product; {plan.reason}")
    return plan


def _plan_ia3_dense(
    M: int,
    N: int,
    K: int,
    is_feedforward: bool,
    gathers: bool,
    dtype: torch.dtype,
    device: DeviceInfo,
    aligned: bool,
    backend: str,
) -> Plan:
    reason = _why_plain("ia3_linear", M, dtype, device, backend)
    if reason:
        return _plain(reason, dtype, device, M * N * K)
    if gathers:
        return Plan("cublas", "a vector for each row: cuBLAS for the base, Triton for the scaling")
    if dtype == torch.float32:
        return Plan("cublas", "fp32: cuBLAS for the base, Triton for the scaling (predicted)")
    if not aligned:
        return Plan(
            "cublas", "rows are no multiples of 16 elements: cuBLAS for the base, Triton for the scaling (predicted)"
        )
    if device.arch == 90:
        if M // 128 * cdiv(K if is_feedforward else N, 256) < HOPPER_TILES:
            few = f"fewer than {HOPPER_TILES} large tiles with all their rows"
            return Plan("cublas", f"{few}: cuBLAS for the base, Triton scales (predicted)")
        return Plan("triton", f"{_IA3_FOLDED[is_feedforward]} (predicted)")
    if M < IA3_GEMM_TOKENS:
        return Plan("cublas", f"fewer than {IA3_GEMM_TOKENS} tokens: cuBLAS splits K, Triton scales (predicted)")
    if is_feedforward:
        return Plan("triton", f"{_IA3_FOLDED[True]} (predicted)")
    return Plan("cublas", "cuBLAS for the base, one Triton pass scales (predicted)")


_DORA = "one pass over the weight for its norms, one scales the output"


@functools.lru_cache(maxsize=4096)
def plan_dora_linear(
    M: int,
    N: int,
    K: int,
    R: int,
    blocksize: int | None,
    decodes: bool,
    dtype: torch.dtype,
    device: DeviceInfo,
    aligned: bool = True,
    backend: str = "auto",
) -> Plan:
    """The path of `dora_linear`, forward and backward.

    Args:
        M, N, K, R, dtype, device, aligned, backend: as for `plan_lora_linear`.
        blocksize: None over a dense weight; over a quantized one as for `plan_lora_linear_quantized`.
        decodes: whether a quantized weight need not be dense but for its products: its norms are known, nothing drops.

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    rows_aligned = aligned and (blocksize is None or K * dtype.itemsize % 16 == 0)
    dense = plan_lora_linear.__wrapped__(M, N, K, R, dtype, device, rows_aligned, backend)
    if blocksize is None:
        return Plan(dense.path, f"{dense.reason}; {_DORA}")
    if decodes:
        known = plan_lora_linear_quantized.__wrapped__(M, N, K, R, blocksize, dtype, device, aligned, backend)
        return Plan(known.path, f"{known.reason}; norms given, one pass scales the output")
    return Plan(
        f"dequantize:{dense.path}", f"written out dense for its norms and its products; {dense.reason}; {_DORA}"
    )


@functools.lru_cache(maxsize=1024)
def plan_dora_norm(numel: int, dtype: torch.dtype, device: DeviceInfo, backend: str = "auto") -> Plan:
    """The path of `dora_norm` over a weight of `numel` elements: "triton" (one pass) or "torch" (blocks of rows).

    Raises:
        RuntimeError: if `backend` is "triton" and Triton kernels cannot run.
    """
    reason = _why_plain("dora_norm", numel, dtype, device, backend, "empty weight")
    if reason:
        return Plan("torch", reason)
    return Plan("triton", "one pass over the weight, V only ever a tile (predicted)")
