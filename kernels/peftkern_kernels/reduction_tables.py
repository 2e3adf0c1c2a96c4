"""Launch parameters of the reduction kernels (shrink, dY pass, weight gradient, plane sums) as pure functions.

Keyed by (architecture, dtype, size bucket, R bucket, aligned, dropout), with a default that is right everywhere. Every
row without a source is predicted: chosen by counting bytes, registers and shared memory on compiled kernels, not timed.

Shared memory that one program may use: 101,376 bytes on sm_86, 89 and 120, 166,912 on sm_80, 232,448 on sm_90 and 100,
65,536 on AMD; the tiles stay below it with every supported rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import cdiv, is_aligned

# (multiprocessors or compute units, bytes that memory moves in a microsecond) of the largest common device of each
# architecture; 0 is the interpreter, and an architecture that is not listed counts as the last row.
DEVICES = {
    0: (4, 1_000_000),
    80: (108, 2_000_000),
    86: (84, 900_000),
    89: (128, 1_000_000),
    90: (132, 4_000_000),
    100: (148, 8_000_000),
    120: (170, 1_800_000),
    942: (304, 5_000_000),
    1100: (96, 900_000),
}
OTHER_DEVICE = (128, 1_000_000)
MAX_SPLITS = 64
LAUNCH_US = 2  # what a second, dependent launch costs
# How far a multiprocessor can exceed its even share of the memory's bandwidth while others are idle; on sm_90 measured.
REACH, HOPPER_REACH = 1.25, 1.1


MEASURED = "bench/results/nvidia-h200/tune.json, tune-dropout.json"


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's tile: BLOCK_M rows (tokens) by BLOCK_C columns (of K or N) by BLOCK_R of the rank.

    `source` names the result file in which the row was measured, or says predicted.
    """

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int
    source: str = "predicted"


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def vectorizes(t: torch.Tensor) -> bool:
    """Whether Triton can load t's rows in 16-byte asynchronous copies: it knows multiples of 16 elements only."""
    return is_aligned(t) and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0


def by_elements(*factors: torch.Tensor) -> bool:
    """Whether Triton can load one of the thin matrices by single elements only, whichever way it lies.

    So it is where the rank is no multiple of 16: each element has an address of its own, and above 16 ranks (the least
    block) a mask as well, in registers.
    """
    return not all(vectorizes(t) or vectorizes(t.t()) for t in factors)


def rank_block(R: int, most: int) -> int:
    """Block along R: a power of two, at least 16 (tensor cores' smallest), at most `most`."""
    return min(most, max(16, next_power_of_2(R)))


def best_splits(*, blocks: int, steps: int, arch: int, operand_bytes: int, plane_bytes: int) -> int:
    """Into how many parts to cut a reduction of `steps` tiles, where `blocks` programs exist without cutting.

    The cost of s parts is counted in bytes of traffic: the operands, more if the busiest multiprocessor has so much of
    them that it cannot keep up (`REACH`), plus, if s > 1, the fp32 planes written and read and one more launch. The
    cheapest s wins.

    Args:
        blocks: programs when nothing is cut.
        steps: tiles along the reduced axis.
        arch: architecture number, a key of `DEVICES`.
        operand_bytes: bytes that are read whatever s is.
        plane_bytes: bytes of one partial plane.
    """
    processors, bytes_per_us = DEVICES.get(arch, OTHER_DEVICE)

    def cost(s: int) -> float:
        busiest = cdiv(blocks * s, processors) * cdiv(steps, s) / (blocks * steps)  # share of the work
        planes = LAUNCH_US * bytes_per_us + 2 * s * plane_bytes if s > 1 else 0
        reach = HOPPER_REACH if arch == 90 else REACH
        return operand_bytes * max(1.0, busiest * processors / reach) + planes

    return min(range(1, min(steps, MAX_SPLITS) + 1), key=cost)


def shrink_tile(
    *, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool, scattered: bool = False
) -> Tile:
    """Tile of `S = scaling * drop(x) A^T`: bound by reading x, so whole rows of 256 bytes and three or more in flight.

    A is read again by every BLOCK_M rows (from the L2 cache), so wider ranks take taller tiles. `scattered`: A's loads
    are `by_elements`, as those of B's transpose in backward.
    """
    rows = 16 if M <= 16 else 32 if M <= 32 else 64
    if arch >= 900:  # AMD: 64 KiB of LDS, two stages; unaligned tiles take a scalar register pair for each load's mask
        if dtype == torch.float32 or not aligned:
            wide = aligned and not (arch == 1100 and dropout)
            return Tile(min(rows, 32), 32, rank_block(R, 64 if wide else 32), 4, 2 if aligned else 1)
        if arch == 1100:  # dropout's words, or more than 32 ranks of fp32 factors, take the registers of half the rows
            return Tile(min(rows, 32) if dropout or R > 32 else rows, 64, rank_block(R, 64), 4, 2)
        return Tile(rows, 64, rank_block(R, 128), 4, 2)
    if dtype == torch.float32:
        if not aligned:
            return Tile(min(rows, 32), 32, rank_block(R, 32), 8, 2)
        return Tile(rows, 32, rank_block(R, 64), 8 if rows == 64 else 4, 3)
    if not aligned:  # no asynchronous loads: the tile passes through registers
        return Tile(min(rows, 32), 64, rank_block(R, 64), 4, 2)
    roomy = arch in (80, 90, 100)
    if arch == 90 and R <= 32 and dropout:  # bound by drawing the mask: more programs on each multiprocessor
        return Tile(min(rows, 32), 256 if R <= 16 else 128, rank_block(R, 32), 4, 4, MEASURED)
    if R <= 32:
        return Tile(rows, 128, rank_block(R, 32), 4, 4 if roomy else 3)
    if arch == 90 and R <= 64:
        return Tile(rows, 64, 64, 4, 4) if scattered else Tile(rows, 128, 64, 4, 4, MEASURED)
    # 128 ranks, of fp32 or with a mask for each, are too many for 128 rows, and for four warps. So are they on sm_80
    # beside a dropout mask.
    crowded = R > 64 and (R % 16 != 0 or not roomy or (arch == 80 and dropout))
    if M > 64 and R > 32 and roomy and not crowded:
        rows = 128
    return Tile(rows, 64, rank_block(R, 128), 8 if rows == 128 or (rows == 64 and crowded) else 4, 4 if roomy else 3)


# Rows of which a shrink beside a GEMM is faster than before it: what fewer take was not measured, and the programs of
# more would not all be placed at once, so that the GEMM could not begin.
BESIDE_ROWS = range(4096, 32768 + 1)
BESIDE = "bench/results/nvidia-h200/overlap.json"


def fits_beside(rows: torch.Tensor, R: int, arch: int) -> bool:
    """Whether a shrink of these rows [M, K] to R ranks runs beside a persistent GEMM of the same rows."""
    if arch != 90 or rows.dtype.itemsize != 2 or not vectorizes(rows):
        return False
    return rows.shape[0] in BESIDE_ROWS and R % 16 == 0 and 0 < R <= 64


def shrink_beside_tile(R: int) -> Tile:
    """Tile of a shrink that runs beside a persistent GEMM: 256 rows a program, so that 32 of Hopper's multiprocessors
    read 8192 rows while the others are at the products already. Ranks between 16 and 64: predicted."""
    return Tile(256, 128, 16, 8, 3, BESIDE) if R == 16 else Tile(256, 64, 64, 8, 5, BESIDE)


def weight_gradient_tile(
    *, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool, scattered: bool = False
) -> Tile:
    """Tile of `dA = dS^T drop(x)` and `dB = dY^T S`: BLOCK_C columns of x or dY, walking down the rows.

    `scattered`: the loads of dS or S are `by_elements`.
    """
    rows = 16 if M <= 16 else 32 if M <= 32 else 64
    if arch >= 900:
        if not aligned:
            return Tile(16, 32 if dtype == torch.float32 else 64, rank_block(R, 32), 4, 1)
        if dtype == torch.float32:
            return Tile(16, 64, rank_block(R, 64), 4, 2)
        return Tile(min(rows, 32), 128, rank_block(R, 32 if arch == 1100 else 64), 4, 2)
    if dtype == torch.float32:
        return Tile(16, 64, rank_block(R, 64), 4, 3) if aligned else Tile(16, 32, rank_block(R, 32), 4, 2)
    if not aligned:
        return Tile(min(rows, 32), 128, rank_block(R, 64), 4 if R <= 32 else 8, 2)
    if arch == 90 and R <= 32 and dropout and rows == 64:
        return Tile(64, 128, rank_block(R, 32), 4, 4, MEASURED)
    narrow = R <= 32 or (R <= 64 and not scattered)
    if arch == 90 and narrow:
        return Tile(rows, 64 if R > 32 and dropout else 128, rank_block(R, 64), 4, 4, MEASURED)
    # Sums held in registers: 64 to 128 a thread. Hopper's and Blackwell's operands stay in shared memory meanwhile.
    few_warps = narrow if arch in (90, 100) else R <= 32
    return Tile(rows, 128, rank_block(R, 64 if scattered else 128), 4 if few_warps else 8, 3)


def dy_pass_tile(*, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, scattered: bool = False) -> Tile:
    """Tile of the one pass over dY that gives dS and dB (small R): rows x 256 or 512 columns held once, used twice.

    `scattered`: the loads of B or S are `by_elements`.
    """
    block_r = rank_block(R, 32)
    if arch >= 900:
        if dtype == torch.float32 or not aligned:
            return Tile(16, 32, rank_block(R, 16), 4, 2 if aligned else 1)
        return Tile(32, 64, rank_block(R, 16), 4, 2) if arch == 1100 else Tile(32, 128, block_r, 4, 2)
    if dtype == torch.float32:
        return Tile(16, 128, block_r, 8, 2)
    if not aligned:
        return Tile(32, 128, block_r, 8, 2)
    if arch == 90 and block_r == 16:
        return Tile(64, 512, 16, 8, 3, MEASURED) if M >= 2048 else Tile(64, 256, 16, 8, 4, MEASURED)
    if arch in (90, 100):  # one copy of the tile serves both products; Blackwell's masked rows take more registers
        return Tile(64, 256, block_r, 4 if arch == 90 and not scattered else 8, 3)
    if arch == 120 and scattered:
        block_r = 16
    return Tile(32, 256, block_r, 8, 3)  # two copies: 90 KB of shared memory


def dora_norm_tile(*, arch: int, dtype: torch.dtype, R: int, aligned: bool) -> Tile:
    """Tile of the row norms of W + scaling * B A: block_m rows of W by block_c of its columns, block_r of the rank.

    Bound by reading W; A is read again by every block of rows (from the L2 cache), so wider ranks take taller tiles.
    Up to 128 ranks are one step, and B's tile is held through the walk along K. Beside the loads' registers there are
    two fp32 numbers an element of the tile, the product and the sum of squares; an exact fp32 product holds its
    operands in registers too.
    """
    if arch == 0:
        return Tile(32, 32, rank_block(R, 16), 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32 if not aligned or arch >= 900 else 64, 16, 4, 2)
    if arch == 1100:
        return Tile(32, 64 if aligned else 32, rank_block(R, 32), 4, 2)
    if arch >= 900 or not aligned:
        return Tile(64, 64 if aligned else 32, rank_block(R, 64 if arch >= 900 else 32), 4, 2)
    roomy = arch in (80, 90, 100)
    if R <= 32:
        return Tile(64, 64, rank_block(R, 32), 4, 4 if roomy else 3)
    if R <= 64:
        return Tile(128, 64, 64, 8, 4 if roomy else 3)
    if R <= 128:
        return Tile(128, 64 if roomy else 32, 128, 8, 3)
    return Tile(64, 64, 64, 4, 2)


def embedding_tile(*, arch: int, dtype: torch.dtype, T: int, R: int) -> Tile:
    """Tile of the embedding's gather: BLOCK_M tokens by BLOCK_C columns of the table."""
    rows = 16 if T <= 2048 else 32
    if dtype == torch.float32 or arch >= 900:
        return Tile(16, 64, rank_block(R, 16 if arch >= 900 else 32), 4 if arch >= 900 else 8, 2)
    return Tile(rows, 128, rank_block(R, 64), 4, 2)
