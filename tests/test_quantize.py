"""`ops.quantize` bit for bit: against the formula (`reference`) and against bitsandbytes' `default` backend."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import reference, use_backend
from peftkern.backend import DeviceInfo
from peftkern.ops import _quantize_torch, dequantize, dequantize_4bit, dequantize_8bit, quantize_4bit, quantize_8bit
from peftkern.ops.plan import plan_dequantize
from peftkern.ops.quantize import _operator_4bit, _operator_4bit_out, _operator_8bit, _operator_8bit_out
from peftkern.weights import BLOCKSIZES, Weight4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Odd counts (half a byte is left over), blocks that straddle rows, a last block cut short, more than 256 blocks of 32.
SHAPES = ((1, 1), (3, 7), (5, 33), (64, 64), (67, 131), (31, 1023))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in dtype, shape and bits (so that -0 is not 0, and NaN is NaN)."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(kind) != expected.contiguous().view(kind)
    assert not differ.any(), f"{int(differ.sum())} of {got.numel()} elements differ"


def matrix(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, with blocks of zeros, of tiny and of large numbers, and elements in the middle of two values."""
    w = torch.randn(N, K)
    flat = w.view(-1)
    if flat.numel() > 2000:
        flat[:700] = 0
        flat[700:1000] *= 1e-6
        flat[1000:1300] *= 3e3
        flat[1500:1516] = torch.linspace(-1, 1, 16)
    return w.to(dtype)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def default_backend(name: str, *args):
    """An operator of bitsandbytes as its `default` backend computes it, whatever is registered for the device."""
    operator = getattr(torch.ops.bitsandbytes, name).default
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


def default_dequantize(packed, scales, code, blocksize, shape, dtype) -> torch.Tensor:
    """The `default` backend's arithmetic, without the compiler that it wraps around it."""
    from bitsandbytes.backends.default import ops

    return ops._dequantize_4bit_compute.__wrapped__(packed, scales, code, blocksize, shape, dtype)


def default_scales(codes, nested_absmax, nested_code, offset) -> torch.Tensor:
    """Scales from their 8-bit codes, likewise."""
    from bitsandbytes.backends.default import ops

    compute = ops._dequantize_blockwise_compute.__wrapped__
    return compute(codes, nested_absmax, nested_code, 256, torch.float32) + offset


# -- the tables ---------------------------------------------------------------------------------------------------


def test_tables_are_bitsandbytes(bnb):
    """Catches a digit lost in a table, a table rounded from double, and a zero with the wrong sign."""
    for quant_type in ("nf4", "fp4"):
        expected = bnb.functional.get_4bit_type(quant_type, device="cpu")
        assert_same(_quantize_torch.code_4bit(quant_type), expected)
    assert_same(_quantize_torch.code_8bit(), bnb.functional.create_dynamic_map())


def test_tables_do_not_follow_the_default_dtype():
    """Catches scales of scales in bfloat16 where a model is built under that default."""
    expected = [_quantize_torch.code_4bit("nf4"), _quantize_torch.code_8bit()]
    w = matrix(67, 131, torch.bfloat16)
    weight = quantize_4bit(w)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_same(_quantize_torch.code_4bit("nf4"), expected[0])
        assert_same(_quantize_torch.code_8bit(), expected[1])
        again = quantize_4bit(w)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, wanted in zip(again.tensors(), weight.tensors(), strict=True):
        assert_same(got, wanted)


# -- 4 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_4bit_is_bitsandbytes(bnb, quant_type, blocksize):
    """Every part equal, and what comes back from it. Catches another midpoint or tie, a block counted by rows, a last
    short block multiplied in place of divided, a zero block's scale, the order of nibbles, an offset of other bits."""
    dynamic = bnb.functional.create_dynamic_map()
    code = bnb.functional.get_4bit_type(quant_type, device="cpu")
    for shape in SHAPES:
        for dtype in DTYPES:
            w = matrix(*shape, dtype)
            packed, absmax = default_backend("quantize_4bit", w, blocksize, quant_type, torch.uint8)
            offset = absmax.mean()
            codes, nested_absmax = default_backend("quantize_blockwise", absmax - offset, dynamic, 256)
            flat = quantize_4bit(w, quant_type, blocksize, double_quant=False)
            nested = quantize_4bit(w, quant_type, blocksize)
            assert flat.nested_absmax is flat.nested_code is flat.offset is None
            assert flat.shape == nested.shape == w.shape and flat.dtype == nested.dtype == dtype
            assert flat.quant_type == nested.quant_type == quant_type
            expected = (packed.view(-1), codes, code, nested_absmax, dynamic, offset)
            for got, wanted in zip(nested.tensors(), expected, strict=True):
                assert_same(got, wanted)
            assert_same(flat.packed, packed.view(-1))
            assert_same(flat.absmax, absmax)
            scales = default_scales(codes, nested_absmax, dynamic, offset)
            for out_dtype in DTYPES:
                for weight, s in ((flat, absmax), (nested, scales)):
                    theirs = default_dequantize(packed.view(-1), s, code, blocksize, shape, out_dtype)
                    assert_same(dequantize_4bit(weight, out_dtype), theirs)


def test_quantize_4bit_is_bitsandbytes_on_this_cpu(bnb):
    """The public function, whose CPU backend searches the 8-bit map in its own way: there codes are neighbours."""
    w = matrix(67, 131, torch.bfloat16)
    theirs, state = bnb.functional.quantize_4bit(w, blocksize=32, compress_statistics=True, quant_type="nf4")
    ours = quantize_4bit(w, "nf4", 32)
    assert_same(ours.packed, theirs.view(-1))
    assert_same(ours.offset, state.offset)
    assert_same(ours.nested_absmax, state.state2.absmax)
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_4bit_is_the_formula(quant_type, nested, backend, device):
    """Catches a scale rounded once in place of twice, a nibble order, an index past 256 blocks of scales; on a kernel
    (fewer sizes: the interpreter is slow) also that the public function hands it the right tensors."""
    triton = backend == "triton"
    for blocksize in (32, 512) if triton else BLOCKSIZES:
        for shape in SHAPES[1:4:2] if triton else SHAPES:
            weight = quantize_4bit(matrix(*shape, torch.float32).to(device), quant_type, blocksize, nested)
            for dtype in DTYPES:
                truth = reference.dequantize_4bit(weight, dtype)
                with use_backend(backend):
                    assert_same(dequantize_4bit(weight, dtype), truth)
                    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
                    assert dequantize(weight, out=out) is out
                assert_same(out, truth)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_any_storage_dtype_is_the_same_bytes(bnb, quant_type, storage, device):
    """Catches codes read as numbers of the dtype that they are stored in, and a column of bytes taken for a row."""
    w = matrix(64, 66, torch.bfloat16)
    stored, absmax = default_backend("quantize_4bit", w, 64, quant_type, storage)
    assert stored.dtype == storage and stored.shape[1] == 1
    ours = quantize_4bit(w, quant_type, 64, double_quant=False)
    weight = Weight4bit(stored.view(torch.uint8), absmax, ours.code, w.shape, 64, quant_type, w.dtype).to(device)
    expected = reference.dequantize_4bit(ours, w.dtype)
    for backend in ("torch", "triton"):
        with use_backend(backend):
            assert_same(dequantize_4bit(weight).cpu(), expected)


@pytest.mark.parametrize("chunk", [4096, 3 * 4096, 2**21])
def test_chunks_change_no_bits(chunk, monkeypatch):
    """Catches a chunk's edge inside a block or a byte, a short chunk that is scaled like a last block, and scales of a
    later chunk (there are more blocks than 4096) taken from the first one's groups."""
    w = matrix(67, 3001, torch.bfloat16)
    weights = [quantize_4bit(w, "fp4", 32), quantize_4bit(w, "nf4", 4096, False), quantize_8bit(w)]
    dense = [dequantize(weight) for weight in weights]
    monkeypatch.setattr(_quantize_torch, "CPU_CHUNK", chunk)
    again = [quantize_4bit(w, "fp4", 32), quantize_4bit(w, "nf4", 4096, False), quantize_8bit(w)]
    for weight, other, truth in zip(weights, again, dense, strict=True):
        for part, wanted in zip(other.tensors(), weight.tensors(), strict=True):
            assert (part is None and wanted is None) or assert_same(part, wanted) is None
        assert_same(dequantize(other), truth)


@pytest.mark.parametrize("quantize", [functools.partial(quantize_4bit, blocksize=32), quantize_8bit])
def test_any_strides(quantize, monkeypatch):
    """Catches rows taken for contiguous, and a copy that begins at the wrong row."""
    base = torch.randn(70, 300)
    for chunk in (4096, 2**21):
        monkeypatch.setattr(_quantize_torch, "CPU_CHUNK", chunk)
        for w in (base.t(), base[:, 3:290], base[::3], base[1:2].expand(5, 300), base.new_ones(1, 9000)[:, ::2]):
            got, wanted = quantize(w), quantize(w.contiguous())
            assert got.shape == w.shape
            for part, expected in zip(got.tensors(), wanted.tensors(), strict=True):
                assert_same(part, expected)


def test_error_of_quantization_is_that_of_the_values():
    """An oracle apart from bitsandbytes: each element became the nearest of its block's 16 values."""
    w = torch.randn(40, 70)
    for quant_type in ("nf4", "fp4"):
        weight = quantize_4bit(w, quant_type, 32, double_quant=False)
        values = weight.code.double()[None] * weight.absmax.double().repeat_interleave(32)[: w.numel(), None]
        nearest = (values - w.double().view(-1, 1)).abs().amin(dim=1)
        error = (dequantize_4bit(weight).double() - w.double()).abs().view(-1)
        assert (error - nearest).max() < 1e-6 and nearest.max() > 0.01


# -- 8 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_8bit_is_bitsandbytes(bnb, dtype):
    """Catches a step of 1 / 127 where bitsandbytes rounds 127 / scale, truncation, and ties away from even."""
    for shape in SHAPES:
        w = torch.randn(shape).to(dtype)
        data, scale, _ = default_backend("int8_vectorwise_quant", w)
        weight = quantize_8bit(w)
        assert_same(weight.data, data)
        assert_same(weight.scale, scale)
        assert weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_8bit_is_the_formula_and_bitsandbytes_backward(dtype, device):
    """Catches a division by 127, a product rounded to 16 bits twice, and a scale of another row."""
    for shape in SHAPES:
        weight = quantize_8bit(torch.randn(shape, device=device))
        truth = reference.dequantize_8bit(weight, dtype)
        backward = weight.data.to(dtype, copy=True).mul_(weight.scale.unsqueeze(1).mul(1.0 / 127.0))
        assert_same(dequantize_8bit(weight, dtype), truth)
        assert_same(backward, truth)
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        assert dequantize(weight, out=out) is out
        assert_same(out, truth)


def test_8bit_rows_of_zeros_and_of_tiny_numbers():
    """Catches 0 * infinity, which torch turns into any integer, and a row whose 127 / scale passes float32."""
    w = torch.randn(4, 9)
    w[1] = 0
    w[2] = 1e-37
    weight = quantize_8bit(w)
    assert not weight.data[1].any() and weight.data[0].abs().max() == 127 and (weight.data[2] == 34).all()
    error = (dequantize_8bit(weight).double() - w.double()).abs()
    assert error[1].max() == 0 and error[2].max() < 1e-37 and error[3].max() <= w[3].abs().max() / 250


# -- arguments ----------------------------------------------------------------------------------------------------


def test_a_dense_weight_is_returned_itself():
    """Catches a copy of what needs none, and a buffer left unwritten."""
    w = torch.randn(3, 4, dtype=torch.bfloat16)
    assert dequantize(w) is w and dequantize(w, torch.bfloat16) is w
    assert_same(dequantize(w, torch.float32), w.float())
    out = torch.empty(3, 4)
    assert dequantize(w, out=out) is out
    assert_same(out, w.float())


W = torch.randn(4, 6)
Q4, Q8 = quantize_4bit(W), quantize_8bit(W)
NAN = torch.where(torch.arange(24).view(4, 6) == 15, float("nan"), W)
WRONG = [
    (lambda: quantize_4bit([1.0]), TypeError, "w: expected a tensor"),
    (lambda: quantize_4bit(W.double()), TypeError, "w: expected float32, float16 or bfloat16, got torch.float64"),
    (lambda: quantize_8bit(W.int()), TypeError, "w: expected float32"),
    (lambda: quantize_4bit(W[0]), ValueError, r"w: expected shape .* got \[6\]"),
    (lambda: quantize_8bit(W[:0]), ValueError, r"w: expected shape .* got \[0, 6\]"),
    (lambda: quantize_4bit(W, "int4"), ValueError, "quant_type: expected one of nf4, fp4, got 'int4'"),
    (lambda: quantize_4bit(W, blocksize=48), ValueError, "blocksize: expected one of 32, .*, got 48"),
    (lambda: quantize_4bit(NAN), ValueError, r"w: expected finite numbers, got nan at \[2, 3\]"),
    (lambda: quantize_8bit(NAN.nan_to_num(torch.inf).half()), ValueError, r"finite numbers, got inf at \[2, 3\]"),
    (lambda: quantize_4bit(torch.full((9, 64), 3e38)), ValueError, "mean magnitude .* passes float32"),
    (lambda: dequantize_4bit(Q8), TypeError, "q: expected a Weight4bit, got Weight8bit"),
    (lambda: dequantize_8bit(W), TypeError, "q: expected a Weight8bit, got Tensor"),
    (lambda: dequantize("nf4"), TypeError, "weight: expected a tensor, Weight4bit or Weight8bit, got str"),
    (lambda: dequantize(Q4, torch.float64), ValueError, "dtype: expected float32, .* got torch.float64"),
    (lambda: dequantize(Q8, out=torch.empty(4, 6).int()), ValueError, "dtype: expected float32, .* got torch.int32"),
    (lambda: dequantize(Q4, out=torch.empty(6, 4)), ValueError, r"out: expected contiguous \[4, 6\]"),
    (lambda: dequantize(Q8, out=torch.empty(6, 4).t()), ValueError, "out: .*with gaps between elements"),
    (lambda: dequantize(Q4, torch.float16, torch.empty(4, 6)), ValueError, "out: expected .* of torch.float16"),
    (lambda: dequantize(Q4, out=torch.empty(4, 6, device="meta")), ValueError, "out: expected .* on cpu, .* meta"),
    (lambda: dequantize(W, out=torch.empty(4)), ValueError, r"out: expected contiguous \[4, 6\]"),
]


@pytest.mark.parametrize("call, error, message", WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_are_named(call, error, message):
    """Catches garbage quantized without a word, as bitsandbytes does with NaN, and errors from deep inside torch."""
    with pytest.raises(error, match=message):
        call()


def test_plan_of_dequantize():
    """Catches a kernel where none can run, and a silent fallback where one was asked for."""
    hopper, old = DeviceInfo("cuda", 90), DeviceInfo("cuda", 75, "sm_75 is older than sm_80")
    assert plan_dequantize(99, torch.bfloat16, hopper).path == "triton"
    assert plan_dequantize(99, torch.bfloat16, hopper, "torch").path == "torch"
    assert plan_dequantize(99, torch.bfloat16, old).path == "torch"
    assert plan_dequantize(99, torch.bfloat16, DeviceInfo("cpu", 0, "")).path == "torch"
    assert plan_dequantize(99, torch.bfloat16, DeviceInfo("cpu", 0, ""), "triton").path == "triton"
    with pytest.raises(RuntimeError, match="dequantize_4bit: .* sm_75 is older than sm_80"):
        plan_dequantize(99, torch.bfloat16, old, "triton")


# -- memory, operators, compilation -------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of each storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if hasattr(t, "data_ptr")}
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, list | tuple) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.kept.append(t)
                self.seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return result

    def largest(self, *results: torch.Tensor) -> int:
        """Of those that hold none of the results."""
        mine = {t.untyped_storage().data_ptr() for t in results}
        return max(size for address, size in self.seen.items() if address not in mine)


def test_what_is_held_does_not_grow_with_the_weight():
    """Catches a float32 or int32 copy of the whole weight, and scales in more than their own size in float32."""
    w = torch.randn(1024, 4096, dtype=torch.bfloat16)
    chunk = 4 * _quantize_torch.CPU_CHUNK
    with Allocations() as made:
        packed, absmax = _quantize_torch.quantize_4bit(w, "nf4", 64)
    assert 0.9 * chunk < made.largest(packed, absmax) <= chunk
    with Allocations() as made:
        _quantize_torch.quantize_4bit(w.t(), "nf4", 64)
    assert made.largest(*made.kept[:2]) <= chunk + 2 * w.nbytes // w.shape[1]
    with Allocations() as made:
        data, scale = _quantize_torch.quantize_8bit(w)
    assert made.largest(data, scale) <= chunk
    weight = quantize_4bit(w)
    out = torch.empty_like(w)
    with Allocations() as made:
        _quantize_torch.dequantize_4bit(*weight.tensors(), 64, out)
    assert made.largest(out) == 4 * weight.absmax.numel()
    for plain in (quantize_4bit(w, double_quant=False), quantize_4bit(w, blocksize=4096)):
        with Allocations() as made:
            _quantize_torch.dequantize_4bit(*plain.tensors(), plain.blocksize, out)
        assert made.largest(out) <= chunk
    with Allocations() as made:
        _quantize_torch.dequantize_8bit(data, scale, out)
    assert made.largest(out) <= chunk


@pytest.mark.parametrize("nested", [False, True])
def test_operators_pass_opcheck(nested):
    """Catches a fake that lies about shape or dtype, and a result that is written without the schema saying so."""
    weight = quantize_4bit(torch.randn(5, 33), "nf4", 32, nested)
    parts, out = weight.tensors(), torch.empty(5, 33, dtype=torch.float16)
    q8 = quantize_8bit(torch.randn(5, 33))
    for operator, args in (
        (_operator_4bit, (*parts, 5, 33, 32, torch.float16, "torch")),
        (_operator_4bit_out, (*parts, 32, "torch", out)),
        (_operator_8bit, (*q8.tensors(), torch.bfloat16)),
        (_operator_8bit_out, (*q8.tensors(), out)),
    ):
        assert set(torch.library.opcheck(operator, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "quantize", [quantize_4bit, functools.partial(quantize_4bit, double_quant=False), quantize_8bit]
)
def test_compiles_without_a_graph_break(quantize):
    """Catches a check or a weight that Dynamo cannot trace, a buffer that is not written, a gradient that is lost."""
    weight = quantize(torch.randn(5, 33))
    x = torch.randn(2, 33, requires_grad=True)

    def layer(x, weight, buffer):
        return x @ dequantize(weight).t() + (x @ dequantize(weight, out=buffer).t()).float()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        buffer = torch.full((5, 33), float("nan"))
        y = function(x, weight, buffer)
        (dx,) = torch.autograd.grad(y.sum(), x)
        results.append((y, dx, buffer))
    for got, expected in zip(*results, strict=True):
        assert_same(got.detach(), expected.detach())
    assert_same(results[0][2], dequantize(weight))


def test_a_dispatch_mode_sees_one_operator():
    """Catches eager shortcuts that hide the operation from selective checkpointing and fake tensors."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    weight, out = quantize_4bit(torch.randn(5, 33)), torch.empty(5, 33)
    with Names():
        got = dequantize_4bit(weight)
        dequantize_4bit(weight, out=out)
    assert names == ["peftkern.dequantize_4bit.default", "peftkern.dequantize_4bit_out.default"]
    assert_same(got, reference.dequantize_4bit(weight, torch.float32))
    assert_same(out, got)


@pytest.mark.gpu
def test_a_gpu_quantizes_to_the_same_bits():
    """Catches a division that is rounded otherwise on the GPU. The mean, a sum in another order, may differ."""
    for shape in SHAPES:
        w = matrix(*shape, torch.bfloat16)
        for quant_type in ("nf4", "fp4"):
            here, there = (quantize_4bit(t, quant_type, 32, False) for t in (w, w.cuda()))
            for part, expected in zip(there.tensors()[:3], here.tensors()[:3], strict=True):
                assert_same(part.cpu(), expected)
            assert_same(dequantize_4bit(there).cpu(), dequantize_4bit(here))
        for part, expected in zip(quantize_8bit(w.cuda()).tensors(), quantize_8bit(w).tensors(), strict=True):
            assert_same(part.cpu(), expected)
