"""`ops.multi_lora_linear_shared` on Triton kernels, through the public operation, in Triton's interpreter.

What the launches compute is tested in test_multi_lora_linear_shared_calls.py; here, who gets which of their results.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from multi_data import layer  # noqa: E402
from numerics import padded_randn  # noqa: E402
from peftkern import reference, use_backend  # noqa: E402
from peftkern.backend import device_info  # noqa: E402
from peftkern.ops import dequantize, quantize_4bit, quantize_8bit  # noqa: E402
from peftkern.ops.plan import APART, Plan  # noqa: E402
from test_multi_lora_linear_shared import (  # noqa: E402
    MIXED,
    check_against_fp64,
    gradients,
    params_of,
    projections,
    singly,
    together,
)

MODULE = importlib.import_module("peftkern.ops.multi_lora_linear_shared")
SINGLE = importlib.import_module("peftkern.ops.multi_lora_linear")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or bool(device_info(torch.device("cpu")).triton), reason="runs in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("triton"):
        yield


def forced(monkeypatch, path):
    for module in (MODULE, SINGLE):
        monkeypatch.setattr(module, "plan_for", lambda *_: Plan(path, "forced by a test"))


@pytest.mark.parametrize("M, path", [(5, None), (20, None), (70, "cublas"), (70, "triton")])
def test_each_projection_matches_fp64(M, path, monkeypatch):
    """Would catch S, or a gradient, that is handed to another projection than the launch made it for."""
    if path is not None:  # the plan's own choice between the two needs a GPU's measurements
        forced(monkeypatch, path)
    x, held, ids = projections(M, 24, torch.float32, MIXED)
    dys = [padded_randn(M, w.shape[0], pad=5, dtype=torch.float32) for w, *_ in held]
    check_against_fp64(gradients(lambda: together(x, held, ids), x, held, dys), x, held, ids, dys, terms=250, rounded=6)


def test_one_mask_for_all_and_an_unused_output():
    """Would catch masks by projection, and a projection's rank found in another's place where one has no dY."""
    x, held, ids = projections(10, 24, torch.float32, MIXED)
    dys, options = [None, torch.randn(10, 17), torch.randn(10, 70)], {"dropout_p": 0.4, "seed": torch.tensor([9])}
    results = [gradients(lambda f=f: f(x, held, ids, **options), x, held, dys) for f in (together, singly)]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["dequantize:cublas", "dequantize:decode", "fused_4bit", "decode_4bit"])
def test_quantized_weights(path, monkeypatch):
    """Would catch weights that are decoded in another's place, or not at all."""
    forced(monkeypatch, path)
    x, _, ids = projections(10, 64, torch.float16)
    quantize = quantize_8bit if path == "dequantize:cublas" else quantize_4bit
    held = [
        (quantize(torch.randn(N, 64).half()), torch.randn(N).half(), layer(N, 64, torch.float16, ranks=ranks))
        for N, ranks in ((64, MIXED[0]), (32, MIXED[1]))
    ]
    dys = [torch.randn(10, N).half() for N in (64, 32)]
    results = [gradients(lambda f=f: f(x, held, ids), x, held, dys) for f in (together, singly)]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-2, atol=0.25)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("quantize", [lambda w: quantize_4bit(w, double_quant=False), quantize_8bit])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M, path, count", [(70, "cublas", 2), (70, "cublas", 1), (10, "decode", 1), (70, "triton", 1)])
def test_weights_that_are_written_out_one_after_another_match_fp64(
    M, path, count, dropout_p, quantize, blocks, monkeypatch
):
    """Would catch a block of a weight that is added to other columns of y than its rows are, or to another
    projection's; a product that is added twice or to what has no adapters yet; and dX begun anew by one."""
    forced(monkeypatch, f"dequantize:{path}")
    x, _, ids = projections(M, 64)
    held = [
        (quantize(torch.randn(N, 64)), torch.randn(N), layer(N, 64, ranks=ranks))
        for N, ranks in zip((96, 48)[:count], MIXED, strict=False)
    ]
    if blocks > 1:
        monkeypatch.setattr("peftkern.ops._dense_blocks.BUFFER_BYTES", 64 * 4 * (96 // blocks))
    dys, seed = [padded_randn(M, w.shape[0], pad=5, dtype=torch.float32) for w, *_ in held], torch.tensor([77])
    dense = [(dequantize(w, torch.float32), b, pool) for w, b, pool in held]
    plan = MODULE.shared_plan_for(x, *map(list, zip(*[(w, p, b) for w, b, p in held], strict=True)), "triton")
    assert plan.path == ("dequantize:cublas" if count > 1 else APART)
    got = gradients(lambda: together(x, held, ids, dropout_p=dropout_p, seed=seed), x, held, dys)
    known = torch.where(ids < 5, ids, -1)
    keep = reference.multi_dropout_mask(seed, known, 64, dropout_p) if dropout_p else None
    check_against_fp64(got, x, dense, ids, dys, terms=300, rounded=6, keep=keep, p=dropout_p)


def unlike(x, held):
    """Projections that one launch cannot serve, each with the words for it."""
    (w0, b0, p0), (w1, b1, p1), *_ = held
    yield [(w0, b0, p0), (w1, None, p1)], "some have a bias"
    yield [(w0, b0, p0), (w1.contiguous(), b1, p1)], "stored differently"
    yield [(w0, b0, p0), (w1.t().contiguous().t(), b1, p1)], "stored differently"
    yield [(w0, b0, p0), (w1, b1, layer(17, 24, torch.float16, torch.float32))], "slots or dtype"


def test_what_is_kept_apart_is_right_all_the_same():
    """Would catch a pool, a bias or a weight that is read as the first's."""
    x, held, ids = projections(7, 24, torch.float16, MIXED)
    for pair, words in unlike(x, held):
        plan = MODULE.shared_plan_for(x, *map(list, zip(*[(w, p, b) for w, b, p in pair], strict=True)), "triton")
        assert plan.path == APART and words in plan.reason
        dys = [torch.randn(7, w.shape[0]).half() for w, *_ in pair]
        results = [gradients(lambda f=f, pair=pair: f(x, pair, ids), x, pair, dys) for f in (together, singly)]
        for a, b in zip(*(y + g for y, g in results), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert MODULE.shared_plan_for(x, *map(list, zip(*[(w, p, b) for w, b, p in held], strict=True)), "triton").path == (
        "decode"
    )


def test_only_one_projection_learns():
    """Would catch outputs with a history that single calls have not, and parameters out of step with the launches."""
    x, held, ids = projections(7, 24, torch.float32, MIXED)
    for *_, pool in (held[0], held[2]):
        for t in params_of(pool):
            t.requires_grad_(False)
    x = x.detach()
    dys = [None, torch.randn(7, 17), None]
    assert [y.requires_grad for y in together(x, held, ids)] == [False, True, False]
    _, got = gradients(lambda: together(x, held, ids), x, held, dys)
    _, want = gradients(lambda: singly(x, held, ids), x, held, dys)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    learnt = [t is not None for t in got]
    assert any(learnt) and not any(learnt[:9]) and not any(learnt[-8:])
