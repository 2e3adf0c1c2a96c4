"""Linear layers over quantized weights: ours alone, moved, cast, copied, saved; and bitsandbytes' read in place."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from numerics import EPS32, assert_rounded
from peftkern import nn as nn_layers
from peftkern.backend import use_backend
from peftkern.ops import dequantize, quantize_4bit, quantize_8bit
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.utils.quantized_files import read_quantized
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(K: int = 65, N: int = 30, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(K, N, bias).to(dtype)
    return made


def four(**kwargs) -> Linear4bit:
    return Linear4bit.from_linear(linear(), **kwargs)


def makers() -> list:
    return [
        pytest.param(lambda: four(), id="nf4"),
        pytest.param(lambda: four(double_quant=False, quant_type="fp4", blocksize=128), id="fp4"),
        pytest.param(lambda: Linear4bit.from_linear(linear(64), quant_storage=torch.bfloat16), id="bf16 storage"),
        pytest.param(lambda: Linear8bit.from_linear(linear()), id="int8"),
    ]


def bits(module: nn.Module) -> list[torch.Tensor]:
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in weight_of(module).tensors() if t is not None]


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def quantized(kind: str, N: int, K: int, dtype: torch.dtype):
    w = torch.randn(N, K).to(dtype)
    return quantize_8bit(w) if kind == "int8" else quantize_4bit(w, kind, double_quant=kind == "nf4")


# --- the operation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_linear_quantized_matches_fp64(kind, dtype):
    """Catches a transposed weight, a lost bias, an unscaled row and a gradient of the wrong product, at odd sizes."""
    N, K = 37, 75
    weight = quantized(kind, N, K, dtype)
    x, bias = torch.randn(3, 5, K).to(dtype).requires_grad_(), torch.randn(N).to(dtype).requires_grad_()
    y = linear_quantized(x, weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    w64, x64, b64, dy64 = (t.detach().double() for t in (dequantize(weight, dtype), x, bias, dy))
    # How a CPU adds 16-bit products is the library's affair: it may round partial sums to the dtype.
    sums = {"accumulate_eps": EPS32} if dtype == torch.float32 else {"accumulate_eps": EPS32, "rounded": 4}
    assert y.dtype == dtype
    assert_rounded(y.detach(), x64 @ w64.t() + b64, x64.abs() @ w64.abs().t() + b64.abs(), terms=K + 1, **sums)
    assert_rounded(x.grad, dy64 @ w64, dy64.abs() @ w64.abs(), terms=N, **sums)
    assert_rounded(bias.grad, dy64.sum((0, 1)), dy64.abs().sum((0, 1)), terms=15, **sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(1, 24, 64), (5, 17, 96), (16, 40, 160)])
def test_few_rows_are_decoded_in_the_kernel(M, N, K, dtype, device, monkeypatch):
    """Catches a frozen layer that writes its weight out for one token, and an adapter of rank 0 that adds something."""
    pytest.importorskip("triton")
    weight = quantized("nf4", N, K, dtype).to(device)
    x, bias = torch.randn(M, K, device=device).to(dtype).requires_grad_(), torch.randn(N, device=device).to(dtype)
    home = sys.modules["peftkern.ops.linear_quantized"]
    with monkeypatch.context() as m, use_backend("triton"):
        m.setattr(home, "dequantize", lambda *_: pytest.fail("the weight was written out"))
        y = linear_quantized(x, weight, bias)
    w64, x64, dy = dequantize(weight, dtype).double(), x.detach().double(), torch.randn(M, N, device=device).to(dtype)
    assert_rounded(y.detach(), x64 @ w64.T + bias.double(), x64.abs() @ w64.abs().T + bias.double().abs(), terms=K + 1)
    y.backward(dy)
    sums = {"accumulate_eps": EPS32, "rounded": 4}
    assert_rounded(x.grad, dy.double() @ w64, dy.double().abs() @ w64.abs(), terms=N, **sums)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_nothing_is_kept_for_backward(kind):
    """Catches a dense weight, or x, held from forward to backward, which would cost more than the weight itself."""
    weight = quantized(kind, 40, 64, torch.float32)
    x = torch.randn(7, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_quantized(x, weight).sum().backward()
    assert kept == [] and x.grad is not None


def test_backward_asks_for_no_more_than_is_needed(monkeypatch):
    """Catches a weight that is decoded in backward for nobody."""
    home, calls = sys.modules["peftkern.ops.linear_quantized"], []
    monkeypatch.setattr(home, "dequantize", lambda *a: calls.append(1) or dequantize(*a))
    bias = torch.zeros(8, requires_grad=True)
    linear_quantized(torch.randn(2, 64), quantized("nf4", 8, 64, torch.float32), bias).sum().backward()
    assert len(calls) == 1 and torch.equal(bias.grad, torch.full((8,), 2.0))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_operator_passes_opcheck_and_compiles(kind):
    """Catches a fake whose shape or dtype differs, and a graph break on the way to the weight."""
    torch._dynamo.reset()
    weight = quantized(kind, 30, 66, torch.float32)
    layer = (Linear8bit if kind == "int8" else Linear4bit).from_weight(weight, torch.randn(30))
    x = torch.randn(4, 66, requires_grad=True)
    eager = layer(x)
    dx = torch.autograd.grad(eager.square().sum(), x)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(eager, compiled)
    assert torch.equal(dx, torch.autograd.grad(compiled.square().sum(), x)[0])
    tensors = [t for t in weight.tensors() if t is not None]
    numbers = [30, 66, getattr(weight, "blocksize", 0)]
    torch.library.opcheck(torch.ops.peftkern.linear_quantized.default, (x, tensors, numbers, layer.bias))


def test_wrong_arguments_are_refused_by_name():
    """Catches an error from deep inside a product that names nothing."""
    weight = quantized("nf4", 8, 64, torch.float32)
    for x, w, bias, error, words in [
        (torch.randn(2, 63), weight, None, ValueError, "x: expected shape"),
        (torch.randn(2, 64, dtype=torch.float64), weight, None, TypeError, "x: expected float32"),
        (torch.randn(2, 64), torch.randn(8, 64), None, TypeError, "weight: expected a Weight4bit"),
        (torch.randn(2, 64), weight, torch.randn(64), ValueError, "bias: expected shape"),
        (torch.randn(2, 64, device="meta"), weight, None, ValueError, "weight: expected device meta"),
        ([1.0], weight, None, TypeError, "x: expected a tensor"),
    ]:
        with pytest.raises(error, match=words):
            linear_quantized(x, w, bias)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_of_gradients(kind):
    """Catches gradients of gradients that are zero, or refused where `use_backend("unfused")` is to make them: layers
    over a quantized base call this under it."""
    x, bias = torch.randn(2, 64), torch.randn(8)

    def curvature(layer):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), leaf)[0]

    weight = quantized(kind, 8, 64, torch.float32)
    want = curvature(lambda x: torch.nn.functional.linear(x, dequantize(weight), bias))
    torch.testing.assert_close(curvature(lambda x: linear_quantized(x, weight, bias)), want)
    layer = nn_layers.LoraLinear(64, 8, r=2, init_lora_weights=False, quantization=kind)
    with pytest.raises(RuntimeError, match="lora_linear: double backward"):
        curvature(layer)
    dense = nn_layers.LoraLinear.from_linear(nn.Linear(64, 8), r=2)
    dense.base_layer.weight.data = dequantize(layer.base_layer.quantized_weight(), torch.float32)
    dense.base_layer.bias, dense.lora_A, dense.lora_B = layer.base_layer.bias, layer.lora_A, layer.lora_B
    with use_backend("unfused"):
        torch.testing.assert_close(curvature(layer), curvature(dense))


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_compute_dtype_is_bitsandbytes(compute):
    """Catches x that is not cast to compute_dtype, or y that is not cast back."""
    layer = four(compute_dtype=compute)
    x = torch.randn(3, 65)
    w = dequantize(weight_of(layer), compute or torch.float32)
    expected = nn.functional.linear(x.to(w.dtype), w, layer.bias.to(w.dtype)).to(x.dtype)
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x), expected)


def test_autocast_decides_the_product_and_x_the_result():
    """Catches a product in x's dtype under autocast, and a dtype of y that bitsandbytes would not give."""
    layer = Linear8bit.from_linear(linear())
    x = torch.randn(3, 65)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    w = dequantize(weight_of(layer), torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, nn.functional.linear(x.bfloat16(), w, layer.bias.bfloat16()).float())


@pytest.mark.parametrize("make", makers())
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "type", "float"])
def test_casts_change_the_bias_and_no_bit_of_the_weight(make, cast):
    """Catches absmax in 16 bits, and packed bytes of a float storage cast as if they were numbers."""
    layer = make()
    before, keys = [t.clone() for t in bits(layer)], list(layer.state_dict())
    {"to": lambda: layer.to(torch.bfloat16), "type": lambda: layer.type(torch.float16)}.get(
        cast, getattr(layer, cast)
    )()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(layer), strict=True))
    wanted = {"half": torch.float16, "double": torch.float64, "float": torch.float32, "type": torch.float16}
    assert layer.bias.dtype == wanted.get(cast, torch.bfloat16)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("make", makers())
def test_to_moves_everything_there_and_back(make):
    """Catches a statistic left behind (the meta device stands for another one), and a parameter that is made anew where
    an optimizer or a wrapper holds the old one."""
    layer = make()
    weight, state = layer.weight, {k: v.clone() for k, v in layer.state_dict().items()}
    layer.to("cpu")
    assert layer.weight is weight
    moved = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in weight_of(moved).tensors() if t is not None} == {"meta"}
    assert moved(torch.empty(2, layer.in_features, device="meta")).shape == (2, 30)
    assert list(moved.state_dict()) == list(state)
    moved.to_empty(device="cpu").load_state_dict(state)
    assert same_bits(moved, layer) and torch.equal(moved.bias, layer.bias)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", makers())
def test_state_dict_round_trip(make, assign):
    """Catches a name that differs from bitsandbytes', loaded tensors that stay shared, and a meta layer left empty."""
    source = make()
    state = source.state_dict()
    if isinstance(source, Linear8bit):
        assert list(state) == ["weight", "bias", "SCB", "weight_format"]
        target = Linear8bit(65, 30, device="meta" if assign else None)
    else:
        theirs = bnb.nn.Linear4bit(64, 64, compress_statistics=source.nested_absmax is not None)
        theirs.quant_type = theirs.weight.quant_type = source.quant_type
        assert list(state) == list(theirs.to("cpu").state_dict())
        target = Linear4bit(source.in_features, 30, device="meta" if assign else None)
    assert target.load_state_dict(state, assign=assign) == ([], [])
    assert same_bits(source, target) and torch.equal(source.bias, target.bias)
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(bits(source), bits(target), strict=True)]
    # The offset of double quantization is a number in the file, so that it never is.
    assert not any(shared) if not assign else sum(shared) >= len(shared) - 1
    x = torch.randn(2, source.in_features)
    assert torch.equal(source(x), target(x))
    if isinstance(source, Linear4bit):
        assert (target.quant_type, target.blocksize, target.quant_storage, target.weight_dtype) == (
            source.quant_type,
            source.blocksize,
            source.quant_storage,
            source.weight_dtype,
        )


def test_loading_into_a_layer_keeps_its_parameter():
    """Catches a parameter that wrappers and optimizers know, replaced by a load without `assign`."""
    layer = four()
    before = layer.weight
    layer.load_state_dict(four().state_dict())
    assert layer.weight is before


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("weight"), "Missing|missing"),
        (lambda s: s.pop("weight.absmax"), "'weight.absmax'.*missing"),
        (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "quant_state.*missing"),
        (lambda s: s.update(other=torch.ones(1)), "Unexpected"),
        (lambda s: s.pop("bias"), "Missing.*bias"),
        (lambda s: s.update(bias=torch.ones(3)), "size mismatch for bias"),
    ],
)
def test_loading_what_does_not_fit_is_refused(change, words):
    """Catches a layer that is half loaded, or silently not at all."""
    state = dict(four().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        four().load_state_dict(state)


def test_loading_another_kind_or_shape_is_refused():
    """Catches an int8 or dense weight, or that of another layer, taken for a 4-bit one."""
    for state, words in [
        (Linear8bit.from_linear(linear()).state_dict(), "expected a Weight4bit"),
        (linear().state_dict(), "dense weight.*quantize_model"),
        (Linear4bit.from_linear(linear(66)).state_dict(), r"shape \[30, 65\].*\[30, 66\]"),
    ]:
        layer = four()
        before = [t.clone() for t in bits(layer)]
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(before, bits(layer), strict=True))


@pytest.mark.parametrize("make", makers())
def test_deepcopy_and_pickle(make):
    """Catches a copy that shares memory with its original, and one that holds its weight twice."""
    layer = make()
    layer(torch.randn(2, layer.in_features))  # so that something is kept
    size = len(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert same_bits(layer, other)
        assert not {a.data_ptr() for a in bits(layer)} & {b.data_ptr() for b in bits(other)}
        assert weight_of(other).tensors()[0].data_ptr() == other.weight.data_ptr()
        x = torch.randn(2, layer.in_features)
        assert torch.equal(layer(x), other(x))
        assert len(pickle.dumps(other)) <= size + 16


@pytest.mark.parametrize("make", makers())
def test_weight_is_put_together_once_and_follows_its_tensors(make):
    """Catches a forward with a weight that was replaced since, and one that puts it together anew each time."""
    layer = make()
    first = weight_of(layer)
    assert weight_of(layer) is first
    other = make()
    layer.weight.data = other.weight.data
    assert weight_of(layer) is not first
    for name in layer._statistics:
        setattr(layer, name, getattr(other, name))
    x = torch.randn(2, layer.in_features)
    layer.bias = other.bias
    assert torch.equal(layer(x), other(x)) and weight_of(layer) is weight_of(layer)


def test_bytes_that_were_cast_as_numbers_are_refused():
    """Catches PEFT's own prepare_model_for_kbit_training, which widens packed bytes that are held as bfloat16."""
    layer = Linear4bit.from_linear(linear(64), quant_storage=torch.bfloat16)
    layer.weight.data = layer.weight.data.float()
    with pytest.raises(ValueError, match="expected the packed bytes as torch.bfloat16, got torch.float32"):
        layer(torch.randn(2, 64))


def test_new_layers_hold_zeros_and_ask_for_no_gradient():
    """Catches uninitialized memory in a layer that nothing was loaded into, and a weight that an optimizer takes."""
    for layer in (Linear4bit(65, 30), Linear4bit(65, 30, double_quant=False), Linear8bit(65, 30, bias=False)):
        assert not layer.weight.requires_grad and layer(torch.randn(2, 65)).count_nonzero() == 0
        assert layer.in_features == 65 and layer.out_features == 30


def test_int8_bits_are_bitsandbytes():
    """Catches rows quantized from bfloat16 or float32, where bitsandbytes rounds to float16 first."""
    for dtype in DTYPES:
        dense = linear(dtype=dtype)
        theirs = bnb.nn.Linear8bitLt(65, 30, has_fp16_weights=False)
        theirs.load_state_dict(dense.state_dict())
        ours = Linear8bit.from_linear(dense)
        assert same_bits(ours, theirs.to("cpu")) and ours.weight_dtype == dtype


# --- bitsandbytes' layers --------------------------------------------------------------------------------------------


def bnb_linear(K: int = 64, N: int = 64, **kwargs) -> nn.Module:
    return bnb.nn.Linear4bit(K, N, **kwargs).to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_weight_of_bitsandbytes_4bit(nested, storage):
    """Catches a copy, bytes read in a storage's own dtype, and a state of double quantization left out."""
    layer = bnb_linear(66, 34, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    weight = weight_of(layer)
    assert weight.packed.data_ptr() == layer.weight.data_ptr() and weight_of(layer) is weight
    assert weight.absmax is layer.weight.quant_state.absmax and weight.nested is nested
    assert type(weight.packed) is torch.Tensor
    expected = read_quantized(layer.state_dict(), "")
    assert torch.equal(dequantize(weight, torch.float32), dequantize(expected, torch.float32))
    torch._dynamo.reset()
    x = torch.randn(3, 66)
    run = torch.compile(
        lambda x: linear_quantized(x, weight_of(layer), layer.bias), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(run(x), linear_quantized(x, weight, layer.bias))


def test_weight_of_bitsandbytes_follows_moves_and_copies():
    """Catches the weight of the original in a copy of the layer, and one kept beyond a move."""
    layer = bnb_linear(compress_statistics=True)
    first = weight_of(layer)
    other = copy.deepcopy(layer)
    size = len(pickle.dumps(other))
    assert weight_of(other).packed.data_ptr() == other.weight.data_ptr() != layer.weight.data_ptr()
    assert len(pickle.dumps(other)) <= size + 128, "what is kept was pickled too"
    layer.weight.data = layer.weight.data.clone()
    assert weight_of(layer) is not first


def test_offset_in_another_dtype_is_widened():
    """Catches an offset that bitsandbytes made under a bfloat16 default, handed on as it is."""
    layer = bnb_linear(compress_statistics=True)
    layer.weight.quant_state.offset = layer.weight.quant_state.offset.bfloat16()
    assert weight_of(layer).offset.dtype == torch.float32
    assert weight_of(layer) is weight_of(layer)


def test_state_of_the_module_serves_where_the_parameter_lost_it():
    """Catches a parameter that FSDP made anew, which has no quant_state."""
    layer = bnb_linear(quant_type="nf4")
    expected = dequantize(weight_of(layer))
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(dequantize(weight_of(layer)), expected)


def test_layers_that_are_not_quantized():
    """Catches a dense layer, an embedding or a not yet quantized layer read as packed bytes."""
    for module in (nn.Linear(8, 8), nn.Embedding(8, 8), bnb.nn.Embedding4bit(8, 64).to("cpu"), nn.LSTM(4, 4)):
        assert weight_of(module) is None
    assert weight_of(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True).to("cpu")) is None
    for module in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(ValueError, match="not quantized its weight yet"):
            weight_of(module)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_cpu_packing_is_undone(nested, storage):
    """Catches codes in the order of bitsandbytes' CPU kernel taken for rows, scales left transposed, and a layer that
    is packed, and rounded, again and again."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = bnb_linear(128, 96, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    before = dequantize(weight_of(layer), torch.float32)
    codes = weight_of(layer).packed.clone()
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.warns(UserWarning, match="repacked this weight for its CPU kernel"):
        weight = weight_of(layer)
    assert torch.equal(weight.packed, codes) and layer.weight.dtype == storage
    # Not nested: one rounding to bfloat16. Nested: quantized anew on top, in blocks of 256.
    error = (dequantize(weight, torch.float32) - before).abs()
    assert (error <= before.abs() * 2**-8 + (0.02 * before.abs().max() if nested else 0)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weight_of(layer) is weight
        with torch.no_grad():
            layer.eval()(torch.randn(2, 128))
        assert weight_of(layer) is weight


def test_weight_of_bitsandbytes_8bit_before_and_after_its_forward():
    """Catches scales looked for in one of their two places only, and int8 rows that were copied."""
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    before = weight_of(layer)
    assert before.data.data_ptr() == layer.weight.data_ptr() and weight_of(layer) is before
    layer(torch.randn(2, 64, dtype=torch.float16))
    assert layer.weight.SCB is None and layer.state.SCB is not None
    after = weight_of(layer)
    assert torch.equal(after.data, before.data) and torch.equal(after.scale, before.scale)
    assert weight_of(layer) is after
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    run = torch.compile(lambda x: linear_quantized(x, weight_of(layer)), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), linear_quantized(x, after))


@pytest.mark.parametrize("adapter", [None, "lora", "ia3"])
@pytest.mark.parametrize("make", [Linear4bit.from_linear, Linear8bit.from_linear])
def test_integers_are_refused(make, adapter):
    """Would catch a model that is trained on noise: LongT5, Switch and others cast x to the dtype of wo's weight, which
    is uint8 once it is quantized, and a layer that casts to its own dtype would compute from what is left of x."""
    layer = make(nn.Linear(64, 8))
    if adapter is not None:
        layer = {"lora": nn_layers.LoraLinear, "ia3": nn_layers.IA3Linear}[adapter].from_linear(layer)
    with pytest.raises(TypeError, match="floating-point tensor for a quantized layer, got torch.uint8.*skip_modules"):
        layer(torch.randn(3, 64).to(torch.uint8))
