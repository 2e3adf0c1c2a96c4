"""`ops.dora_linear` and `dora_norm` on the plain path: meaning, gradients, what they keep, torch's machinery."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from dora_data import SCALING, apply, check, make, run, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.backend import DeviceInfo
from peftkern.ops import dequantize, dora_linear, dora_norm, quantize_4bit, quantize_8bit
from peftkern.ops._lora_linear_torch import keep_mask
from peftkern.ops.dora_linear import _flatten, _operator
from peftkern.ops.plan import Plan, plan_dora_linear, plan_dora_norm

MODULE = importlib.import_module("peftkern.ops.dora_linear")
CALL = importlib.import_module("peftkern.ops._dora_linear_call")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 64, 64, 16), (1, 17, 33, 1), (65, 130, 200, 12), (7, 1, 1, 3), (33, 48, 40, 70)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K, R", SHAPES)
def test_output_and_gradients_match_fp64(M, N, K, R, dtype, masters, p):
    """Would catch a norm of the wrong axis or with a gradient, c on one of the two products only, dropout of the base,
    a read past a row's end (the padding is NaN)."""
    tensors = make(M, N, K, R, dtype, masters=masters)
    dy, seed = padded_randn(M, N, pad=5, dtype=dtype), torch.tensor([11])
    outputs = run(tensors, dy, dropout_p=p, seed=seed)
    assert outputs[0].dtype == dtype and [t.dtype for t in tensors] == [g.dtype for g in outputs[1:]]
    check(outputs, tensors, dy, keep_mask(seed, M, K, p) if p else None, p)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    """Would catch any gradient formula that is only nearly right.

    A and B change the norm, through which no gradient flows, so it is given: what finite differences see is then what
    the formula says."""
    tensors = [t.detach().double().requires_grad_() for t in make(6, 5, 7, 3)]
    x = tensors[0].detach().reshape(2, 3, 7).requires_grad_()
    norm, seed = dora_norm(*tensors[1:4], SCALING), torch.tensor([5])

    def function(*t):
        return apply(t, norm=norm, dropout_p=p, seed=seed)

    assert torch.autograd.gradcheck(function, (x, *tensors[1:]))


def test_the_norm_that_is_given_is_used_and_the_one_worked_out_is_the_same():
    """Would catch a norm that is ignored, or one that is not what `dora_norm` gives."""
    tensors = make(6, 5, 7, 3)
    norm = dora_norm(*tensors[1:4], SCALING)
    assert not norm.requires_grad and norm.dtype == torch.float32
    assert torch.equal(apply(tensors), apply(tensors, norm=norm))
    bias = tensors[5]
    torch.testing.assert_close(apply(tensors, norm=2 * norm) - bias, (apply(tensors) - bias) / 2)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_same_as_peft(p):
    """Would catch another meaning than PEFT's: which products c scales, what dropout reaches, the bias."""
    peft = pytest.importorskip("peft")
    from torch import nn

    config = peft.LoraConfig(r=3, lora_alpha=2, use_dora=True, lora_dropout=p, target_modules=["l"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"l": nn.Linear(7, 5)}))["l"]
    x, weight, lora_A, lora_B, magnitude, bias = (t.detach() for t in make(9, 5, 7, 3))
    learned = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"])
    with torch.no_grad():
        for module, t in zip((layer.base_layer, *learned), (weight, lora_A, lora_B, magnitude), strict=True):
            module.weight.copy_(t)
        layer.base_layer.bias.copy_(bias)
    parameters = [module.weight for module in learned]
    mine = [t.clone().requires_grad_() for t in (lora_A, lora_B, magnitude)]
    seed = torch.tensor([3])
    if p:
        keep = keep_mask(seed, 9, 7, p)
        layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: args[0] * keep / (1 - p))
    y = dora_linear(x, weight, *mine, 2 / 3, bias, dropout_p=p, seed=seed)
    want = layer(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    grads = zip(
        torch.autograd.grad(y.sin().sum(), mine), torch.autograd.grad(want.sin().sum(), parameters), strict=True
    )
    for got, theirs in grads:
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_that_points_nowhere_gives_the_bias_alone():
    """Would catch 0 / 0, which would make the whole model NaN for one pruned row; and a NaN in the weight that is
    taken for such a row and hidden."""
    tensors = make(6, 5, 7, 3, grad=False)
    tensors[1][2], tensors[3][2], tensors[4][:] = 0.0, 0.0, 1.5
    for t in tensors:
        t.requires_grad_()
    outputs = run(tensors, torch.randn(6, 5))
    assert torch.equal(outputs[0][:, 2], tensors[5].detach()[2].expand(6)) and outputs[5][2] == 0
    assert all(t.isfinite().all() for t in outputs)
    with torch.no_grad():
        tensors[1][1, 0] = float("nan")
        assert apply(tensors)[:, 1].isnan().all()


@pytest.mark.parametrize("kind", ["dense", "dropout", "nf4", "int8"])
def test_operator_passes_opcheck(kind):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    x, w, *rest, bias = make(6, 64, 64, 3)
    weight = {"nf4": quantize_4bit, "int8": quantize_8bit}.get(kind, lambda w: w)(w.detach() if "4" in kind else w)
    tensors, sizes = _flatten(weight)
    seed, p = (torch.tensor([3]), 0.2) if kind == "dropout" else (None, 0.0)
    path = "dequantize:torch" if len(tensors) > 1 else "torch"
    arguments = (x, tensors, *rest, bias, seed, None, sizes, SCALING, p, path, True)
    assert set(torch.library.opcheck(_operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_without_a_graph_break(p):
    """Would catch a check or a plan that Dynamo cannot trace, and another result under the compiler."""
    tensors, seed = make(6, 5, 7, 3), torch.tensor([3])

    def function(*t):
        norm = dora_norm(*t[1:4], SCALING) if not p else None
        return apply(t, norm=norm, dropout_p=p, seed=seed)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    dy = torch.randn(6, 5)
    results = [run(tensors, dy, lambda t, f=f: f(*t)) for f in (function, compiled)]
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))


def test_compiles_with_dynamic_tokens():
    """Would catch a plan that turns the number of tokens into a constant and recompiles at each length."""
    _, *rest = make(6, 5, 7, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: apply([x, *rest]), backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for M in (40, 50, 60):
        x = torch.randn(M, 7)
        assert torch.equal(compiled(x), apply([x, *rest]))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.parametrize("use_reentrant, compiled", [(False, False), (True, False), (False, True)])
def test_checkpointing(use_reentrant, compiled):
    """Would catch something kept in forward that the recomputation does not make again, as another dropout mask."""
    tensors = make(12, 5, 7, 3)

    def function(x):
        return apply([x, *tensors[1:]], dropout_p=0.3)

    def checkpointed(x):
        return checkpoint(function, x, use_reentrant=use_reentrant)

    target = torch.compile(checkpointed, backend="aot_eager") if compiled else checkpointed
    results = []
    for step in (torch.compile(function, backend="aot_eager") if compiled else function, target):
        torch.manual_seed(4)
        results.append(run(tensors, torch.ones(12, 5), lambda t, f=step: f(t[0])))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_autocast():
    """Would catch a result in the wrong dtype, the norm of a rounded weight, gradients not in their parameter's
    dtype."""
    tensors = make(9, 5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply(tensors)
        norm = dora_norm(*tensors[1:4], SCALING)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in tensors} == {torch.float32}
    truth = reference.dora_norm(*(t.detach().double() for t in tensors[1:4]), SCALING)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)
    (truth, *_), (magnitude, *_) = truth_and_magnitude(tensors, torch.ones(9, 5))
    # x, W, bias, A, B, S, the base, u and the result are rounded to bf16; magnitude and norm are not.
    assert ((y.double() - truth).abs() <= 9 * torch.finfo(torch.bfloat16).eps / 2 * magnitude).all()


def kept(tensors, **options):
    """y, and the tensors that it kept for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        return apply(tensors, **options), saved


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_combination_of_gradients_and_what_is_kept(p):
    """Would catch work done, or activations kept, for gradients that nobody wants."""
    M, N, K, R = 8, 5, 7, 3
    options = {"dropout_p": p, "seed": torch.tensor([3])}
    everything = make(M, N, K, R)
    apply(everything, **options).square().sum().backward()
    for wanted in itertools.product((False, True), repeat=6):
        if not any(wanted):
            continue
        tensors = [t.detach().requires_grad_(want) for t, want in zip(everything, wanted, strict=True)]
        y, saved = kept(tensors, **options)
        y.square().sum().backward()
        for t, full, want in zip(tensors, everything, wanted, strict=True):
            assert (t.grad is not None) == want and (not want or torch.equal(t.grad, full.grad))
        needs_x, needs_w, needs_a, needs_b, needs_m, _ = wanted
        parameters = {t.data_ptr() for t in tensors[1:]}
        activations = [t for t in saved if t.data_ptr() not in parameters]
        x_kept = needs_a or needs_w
        products = needs_x or needs_w or needs_a or needs_b
        vectors = products * N + needs_m * N
        drops = bool(p) and (needs_x or needs_w or needs_a)
        expected = x_kept * M * K + needs_b * M * R + needs_m * M * N + vectors + drops * M * K
        assert sum(t.numel() for t in activations) == expected, wanted
        assert any(t.data_ptr() == tensors[0].data_ptr() for t in activations) == x_kept, "x is kept by reference"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    """Would catch activations kept alive under no_grad."""
    with mode():
        y = apply(make(8, 5, 7, 3))
    assert y.grad_fn is None and not y.requires_grad


def test_the_output_may_be_changed_in_place():
    """Would catch y that shares memory with what backward reads, or is a view to autograd."""
    tensors = make(8, 5, 7, 3)
    for shape in ((8, 7), (2, 4, 7)):
        x = tensors[0].detach().reshape(shape).requires_grad_()
        results = []
        for change in (lambda y: y.mul(3), lambda y: y.mul_(3)):
            y = change(apply([x, *tensors[1:]]))
            results.append(torch.autograd.grad(y.sum(), (x, *tensors[1:])))
        assert all(torch.equal(apart, in_place) for apart, in_place in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty_input(shape, p):
    """Would catch a crash, or gradients that are missing in place of zero, on an empty batch."""
    _, *rest = make(1, 5, 7, 3)
    x = torch.empty(shape, requires_grad=True)
    y = apply([x, *rest], dropout_p=p)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5) and x.grad.shape == shape
    assert not any(t.grad.any() for t in rest)


def test_strided_input_of_any_rank():
    """Would catch a wrong flattening of transposed activations, of a weight like Conv1D's, of a strided magnitude."""
    _, w, a, b, m, bias = make(1, 5, 7, 3, grad=False)
    for x in (torch.randn(7, 4, 3).permute(1, 2, 0), torch.randn(7), torch.randn(2, 3, 4, 7)[:, ::2]):
        want = reference.dora_linear(x, w, a, b, m, SCALING, bias)
        torch.testing.assert_close(dora_linear(x, w, a, b, m, SCALING, bias), want)
    transposed, spread, x = torch.randn(7, 5).t(), m.repeat_interleave(2)[::2], torch.randn(4, 7)
    want = reference.dora_linear(x, transposed, a, b, spread, SCALING)
    torch.testing.assert_close(dora_linear(x, transposed, a, b, spread, SCALING), want)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("path", ["torch", "torch_fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_plain_paths_match_fp64_over_blocks_of_rows(dtype, path, p, monkeypatch):
    """Would catch a fault in the path that this machine's CPU does not take, and in norms and outputs over several
    blocks of rows."""
    monkeypatch.setattr("peftkern.ops._ia3_linear_torch.BLOCK_ROWS", 16)
    monkeypatch.setattr("peftkern.ops._dora_linear_torch.BLOCK_ELEMENTS", 7 * 40)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(path, "forced by a test"))
    tensors, seed = make(50, 24, 40, 5, dtype, masters=True), torch.tensor([9])
    dy = padded_randn(50, 24, pad=3, dtype=dtype)
    outputs = run(tensors, dy, dropout_p=p, seed=seed)
    check(outputs, tensors, dy, keep_mask(seed, 50, 40, p) if p else None, p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("buffer_rows", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [lambda w: quantize_4bit(w, blocksize=32, double_quant=False), quantize_8bit])
def test_quantized_weights(quantize, dtype, buffer_rows, p, monkeypatch):
    """Would catch a block's norms or gradients that land in another's rows, and a weight decoded in another dtype.

    With the weight whole, results have the bits of the dequantized weight's."""
    M, N, K, R = 9, 200, 64, 4
    if buffer_rows:
        shared = importlib.import_module("peftkern.ops._dense_blocks")
        monkeypatch.setattr(shared, "BUFFER_BYTES", buffer_rows * K * dtype.itemsize)
    tensors, seed = make(M, N, K, R, dtype), torch.tensor([9])
    x, w, *rest = tensors
    weight = quantize(w.detach().contiguous())
    dense = dequantize(weight, dtype)
    dy = torch.randn(M, N).to(dtype)
    results = []
    for held in (weight, dense):
        leaves = [x, *rest]
        results.append(run(leaves, dy, lambda t, held=held: apply([t[0], held, *t[1:]], dropout_p=p, seed=seed)))
        norm = dora_norm(held, *rest[:2], SCALING, dtype=dtype)
        results[-1].append(norm)
    if not buffer_rows:
        assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
    blocks = 4 if buffer_rows else 0  # each block's part of dX and dA is rounded
    keep = keep_mask(seed, M, K, p) if p else None
    check(results[0][:-1], [x, dense, *rest], dy, keep, p, extra=blocks, which=(0, 1, 3, 4, 5, 6))


def test_nothing_of_a_quantized_weight_is_decoded_without_need(monkeypatch):
    """Would catch a backward that decodes the weight where x needs no gradient, and a forward that decodes it for its
    norms and again for its product."""
    x, w, *rest = make(9, 64, 64, 3)
    weight = quantize_4bit(w.detach().contiguous())
    decoded = []
    blocks = CALL.dense_blocks
    monkeypatch.setattr(CALL, "dense_blocks", lambda *args: decoded.append(1) or blocks(*args))
    apply([x.detach(), weight, *rest], dropout_p=0.1).sum().backward()
    assert len(decoded) == 1


def test_same_bits_on_two_runs_and_backward_keeps_its_path():
    """Would catch a reduction whose order is not fixed, or a backward that looks up the backend again."""
    runs = []
    tensors = make(65, 34, 70, 5)
    for _ in range(2):
        for t in tensors:
            t.grad = None
        with use_backend("torch"):
            y = apply(tensors)
        with use_backend("triton"):
            y.square().sum().backward()
        runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_used_twice_in_one_graph_and_double_backward_is_refused():
    """Would catch a backward that writes into what it saved, and second derivatives that are silently wrong."""
    tensors = make(8, 7, 7, 3)
    apply([apply(tensors), *tensors[1:]]).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    inner = reference.dora_linear(*wide[:5], SCALING, wide[5])
    reference.dora_linear(inner, *wide[1:5], SCALING, wide[5]).sum().backward()
    for got, want in zip(tensors, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(apply(tensors).square().sum(), tensors[0], create_graph=True)


def test_dropout_applies_in_training_only_and_a_seed_is_drawn():
    """Would catch dropout in evaluation, and one mask for all calls."""
    tensors = make(16, 5, 7, 3, grad=False)
    assert torch.equal(apply(tensors, dropout_p=0.5, training=False), apply(tensors))
    assert not torch.equal(apply(tensors, dropout_p=0.5), apply(tensors, dropout_p=0.5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("N, K, R", [(64, 64, 16), (1, 1, 1), (37, 200, 70)])
def test_norms_match_fp64_where_the_adapter_cancels_the_weight(N, K, R, dtype, monkeypatch):
    """Would catch norms from |W|^2 + 2 s <W A^T, B> + s^2 |B A|^2, which cancel, a row in the wrong block, a read past
    a row's end."""
    monkeypatch.setattr("peftkern.ops._dora_linear_torch.BLOCK_ELEMENTS", 10 * K)
    _, w, a, b, *_ = make(1, N, K, R, dtype, grad=False)
    w.copy_(-SCALING * (b.double() @ a.double()) * 0.99 + 0.01 * torch.randn(N, K))
    norm = dora_norm(w, a, b, SCALING)
    wide = [t.double() for t in (w, a, b)]
    truth = reference.dora_norm(*wide, SCALING)
    magnitude = reference.dora_norm(*(t.abs() for t in wide), SCALING)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_rounded(norm, truth, magnitude, terms=R + 2 + K)


BAD = [
    (0, lambda t: t.int(), TypeError, "x: expected float32"),
    (0, lambda t: t[:, :-1], ValueError, r"x: expected shape \[\.\.\., 7\]"),
    (0, lambda t: t.tolist(), TypeError, "x: expected a tensor"),
    (1, lambda t: t.bfloat16(), TypeError, "x in torch.float32 and weight in torch.bfloat16: cast x, or"),
    (1, lambda t: t[0], ValueError, "weight: expected shape"),
    (1, lambda t: None, TypeError, "weight: expected a tensor, a Weight4bit"),
    (2, lambda t: t[:, :-1], ValueError, "lora_A: expected shape"),
    (3, lambda t: t[:-1], ValueError, "lora_B: expected shape"),
    (4, lambda t: t[:-1], ValueError, r"magnitude: expected shape \[5\]"),
    (4, lambda t: t[:, None], ValueError, r"magnitude: expected shape \[5\]"),
    (4, lambda t: t.half(), TypeError, "magnitude: expected torch.float32, got torch.float16"),
    (4, lambda t: None, TypeError, "magnitude: expected a tensor"),
    (4, lambda t: t.to("meta"), ValueError, "magnitude: expected device cpu"),
    (5, lambda t: t[:-1], ValueError, "bias: expected shape"),
    (5, lambda t: 3.0, TypeError, "bias: expected a tensor"),
]


@pytest.mark.parametrize("index, damage, error, message", BAD)
def test_wrong_arguments_are_named(index, damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    tensors = make(4, 5, 7, 3, grad=False)
    tensors[index] = damage(tensors[index])
    with pytest.raises(error, match=message):
        apply(tensors)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"norm": torch.ones(4)}, ValueError, r"norm: expected shape \[5\]"),
        ({"norm": torch.ones(5).double()}, TypeError, "norm: expected torch.float32"),
        ({"norm": 1.0}, TypeError, "norm: expected a tensor"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"dropout_p": 0.1, "seed": 3}, TypeError, "seed: expected an int64 tensor"),
        ({"scaling": float("nan")}, ValueError, "dora_linear: scaling"),
        ({"scaling": "1"}, TypeError, "dora_linear: scaling"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    """Would catch a norm that broadcasts, and a number that is none."""
    tensors = make(4, 5, 7, 3, grad=False)
    with pytest.raises(error, match=message):
        dora_linear(*tensors[:5], options.pop("scaling", 1.0), **options)


@pytest.mark.parametrize(
    "index, damage, error, message",
    [
        (0, lambda t: t.int(), TypeError, "weight: expected float32"),
        (0, lambda t: t.tolist(), TypeError, "weight: expected a tensor, a Weight4bit"),
        (0, lambda t: t[0], ValueError, "weight: expected shape"),
        (1, lambda t: t[:, 1:], ValueError, "lora_A: expected shape"),
        (2, lambda t: t[1:], ValueError, "lora_B: expected shape"),
        (2, lambda t: None, TypeError, "lora_B: expected a tensor"),
    ],
)
def test_wrong_arguments_of_the_norm_are_named(index, damage, error, message):
    """Would catch a norm of what is no matrix."""
    matrices = make(1, 5, 7, 3, grad=False)[1:4]
    matrices[index] = damage(matrices[index])
    with pytest.raises(error, match=f"dora_norm: {message}"):
        dora_norm(*matrices, 1.0)


HOPPER, NATIVE_CPU = DeviceInfo("cuda", 90), DeviceInfo("cpu", 0, "no CPU backend")


@pytest.mark.parametrize(
    "changes, path",
    [
        ({}, "triton"),
        ({"M": 16}, "decode"),
        ({"M": 0}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"device": NATIVE_CPU}, "torch"),
        ({"blocksize": 64, "M": 16}, "dequantize:decode"),
        ({"blocksize": 64, "M": 16, "decodes": True}, "decode_4bit"),
        ({"blocksize": 64, "M": 128, "decodes": True}, "fused_4bit"),
        ({"blocksize": 0, "decodes": True}, "dequantize:triton"),
        ({"blocksize": 64}, "dequantize:triton"),
        ({"blocksize": 64, "backend": "torch"}, "dequantize:torch"),
        ({"blocksize": 64, "backend": "torch", "decodes": True}, "dequantize:torch"),
    ],
)
def test_the_plan(changes, path):
    """Would catch a silent fallback, and a 4-bit weight decoded by its product while its norms need it dense."""
    sizes = {"M": 8192, "N": 4096, "K": 4096, "R": 16, "blocksize": None, "decodes": False}
    plan = plan_dora_linear(**(sizes | {"dtype": torch.bfloat16, "device": HOPPER} | changes))
    assert plan.path == path and "norms" in plan.reason


def test_the_plan_of_norms():
    """Would catch a promise of kernels that is not kept."""
    assert plan_dora_norm(64, torch.bfloat16, HOPPER).path == "triton"
    assert plan_dora_norm(64, torch.bfloat16, NATIVE_CPU).path == "torch"
    with pytest.raises(RuntimeError, match="dora_norm"):
        plan_dora_norm(64, torch.float64, HOPPER, "triton")
