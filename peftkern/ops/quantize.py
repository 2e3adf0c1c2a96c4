"""Quantized weights: from dense to bitsandbytes' 4-bit and 8-bit formats, and back. Formulas: `peftkern.weights`.

Quantizing is plain PyTorch on any device, in chunks. Dequantizing has two paths for 4 bits, plain PyTorch and one
Triton launch, which give the same bits; for 8 bits PyTorch does it in one launch by itself. Nothing here is
differentiable: these weights are frozen.
"""

from __future__ import annotations

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _quantize_torch
from peftkern.ops._common import FLOATS, ask, needs_operator
from peftkern.ops.plan import plan_dequantize
from peftkern.weights import BLOCKSIZES, DENSE_DTYPES, QUANT_TYPES, Weight, Weight4bit, Weight8bit

MaybeTensor = torch.Tensor | None


# -- quantize -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_4bit(
    w: torch.Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> Weight4bit:
    """Quantize a matrix to NF4 or FP4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

    Each block of `blocksize` elements, in row-major order, is divided by its largest magnitude, and each element
    becomes the nearest of 16 values. With double quantization those magnitudes, less their mean, are quantized in turn
    in blocks of 256 to the dynamic 8-bit map. All in float32.

    Bits are those of bitsandbytes 0.50's `default` backend, for codes, scales and scales of scales. Its CPU backend
    searches the 8-bit map in another way, so that some codes of scales are one off; its GPU kernels were not compared.

    Args:
        w: [out_features, in_features], float32, float16 or bfloat16; any strides, any device. Beside the result
            buffers are held of 40 MB, on a CPU of less than 1 MB, and with double quantization a few numbers a block.
        quant_type: "nf4" or "fp4".
        blocksize: a power of two from 32 to 4096.
        double_quant: whether scales are quantized too: 0.127 in place of 0.5 bits an element at blocksize 64.

    Returns:
        The weight, on w's device, with w's dtype as the one that it dequantizes to.

    Raises:
        TypeError: w is no tensor of one of these dtypes.
        ValueError: its shape, quant_type or blocksize is none of the above, or w holds NaN or infinity.
    """
    _check_matrix(w)
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected one of {', '.join(QUANT_TYPES)}, got {quant_type!r}")
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")
    packed, absmax = _quantize_torch.quantize_4bit(w, quant_type, blocksize)
    _refuse_nonfinite(w, absmax)
    code = _quantize_torch.code_4bit(quant_type).to(w.device)
    if not double_quant:
        return Weight4bit(packed, absmax, code, w.shape, blocksize, quant_type, w.dtype)
    codes, nested_absmax, nested_code, offset = _quantize_torch.quantize_scales(absmax)
    if not offset.isfinite():
        raise ValueError(f"w: the mean magnitude of its blocks passes float32; double_quant=False may do ({offset=})")
    return Weight4bit(packed, codes, code, w.shape, blocksize, quant_type, w.dtype, nested_absmax, nested_code, offset)


@torch.no_grad()
def quantize_8bit(w: torch.Tensor) -> Weight8bit:
    """Quantize a matrix row by row to 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339).

    `scale[n] = max_k |w[n, k]|`, `data[n, k] = round(w[n, k] * fl(127 * fl(1 / scale[n])))` in float32, halves to
    even; a row of zeros gives zeros. Bits are those of `int8_vectorwise_quant` of bitsandbytes' `default` backend on
    the same w. (`Linear8bitLt` rounds its weight to float16 before it quantizes; that is not done here.)

    Args:
        w: [out_features, in_features], float32, float16 or bfloat16; any strides, any device.

    Returns:
        The weight, on w's device, with w's dtype as the one that it dequantizes to.

    Raises:
        TypeError: w is no tensor of one of these dtypes.
        ValueError: it is no matrix, or holds NaN or infinity.
    """
    _check_matrix(w)
    data, scale = _quantize_torch.quantize_8bit(w)
    _refuse_nonfinite(w, scale)
    return Weight8bit(data, scale, w.dtype)


def _check_matrix(w: torch.Tensor) -> None:
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"w: expected a tensor [out_features, in_features], got {type(w).__name__}")
    if w.dtype not in DENSE_DTYPES:
        raise TypeError(f"w: expected float32, float16 or bfloat16, got {w.dtype}")
    if w.is_meta:
        raise ValueError("w: expected a tensor with values, got one on the meta device")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"w: expected shape [out_features, in_features], each at least 1, got {list(w.shape)}")


def _refuse_nonfinite(w: torch.Tensor, largest: torch.Tensor) -> None:
    """NaN and infinity show in the largest magnitudes, which are few; w is searched only to say where."""
    if not largest.isfinite().all():
        for n, row in enumerate(w):
            wrong = (~row.isfinite()).nonzero()
            if wrong.numel():
                k = int(wrong[0])
                raise ValueError(f"w: expected finite numbers, got {row[k].item()} at [{n}, {k}]")


# -- dequantize ---------------------------------------------------------------------------------------------------


def dequantize(weight: Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """A dense [out_features, in_features] of any weight; a dense one that has the dtype already is returned itself.

    Args:
        weight: a matrix, `Weight4bit` or `Weight8bit`.
        dtype: of the result; `out`'s, else the weight's own, if None.
        out: written and returned if given; see `dequantize_4bit`.

    Raises:
        TypeError: weight is none of these.
        ValueError: dtype or out does not fit.
    """
    if isinstance(weight, Weight4bit):
        return dequantize_4bit(weight, dtype, out)
    if isinstance(weight, Weight8bit):
        return dequantize_8bit(weight, dtype, out)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a tensor, Weight4bit or Weight8bit, got {type(weight).__name__}")
    if out is None:
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
        return weight if dtype is None else weight.to(dtype)
    _result_dtype(weight, dtype, out, weight.dtype)
    with torch.no_grad():
        return out.copy_(weight)


def dequantize_4bit(q: Weight4bit, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """`w[i] = round(fl(code[nibble of i] * s[i // blocksize]))`, bit for bit on every path; see `peftkern.weights`.

    Held beside the result: on the kernel's path nothing; in plain PyTorch the scales in float32 if they are quantized,
    and buffers of less than half a MB on a CPU, 15 MB elsewhere. Not differentiable.

    Args:
        q: the weight.
        dtype: float32, float16 or bfloat16; `out`'s, else `q.dtype`, if None.
        out: [out_features, in_features], contiguous, of `dtype` and on q's device; a new tensor if None.

    Returns:
        `out`, or a new tensor.

    Raises:
        TypeError: q is no `Weight4bit`.
        ValueError: dtype or out does not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    if not isinstance(q, Weight4bit):
        raise TypeError(f"q: expected a Weight4bit, got {type(q).__name__}")
    dtype = _result_dtype(q, dtype, out, q.dtype)
    N, K = q.shape
    path = ask(plan_dequantize, N * K, dtype, device_info(q.device), backend_in_force()).path
    tensors = (q.packed, q.absmax, q.code, q.nested_absmax, q.nested_code, q.offset)
    if needs_operator(q.packed, q.absmax) or (out is not None and needs_operator(out)):
        if out is None:
            return _operator_4bit(*tensors, N, K, q.blocksize, dtype, path)
        _operator_4bit_out(*tensors, q.blocksize, path, out)
        return out
    if out is None:
        out = torch.empty(N, K, dtype=dtype, device=q.device)
    write_4bit(*tensors, q.blocksize, path, out)
    return out


def dequantize_8bit(q: Weight8bit, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """`w[n, k] = round(fl(data[n, k] * fl(scale[n] * fl(1 / 127))))`, one rounding from float32 to the dtype.

    That is what bitsandbytes' `Linear8bitLt` multiplies with in backward, bit for bit. Its forward never forms a
    dense weight, save for outlier columns, which its `int8_vectorwise_dequant` makes in another order,
    `fl(fl(data * scale) * fl(1 / 127))`: float32 results may differ in their last bit. Not differentiable.

    Plain PyTorch on every device and under every `use_backend`: off the CPU it is one launch already.

    Args:
        q: the weight.
        dtype: float32, float16 or bfloat16; `out`'s, else `q.dtype`, if None.
        out: [out_features, in_features], contiguous, of `dtype` and on q's device; a new tensor if None.

    Returns:
        `out`, or a new tensor.

    Raises:
        TypeError: q is no `Weight8bit`.
        ValueError: dtype or out does not fit.
    """
    if not isinstance(q, Weight8bit):
        raise TypeError(f"q: expected a Weight8bit, got {type(q).__name__}")
    dtype = _result_dtype(q, dtype, out, q.dtype)
    if needs_operator(q.data, q.scale) or (out is not None and needs_operator(out)):
        if out is None:
            return _operator_8bit(q.data, q.scale, dtype)
        _operator_8bit_out(q.data, q.scale, out)
        return out
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    with torch.no_grad():  # `out` may be a parameter
        _quantize_torch.dequantize_8bit(q.data, q.scale, out)
    return out


def _result_dtype(
    weight: Weight, dtype: torch.dtype | None, out: torch.Tensor | None, default: torch.dtype
) -> torch.dtype:
    """The dtype to write, once `out` is known to fit."""
    if out is not None and not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a tensor or None, got {type(out).__name__}")
    if dtype is None:
        dtype = default if out is None else out.dtype
    if dtype not in DENSE_DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if out is not None:
        fits = out.shape == weight.shape and out.dtype == dtype and out.device == weight.device
        if not fits or not out.is_contiguous():
            layout = "" if out.is_contiguous() else " with gaps between elements"
            raise ValueError(
                f"out: expected contiguous {list(weight.shape)} of {dtype} on {weight.device}, "
                f"got {list(out.shape)} of {out.dtype} on {out.device}{layout}"
            )
    return dtype


@torch.no_grad()
def write_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: MaybeTensor,
    nested_code: MaybeTensor,
    offset: MaybeTensor,
    blocksize: int,
    path: str,
    out: torch.Tensor,
) -> None:
    """Dequantize into `out` [N, K], contiguous, by `path` ("torch" or "triton"); nothing is checked."""
    if path == "torch":
        _quantize_torch.dequantize_4bit(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, out)
        return
    from peftkern_kernels import replay
    from peftkern_kernels.dequantize_4bit import dequantize_4bit_calls
    from peftkern_kernels.format_4bit import Packed4bit
    from peftkern_kernels.launch import Call

    N, K = out.shape
    tensors = (packed, absmax, code, nested_absmax, nested_code, offset)

    def build() -> list[Call]:
        return dequantize_4bit_calls(Packed4bit(*tensors, N, K, blocksize), out, arch=device_info(out.device).arch)

    replay.run(("dequantize_4bit", blocksize), (*tensors, out), build, out.device)


# -- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::dequantize_4bit", mutates_args=())
def _operator_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: MaybeTensor,
    nested_code: MaybeTensor,
    offset: MaybeTensor,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
    path: str,
) -> torch.Tensor:
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    write_4bit(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, path, out)
    return out


@_operator_4bit.register_fake
def _(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: MaybeTensor,
    nested_code: MaybeTensor,
    offset: MaybeTensor,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
    path: str,
) -> torch.Tensor:
    return packed.new_empty(N, K, dtype=dtype)


@torch.library.custom_op("peftkern::dequantize_4bit_out", mutates_args=("out",))
def _operator_4bit_out(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: MaybeTensor,
    nested_code: MaybeTensor,
    offset: MaybeTensor,
    blocksize: int,
    path: str,
    out: torch.Tensor,
) -> None:
    write_4bit(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, path, out)


@torch.library.custom_op("peftkern::dequantize_8bit", mutates_args=())
def _operator_8bit(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    _quantize_torch.dequantize_8bit(data, scale, out)
    return out


@_operator_8bit.register_fake
def _(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(data, dtype=dtype)


@torch.library.custom_op("peftkern::dequantize_8bit_out", mutates_args=("out",))
def _operator_8bit_out(data: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    _quantize_torch.dequantize_8bit(data, scale, out)
