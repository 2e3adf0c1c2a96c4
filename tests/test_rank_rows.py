"""S and dS of ranks whose rows are no multiples of 16 bytes: gaps between rows, so that persistent GEMMs take them.

In the interpreter the table of tiles is exchanged for persistent ones, as Hopper has them; memory that nobody wrote is
NaN throughout, so that what is read of a gap shows in every result.
"""

from __future__ import annotations

import importlib
import types
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dora_data import apply as dora
from dora_data import make as dora_tensors
from held_paths import hold_lora_linear
from numerics import assert_rounded, lora_linear_truth, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import gated_lora_linear, lora_linear, lora_linear_shared, quantize_4bit
from peftkern.ops import plan as plans
from peftkern.ops._dora_linear_triton import forward_calls as dora_forward_calls
from peftkern.ops._lora_linear_triton import backward_calls, forward_calls, output_calls
from peftkern.ops._projection_group import Group
from peftkern.ops._rank_rows import columns_of_s, joined_parts, new_s, row_of_s, whole_blocks
from peftkern.ops.plan import Plan
from peftkern_kernels import gemm_tables, launch
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.gemm_tables import MULTIPROCESSORS, Tile
from peftkern_kernels.launch import is_aligned, run_all
from test_lora_linear_shared import Projections, check

SCALING = 0.75
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = [1, 3, 4, 6, 12, 20, 33]
M, N, K = 65, 72, 48  # tiles enough for "large", rows that descriptors take
PERSISTENT = "_lora_linear_persistent_kernel"


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """The names of kernels that were launched; path and tiles are such as Hopper's."""
    tile = Tile(32, 32, 32, 4, 1, tma=True)
    table = dict.fromkeys(("one tile", "one tile medium", "medium", "small", "tiny"), tile)
    monkeypatch.setattr(gemm_tables, "_INTERPRETER", {**table, "large": replace(tile, persistent=True)})
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    hold_lora_linear(monkeypatch, "triton")
    quantized = importlib.import_module("peftkern.ops.lora_linear_quantized")
    monkeypatch.setattr(quantized, "plan_for", lambda *_: Plan("dequantize:triton", "forced by a test"))
    names: list[str] = []
    run = launch.Call.run

    def counted(call):
        names.append(call.kernel.__name__)
        return run(call)

    monkeypatch.setattr(launch.Call, "run", counted)
    torch._dynamo.reset()
    return names


@pytest.fixture
def poison(monkeypatch):
    """From its call on, floats that are allocated are NaN."""

    def start():
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            monkeypatch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))

    return start


def _poisoning(allocate):
    """An allocator whose floats are NaN, between rows too."""

    def poisoned(*args, **options):
        t = allocate(*args, **options)
        if type(t) is torch.Tensor and t.device.type != "meta" and t.is_floating_point():
            t.new_tensor([]).set_(t.untyped_storage()).fill_(float("nan"))
        return t

    return poisoned


def assert_persistent(names, device, count):
    """`count` of the launches were persistent GEMMs: those of the interpreter's table here."""
    if device == "cpu":
        assert names.count(PERSISTENT) == count, names


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", RANKS)
def test_output_and_gradients_match_fp64(R, dtype, p, device, started, poison):
    """Would catch a gap that is read or written, a row of S at the place of a contiguous one, and an odd rank that
    leaves the persistent GEMM."""
    shapes = [(M, K), (N, K), (R, K), (N, R)]
    tensors = [padded_randn(*shape, pad=16, dtype=dtype, device=device) for shape in shapes]
    tensors = [t.detach().requires_grad_(i != 1) for i, t in enumerate(tensors)]
    tensors.append(torch.randn(N, device=device).to(dtype).requires_grad_())
    dy, seed = padded_randn(M, N, pad=8, dtype=dtype, device=device), torch.tensor([1234], device=device)
    poison()
    with use_backend("triton"):
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=p, seed=seed)
        y.backward(dy)
    # dX's GEMM masks its low-rank part, for which a persistent one has room up to 16 ranks.
    assert_persistent(started, device, 1 if p and R > 16 else 2)
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    results = lora_linear_truth(tensors, dy, SCALING, keep, p)
    outputs = [y.detach(), *(t.grad for t in tensors)]
    for index, rounded in ((0, 1), (1, 1), (3, 1), (4, 1), (5, 0)):  # S, or dS, is rounded on the way
        out, truth, magnitude = outputs[index], results[0][index], results[1][index]
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gaps_are_nobodys(dtype, device, poison):
    """Would catch a kernel that stores past the rank, over the next row where rows have no gap."""
    x, w = padded_randn(M, K, pad=8, dtype=dtype, device=device), padded_randn(N, K, pad=8, dtype=dtype, device=device)
    a, b = padded_randn(3, K, pad=8, dtype=dtype, device=device), padded_randn(N, 3, pad=1, dtype=dtype, device=device)
    poison()
    y, s, calls = forward_calls(x, w, a, b, SCALING, None, None, "triton", 0)
    row = 16 // dtype.itemsize
    assert s.stride() == (row, 1) and is_aligned(s)
    run_all(calls)
    whole = s.as_strided((s.untyped_storage().nbytes() // dtype.itemsize,), (1,))
    inside = torch.zeros(whole.shape, dtype=torch.bool, device=device)
    inside.as_strided((M, 3), (row, 1)).fill_(True)
    assert torch.equal(whole.isfinite(), inside) and y.isfinite().all()


def qkv(ranks, dtype, device, masters=False):
    """Projections whose rows descriptors take."""
    outs = list(zip((72, 40, 40), ranks, strict=True))
    made = Projections(M, 48, outs, dtype, masters=masters, device=device)
    made.x = padded_randn(M, 48, pad=8, dtype=dtype, device=device).requires_grad_()
    made.weights = made.dense = [padded_randn(n, 48, pad=8, dtype=dtype, device=device) for n, _ in outs]
    made.dys = [padded_randn(M, n, pad=8, dtype=dtype, device=device) for n, _ in outs]
    return made


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("scalings", [(0.75,) * 3, (0.75, -0.5, 2.0)], ids=["alike", "mixed"])
@pytest.mark.parametrize(
    "ranks, dtype", [((12, 3, 1), torch.bfloat16), ((4, 4, 4), torch.float16), ((6, 8, 33), torch.float32)], ids=str
)
def test_projections_side_by_side_match_fp64(ranks, dtype, scalings, p, device, started, poison):
    """Would catch columns of a neighbour, a projection that starts between two multiples of 16 bytes and so leaves the
    persistent GEMM, and a gap's column in dS or dA."""
    projections, seed = qkv(ranks, dtype, device), torch.tensor([1234], device=device)
    keep = reference.dropout_mask(seed, M, 48, p) if p else None
    poison()
    with use_backend("triton"):
        got = projections.run(scalings, dropout_p=p, seed=seed)
    # dX's, of all ranks together, has no persistent form with a mask; two more are added to it by cuBLAS.
    assert_persistent(started, device, 3 if p and sum(ranks) > 16 else 4)
    check(projections, got, projections.truth(scalings, keep, p), roundings=(1, 3, 1, 1), dtype=dtype)


def test_columns_between_projections_hold_rows_that_are_there(device):
    """Would catch an A of all projections with memory in it that nobody wrote, and rows in another's place."""
    factors = [torch.randn(r, 5, device=device) for r in (3, 8, 1, 2)]
    columns = columns_of_s([3, 8, 1, 2], torch.bfloat16, "dequantize:triton", 90)
    assert columns == (slice(0, 3), slice(8, 16), slice(16, 17), slice(24, 26))
    assert whole_blocks(columns) == (slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 26))
    whole = torch.cat(joined_parts(factors, columns))
    assert whole.shape == (26, 5) and whole.isfinite().all()
    for factor, part in zip(factors, columns, strict=True):
        assert torch.equal(whole[part], factor)
    packed = columns_of_s([3, 8, 1, 2], torch.bfloat16, "triton", 80)
    assert torch.equal(torch.cat(joined_parts(factors, packed)), torch.cat(factors))


def operations(device, R, p):
    """Each operation that makes an S, as (function of leaves, leaves, persistent launches)."""
    dtype = torch.bfloat16
    x, w, a, b = (padded_randn(*s, pad=8, dtype=dtype, device=device) for s in ((M, 64), (64, 64), (R, 64), (64, R)))
    up, seed = padded_randn(M, 64, pad=8, dtype=dtype, device=device), torch.tensor([9], device=device)
    drop = {"dropout_p": p, "seed": seed if p else None}
    adapter = [t.clone().requires_grad_() for t in (x, a, b)]
    stored = quantize_4bit(w.contiguous())
    both = 1 if p and R > 16 else 2
    magnitudes = dora_tensors(M, 64, 64, R, dtype, device=device)
    magnitudes[0], magnitudes[1] = adapter[0], w

    def shared(x, a, b):
        return lora_linear_shared(x, [w, w], [a, a[:1]], [b, b[:, :1]], (1.0, 2.0), **drop)

    return {
        "lora": (lambda x, a, b: [lora_linear(x, w, a, b, SCALING, **drop)], adapter, both),
        "nf4": (lambda x, a, b: [lora_linear(x, stored, a, b, SCALING, **drop)], adapter, both),
        "gated": (lambda x, a, b: [gated_lora_linear(x, up, w, a, b, SCALING, **drop)], adapter, both),
        "shared": (shared, adapter, 3 if not p or R + 1 <= 16 else 2),
        "dora": (lambda *t: [dora([t[0], w, *t[1:]], **drop)], [magnitudes[0], *magnitudes[2:]], 2),
    }


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["lora", "nf4", "gated", "shared", "dora"])
def test_compiled_is_eager(name, p, device, monkeypatch, started, poison):
    """Would catch a fake whose S has other strides than the real one, and a graph that makes S contiguous or reads its
    gaps."""
    monkeypatch.setattr(
        importlib.import_module("peftkern.ops.dora_linear"), "plan_for", lambda *_, **__: Plan("triton", "forced")
    )
    run, leaves, count = operations(device, 12, p)[name]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, run, compiled):
        started.clear()
        with use_backend("triton"):
            ys = function(*leaves)
            grads = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
        assert_persistent(started, device, count)
        poison()  # what Dynamo cannot trace, and what it traced before does not see
        results.append([*ys, *grads])
    for first, *others in zip(*results, strict=True):
        assert first.isfinite().all() and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("R", [4, 8, 12])
def test_operators_pass_opcheck(R, device):
    """Would catch a fake that lies about S's shape or strides, of one projection and of several."""
    dtype = torch.bfloat16
    x, w, a, b = (padded_randn(*s, pad=8, dtype=dtype, device=device) for s in ((M, K), (N, K), (R, K), (N, R)))
    one = importlib.import_module("peftkern.ops.lora_linear")._operator
    several = importlib.import_module("peftkern.ops._lora_linear_shared_operator")._operator
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (one, (x, w, a, b, None, None, SCALING, 0.0, "triton")),
        (several, (x, [a, a[:3]], [b, b[:, :3]], [w, w], [1, 0, 0, 0] * 2, [], [False] * 2, None, [1.0, 2.0], 0.0,
                   "triton")),
    ):  # fmt: skip
        s = operator(*arguments)[1]
        assert s.stride(0) % 8 == 0 and s.shape[1] == (R if operator is one else -(-R // 8) * 8 + 3)
        found = torch.library.opcheck(operator, arguments, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}


def test_lengths_do_not_recompile(device):
    """Would catch a number of rows, or of bytes between them, that becomes a constant of the graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    run, (x, a, b), _ = operations(device, 4, 0.0)["lora"]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    with use_backend("triton"):
        for length in (65, 70, 90):
            rows = padded_randn(length, 64, pad=8, dtype=x.dtype, device=device)
            torch._dynamo.mark_dynamic(rows, 0)
            assert torch.equal(compiled(rows, a, b)[0], run(rows, a, b)[0])
    assert counter.frame_count == 1


def test_checkpointing_and_a_copy_of_what_is_kept(device):
    """Would catch a recomputed S that does not fit what was saved, and a backward that cannot take S without gaps, as
    it comes back from the host's memory."""
    run, leaves, _ = operations(device, 12, 0.4)["lora"]
    with use_backend("triton"):
        ys = run(*leaves)
        want = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
        again = checkpoint(run, *leaves, use_reentrant=False)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().contiguous(), lambda t: t)
        with hooks:
            copied = run(*leaves)
        for ys in (again, copied):
            grads = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
            assert all(torch.equal(got, other) for got, other in zip(grads, want, strict=True))


# -- what Hopper launches: no kernel runs here ---------------------------------------------------------------------


def on_meta(R, dtype=torch.bfloat16, masters=False):
    """x, weight, A, B of 8192 x 4096 x 4096."""
    kind = torch.float32 if masters else dtype
    shapes = [((8192, 4096), dtype), ((4096, 4096), dtype), ((R, 4096), kind), ((4096, R), kind)]
    return [torch.empty(*shape, dtype=d, device="meta") for shape, d in shapes]


def kernels(calls):
    return [call.kernel.__name__ for call in calls]


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("R", [1, 4, 12, 16, 20])
def test_hopper_takes_the_persistent_gemm_for_every_rank(R, p, masters):
    """Would catch rank 4 or 12 in the GEMM whose programs end with their tile, 5 % slower, forward or backward."""
    x, w, a, b = on_meta(R, masters=masters)
    drop = Dropout(torch.empty(1, dtype=torch.int64, device="meta"), p) if p else None
    y, s, forward = forward_calls(x, w, a, b, SCALING, None, drop, "triton", 90)
    *_, backward = backward_calls(y, x, w, a, b, s, SCALING, drop, "triton", 90, (True, True, True))
    assert s.shape == (8192, R) and s.stride() == (-(-R // 8) * 8, 1)
    assert PERSISTENT in kernels(forward)
    assert (PERSISTENT in kernels(backward)) is (p == 0.0 or R <= 16)
    names = {"_lora_linear_persistent_kernel", "_lora_linear_tma_kernel"}
    assert sum(name in names for name in kernels([*forward, *backward])) == 2


def test_hopper_takes_it_for_dora_and_for_projections_side_by_side():
    """Would catch y of DoRA in a pass of its own, and k's columns of S between two multiples of 16 bytes."""
    x, w, a, b = on_meta(12)
    m = x.new_empty(4096)
    *_, calls = dora_forward_calls(x, w, w, a, b, m, None, None, SCALING, None, "triton", 90, True)
    assert PERSISTENT in kernels(calls) and not any("scale" in name for name in kernels(calls))
    columns = columns_of_s([4, 4, 12], x.dtype, "triton", 90)
    s = new_s(x, 8192, columns[-1].stop, "triton", 90)
    assert all(is_aligned(s[:, part]) for part in columns)
    assert is_aligned(new_s(x, 8192, 20, "triton", 90))  # dS, whose columns have no gaps
    group = Group((w,) * 3, (SCALING,) * 3, columns, 0.0, "triton")
    shared = importlib.import_module("peftkern.ops._lora_linear_shared_triton")
    factor = x.new_empty(columns[-1].stop, 4096)
    assert len(shared.all_shrinks(x, group, factor, s, None, 90)) == 1
    for part in columns:
        rows = x.new_empty(4096, part.stop - part.start)
        assert PERSISTENT in kernels(output_calls(x, w, s[:, part], rows, x, None, "triton", 90))


def test_no_device_is_asked_where_it_does_not_matter(monkeypatch):
    """Would catch a traced graph that can no longer be looked at on a machine without its GPU, for a rank of 16; and a
    question that plain PyTorch has to wait for."""
    asked = []
    module = importlib.import_module("peftkern.ops._rank_rows")
    monkeypatch.setattr(module, "device_info", lambda device: asked.append(device) or types.SimpleNamespace(arch=90))
    x = torch.empty(7, 40, dtype=torch.bfloat16, device="meta")
    for path in ("torch", "cublas", "dequantize:torch", "decode"):
        assert module.fake_s(x, 7, 3, path).is_contiguous() and module.s_columns([3, 4], x, path)[1].start == 3
    assert module.fake_s(x, 7, 16, "triton").is_contiguous() and module.s_columns([8, 16], x, "triton")[1].start == 8
    assert not asked
    assert module.fake_s(x, 7, 3, "triton").stride() == (8, 1) and len(asked) == 1


@pytest.mark.parametrize("arch", [arch for arch in MULTIPROCESSORS if arch not in (0, 90)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elsewhere_s_is_contiguous(arch, dtype):
    """Would catch memory spent where no GEMM is persistent: other architectures, other paths, exact fp32 products."""
    for R in RANKS:
        assert row_of_s(R, dtype, "triton", arch) == R
        for path in ("cublas", "decode", "decode_4bit", "fused_4bit", "torch", "dequantize:cublas"):
            assert row_of_s(R, dtype, path, 90) == R
        assert row_of_s(R, torch.float32, "triton", 90) == R
    x = types.SimpleNamespace(dtype=dtype, new_empty=lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))
    assert new_s(x, 7, 3, "triton", arch).is_contiguous()
