"""A quantized weight made dense for as long as a product takes, whole or, where it is large, block by block.

For products that torch takes one by one. Where kernels are launched as a list, the launches that write a weight out
stand in the list (_weight_calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peftkern.ops._common import PLAIN_PATHS
from peftkern.ops.quantize import dequantize_8bit, write_4bit
from peftkern.weights import Weight4bit, Weight8bit, row_blocks

Quantized = Weight4bit | Weight8bit
# A dequantized weight larger than this is made and used in blocks of rows that take turns in one buffer. The largest
# linear layer of an 8B Llama takes 117 MB in 16 bits, that of a 70B one 470 MB.
BUFFER_BYTES = 2**28


def blocks_of(weight: Quantized, dtype: torch.dtype) -> list[slice]:
    """The rows [N] in blocks that fit the buffer in `dtype`; the first is the largest."""
    return row_blocks(weight, BUFFER_BYTES // (weight.shape[1] * dtype.itemsize))


def dense_blocks(weight: Quantized, dtype: torch.dtype, dense_path: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of W, the same rows dense); blocks take turns in one buffer, so each is used before the next is made."""
    blocks = blocks_of(weight, dtype)
    buffer = torch.empty(blocks[0].stop, weight.shape[1], dtype=dtype, device=weight.device)
    for rows in blocks:
        out = buffer[: rows.stop - rows.start]
        _write_dense(weight if len(blocks) == 1 else weight.rows(rows), dense_path, out)
        yield rows, out


def _write_dense(weight: Quantized, dense_path: str, out: torch.Tensor) -> None:
    # By the path that forward took: the setting that chose it may not be seen by the thread that runs backward.
    if isinstance(weight, Weight4bit):
        write: Any = write_4bit
        write(*weight.tensors(), weight.blocksize, "torch" if dense_path in PLAIN_PATHS else "triton", out)
    else:
        dequantize_8bit(weight, out=out)
