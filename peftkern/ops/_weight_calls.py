"""A frozen weight as a product's launches take it: what makes it ready stands in the list before them.

Kernels over 4 bits take it as it is stored, and so do those over a dense weight in the operands' dtype. Any other is
first written out in that dtype, into scratch memory: a dense one that autocast has cast, and on the paths
"dequantize:PATH" a quantized one, block by block where it is large (_dense_blocks.py). Weights of one list take turns
in that memory (`room_for`), so that no two are dense at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from peftkern.ops import _quantize_torch
from peftkern.ops._dense_blocks import blocks_of
from peftkern.weights import Weight4bit
from peftkern_kernels.dequantize_4bit import dequantize_4bit_calls
from peftkern_kernels.format_4bit import Packed4bit
from peftkern_kernels.launch import Call, TorchCall, nbytes, scratch

Calls = list[Call | TorchCall]
WRITTEN_OUT = "dequantize:"  # what the path of a quantized weight begins with that is written out dense


@dataclass(slots=True)
class Part:
    """Some rows of a frozen weight [N, K], or all.

    Attributes:
        rows: which.
        weight: these rows as the launches of `path` take them: dense, or a `Weight4bit`.
        path: without "dequantize:".
        calls: what writes them, to be run before the first launch that reads them and after the last that reads the
            part before.
    """

    rows: slice
    weight: Any
    path: str
    calls: Calls

    def of_rows(self, t: torch.Tensor | None) -> Any:
        """These rows of t [N, ...], which may be absent."""
        return t if t is None or self._are_all(t.shape[0]) else t[self.rows]

    def of_columns(self, t: torch.Tensor) -> torch.Tensor:
        """These columns of t [M, N]."""
        return t if self._are_all(t.shape[1]) else t[:, self.rows]

    def _are_all(self, N: int) -> bool:
        return self.rows.start == 0 and self.rows.stop == N


def is_whole_on(parts: Sequence[Part], *paths: str) -> bool:
    """Whether the launches of one of these paths take the weight whole."""
    return len(parts) == 1 and parts[0].path in paths


def packed(weight: Weight4bit) -> Packed4bit:
    """A 4-bit weight as the kernels take it."""
    N, K = weight.shape
    held = {f.name: getattr(weight, f.name) for f in fields(Packed4bit) if f.name not in ("N", "K")}
    return Packed4bit(N=N, K=K, **held)


class Stored(NamedTuple):
    """What a recording of launches over weights must know of them (see `replay.produce`): a part of its key, the
    tensors that are to be looked at, and those of which the key tells all."""

    key: tuple[Any, ...]
    seen: list[torch.Tensor | None]
    told: list[torch.Tensor | None]


def stored(*weights: Any) -> Stored:
    """`Stored` of weights, dense or quantized."""
    key: list[Any] = []
    seen: list[torch.Tensor | None] = []
    told: list[torch.Tensor | None] = []
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            key.append("dense")
            seen.append(weight)
        elif isinstance(weight, Weight4bit):  # its tensors are contiguous, and as large as these say
            key += weight.shape, weight.blocksize, weight.nested
            told += weight.tensors()
        else:
            key.append("8 bits")
            seen += weight.tensors()
    return Stored(tuple(key), seen, told)


def room_for(weights: Sequence[Any], path: str, like: torch.Tensor) -> torch.Tensor | None:
    """Memory between launches that the weights take in turn, in the dtype of `like`; None if none of them needs it."""
    most = max((_elements_written(weight, path, like.dtype) for weight in weights), default=0)
    return scratch(most, dtype=like.dtype, device=like.device) if most else None


def _elements_written(weight: Any, path: str, dtype: torch.dtype) -> int:
    """Elements of the largest part of the weight that is written out."""
    if isinstance(weight, torch.Tensor):
        return 0 if weight.dtype == dtype else weight.numel()
    return blocks_of(weight, dtype)[0].stop * weight.shape[1] if path.startswith(WRITTEN_OUT) else 0


def parts_of(weight: Any, path: str, like: torch.Tensor, arch: int, room: torch.Tensor | None = None) -> Iterator[Part]:
    """The parts of a weight, in the dtype of `like` where they are dense; written into `room` if there is one."""
    N, K = weight.shape
    if not _elements_written(weight, path, like.dtype):
        yield Part(slice(0, N), weight, path.removeprefix(WRITTEN_OUT), [])
        return
    memory: Any = room_for([weight], path, like) if room is None else room
    if isinstance(weight, torch.Tensor):
        dense = _laid_out_as(weight, memory[: N * K])
        cast = TorchCall("cast W", torch.Tensor.copy_, (dense, weight), nbytes(dense, weight))
        yield Part(slice(0, N), dense, path, [cast])
        return
    blocks = blocks_of(weight, like.dtype)
    for rows in blocks:
        block = weight if len(blocks) == 1 else weight.rows(rows)
        dense = memory[: block.shape[0] * K].view(block.shape)
        yield Part(rows, dense, path.removeprefix(WRITTEN_OUT), _written(block, dense, arch))


def _laid_out_as(weight: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """`room` [N K] as a matrix [N, K] with its rows, or its columns, together as those of the weight are."""
    N, K = weight.shape
    by_columns = weight.stride(0) == 1 and weight.stride(1) >= N
    return room.view(K, N).t() if by_columns else room.view(N, K)


def _written(weight: Any, dense: torch.Tensor, arch: int) -> Calls:
    """What writes a quantized weight into `dense`."""
    if isinstance(weight, Weight4bit):
        return [*dequantize_4bit_calls(packed(weight), dense, arch=arch)]
    moved = nbytes(weight.data, weight.scale, dense)
    return [TorchCall("dequantize", _quantize_torch.dequantize_8bit, (weight.data, weight.scale, dense), moved)]
