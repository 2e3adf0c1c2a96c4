"""`ops.lora_linear` over 4-bit and 8-bit weights: every path, forward and every gradient, and what it keeps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.backend import DeviceInfo
from peftkern.ops import dequantize, lora_linear, quantize_4bit, quantize_8bit
from peftkern.ops._lora_linear_torch import keep_mask
from peftkern.ops.plan import Plan, plan_lora_linear_quantized
from peftkern.weights import Weight4bit, Weight8bit

MODULE = importlib.import_module("peftkern.ops.lora_linear_quantized")
BLOCKS = importlib.import_module("peftkern.ops._dense_blocks")
SCALING = 0.75
FORMATS = {
    "nf4, nested": lambda w: quantize_4bit(w, "nf4", 64, True),
    "fp4": lambda w: quantize_4bit(w, "fp4", 32, False),
    "int8": quantize_8bit,
}


@pytest.fixture(params=FORMATS)
def quantize(request):
    return FORMATS[request.param]


def make(quantize, M, N, K, R, dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """(x, A, B, bias) as leaves with NaN-padded rows, the quantized weight, dy."""
    adapter_dtype = adapter_dtype or dtype
    weight = quantize(torch.randn(N, K, device=device).to(dtype))
    shapes = [((M, K), dtype), ((R, K), adapter_dtype), ((N, R), adapter_dtype)]
    tensors = [padded_randn(*shape, pad=i + 1, dtype=kind, device=device) for i, (shape, kind) in enumerate(shapes)]
    tensors.append(torch.randn(N, device=device).to(dtype))
    dy = padded_randn(M, N, pad=5, dtype=dtype, device=device)
    return [t.detach().requires_grad_() for t in tensors], weight, dy


def run(tensors, weight, dy, backend="auto", **options):
    """[y, dX, dA, dB, dbias]."""
    x, a, b, bias = tensors
    for t in tensors:
        t.grad = None
    with use_backend(backend):
        y = lora_linear(x, weight, a, b, SCALING, bias, **options)
        y.backward(dy)
    return [y.detach(), *(t.grad for t in tensors)]


def truth_and_magnitude(tensors, weight, dy, keep=None, p=0.0):
    """The results of `run` in fp64 over the dequantized weight, of the tensors and of their absolute values."""
    w = dequantize(weight, dy.dtype).double()
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        x, a, b, bias = wide = [transform(t).requires_grad_() for t in tensors]
        truth = reference.lora_linear(x, transform(w), a, b, SCALING, bias, keep, p)
        truth.backward(transform(dy))
        results.append([truth.detach(), *(t.grad for t in wide)])
    return results


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("M, N, K, R", [(33, 48, 64, 16), (5, 17, 33, 3), (1, 130, 200, 12)])
def test_plain_path_has_the_bits_of_the_dequantized_weight(M, N, K, R, dtype, dropout_p, quantize):
    """Would catch a weight that is decoded in another dtype, and a backward that differs from the dense one's."""
    tensors, weight, dy = make(quantize, M, N, K, R, dtype)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([5])}
    quantized = run(tensors, weight, dy, **options)
    dense = run(tensors, dequantize(weight, dtype), dy, **options)
    for got, want in zip(quantized, dense, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype, masters", [(torch.float16, False), (torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("M, N, K, R", [(3, 48, 64, 16), (40, 66, 128, 12), (20, 34, 192, 40), (20, 33, 35, 5)])
def test_kernels_match_fp64(M, N, K, R, dtype, masters, dropout_p, quantize, device):
    """Would catch swapped nibbles, a scale of the wrong block, a lost expand, a mask that backward draws anew."""
    tensors, weight, dy = make(quantize, M, N, K, R, dtype, torch.float32 if masters else None, device)
    seed = torch.tensor([1234], device=device)
    outputs = run(tensors, weight, dy, "triton", dropout_p=dropout_p, seed=seed)
    keep = reference.dropout_mask(seed, M, K, dropout_p) if dropout_p else None
    results = truth_and_magnitude(tensors, weight, dy, keep, dropout_p)
    casts = 2 if masters else 0
    for out, truth, magnitude, rounded in zip(
        outputs, *results, (2 + casts, 2 + casts, 1 + casts, 1 + casts, 0), strict=True
    ):
        factor = torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded * factor)


def test_kernels_give_the_same_bits_twice(quantize, device):
    """Would catch a reduction in an order that is not fixed."""
    tensors, weight, dy = make(quantize, 40, 66, 128, 12, torch.bfloat16, device=device)
    runs = [run(tensors, weight, dy, "triton", dropout_p=0.2, seed=torch.tensor([3], device=device)) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def kept(run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A function's result, and the tensors that it kept for backward."""
    saved: list[torch.Tensor] = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(), saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_keeps_x_and_s_and_a_mask_and_no_weight(dropout_p, quantize):
    """Would catch a dequantized weight that lives until backward: it would undo what four bits save."""
    M, N, K, R = 24, 80, 96, 4
    tensors, weight, _ = make(quantize, M, N, K, R)
    x, a, b, bias = tensors
    _, saved = kept(lambda: lora_linear(x, weight, a, b, SCALING, bias, dropout_p=dropout_p))
    activations = [t for t in saved if all(t is not p for p in (a, b))]
    assert any(t is x for t in activations)
    expected = x.nbytes + M * R * 4 + (M * K if dropout_p else 0)
    assert sum(t.nbytes for t in activations) == expected


def test_backward_without_dx_never_decodes_the_weight(quantize, monkeypatch):
    """Would catch work for a gradient that nobody asked for: the first layer's input needs none."""
    tensors, weight, dy = make(quantize, 24, 80, 96, 4)
    tensors[0].requires_grad_(False)
    x, a, b, bias = tensors
    y = lora_linear(x, weight, a, b, SCALING, bias)
    monkeypatch.setattr(BLOCKS, "_write_dense", None)
    y.backward(dy)
    want = run([tensors[0].detach(), *tensors[1:]], dequantize(weight, x.dtype), dy)
    assert torch.equal(a.grad, want[2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_blocks_of_rows_that_share_a_buffer(dropout_p, quantize, monkeypatch):
    """Would catch a block used after the next has overwritten it, and blocks cut inside a group of scales."""
    tensors, weight, dy = make(quantize, 20, 512, 64, 6)
    seed = torch.tensor([2])
    monkeypatch.setattr(BLOCKS, "BUFFER_BYTES", 200 * 64 * 4)
    calls, write = [], BLOCKS._write_dense
    monkeypatch.setattr(BLOCKS, "_write_dense", lambda *arguments: (calls.append(arguments), write(*arguments)))
    outputs = run(tensors, weight, dy, dropout_p=dropout_p, seed=seed)
    assert len(calls) > 2
    keep = keep_mask(seed, 20, 64, dropout_p) if dropout_p else None
    results = truth_and_magnitude(tensors, weight, dy, keep, dropout_p)
    for out, truth, magnitude in zip(outputs, *results, strict=True):
        assert_rounded(out, truth, magnitude, terms=20 + 512 + 64 + 6, rounded=4)


@pytest.mark.parametrize("path", ["triton", "cublas", "decode"])
@pytest.mark.parametrize("format", ["nf4, nested", "int8"])
def test_kernels_over_blocks_of_rows_match_fp64(format, path, monkeypatch, device):
    """Would catch a block that misses its columns of y or dY, its rows of B, its bias, or its part of dX, and an S or a
    mask of its own for each."""
    M, N, K, R, p = (7 if path == "decode" else 40), 700, 64, 6, 0.3
    quantize = FORMATS[format]
    monkeypatch.setattr(BLOCKS, "BUFFER_BYTES", 300 * K * 2)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(f"dequantize:{path}", "forced by a test"))
    tensors, weight, dy = make(quantize, M, N, K, R, torch.bfloat16, torch.float32, device)
    assert len(BLOCKS.blocks_of(weight, torch.bfloat16)) == 3
    seed = torch.tensor([1234], device=device)
    outputs = run(tensors, weight, dy, "triton", dropout_p=p, seed=seed)
    results = truth_and_magnitude(tensors, weight, dy, reference.dropout_mask(seed, M, K, p), p)
    for out, truth, magnitude, rounded in zip(outputs, *results, (4, 6, 3, 3, 0), strict=True):
        factor = torch.finfo(torch.bfloat16).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded * factor)


def test_operator_passes_opcheck(quantize):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    (x, a, b, bias), weight, _ = make(quantize, 6, 34, 66, 3)
    tensors, numbers = MODULE.flatten(weight)
    for seed, p in ((None, 0.0), (torch.tensor([9]), 0.2)):
        arguments = (x, tensors, a, b, bias, seed, numbers, SCALING, p, "dequantize:torch")
        assert set(torch.library.opcheck(MODULE._operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout_p, quantize):
    """Would catch a weight that Dynamo cannot take apart, and a seed frozen into the graph."""
    tensors, weight, dy = make(quantize, 6, 34, 66, 3)

    def step(x, a, b, bias):
        return lora_linear(x, weight, a, b, SCALING, bias, dropout_p=dropout_p)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (step, compiled):
        torch.manual_seed(3)
        for t in tensors:
            t.grad = None
        y = function(*tensors)
        y.backward(dy)
        grads.append([y.detach(), *(t.grad for t in tensors)])
    for eager, traced in zip(*grads, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout(reentrant, quantize):
    """Would catch a mask that the recomputation draws anew."""
    tensors, weight, dy = make(quantize, 6, 34, 66, 3)

    def step(x, a, b, bias):
        return lora_linear(x, weight, a, b, SCALING, bias, dropout_p=0.5)

    grads = []
    for function in (step, lambda *args: checkpoint(step, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        for t in tensors:
            t.grad = None
        function(*tensors).backward(dy)
        grads.append([t.grad for t in tensors])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_autocast_takes_the_weight_in_its_dtype(quantize):
    """Would catch scales cast to bfloat16 on the way, which changes most weights."""
    (x, a, b, bias), weight, _ = make(quantize, 6, 34, 66, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, a, b, SCALING, bias)
    cast_x, cast_bias = (t.detach().bfloat16() for t in (x, bias))
    want = lora_linear(cast_x, dequantize(weight, torch.bfloat16), a, b, SCALING, cast_bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def test_empty_input(quantize):
    """Would catch a launch on an empty grid."""
    (_, a, b, bias), weight, _ = make(quantize, 1, 34, 66, 3)
    x = torch.empty(0, 66, requires_grad=True)
    y = lora_linear(x, weight, a, b, SCALING, bias)
    y.sum().backward()
    assert y.shape == (0, 34)
    assert x.grad.shape == (0, 66)
    assert not a.grad.any()


def test_wrong_arguments_are_named(quantize):
    """Would catch a shape error that surfaces as a message about a product inside."""
    (x, a, b, bias), weight, _ = make(quantize, 4, 34, 66, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 66\]"):
        lora_linear(x[:, :-1], weight, a, b, SCALING, bias)
    with pytest.raises(ValueError, match=r"lora_B: expected shape \[34, 3\]"):
        lora_linear(x, weight, a, b[:-1], SCALING, bias)
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16"):
        lora_linear(x.double(), weight, a.double(), b.double(), SCALING)
    with pytest.raises(TypeError, match="weight: expected a tensor, a Weight4bit or a Weight8bit, got list"):
        lora_linear(x, [weight], a, b, SCALING)


CARDS = {arch: DeviceInfo("cuda", arch) for arch in (80, 89, 90)}


def path(M, arch=90, N=4096, K=4096, blocksize=64, dtype=torch.bfloat16, **options):
    return plan_lora_linear_quantized(M, N, K, 16, blocksize, dtype, CARDS[arch], **options).path


@pytest.mark.parametrize("arch", CARDS)
def test_plan_decodes_in_the_kernel_for_few_tokens_and_writes_out_for_many(arch):
    """Would catch a crossover that is lost: fused at 8192 tokens decodes each weight 64 times."""
    assert path(1, arch) == path(16, arch) == "decode_4bit"
    assert path(17, arch) == path(128, arch) == "fused_4bit"
    assert path(8192, arch) == "dequantize:triton"


def test_plan_of_what_fused_kernels_cannot_take():
    """Would catch an odd row (whose bytes hold two rows) given to kernels that read whole bytes of a row."""
    assert path(128, K=4095).startswith("dequantize:")
    assert path(1, blocksize=0) == "dequantize:decode"  # 8 bits
    assert path(128, blocksize=0) == "dequantize:cublas"
    assert path(128, backend="torch") == "dequantize:torch"


def test_plan_fuses_longer_on_a_card_with_little_bandwidth():
    """Would catch one threshold for all: at 512 tokens they differ."""
    assert path(512, 89) == "fused_4bit"
    assert path(512, 90) == "dequantize:cublas"


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_weight_are_the_rows_of_its_matrix(format):
    """Would catch a cut that takes another block's scales."""
    weight = FORMATS[format](torch.randn(1536, 96))
    quantum = weight.row_quantum
    dense = dequantize(weight, torch.float32)
    for rows in (slice(0, quantum), slice(quantum, 1536), slice(2 * quantum, 3 * quantum)):
        part = weight.rows(rows)
        assert isinstance(part, Weight4bit | Weight8bit)
        assert torch.equal(dequantize(part, torch.float32), dense[rows])
