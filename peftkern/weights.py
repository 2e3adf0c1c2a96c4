"""What a frozen weight can be: a dense tensor, or one of bitsandbytes' formats kept as it is stored.

Every operation that takes a `weight` takes any of the three. A quantized weight is a small value that holds tensors by
reference and says what they mean; `tensors()` is what crosses an operator's boundary, `ops.dequantize` makes it dense.

Formats (bitsandbytes 0.50, Dettmers et al. 2023, arXiv:2305.14314 and 2022, arXiv:2208.07339), for w of [N, K], i the
flat index n K + k:

    4-bit   byte i // 2 of `packed` holds two codes, the high nibble for even i; b = i // blocksize;
            w[i] = round(code[nibble] * s[b]), s = absmax if that is float32, else (double quantization)
            s[b] = fl(fl(nested_code[absmax[b]] * nested_absmax[b // 256]) + offset), all in float32, two roundings.
    8-bit   w[n, k] = round(fl(data[n, k] * fl(scale[n] * fl(1 / 127)))), all in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# dtypes that a weight may be quantized from and dequantized to
DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuantizedWeight(Protocol):
    """What the quantized formats share."""

    @property
    def shape(self) -> torch.Size:
        """[N, K], those of the matrix that the weight stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """What it was quantized from, and dequantizes to where nobody says otherwise."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def is_cpu(self) -> bool:
        """Whether that is the CPU; quicker to ask than the device."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""

    @property
    def row_quantum(self) -> int:
        """Rows that come together when the matrix is cut."""

    def rows(self, rows: slice) -> QuantizedWeight:
        """The matrix's rows [start, stop) by reference; start is a multiple of `row_quantum`."""

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Its tensors in the order in which operators take them."""

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with its tensors on `device`."""


def _expect(name: str, t: torch.Tensor, dtype: torch.dtype, numel: int, meaning: str) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype != dtype or t.numel() != numel or not t.is_contiguous():
        layout = "" if t.is_contiguous() else " with gaps between elements"
        raise ValueError(
            f"{name}: expected {numel} contiguous elements of {dtype} ({meaning}), got {t.numel()} of {t.dtype}{layout}"
        )


def _expect_sizes(shape: Any) -> torch.Size:
    try:
        sizes = torch.Size(shape)
    except TypeError as error:
        raise TypeError(f"shape: expected [out_features, in_features], got {shape!r}") from error
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"shape: expected [out_features, in_features], each at least 1, got {list(sizes)}")
    return sizes


def _expect_one_device(tensors: dict[str, torch.Tensor | None], device: torch.device) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name}: expected device {device} as the codes, got {t.device}")


@dataclass(frozen=True, slots=True, eq=False)
class Weight4bit:
    """A matrix [N, K] in bitsandbytes' 4-bit format; see the module for the formula.

    Attributes:
        packed: uint8 [ceil(N K / 2)], a view of whatever dtype the codes are stored in.
        absmax: float32 [blocks], or uint8 [blocks] with double quantization; blocks = ceil(N K / blocksize).
        code: float32 [16], the value of each code.
        shape: [N, K].
        blocksize: elements that share a scale, a power of two from 32 to 4096; blocks may straddle rows.
        quant_type: "nf4" or "fp4".
        dtype: float32, float16 or bfloat16, what it was quantized from.
        nested_absmax: float32 [ceil(blocks / 256)], with double quantization only, as the next two.
        nested_code: float32 [256].
        offset: float32 of one element.

    Raises:
        TypeError: something is no tensor.
        ValueError: a size, dtype, device or name does not fit; the message names it.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: torch.Size
    blocksize: int = 64
    quant_type: str = "nf4"
    dtype: torch.dtype = torch.bfloat16
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _expect_sizes(self.shape))
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: expected one of {', '.join(QUANT_TYPES)}, got {self.quant_type!r}")
        if not isinstance(self.blocksize, int) or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize!r}")
        if self.dtype not in DENSE_DTYPES:
            raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {self.dtype}")
        numel = math.prod(self.shape)
        blocks = -(-numel // self.blocksize)
        if not isinstance(self.absmax, torch.Tensor):
            raise TypeError(f"absmax: expected a tensor, got {type(self.absmax).__name__}")
        _expect("packed", self.packed, torch.uint8, -(-numel // 2), "two codes a byte")
        _expect("code", self.code, torch.float32, 16, "the value of each code")
        if self.nested:
            _expect("absmax", self.absmax, torch.uint8, blocks, "double quantization, one a block")
            groups = -(-blocks // NESTED_BLOCKSIZE)
            for name, size, meaning in (
                ("nested_absmax", groups, f"one for {NESTED_BLOCKSIZE} blocks"),
                ("nested_code", 256, "the value of each 8-bit code"),
                ("offset", 1, "added to every scale"),
            ):
                part = getattr(self, name)
                if part is None:
                    raise ValueError(
                        f"{name}: expected a tensor, since absmax is uint8 (double quantization), got None"
                    )
                _expect(name, part, torch.float32, size, meaning)
        else:
            for name in ("nested_absmax", "nested_code", "offset"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected None, since absmax is {self.absmax.dtype}, not uint8")
            _expect("absmax", self.absmax, torch.float32, blocks, "one a block")
        names = ("absmax", "code", "nested_absmax", "nested_code", "offset")
        _expect_one_device({name: getattr(self, name) for name in names}, self.packed.device)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too (double quantization)."""
        return self.absmax.dtype == torch.uint8

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_cpu(self) -> bool:
        return self.packed.is_cpu

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.offset

    @property
    def row_quantum(self) -> int:
        """Rows that come together when the matrix is cut: cuts lie between blocks, and between groups of scales."""
        together = self.blocksize * (NESTED_BLOCKSIZE if self.nested else 1)
        return math.lcm(together, self.shape[1]) // self.shape[1]

    def rows(self, rows: slice) -> Weight4bit:
        """The matrix's rows [start, stop) by reference; start is a multiple of `row_quantum`."""
        K = self.shape[1]
        if rows.start % self.row_quantum:
            raise ValueError(f"rows: expected a start that is a multiple of {self.row_quantum}, got {rows.start}")
        first, last = rows.start * K, rows.stop * K
        blocks = slice(first // self.blocksize, -(-last // self.blocksize))
        groups = slice(blocks.start // NESTED_BLOCKSIZE, -(-blocks.stop // NESTED_BLOCKSIZE))
        return replace(
            self,
            packed=self.packed.view(-1)[first // 2 : -(-last // 2)],
            absmax=self.absmax.view(-1)[blocks],
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.view(-1)[groups],
            shape=torch.Size((rows.stop - rows.start, K)),
        )

    def to(self, device: torch.device | str) -> Weight4bit:
        names = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")
        moved: dict[str, Any] = {
            n: t if t is None else t.to(device) for n, t in zip(names, self.tensors(), strict=True)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, eq=False)
class Weight8bit:
    """A matrix [N, K] in LLM.int8's format: one scale a row.

    Activations stay in 16 or 32 bits, and there is no outlier threshold: this is what bitsandbytes multiplies with in
    backward. Its forward rounds activations to 8 bits too, but for columns with outliers.

    Attributes:
        data: int8 [N, K], contiguous.
        scale: float32 [N], the largest magnitude of each row (bitsandbytes' SCB).
        dtype: float32, float16 or bfloat16, what it was quantized from.

    Raises:
        TypeError: something is no tensor.
        ValueError: a size, dtype or device does not fit; the message names it.
    """

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in DENSE_DTYPES:
            raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {self.dtype}")
        if not isinstance(self.data, torch.Tensor):
            raise TypeError(f"data: expected a tensor, got {type(self.data).__name__}")
        _expect("data", self.data, torch.int8, self.data.numel(), "one code an element")
        rows = _expect_sizes(self.data.shape)[0]
        _expect("scale", self.scale, torch.float32, rows, "one a row")
        _expect_one_device({"scale": self.scale}, self.data.device)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def is_cpu(self) -> bool:
        return self.data.is_cpu

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.data, self.scale

    @property
    def row_quantum(self) -> int:
        """Rows that come together when the matrix is cut: any row can stand alone."""
        return 1

    def rows(self, rows: slice) -> Weight8bit:
        """The matrix's rows [start, stop) by reference."""
        return replace(self, data=self.data[rows], scale=self.scale.view(-1)[rows])

    def to(self, device: torch.device | str) -> Weight8bit:
        return replace(self, data=self.data.to(device), scale=self.scale.to(device))


Weight = torch.Tensor | Weight4bit | Weight8bit


def row_blocks(weight: QuantizedWeight, max_rows: int) -> list[slice]:
    """The weight's rows in as few pieces as have at most `max_rows` each, but at least `row_quantum`."""
    N, quantum = weight.shape[0], weight.row_quantum
    if max_rows >= N:
        return [slice(0, N)]
    size = max(max_rows // quantum, 1) * quantum
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]
