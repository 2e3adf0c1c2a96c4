"""`ops.multi_lora_linear_shared` on the plain path: each projection against fp64, what is asked and kept."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from multi_data import layer, make, mask_of, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern import use_backend
from peftkern.backend import DeviceInfo
from peftkern.ops import dequantize, multi_lora_linear, multi_lora_linear_shared, quantize_4bit, quantize_8bit
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.ops.multi_lora_linear_shared import shared_plan_for
from peftkern.ops.plan import APART, Plan, plan_multi_lora_linear, plan_multi_lora_linear_shared

# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.multi_lora_linear_shared")
SIZES = (34, 17, 70, 1)  # out_features
ALIKE = ((4, 0, 3, 4, 1),) * 4
MIXED = ((4, 0, 3, 4, 1), (1, 0, 5, 2, 0), (4, 0, 3, 4, 1), (2, 2, 2, 2, 2))


def projections(M, K, dtype=torch.float32, ranks=ALIKE, count=3, adapter_dtype=None, grad=True):
    """x, `count` (frozen weight, bias, adapters), and ids that name every slot, an empty one, none, and no slot."""
    x, *_, ids = make(M, 3, K, dtype)
    x = x.detach().requires_grad_(grad)
    held = []
    for N, own in zip(SIZES[:count], ranks, strict=False):
        weight = padded_randn(N, K, pad=2, dtype=dtype)
        held.append((weight, torch.randn(N).to(dtype), layer(N, K, dtype, adapter_dtype, own, max_rank=6, grad=grad)))
    return x, held, ids


def params_of(adapters):
    return [t for entry in adapters.entries if entry is not None for t in entry[:2]]


def together(x, held, ids, **options):
    weights, biases, pools = zip(*held, strict=True)
    return multi_lora_linear_shared(x, weights, pools, ids, biases, **options)


def singly(x, held, ids, **options):
    return tuple(multi_lora_linear(x, w, pool, ids, b, **options) for w, b, pool in held)


def gradients(function, x, held, dys):
    """Outputs and all gradients after a backward through those that have a history and whose dY is not None."""
    tensors = [x, *(t for *_, pool in held for t in params_of(pool))]
    for t in tensors:
        t.grad = None
    ys = function()
    live = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    torch.autograd.backward(*zip(*live, strict=True))
    return [y.detach() for y in ys], [t.grad for t in tensors]


def check_against_fp64(got, x, held, ids, dys, *, terms, rounded, keep=None, p=0.0):
    """Each y, the sum of all dX and each gradient of an adapter against fp64."""
    ys, (dx, *grads) = got
    exact = size = 0.0
    for y, (weight, bias, pool), dy in zip(ys, held, dys, strict=True):
        (y_true, dx_true, _, _, *own) = truth_and_magnitude(x, weight, bias, pool, ids, dy, keep, p)
        assert_rounded(y, *y_true, terms=terms, rounded=rounded)
        exact, size = exact + dx_true[0], size + dx_true[1]
        for truth in own:
            grad = grads.pop(0)
            grad = torch.zeros_like(truth[0]).to(y.dtype) if grad is None else grad
            assert_rounded(grad, *truth, terms=terms, rounded=rounded)
    assert_rounded(dx, exact, size, terms=terms * len(ys), rounded=rounded * len(ys))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("M, K, count, ranks", [(1, 33, 3, ALIKE), (40, 24, 2, MIXED), (65, 7, 4, MIXED)])
def test_each_projection_matches_fp64(M, K, count, ranks, dtype, dropout_p):
    """Would catch rows taken for one projection's groups and used for another's ranks, dX overwritten in place of
    added to, a mask of its own for each projection, and gradients handed to another projection's parameters."""
    x, held, ids = projections(M, K, dtype, ranks, count)
    dys, seed = [padded_randn(M, w.shape[0], pad=5, dtype=dtype) for w, *_ in held], torch.tensor([1234])
    got = gradients(lambda: together(x, held, ids, dropout_p=dropout_p, seed=seed), x, held, dys)
    # The mask of a row is that of its slot, whatever the slot's rank in a projection.
    keep = mask_of(held[0][2], ids, K, seed, dropout_p) if dropout_p else None
    check_against_fp64(got, x, held, ids, dys, terms=M + K + 80, rounded=5, keep=keep, p=dropout_p)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [ALIKE, MIXED])
def test_forward_and_adapters_are_bit_for_bit_the_single_calls(ranks, count):
    """Would catch arithmetic that differs from the single operation's where it need not."""
    x, held, ids = projections(20, 24, torch.float32, ranks, count)
    dys, options = [torch.randn(20, w.shape[0]) for w, *_ in held], {"dropout_p": 0.3, "seed": torch.tensor([7])}
    ys, (dx, *grads) = gradients(lambda: together(x, held, ids, **options), x, held, dys)
    want, (dx_want, *grads_want) = gradients(lambda: singly(x, held, ids, **options), x, held, dys)
    assert all(torch.equal(a, b) for a, b in zip(ys, want, strict=True))
    for a, b in zip(grads, grads_want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(dx, dx_want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("each", [1, 4, 40])
def test_an_id_for_each_sequence(each):
    """Would catch groups of sequences cut at the wrong row, or a view of x's shape that the outputs do not get."""
    ids = torch.tensor([0, 3, 0, 2, -1])
    _, held, _ = projections(1, 24)
    x = torch.randn(5, each, 24, requires_grad=True)
    dys = [torch.randn(5, each, w.shape[0]) for w, *_ in held]
    got = gradients(lambda: together(x, held, ids), x, held, dys)
    assert got[0][0].shape == (5, each, 34) and got[1][0].shape == x.shape
    flat = x.detach().view(-1, 24), ids.repeat_interleave(each), [dy.flatten(0, 1) for dy in dys]
    ys = [y.flatten(0, 1) for y in got[0]]
    own = (ys, [got[1][0].view(-1, 24), *got[1][1:]])
    check_against_fp64(own, flat[0], held, flat[1], flat[2], terms=5 * each + 100, rounded=4)


@pytest.mark.parametrize("path", ["torch", "torch_fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_both_plain_paths_match_fp64(dropout_p, path, monkeypatch):
    """Would catch a second projection's blocks that replace the first's in dX, on the path this CPU does not take."""
    monkeypatch.setattr("peftkern.ops._lora_linear_fp32.BLOCK_ROWS", 16)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    x, held, ids = projections(50, 40, torch.bfloat16, MIXED)
    dys, seed = [torch.randn(50, w.shape[0]).bfloat16() for w, *_ in held], torch.tensor([77])
    got = gradients(lambda: together(x, held, ids, dropout_p=dropout_p, seed=seed), x, held, dys)
    keep = mask_of(held[0][2], ids, 40, seed, dropout_p) if dropout_p else None
    check_against_fp64(got, x, held, ids, dys, terms=160, rounded=6, keep=keep, p=dropout_p)


def test_rows_are_taken_and_masked_once_a_group(monkeypatch):
    """Would catch what the operation is for on a CPU being lost: rows of x gathered and masked for each projection."""
    plain = importlib.import_module("peftkern.ops._multi_lora_linear_torch")
    taken, masked = [], []
    take, apply = plain.take, plain.apply_mask
    monkeypatch.setattr(plain, "take", lambda t, rows: (taken.append(t.data_ptr()), take(t, rows))[1])
    monkeypatch.setattr(plain, "apply_mask", lambda t, mask: (masked.append(1), apply(t, mask))[1])
    x, held, ids = projections(20, 24)
    ys = together(x, held, ids, dropout_p=0.2)
    groups = len(AdapterBatch(ids, 5).groups(20, held[0][2].layout))
    assert taken.count(x.data_ptr()) == groups == len(masked)
    sum(y.sum() for y in ys).backward()
    assert taken.count(x.data_ptr()) == 2 * groups == len(masked)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("quantize", [quantize_4bit, quantize_8bit])
def test_quantized_weights(quantize, blocks, monkeypatch):
    """Would catch a block of a weight that is added to another projection's columns, or dX begun anew."""
    _, held, ids = projections(24, 64)
    x = torch.randn(24, 64, requires_grad=True)
    held = [
        (quantize(torch.randn(N, 64)), torch.randn(N), layer(N, 64, ranks=own))
        for N, own in zip((96, 48), MIXED, strict=False)
    ]
    if blocks > 1:
        monkeypatch.setattr("peftkern.ops._dense_blocks.BUFFER_BYTES", 64 * 4 * (96 // blocks))
    dys = [torch.randn(24, N) for N in (96, 48)]
    dense = [(dequantize(w, torch.float32), b, pool) for w, b, pool in held]
    got = gradients(lambda: together(x, held, ids), x, held, dys)
    check_against_fp64(got, x, dense, ids, dys, terms=200, rounded=4)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_outputs_that_nobody_used(used):
    """Would catch a missing dY taken for the next projection's, and zero gradients in place of none, by which an
    optimizer with weight decay would step."""
    x, held, ids = projections(20, 24, ranks=MIXED)
    dys = [torch.randn(20, w.shape[0]) if i in used else None for i, (w, *_) in enumerate(held)]
    _, grads = gradients(lambda: together(x, held, ids), x, held, dys)
    _, want = gradients(lambda: singly(x, held, ids), x, held, dys)
    for a, b in zip(grads, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", ["x", 0, 1, 2])
def test_only_the_gradients_asked_for(asked):
    """Would catch dX, or a projection's gradients, worked out or S kept for nobody."""
    x, held, ids = projections(20, 24, ranks=MIXED)
    dys = [torch.randn(20, w.shape[0]) for w, *_ in held]
    _, want = gradients(lambda: singly(x, held, ids), x, held, dys)
    learning = [x] if asked == "x" else params_of(held[asked][2])
    tensors = [x, *(t for *_, pool in held for t in params_of(pool))]
    chosen = [any(t is other for other in learning) for t in tensors]
    for t, wanted in zip(tensors, chosen, strict=True):
        t.requires_grad_(wanted)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        _, got = gradients(lambda: together(x, held, ids), x, held, dys)
    for a, b, wanted in zip(got, want, chosen, strict=True):
        assert (a is None) or wanted
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    histories = [[y.requires_grad for y in function(x, held, ids)] for function in (together, singly)]
    assert histories[0] == histories[1]
    kept = [t for t in saved if t.shape == (1, 20, 6)]
    assert len(kept) == (0 if asked == "x" else 1), "S of the projection that learns"
    assert any(t.data_ptr() == x.data_ptr() for t in saved) == (asked != "x")


def test_what_is_kept_for_backward():
    """Would catch a copy of x, one reference for each projection, or a stored mask."""
    x, held, ids = projections(16, 24)
    known = {t.data_ptr() for w, b, pool in held for t in (w, *params_of(pool), pool.pool_a, pool.pool_b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        together(x, held, ids, dropout_p=0.1)
    activations = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.data_ptr() == x.data_ptr() for t in activations) == 1
    others = sorted(t.numel() for t in activations if t.data_ptr() != x.data_ptr())
    assert others == [16, *[16 * 6] * 3], "the ids, and S of each"
    with torch.no_grad():
        assert together(x, held, ids)[0].grad_fn is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_one_mask(use_reentrant):
    """Would catch a mask drawn anew in the recomputation, or once for each projection."""
    x, held, ids = projections(12, 7)
    dys = [torch.ones(12, w.shape[0]) for w, *_ in held]
    results = []
    for wrap in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        results.append(gradients(lambda wrap=wrap: wrap(lambda x: together(x, held, ids, dropout_p=0.5)), x, held, dys))
    for plain, repeated in zip(*(r[1] for r in results), strict=True):
        assert (plain is None and repeated is None) or torch.equal(plain, repeated)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    want = singly(x, held, ids, dropout_p=0.5, seed=seed)
    assert all(torch.equal(a, b.detach()) for a, b in zip(results[0][0], want, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p):
    """Would catch a gradient formula that is only nearly right."""
    x, held, _ = projections(12, 7, torch.float64, MIXED, 2)
    x = x.detach().reshape(3, 4, 7).requires_grad_()
    ids, seed = torch.tensor([0, 3, 0]), torch.tensor([5])
    named = [t for *_, pool in held for slot in (0, 3) for t in pool.entries[slot][:2]]

    def run(x, *_):
        return together(x, held, ids, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(run, (x, *named))


def test_compiles_without_a_graph_break():
    """Would catch a check that Dynamo cannot trace on the way to the single calls, or two masks there."""
    x, held, ids = projections(6, 7, ranks=MIXED)
    tensors = [x, *(t for *_, pool in held for t in params_of(pool))]
    run = torch.compile(lambda x, ids: together(x, held, ids, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    results = []
    for function in (lambda: together(x, held, ids, dropout_p=0.5), lambda: run(x, ids)):
        torch.manual_seed(3)
        _, grads = gradients(function, x, held, [torch.ones(6, w.shape[0]) for w, *_ in held])
        results.append([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-5)


def test_autocast():
    """Would catch outputs in the wrong dtype, or gradients that do not come back in their tensor's."""
    x, held, ids = projections(9, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = together(x, held, ids)
        want = singly(x, held, ids)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    for a, b in zip(ys, want, strict=True):
        torch.testing.assert_close(a, b)
    sum(y.float().sum() for y in ys).backward()
    grads = [t.grad for *_, pool in held for t in params_of(pool) if t.grad is not None]
    assert {t.dtype for t in (x.grad, *grads)} == {torch.float32} and len(grads) >= 6


def test_gradients_of_the_pools_themselves():
    """Would catch the gradient of one projection's pool given to another's."""
    x, held, ids = projections(20, 24, ranks=MIXED)
    dys = [torch.randn(20, w.shape[0]) for w, *_ in held]
    results = []
    for function in (together, singly):
        pools = [pool.kernel_adapters() for *_, pool in held]
        for pool in pools:
            pool.pool_a.requires_grad_(True).grad = None
            pool.pool_b.requires_grad_(True).grad = None
        ys = function(x, [(w, b, pool) for (w, b, _), pool in zip(held, pools, strict=True)], ids)
        torch.autograd.backward(ys, dys)
        results.append([t.grad.clone() for pool in pools for t in (pool.pool_a, pool.pool_b)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (2, 3, 7)])
def test_shapes(shape):
    """Would catch a crash on an empty batch, or a flattening that is not undone."""
    _, held, _ = projections(1, 7)
    x = torch.randn(shape, requires_grad=True)
    ids = torch.zeros(shape[0] if len(shape) > 1 else 1, dtype=torch.int64)
    ys = together(x, held, ids, dropout_p=0.1)
    sum(y.sum() for y in ys).backward()
    assert [y.shape for y in ys] == [(*shape[:-1], N) for N in SIZES[:3]] and x.grad.shape == shape


def test_same_bits_on_two_runs_and_noticing_a_change():
    """Would catch an order of sums that is not fixed, and gradients from an adapter that was replaced since."""
    x, held, ids = projections(65, 24, ranks=MIXED)
    dys = [torch.randn(65, w.shape[0]) for w, *_ in held]
    runs = [
        gradients(lambda: together(x, held, ids, dropout_p=0.2, seed=torch.tensor([7])), x, held, dys) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True) if a is not None)
    ys = together(x, held, ids)
    held[1][2].put(1, torch.randn(2, 24), torch.randn(17, 2), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].sum().backward()


def test_double_backward_is_refused():
    """Would catch second derivatives that are silently wrong (S has no history)."""
    x, held, ids = projections(4, 7)
    ys = together(x, held, ids)
    with pytest.raises(RuntimeError, match="multi_lora_linear_shared: double backward"):
        torch.autograd.grad(ys[0].square().sum(), x, create_graph=True)


def test_what_is_kept_apart_and_the_words_for_it():
    """Would catch projections that share launches which they cannot share, and an answer without its reason."""
    x, held, _ = projections(4, 32)
    weights, biases, pools = map(list, zip(*held, strict=True))
    assert shared_plan_for(x, weights, pools, biases, "auto").path != APART
    device = DeviceInfo("cuda", 90)
    few, many = (plan_multi_lora_linear(M, 64, 64, 16, None, torch.bfloat16, device) for M in (8, 800))
    shared = plan_multi_lora_linear_shared((few, few))
    assert shared.path == "decode" and "two launches of all are two" in shared.reason
    assert "one shrink, one dX" in plan_multi_lora_linear_shared((many,) * 3).reason
    differ = plan_multi_lora_linear_shared((few, many))
    assert differ.path == APART and "their paths differ (decode, cublas)" in differ.reason
    assert plan_multi_lora_linear_shared((few,)).path == APART
    learns = [weights[0].detach().requires_grad_(), *weights[1:]]
    assert "learns" in shared_plan_for(x, learns, pools, biases, "auto").reason
    other = [pools[0], layer(17, 32, ranks=(1, 2)), pools[2]]
    assert "differ in slots" in shared_plan_for(x, weights, other, biases, "auto").reason


def test_kept_apart_is_right_all_the_same():
    """Would catch a base weight that learns left without its gradient, and pools of other sizes read as the first's."""
    x, held, _ = projections(10, 24)
    ids, weight = torch.tensor([0, 1, -1, 0, 1, 7, 0, 1, 1, 0]), held[0][0].detach().requires_grad_()
    held = [(weight, *held[0][1:]), held[1], (*held[2][:2], layer(70, 24, ranks=(2, 3), max_rank=6))]
    dys = [torch.randn(10, w.shape[0]) for w, *_ in held]
    results = []
    for function in (together, singly):
        weight.grad = None
        results.append([*gradients(lambda f=function: f(x, held, ids), x, held, dys)[1], weight.grad])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True)) and weight.grad is not None


BAD = [
    (lambda c: c.update(weights=c["weights"][:2]), ValueError, "pools: expected one for each of 2 weights, got 3"),
    (lambda c: c.update(biases=c["biases"][:2]), ValueError, "biases: expected one for each of 3 weights, got 2"),
    (lambda c: c.update(weights=(), pools=(), biases=()), ValueError, "weights: expected 1 to 4, got 0"),
    (lambda c: c.update(weights=c["weights"] * 2), ValueError, "weights: expected 1 to 4, got 6"),
    (lambda c: c.update(weights=c["weights"][0]), TypeError, "weights: expected a list"),
    (lambda c: c.update(pools=(None, *c["pools"][1:])), TypeError, "pools: expected LayerAdapters"),
    (lambda c: c.update(pools=c["pools"][::-1]), ValueError, r"lora_B: expected shape \[34, 1\]"),
    (lambda c: c.update(biases=c["biases"][::-1]), ValueError, "bias: expected shape"),
    (lambda c: c.update(x=c["x"][:, :-1]), ValueError, "x: expected shape"),
    (lambda c: c.update(adapter_ids=c["adapter_ids"][:-1]), ValueError, "an id for each of x's 4 rows"),
    (lambda c: c.update(dropout_p=1.0), ValueError, "dropout_p"),
]


@pytest.mark.parametrize("damage, error, message", BAD)
def test_wrong_arguments_are_named(damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    x, held, ids = projections(4, 7, grad=False)
    weights, biases, pools = zip(*held, strict=True)
    call = {"x": x, "weights": weights, "pools": pools, "adapter_ids": ids, "biases": biases}
    damage(call)
    with pytest.raises(error, match=message):
        multi_lora_linear_shared(**call)


def test_backward_keeps_the_path_of_its_forward():
    """Would catch a backward that looks up the backend again."""
    x, held, ids = projections(8, 7)
    with use_backend("torch"):
        ys = together(x, held, ids)
    with use_backend("triton"):
        sum(y.sum() for y in ys).backward()
    want = sum(truth_and_magnitude(x, w, b, pool, ids, torch.ones(8, w.shape[0]))[1][0] for w, b, pool in held)
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-5, atol=1e-5)
