"""Launch parameters of the kernels that walk the frozen weight: tile, warps, stages, split of K, by architecture.

`choose_tile` is a pure function of (architecture, dtype, shape, alignment). Its rows are literals, keyed by
(family, bits, aligned, size). SOURCE says where they come from: a result file under bench/results, or "predicted",
which means chosen from registers, spills and shared memory of the compiled kernel and from arithmetic, not timing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .launch import cdiv

SOURCE = "predicted, but for Hopper's medium tile: bench/results/nvidia-h200/tune.json"

# Streaming multiprocessors (AMD: compute units) of the architecture's usual part: how many programs fill it once.
MULTIPROCESSORS = {0: 4, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170, 942: 304, 1100: 96}

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, 942: 65536, 1100: 65536}


@dataclass(frozen=True, slots=True)
class Tile:
    """How a GEMM-shaped kernel is cut up.

    Attributes:
        block_m, block_n, block_k: the output tile and the step along the contraction.
        num_warps, num_stages: launch options.
        group_m: row tiles that are walked together, so that the weight's tile is found in L2.
        split_k: programs that share one output tile; above 1 their fp32 planes are summed by a second launch.
        tma: whether x and the weight are loaded through tensor descriptors.
        persistent: whether a program walks many tiles (lora_linear_persistent.py, ia3_gemm_persistent.py), if out is
            aligned as well.
        block_r: the widest step along the rank of an expand in the same launch.
        overlap: of a decode step, whether its second launch starts while the first runs (sm_90 and later). Not timed.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split_k: int = 1
    tma: bool = False
    persistent: bool = False
    block_r: int = 64
    overlap: bool = False


def _family(arch: int) -> str:
    """The table's name for an architecture; unknown ones take the nearest that asks for least."""
    if arch == 0:
        return "interpreter"
    if arch >= 900:
        return "cdna" if arch < 1000 else "rdna"
    if arch == 90 or 100 <= arch < 120:
        return {90: "hopper"}.get(arch, "blackwell")
    return "ampere" if arch == 80 else "consumer"


# (family, bits, aligned) -> tile by size: "large" fills the device with large tiles; "medium" is the rest above 64
# rows; "small" is up to 64 rows, "tiny" up to 16 (Hopper's and Blackwell's matrix instructions take 64 rows or more).
# Where they are there: "large kn" is for a weight stored as [K, N], which is backward's orientation; "odd out" takes
# the place of "medium" where the output is stored element by element; "one tile" and "one tile medium" are for programs
# that end with their tile, for what a persistent one cannot do (dropout of many ranks, unaligned rows); the latter also
# for an epilogue or an expand of single elements, beside which 4 warps have too few registers.
_TILES: dict[tuple[str, int, bool], dict[str, Tile]] = {
    ("hopper", 16, True): {
        "large": Tile(128, 256, 64, 8, 4, group_m=16, tma=True, persistent=True),
        "large kn": Tile(128, 256, 64, 8, 4, group_m=4, tma=True, persistent=True),
        "medium": Tile(128, 128, 64, 4, 3, tma=True),
        "one tile": Tile(128, 256, 64, 8, 4, group_m=16, tma=True),
        "one tile medium": Tile(128, 128, 64, 8, 4, tma=True),
        "small": Tile(64, 128, 64, 4, 4, tma=True),
        "tiny": Tile(64, 128, 64, 4, 4),
    },
    ("blackwell", 16, True): {
        "large": Tile(128, 256, 64, 8, 4, tma=True),
        "medium": Tile(128, 128, 64, 8, 4, tma=True),
        "small": Tile(64, 128, 64, 4, 4, tma=True),
        "tiny": Tile(64, 128, 64, 4, 4),
    },
    ("ampere", 16, True): {
        # 128 sums a thread, and HMMA's operands, are in registers: beside them 64 ranks of S and B are too many.
        "large": Tile(128, 256, 32, 8, 4, block_r=32),
        "medium": Tile(128, 128, 32, 8, 4),
        # With 64 sums a thread, the assembler works out the addresses of all 64 stores at once, and spills.
        "odd out": Tile(128, 128, 32, 4, 4, block_r=32),
        "small": Tile(64, 128, 64, 4, 4),
        "tiny": Tile(16, 128, 64, 4, 4),
    },
    ("consumer", 16, True): {
        "large": Tile(128, 128, 32, 8, 4),
        "medium": Tile(128, 64, 32, 4, 4),
        "small": Tile(64, 64, 32, 4, 4),
        "tiny": Tile(16, 64, 64, 4, 4),
    },
    ("cdna", 16, True): {
        "large": Tile(128, 128, 64, 4, 2),
        "medium": Tile(128, 64, 64, 4, 2),
        "small": Tile(64, 64, 64, 4, 2),
        "tiny": Tile(16, 64, 64, 4, 2),
    },
    ("rdna", 16, True): {
        "large": Tile(128, 64, 32, 8, 2),
        "medium": Tile(128, 64, 32, 4, 2),
        "small": Tile(64, 64, 32, 4, 2),
        "tiny": Tile(16, 64, 64, 4, 2),
    },
}
_UNALIGNED_16 = {
    "large": Tile(128, 64, 32, 8, 2),
    "medium": Tile(64, 128, 32, 4, 2),
    "small": Tile(64, 64, 32, 4, 2),
    "tiny": Tile(16, 64, 32, 4, 2),
}
# 64 x 128 with K split spills there under Triton 3.6.
_UNALIGNED_CONSUMER = {**_UNALIGNED_16, "medium": _UNALIGNED_16["small"]}
_UNALIGNED_64_ROWS = {**_UNALIGNED_16, "tiny": _UNALIGNED_16["small"]}
_FP32 = {
    "large": Tile(64, 32, 32, 4, 2),
    "medium": Tile(64, 32, 32, 4, 2),
    "small": Tile(64, 32, 32, 4, 2),
    "tiny": Tile(16, 64, 32, 4, 2),
}
# Exact products beside single-element loads take more registers there under Triton 3.6.
_FP32_RDNA = {**_FP32, **dict.fromkeys(("large", "medium", "small"), Tile(32, 32, 32, 4, 2))}
_INTERPRETER = {
    "large": Tile(64, 64, 64, 4, 1),
    "medium": Tile(64, 64, 64, 4, 1),
    "small": Tile(32, 64, 64, 4, 1),
    "tiny": Tile(16, 64, 64, 4, 1),
}


def _rows(arch: int, bits: int, aligned: bool) -> dict[str, Tile]:
    if arch == 0:
        return _INTERPRETER
    family = _family(arch)
    if bits != 16:
        return _FP32_RDNA if family == "rdna" else _FP32
    if not aligned:
        if family == "consumer":
            return _UNALIGNED_CONSUMER
        return _UNALIGNED_64_ROWS if family in ("hopper", "blackwell") else _UNALIGNED_16
    return _TILES[family, 16, True]


def has_persistent_tiles(arch: int, dtype: torch.dtype) -> bool:
    """Whether large GEMMs of aligned operands are persistent there, and so take S and dS through descriptors."""
    return any(tile.persistent for tile in _rows(arch, 16 if dtype.itemsize == 2 else 32, aligned=True).values())


def choose_tile(
    arch: int,
    dtype: torch.dtype,
    *,
    M: int,
    N: int,
    K: int,
    aligned: bool,
    weight_is_kn: bool = False,
    persistent: bool = True,
    out_aligned: bool = True,
    crowded: bool = False,
    singly: bool = False,
    epilogue: bool = False,
) -> Tile:
    """The tile of `out[M, N] = x[M, K] weight[N, K]^T`, with `split_k` set so that few rows still fill the device.

    Args:
        arch: 80, 86, 89, 90, 100, 120; 942, 1100; 0 for the interpreter.
        dtype: of x and weight.
        M, N, K: sizes.
        aligned: every row of both operands starts on a 16-byte boundary and one stride of each is 1.
        weight_is_kn: the weight's unit stride is along N.
        persistent: whether a persistent tile will do (S and `out` aligned, few ranks where there is dropout).
        out_aligned: rows of `out` can be stored 16 bytes at a time.
        crowded: beside the accumulator there is so much in registers that the largest tile would spill.
        singly: elements of S are loaded one by one beside a dropout mask, or those of the factor at more than 16 ranks.
        epilogue: more than a store follows the product, and needs the whole sum: K is not split.
    """
    rows = _rows(arch, 16 if dtype.itemsize == 2 else 32, aligned)
    processors = MULTIPROCESSORS.get(arch, 64)
    if (epilogue or not persistent) and "one tile" in rows:
        rows = {**rows, "medium": rows["one tile medium"]}
    if not persistent and "one tile" in rows:
        rows = {**rows, "large": rows["one tile"], "large kn": rows["one tile"]}
    large = rows.get("large kn", rows["large"]) if weight_is_kn else rows["large"]
    if M <= 16:
        tile = rows["tiny"]
    elif M <= 64:
        tile = rows["small"]
    elif cdiv(M, large.block_m) * cdiv(N, large.block_n) >= 0.75 * processors and not crowded:
        return large
    else:
        tile = rows["medium"] if out_aligned else rows.get("odd out", rows["medium"])
    if epilogue:
        return tile
    split = split_of_k(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), K, tile.block_k, processors)
    if singly and split == 1 and tile == rows["medium"]:  # the expand is in this launch
        tile = rows.get("one tile medium", tile)
    return replace(tile, split_k=split)


def split_of_k(tiles: int, K: int, block_k: int, processors: int, *, steps: int = 8) -> int:
    """Programs along K for one output tile: enough to fill the device once, each with at least `steps` steps of K.

    Powers of two up to 16 only, so that few variants of the second launch exist.
    """
    split = 1
    while split < 16 and tiles * split * 2 <= 1.25 * processors and K // (block_k * split * 2) >= steps:
        split *= 2
    return split


def choose_decode_tile(arch: int, dtype: torch.dtype, *, N: int, K: int, R: int, aligned: bool) -> Tile:
    """The tile of a decode step: `block_n` rows of the weight against 16 tokens, K split so that the device is full."""
    if arch == 0:
        tile = Tile(16, 64, 64, 4, 1)
    elif dtype.itemsize != 2 or not aligned:
        tile = Tile(16, 64, 32, 4, 2)
    elif arch >= 900:
        tile = Tile(16, 64, 64, 4, 2)
    elif arch == 90:  # bench/results/nvidia-h200/tune-decode.json
        tile = Tile(16, 64, 256, 8, 2)
    else:
        tile = Tile(16, 64, 64, 4, 4)
    # Two programs on each multiprocessor keep enough loads under way to reach the memory's bandwidth.
    programs = 2 * MULTIPROCESSORS.get(arch, 64)
    tiles = cdiv(N, tile.block_n) + cdiv(R, tile.block_n)
    return replace(tile, split_k=split_of_k(tiles, K, tile.block_k, programs, steps=4))


def rank_block(R: int, dtype: torch.dtype, *, narrow: bool = False) -> int:
    """The step along the rank: the next power of two from 16 (`tl.dot`'s least) to 64, or to 32 if `narrow`.

    Narrow where an expand has more in registers: a dropout mask, or fp32 factors beside a 128 x 256 accumulator. 16 for
    fp32 dots, whose operands are held in registers whole.
    """
    most = 16 if dtype.itemsize > 2 else 32 if narrow else 64
    return min(most, max(16, 1 << (R - 1).bit_length()))
