"""The arithmetic of bitsandbytes' formats in plain PyTorch, on any device; formulas: `peftkern.weights`.

Everything is done in chunks of whole blocks through a few reused buffers, so that what is held beside operands and
results does not grow with the weight. Blocks do not know of chunks, hence chunks change no bits.

Tables: NF4's values are those of Dettmers et al. 2023 (arXiv:2305.14314, appendix E), FP4's those of a sign, two bits
of exponent and one of mantissa as bitsandbytes assigns them, over their largest; the dynamic 8-bit map is that of
Dettmers 2015 (arXiv:1511.04561) and Dettmers et al. 2021 (arXiv:2110.02861).
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.weights import NESTED_BLOCKSIZE

# Elements at a time, multiples of the largest blocksize. On a CPU buffers of this size stay in the second-level cache,
# and torch keeps operations below 2^15 elements on one thread: to wake the others several times a chunk gains little,
# and costs a hundred times the work where a core is busy. Elsewhere the buffers come to tens of MB, and launches are
# too few to matter.
CPU_CHUNK = 7 * 4096
CHUNK = 2**21
# bitsandbytes takes a block's reciprocal of at least this, and stores it for a last block that is cut short.
_SMALLEST = 1e-38

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# By the low three bits of a code; its high bit is the sign. Not in order, and the zero of each sign is +0.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(sign * m / 12.0 + 0.0 for sign in (1.0, -1.0) for m in _FP4_MAGNITUDES)


def code_4bit(quant_type: str) -> torch.Tensor:
    """float32 [16] on the CPU: the value of each code of "nf4" or "fp4"."""
    return torch.tensor(_NF4 if quant_type == "nf4" else _FP4, dtype=torch.float32, device="cpu")


def code_8bit() -> torch.Tensor:
    """float32 [256] on the CPU, ascending: the dynamic map, in which double quantization writes scales.

    Seven decades below 1, the e-th (from 10^-6) split into 2^e equal parts whose midpoints are values, of both signs;
    and 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for e in range(7):
        edges = torch.linspace(0.1, 1.0, 2**e + 1, dtype=torch.float32, device="cpu")
        midpoints = 10.0 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [midpoints, -midpoints]
    return torch.cat(values).sort().values


def chunk_size(device: torch.device) -> int:
    """Elements that one pass over the buffers handles."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


# -- quantize -----------------------------------------------------------------------------------------------------


def _flat(w: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of w [N, K] in row-major order, any strides; copies at most the rows that they lie in."""
    if w.is_contiguous():
        return w.view(-1)[start:stop]
    K = w.shape[1]
    first, last = start // K, (stop - 1) // K
    if first == last:
        return w[first, start - first * K : stop - first * K]
    return w[first : last + 1].reshape(-1)[start - first * K : stop - first * K]


def _scale_to_one(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> None:
    """Divide each block of float32 `values` by its largest magnitude, which is written to `absmax`, in place.

    A whole block is multiplied by the reciprocal and a last, short one is divided, as bitsandbytes does.
    """
    whole = values.numel() // blocksize
    if whole:
        blocks, peaks = values[: whole * blocksize].view(whole, blocksize), absmax[:whole]
        torch.amax(blocks.abs(), dim=1, out=peaks)
        blocks.mul_(peaks.clamp(min=_SMALLEST).reciprocal_().unsqueeze(1))
    if whole * blocksize < values.numel():
        rest = values[whole * blocksize :]
        peak = rest.abs().amax().clamp_(min=_SMALLEST)
        absmax[whole] = peak
        rest.div_(peak)


def quantize_4bit(w: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K], any strides -> packed uint8 [ceil(N K / 2)], absmax float32 [ceil(N K / blocksize)]."""
    numel, device = w.numel(), w.device
    chunk = min(chunk_size(device), -(-numel // blocksize) * blocksize)
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    code = code_4bit(quant_type)
    rank = code.argsort(stable=True)
    bounds = ((code[rank[:-1]] + code[rank[1:]]) / 2).tolist()
    # A byte of two ranks among the sorted values -> a byte of two codes.
    bytes_of_codes = ((rank << 4)[:, None] | rank[None, :]).to(torch.uint8).view(-1).to(device)

    buffer = torch.empty(chunk, dtype=torch.float32, device=device)
    ranks, above = torch.empty_like(buffer), torch.empty_like(buffer)
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        values = buffer[: stop - start]
        values.copy_(_flat(w, start, stop))
        _scale_to_one(values, absmax[start // blocksize :], blocksize)
        even = -(-(stop - start) // 2) * 2
        buffer[stop - start : even] = 0.0  # the second code of an odd last byte stands for zero
        # The rank is how many midpoints lie below: 15 passes of vector code, several times faster than a binary
        # search for each element.
        ranks.zero_()
        for bound in bounds:
            ranks.add_(torch.gt(buffer, bound, out=above))
        pairs = ranks[:even].to(torch.uint8)
        ranks_packed = (pairs[::2] << 4) | pairs[1::2]
        out = packed[start // 2 : (start + even) // 2]
        torch.index_select(bytes_of_codes, 0, ranks_packed.to(torch.int32), out=out)
    return packed, absmax


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: float32 [blocks] -> uint8 [blocks], float32 [ceil(blocks / 256)], float32 [256], offset."""
    offset = absmax.mean()
    code = code_8bit().to(absmax.device)
    scaled = absmax - offset
    nested_absmax = torch.empty(-(-absmax.numel() // NESTED_BLOCKSIZE), dtype=torch.float32, device=absmax.device)
    _scale_to_one(scaled, nested_absmax, NESTED_BLOCKSIZE)
    ranks = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    return ranks.to(torch.uint8), nested_absmax, code, offset


def quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K], any strides -> data int8 [N, K], scale float32 [N]."""
    data = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    rows = max(1, chunk_size(w.device) // w.shape[1])
    for part, data_part, scale_part in zip(w.split(rows), data.split(rows), scale.split(rows), strict=True):
        values = part.float()
        torch.amax(values.abs(), dim=1, out=scale_part)
        # The limit keeps a row of zeros (or of numbers below 1e-36) from 0 * infinity.
        factor = (scale_part.reciprocal() * 127.0).clamp_(max=torch.finfo(torch.float32).max)
        data_part.copy_((values * factor.unsqueeze(1)).round_())
    return data, scale


# -- dequantize ---------------------------------------------------------------------------------------------------


def block_scales(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [blocks]: absmax itself, or `fl(fl(nested_code[absmax] * nested_absmax) + offset)` written anew."""
    absmax = absmax.view(-1)
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    nested_absmax, nested_code, offset = nested_absmax.view(-1), nested_code.view(-1), offset.view(())
    blocks = absmax.numel()
    scales = torch.empty(blocks, dtype=torch.float32, device=absmax.device)
    chunk = chunk_size(absmax.device)
    for start in range(0, blocks, chunk):
        part = scales[start : start + chunk]
        torch.index_select(nested_code, 0, absmax[start : start + chunk].to(torch.int32), out=part)
        _multiply_blocks(part, nested_absmax[start // NESTED_BLOCKSIZE :], NESTED_BLOCKSIZE, part)
        part.add_(offset)
    return scales


def _multiply_blocks(values: torch.Tensor, scales: torch.Tensor, blocksize: int, out: torch.Tensor) -> None:
    """`out = values * scales`, a scale a block; the last block may be short. All float32."""
    whole = values.numel() // blocksize
    if whole:
        shape = (whole, blocksize)
        blocks = values[: whole * blocksize].view(shape)
        torch.mul(blocks, scales[:whole].unsqueeze(1), out=out[: whole * blocksize].view(shape))
    if whole * blocksize < values.numel():
        torch.mul(values[whole * blocksize :], scales[whole], out=out[whole * blocksize :])


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    """Write the weight to `out` [N, K], contiguous. Operands are contiguous, their shapes do not matter.

    A byte is looked up at once, as one 64-bit element of a table of all 256 pairs of values.
    """
    packed, code = packed.view(-1), code.view(-1)
    numel, device = out.numel(), out.device
    chunk = min(chunk_size(device), -(-numel // blocksize) * blocksize)
    scales = block_scales(absmax, nested_absmax, nested_code, offset)
    high, low = code.unsqueeze(1).expand(16, 16), code.expand(16, 16)
    table = torch.stack((high, low), dim=2).view(256, 2).view(torch.int64).view(256)
    index = torch.empty(chunk // 2, dtype=torch.int32, device=device)
    pairs = torch.empty(chunk // 2, dtype=torch.int64, device=device)
    blocks = pairs.view(torch.float32).view(-1, blocksize)
    flat, in_fp32 = out.view(-1), out.dtype == torch.float32

    # Views of whole chunks are made by three calls for all of them: one by one they would cost as much as the work.
    whole = numel // chunk
    end, per_chunk = whole * chunk, chunk // blocksize
    parts = zip(
        packed[: end // 2].view(whole, chunk // 2).unbind(),
        scales[: whole * per_chunk].view(whole, per_chunk, 1).unbind(),
        flat[:end].view(whole, per_chunk, blocksize).unbind(),
        strict=True,
    )
    for codes, scale, target in parts:
        index.copy_(codes)
        torch.index_select(table, 0, index, out=pairs)
        torch.mul(blocks, scale, out=target if in_fp32 else blocks)
        if not in_fp32:
            target.copy_(blocks)
    if end < numel:
        rest = (numel - end + 1) // 2
        torch.index_select(table, 0, packed[end // 2 :].to(torch.int32), out=pairs[:rest])
        values = blocks.view(-1)[: numel - end]
        _multiply_blocks(values, scales[whole * per_chunk :], blocksize, values)
        flat[end:].copy_(values)


def dequantize_8bit(data: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write `round(data * fl(scale * fl(1 / 127)))` to `out` [N, K], contiguous."""
    step = scale.view(-1, 1) * (1.0 / 127.0)
    if out.device.type != "cpu":  # one fused launch; on a CPU the same call makes float32 copies of everything
        torch.mul(data, step, out=out)
        return
    rows = max(1, CPU_CHUNK // data.shape[1])
    buffer: Any = None
    if out.dtype != torch.float32:
        buffer = torch.empty(rows, data.shape[1], dtype=torch.float32, device=out.device)
    for start in range(0, data.shape[0], rows):
        target = out[start : start + rows]
        values = target if buffer is None else buffer[: target.shape[0]]
        values.copy_(data[start : start + rows])
        values.mul_(step[start : start + rows])
        if buffer is not None:
            target.copy_(values)
