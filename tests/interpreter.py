"""Mends Triton's interpreter for bfloat16, so that kernels can be checked on the CPU.

Two faults of the interpreter (3.6 to 3.9), neither of them in a compiled kernel: `tl.dot` multiplies bfloat16 bit
patterns as if they were integers, and a cast from float32 to bfloat16 truncates in place of rounding to nearest even.
"""

from __future__ import annotations

import numpy as np


def _bf16_bits_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = np.isnan(values)
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def mend_bfloat16() -> None:
    """Wrap the interpreter's dot and float conversion; calling it twice changes nothing."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_peftkern_mended", False):
        return
    create_dot, convert_float = builder.create_dot, interpreter._convert_float

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        def widen(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle(_bf16_bits_to_fp32(handle.data), tl.float32)

        return create_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    def convert(values, input_dtype, output_dtype, rounding_mode):
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16 and not toward_zero:
            return _fp32_to_bf16_bits(values)
        return convert_float(values, input_dtype, output_dtype, rounding_mode)

    builder.create_dot, interpreter._convert_float = dot, convert
    builder._peftkern_mended = True
