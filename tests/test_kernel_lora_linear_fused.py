"""The frozen GEMM with shrink and expand inside: its kernel against fp64, and `lora_linear` on the path "fused"."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from numerics import assert_rounded, lora_linear_truth, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import lora_linear
from peftkern.ops import plan as plans
from peftkern_kernels import lora_linear_fused
from peftkern_kernels.gemm_tables import Tile
from peftkern_kernels.launch import run_all
from peftkern_kernels.lora_linear_fused import MOST_RANK, fused_calls, fused_tile

DTYPES = [torch.float16, torch.bfloat16]
SCALING = 0.75
SMALL = Tile(32, 32, 32, num_warps=4, num_stages=2, group_m=2, tma=True, persistent=True)
# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.lora_linear")


def operands(M, N, K, R, dtype, device, *, transposed=False, masters=False, bias=False):
    """x, weight, a, b, bias with rows that descriptors take, NaN between them."""
    factors = torch.float32 if masters else dtype
    x = padded_randn(M, K, pad=8, dtype=dtype, device=device)
    weight = padded_randn(*((K, N) if transposed else (N, K)), pad=16, dtype=dtype, device=device)
    a = padded_randn(*((K, R) if transposed else (R, K)), pad=3, dtype=factors, device=device)
    b = padded_randn(*((R, N) if transposed else (N, R)), pad=5, dtype=factors, device=device)
    if transposed:
        weight, a, b = weight.t(), a.t(), b.t()
    return x, weight, a, b, padded_randn(1, N, pad=1, dtype=dtype, device=device)[0] if bias else None


def launch(tensors, s=None, *, tile=SMALL, programs=0):
    """(out, s, flags): all of the launches' results, with canary rows and columns behind out and s."""
    x, weight, a, b, bias = tensors
    M, N, R = x.shape[0], weight.shape[0], a.shape[0]
    out = torch.full((M + 1, N + 8), float("nan"), dtype=x.dtype, device=x.device)
    if s is None:
        s = torch.full((M + 1, R + 3), float("nan"), dtype=x.dtype, device=x.device)
    calls = fused_calls(
        x, weight, a, b, SCALING, out[:M, :N], s[:M, :R], bias=bias, tile=tile, arch=0, programs=programs
    )
    run_all(calls)
    return out, s, calls[1].args["ready_ptr"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed, masters, bias", [(False, False, True), (True, False, False), (True, True, True)])
@pytest.mark.parametrize(
    "M, N, K, R", [(1, 40, 32, 1), (17, 136, 200, 12), (65, 40, 40, 40), (130, 72, 32, 16), (33, 264, 24, 64)]
)
def test_matches_fp64(M, N, K, R, transposed, masters, bias, dtype, device):
    """Catches a first column of tiles that is done twice or not at all, ranks past R that are not zero, a scaling that
    is lost or applied twice, s rounded after its use, and a store over an edge."""
    tensors = operands(M, N, K, R, dtype, device, transposed=transposed, masters=masters, bias=bias)
    out, s, ready = launch(tensors)
    x, weight, a, b = (t.double() for t in tensors[:4])
    cast = float(masters)  # rounded to dtype before the product
    magnitude = SCALING * x.abs() @ a.abs().T
    assert_rounded(s[:M, :R], SCALING * x @ a.T, magnitude, terms=K + 1, rounded=cast)
    kept = s[:M, :R].double()
    truth, magnitude = x @ weight.T + kept @ b.T, x.abs() @ weight.abs().T + kept.abs() @ b.abs().T
    if bias:
        truth, magnitude = truth + tensors[4].double(), magnitude + tensors[4].double().abs()
    assert_rounded(out[:M, :N], truth, magnitude, terms=K + R + 1, rounded=cast)
    assert out[M].isnan().all() and out[:, N:].isnan().all(), "out stored past its edge"
    assert s[M].isnan().all() and s[:, R:].isnan().all(), "s stored past its edge"
    assert ready.tolist() == [1] * -(-M // SMALL.block_m), "a flag that a GPU's programs would wait for for ever"


@pytest.mark.parametrize("programs", [2, 3, 5, 40])
@pytest.mark.parametrize("M, N", [(130, 136), (33, 264), (20, 72)])
def test_programs_share_the_tiles(M, N, programs, device):
    """The interpreter runs programs one after another, so s is there from a run of a single one. Catches a tile that no
    program takes, or that two take at different coordinates; the same bits however many there are."""
    tensors = operands(M, N, 40, 12, torch.bfloat16, device, bias=True)
    alone, s, _ = launch(tensors, programs=1)
    shared, again, _ = launch(tensors, s.clone(), programs=programs)
    assert torch.equal(shared[:M, :N], alone[:M, :N])
    assert torch.equal(again[:M, :12], s[:M, :12])


def test_flags_are_lowered_before_each_product(device):
    """Catches a flag still up from the launch before, in memory that is used again: s would be read too early."""
    tensors = operands(600, 40, 32, 4, torch.bfloat16, device)
    out, s = tensors[0].new_empty(600, 40), tensors[0].new_empty(600, 4)
    prepare, product = fused_calls(*tensors[:4], SCALING, out, s, tile=SMALL, arch=0)
    ready = product.args["ready_ptr"]
    ready.fill_(1)
    prepare.run()
    assert ready.shape == (19,) and not ready.any()


def on_meta(M, N, K, dtype=torch.bfloat16):
    return [torch.empty(*shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K), (M, N))]


def test_only_where_the_kernel_can():
    """Catches a descriptor of rows that are not 16-byte aligned, a rank that would spill, and fp32 products, whose
    operands do not fit."""
    x, weight, out = on_meta(8192, 4096, 4096)
    tile = fused_tile(x, weight, 16, out, 90)
    assert tile is not None and tile.persistent and (tile.block_m, tile.block_n) == (128, 256)
    assert fused_tile(out, weight.t(), MOST_RANK, x, 90) is not None
    assert fused_tile(x, weight, MOST_RANK + 1, out, 90) is None
    assert fused_tile(x, weight, 16, out, 80) is None
    assert fused_tile(x[:64], weight, 16, out[:64], 90) is None
    assert fused_tile(*on_meta(8192, 4096, 4096, torch.float32)[:2], 16, out.float(), 90) is None
    unaligned = torch.empty(8192, 4097, dtype=torch.bfloat16, device="meta")[:, :4096]
    assert fused_tile(unaligned, weight, 16, out, 90) is None and fused_tile(x, weight, 16, unaligned, 90) is None
    few = on_meta(2**17, 256, 64)  # a single column of tiles: a GEMM behind its own shrink
    assert fused_tile(few[0], few[1], 16, few[2], 90) is None


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that `lora_linear` launches, held to the path "fused" with small tiles."""
    names: list[str] = []
    run = lora_linear_fused.Call.run

    def noted(call):
        names.append(call.kernel.__name__)
        return run(call)

    monkeypatch.setattr(lora_linear_fused.Call, "run", noted)
    monkeypatch.setattr(lora_linear_fused, "choose_tile", lambda *_, **__: SMALL)
    forced = lambda *_: plans.Plan("fused", "forced by a test")  # noqa: E731
    forced.__wrapped__ = forced
    monkeypatch.setattr(MODULE, "plan_lora_linear", forced)
    return names


@pytest.mark.parametrize("dtype, masters", [(torch.float16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("M, N, K, R", [(65, 72, 40, 12), (40, 200, 136, 3)])
def test_output_and_gradients_match_fp64(M, N, K, R, p, dtype, masters, launched, device):
    """Forward and dX are one GEMM each, and dB comes with dA. Catches an operand in the other's place, a transpose that
    is forgotten in backward, dB that nobody computes, and dropout that is lost on this path."""
    x, weight, a, b, bias = operands(M, N, K, R, dtype, device, masters=masters, bias=True)
    tensors = [t.detach().requires_grad_(t is not weight) for t in (x, weight, a, b, bias)]
    dy = padded_randn(M, N, pad=8, dtype=dtype, device=device)
    seed = torch.tensor([1234], device=device)
    with use_backend("triton"):
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=p, seed=seed)
        y.backward(dy)
    assert launched.count("_lora_linear_fused_kernel") == (0 if p else 2)
    assert launched.count("_weight_gradient_kernel") == 1 and launched.count("_lora_shrink_kernel") == int(p > 0)

    keep = reference.dropout_mask(seed, M, K, p) if p else None
    results = lora_linear_truth(tensors, dy, SCALING, keep, p)
    # Rounded on the way: S; dS (and with dropout the expand into dX); dS; S. Masters twice more.
    casts = 2 if masters else 0
    outputs = [y.detach(), *(t.grad for t in tensors)]
    for index, rounded in ((0, 1 + casts), (1, 1 + (p > 0) + casts), (3, 1 + casts), (4, 1 + casts), (5, 0)):
        out, truth, magnitude = outputs[index], results[0][index], results[1][index]
        factor = torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded * factor)
