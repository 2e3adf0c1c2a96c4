"""`ops.lora_linear_shared` of at most 16 tokens: two launches for all projections, over dense and 4-bit weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import padded_randn
from peftkern import reference, use_backend
from peftkern.ops import lora_linear_shared, quantize_4bit
from peftkern.ops.plan import APART
from peftkern_kernels import launch
from peftkern_kernels.lora_decode import group_decode_calls
from peftkern_kernels.lora_decode_4bit import group_decode_4bit_calls
from peftkern_kernels.lora_decode_finish import Projection
from quantized_data import as_packed
from test_lora_linear_shared import SCALINGS, Projections, check, nf4, one_by_one

DIFFERENT = (0.5, 2.0, -1.25, 1.5)
FOUR = [(9, 2), (1, 5), (70, 16), (31, 4)]


def fp4(w):
    return quantize_4bit(w, "fp4", 32, False)


def against_fp64(projections, path, p=0.0, masters=False):
    """Outputs and gradients of the kernels' path, which must be `path`, within their bounds."""
    (M, K), n = projections.x.shape, len(projections.weights)
    seed = torch.tensor([1234], device=projections.x.device)
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    with use_backend("triton"):
        assert projections.plan("triton").path == path
        got = projections.run(DIFFERENT, dropout_p=p, seed=seed)
    # S or dS and the result, and what masters add; of dX each projection's sum besides.
    casts = 2 if masters else 0
    roundings = (2 + casts, 2 + n + casts, 1 + casts, 1 + casts)
    check(projections, got, projections.truth(DIFFERENT, keep, p), roundings=roundings, dtype=projections.x.dtype)


@pytest.mark.parametrize(
    "M, K, outs, dtype, masters, bias, p",
    [
        (1, 33, [(70, 12), (17, 3)], torch.float32, False, True, 0.0),
        (3, 67, [(17, 70), (130, 8), (5, 1)], torch.bfloat16, True, False, 0.4),
        (16, 64, FOUR, torch.float16, False, True, 0.4),
        (16, 41, [(24, 7)], torch.float32, False, False, 0.4),
        (3, 1, [(1, 1), (2, 1)], torch.bfloat16, False, True, 0.0),
    ],
)
def test_dense_weights_match_fp64(M, K, outs, dtype, masters, bias, p, device):
    """Would catch a program that takes a neighbouring projection's rows, sizes, scaling or bias; a mask of x W^T; S in
    another projection's columns; a dX that lacks a projection."""
    against_fp64(Projections(M, K, outs, dtype, masters, bias, device), "decode", p, masters)


@pytest.mark.parametrize("quantize", [nf4, fp4], ids=["nested", "fp32 scales"])
@pytest.mark.parametrize(
    "M, K, outs, dtype, masters, bias, p",
    [
        (1, 96, [(70, 12), (17, 3)], torch.bfloat16, False, False, 0.4),
        (3, 160, [(17, 20), (66, 8), (5, 1)], torch.bfloat16, True, True, 0.0),
        (16, 64, FOUR, torch.float16, False, True, 0.4),
    ],
)
def test_4bit_weights_match_fp64(M, K, outs, dtype, masters, bias, p, quantize, device):
    """Would catch codes of one projection scaled by another's blocks, or decoded by another's offset."""
    against_fp64(Projections(M, K, outs, dtype, masters, bias, device, quantize), "decode_4bit", p, masters)


@pytest.mark.parametrize("quantize", [None, nf4], ids=["dense", "nf4"])
def test_same_bits_as_single_calls_in_two_launches(quantize, monkeypatch, device):
    """K is split here. Would catch a group whose arithmetic is another than that of one, and one that launches for each
    of its projections."""
    projections = Projections(3, 608, [(70, 12), (17, 3), (33, 16)], torch.float16, device=device, quantize=quantize)
    seed = torch.tensor([77], device=device)
    names, before = [], launch.Call.run
    monkeypatch.setattr(launch.Call, "run", lambda call: names.append(call.name) or before(call))
    with use_backend("triton"), torch.no_grad():
        expected = one_by_one(projections, DIFFERENT, dropout_p=0.4, seed=seed)
        singles = len(names)
        got = lora_linear_shared(
            projections.x, projections.weights, projections.As, projections.Bs, DIFFERENT[:3], projections.biases,
            dropout_p=0.4, seed=seed,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if device == "cpu":  # elsewhere launches may be replayed
        assert singles == 6 and len(names) == 8


def transposed_weight(p):
    p.weights[1] = p.weights[1].t().contiguous().t()


def no_bias(p):
    p.biases[1] = None


def masters(p):
    p.As[1], p.Bs[1] = (t.detach().float().requires_grad_() for t in (p.As[1], p.Bs[1]))


@pytest.mark.parametrize(
    "change, words",
    [
        (transposed_weight, "weights are stored differently"),
        (no_bias, "some have a bias and some have not"),
        (masters, "adapters differ in dtype or strides"),
    ],
)
def test_unlike_projections_run_apart(change, words, device):
    """Would catch pointers of two dtypes, or strides of another projection, in one launch."""
    projections = Projections(2, 20, [(9, 2), (12, 3)], torch.bfloat16, device=device)
    change(projections)
    plan = projections.plan("triton")
    assert plan.path == APART and words in plan.reason and plan.reason.startswith("2 tokens")
    with use_backend("triton"), torch.no_grad():
        got = lora_linear_shared(
            projections.x, projections.weights, projections.As, projections.Bs, SCALINGS[:2], projections.biases
        )
        assert all(torch.equal(a, b) for a, b in zip(got, one_by_one(projections), strict=True))


def test_4bit_weights_of_two_kinds_run_apart(device):
    """Would catch one projection's blocksize or kind of scales taken for all."""
    projections = Projections(2, 64, [(9, 2), (12, 3)], torch.bfloat16, device=device, quantize=nf4)
    projections.weights[1] = fp4(projections.dense[1])
    assert "weights are stored differently" in projections.plan("triton").reason


def test_few_tokens_compiled(device):
    """Would catch a graph break where the plan looks at addresses."""
    projections = Projections(2, 64, [(9, 2), (12, 3)], torch.bfloat16, device=device, quantize=nf4)
    assert projections.plan("triton").path == "decode_4bit"

    def run(x):
        return lora_linear_shared(x, projections.weights, projections.As, projections.Bs, SCALINGS[:2])

    with use_backend("triton"), torch.no_grad():
        expected = run(projections.x)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(projections.x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


def test_builders_refuse_what_one_launch_cannot_take():
    """Would catch a fifth projection that is left out, or kinds that one set of strides and dtypes does not fit."""
    x = torch.randn(2, 8)

    def projection(N=6, R=2, of=torch.float32, bias=None):
        s_out = torch.empty(2, 12)[:, :R]
        return Projection(torch.randn(R, 8).to(of), torch.randn(N, R).to(of), 1.0, torch.empty(2, N), s_out, bias)

    weight = torch.randn(6, 8)
    with pytest.raises(ValueError, match="projections: expected 1 to 4, got 5"):
        group_decode_calls(x, [weight] * 5, [projection()] * 5, arch=0)
    with pytest.raises(ValueError, match="weights: expected one for each of 2"):
        group_decode_calls(x, [weight], [projection()] * 2, arch=0)
    for other in (projection(of=torch.float64), projection(bias=torch.randn(6))):
        with pytest.raises(ValueError, match="(a|bias): expected one dtype and one order of strides"):
            group_decode_calls(x, [weight] * 2, [projection(), other], arch=0)
    with pytest.raises(ValueError, match="weight: expected one dtype"):
        group_decode_calls(x, [weight, padded_randn(6, 8, pad=1, dtype=torch.float32)], [projection()] * 2, arch=0)
    assert len(group_decode_calls(x, [weight] * 2, [projection(), projection(R=3)], arch=0)) == 2
    packed = [as_packed(make(torch.randn(6, 8))) for make in (nf4, fp4)]
    with pytest.raises(ValueError, match="weights: expected one blocksize"):
        group_decode_4bit_calls(x, packed, [projection()] * 2, arch=0)
