"""`ops.multi_lora_linear` on the plain path: meaning, gradients, what it keeps, torch's machinery around it."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from multi_data import layer, leaves, make, mask_of, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern import use_backend
from peftkern.ops import lora_linear, multi_lora_linear, quantize_4bit, quantize_8bit
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.ops.multi_lora_linear import _operator
from peftkern.ops.plan import Plan
from peftkern_kernels.routing import build_routing, slot_seed

# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.multi_lora_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 64, 64), (1, 17, 33), (65, 130, 200), (7, 1, 1), (33, 48, 40)]


def check(results, truths, *, terms, rounded):
    for out, (truth, magnitude), count in zip(results, truths, rounded, strict=True):
        assert_rounded(out, truth, magnitude, terms=terms, rounded=count)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_output_and_gradients_match_fp64(M, N, K, dtype, dropout_p):
    """Would catch a row that takes another's adapter, a wrong place in the pool (its gaps are NaN), a wrong scaling."""
    x, weight, bias, adapters, ids = make(M, N, K, dtype)
    dy = padded_randn(M, N, pad=5, dtype=dtype)
    seed = torch.tensor([1234])
    keep = mask_of(adapters, ids, K, seed, dropout_p) if dropout_p else None
    y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    tensors = leaves(x, weight, bias, adapters)
    truths = truth_and_magnitude(x, weight, bias, adapters, ids, dy, keep, dropout_p)
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    # As `lora_linear`: S and its product; dS and its product; none; none; dS or S. One more for 1 / (1 - p).
    extra = 0 if dropout_p == 0 else 1
    rounded = [4 + extra, 4 + extra, 0, 0] + [2 + extra] * (len(tensors) - 3)
    check([y.detach(), *grads], truths, terms=M + N + K + 5, rounded=rounded)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float64_is_float64_throughout(dropout_p):
    """Would catch scalings that differ, or 1 / (1 - p), that pass through float32 on their way to float64 rows."""
    x, weight, bias, adapters, ids = make(24, 6, 8, torch.float64, ranks=(2, 2, 2))
    for slot, scaling in enumerate((0.1, 0.7, -0.3)):
        adapters.rescale(slot, scaling)
    dy, seed = torch.randn(24, 6, dtype=torch.float64), torch.tensor([5])
    keep = mask_of(adapters, ids, 8, seed, dropout_p) if dropout_p else None
    y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    truths = truth_and_magnitude(x, weight, bias, adapters, ids, dy, keep, dropout_p)
    results = [y.detach(), *(t.grad for t in leaves(x, weight, bias, adapters))]
    check(results, truths, terms=64, rounded=[0] * len(results))


@pytest.mark.parametrize("each", [1, 4, 16, 40])  # rows of a sequence: gathered by adapter, or used where they lie
@pytest.mark.parametrize("ids", [[0, 3, 0, 2, -1], [3, 3, 0, 0, 2], [0, 3, 2, 4, 0], [1, -1, 7, 1, -1], [3, 3, 3]])
def test_an_id_for_each_sequence(ids, each):
    """Would catch a sequence cut at the wrong row, adapters copied in the wrong order, or two pieces of one adapter of
    which one gradient is lost."""
    B, N, K = len(ids), 19, 24
    _, weight, bias, adapters, _ = make(1, N, K)
    x = torch.randn(B, each, K, requires_grad=True)
    dy = torch.randn(B, each, N)
    y = multi_lora_linear(x, weight, adapters, torch.tensor(ids), bias)
    y.backward(dy)
    rows = torch.tensor(ids).repeat_interleave(each)
    flat = (x.detach().view(-1, K), weight, bias, adapters, rows)
    truths = truth_and_magnitude(*flat, dy.view(-1, N))
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves(x, weight, bias, adapters)]
    grads[0] = grads[0].view(-1, K)
    check([y.detach().view(-1, N), *grads], truths, terms=B * each + N + K, rounded=[4, 4, 0, 0] + [2] * 8)


@pytest.mark.parametrize("base_rows", [True, False])  # without them, rows are put into the adapters' order
def test_each_adapter_is_as_its_rows_alone(base_rows):
    """Would catch a dropout mask, or a gradient, that depends on which other rows share the batch, and rows that are
    put back in another order than they came in."""
    x, weight, bias, adapters, ids = make(40, 24, 33)
    if not base_rows:
        ids = torch.tensor([4, 0, 3, 2, 0]).repeat(8)
    weight.requires_grad_(False)
    dy, seed = torch.randn(40, 24), torch.tensor([99])
    y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=0.3, seed=seed)
    y.backward(dy)
    for slot, entry in enumerate(adapters.entries):
        rows = ids == slot
        if entry is None or not rows.any():
            continue
        alone = [t.detach().clone().requires_grad_() for t in (x[rows], entry.lora_A, entry.lora_B)]
        own = slot_seed(seed, slot)
        again = lora_linear(alone[0], weight, *alone[1:], entry.scaling, bias, dropout_p=0.3, seed=own)
        again.backward(dy[rows])
        for got, want in zip(
            (y[rows], x.grad[rows], entry.lora_A.grad, entry.lora_B.grad),
            (again, *(t.grad for t in alone)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert {slot for slot in range(5) if (ids == slot).any()} >= {0, 2, 3, 4}, "the ids name every adapter"


def test_an_absent_adapter_has_no_gradient():
    """Would catch a zero gradient, which an optimizer with momentum or weight decay would step by."""
    x, weight, bias, adapters, _ = make(6, 5, 7)
    multi_lora_linear(x, weight, adapters, torch.tensor([0, 0, -1, 3, 3, 1]), bias).sum().backward()
    for slot, entry in enumerate(adapters.entries):
        if entry is not None:
            assert (entry.lora_A.grad is None) == (entry.lora_B.grad is None) == (slot not in (0, 3))


def test_rows_are_put_into_the_order_of_their_groups():
    """Would catch a group that is given other rows than its own, and rows of the base alone that are moved, so that
    they are no longer the frozen layer's to the last bit."""
    layout = layer(5, 7).layout
    ids = torch.tensor([4, 0, 3, 2, 0])
    batch = AdapterBatch(ids, 5)
    groups = batch.groups(10, layout)
    order, back, moved = batch.in_order(10, layout)
    assert torch.equal(order[back], torch.arange(10))
    assert all(torch.equal(order[new.rows], torch.arange(10)[old.rows]) for new, old in zip(moved, groups, strict=True))
    assert [group.slots for group in moved] == [group.slots for group in groups]
    for stays in ([4, 0, -1, 2, 0], [0, 0, 3, 3, 3], [], [-1, -1]):
        batch = AdapterBatch(torch.tensor(stays, dtype=torch.int64), 5)
        assert batch.in_order(len(stays), layout) == (None, None, batch.groups(len(stays), layout)), stays


def test_rows_without_an_adapter_are_untouched():
    """Would catch a broken adapter (NaN) that reaches other rows, which a mask by multiplication would let it."""
    x, weight, bias, adapters, _ = make(8, 5, 7, grad=False)
    base = torch.nn.functional.linear(x, weight, bias)
    adapters.entries[0].lora_A.data.fill_(float("nan"))
    y = multi_lora_linear(x, weight, adapters, torch.tensor([0, -1, 1, 9, -1, 2, 0, -1]), bias)
    assert torch.equal(y[[1, 2, 3, 4, 7]], base[[1, 2, 3, 4, 7]])
    assert y[5].isfinite().all() and y[[0, 6]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_master_adapters(dtype):
    """Would catch gradients of masters that come back in 16 bits, or y widened to the masters' dtype."""
    x, weight, bias, adapters, ids = make(40, 24, 56, dtype, torch.float32)
    dy = torch.randn(40, 24).to(dtype)
    y = multi_lora_linear(x, weight, adapters, ids, bias)
    y.backward(dy)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    tensors = leaves(x, weight, bias, adapters)
    truths = truth_and_magnitude(x, weight, bias, adapters, ids, dy)
    for out, (truth, magnitude) in zip([y.detach(), *(t.grad for t in tensors)], truths, strict=True):
        # A and B are rounded too: one more for each, in units of the 16-bit dtype whatever the result's dtype.
        assert ((out.double() - truth).abs() <= 4 * eps * magnitude + 1e-7).all()
    assert {t.grad.dtype for t in tensors[3:]} == {torch.float32}


@pytest.mark.parametrize("path", ["torch", "torch_fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_both_plain_paths_match_fp64(dropout_p, path, monkeypatch):
    """Would catch a fault in the path that this machine's CPU does not take, and in sums over several row blocks."""
    monkeypatch.setattr("peftkern.ops._lora_linear_fp32.BLOCK_ROWS", 16)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    x, weight, bias, adapters, ids = make(50, 24, 40, torch.bfloat16)
    dy, seed = torch.randn(50, 24).bfloat16(), torch.tensor([77])
    keep = mask_of(adapters, ids, 40, seed, dropout_p) if dropout_p else None
    y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    truths = truth_and_magnitude(x, weight, bias, adapters, ids, dy, keep, dropout_p)
    tensors = leaves(x, weight, bias, adapters)
    # The base product is rounded before the adapter's part is added, on both.
    check([y.detach(), *(t.grad for t in tensors)], truths, terms=130, rounded=[5, 5, 0, 0] + [3] * 8)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("quantize", [quantize_4bit, quantize_8bit])
def test_quantized_weights(quantize, blocks, monkeypatch):
    """Would catch a base weight decoded wrongly, or rows of a block put in another's place."""
    x, weight, bias, adapters, ids = make(24, 96, 64, grad=False)
    packed = quantize(weight.contiguous())
    from peftkern.ops import dequantize

    dense = dequantize(packed, torch.float32)
    if blocks > 1:
        monkeypatch.setattr("peftkern.ops._dense_blocks.BUFFER_BYTES", 64 * 4 * (96 // blocks))
    for t in (x, bias, *leaves(x, weight, bias, adapters)[3:]):
        t.requires_grad_()
    dy = torch.randn(24, 96)
    results = []
    for w in (packed, dense):
        tensors = leaves(x, weight, bias, adapters)
        for t in tensors:
            t.grad = None
        y = multi_lora_linear(x, w, adapters, ids, bias)
        y.backward(dy)
        results.append([y.detach(), x.grad, bias.grad, *(t.grad for t in tensors[3:])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p):
    """Would catch any gradient formula that is only nearly right."""
    x, weight, bias, adapters, _ = make(12, 5, 7, torch.float64)
    x = x.detach().reshape(3, 4, 7).requires_grad_()
    ids, seed = torch.tensor([0, 3, 0]), torch.tensor([5])
    held = [t for slot in (0, 3) for t in adapters.entries[slot][:2]]

    def run(x, weight, bias, *_):
        return multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(run, (x, weight, bias, *held))


def operator_arguments(p=0.0):
    x, weight, bias, adapters, ids = make(6, 5, 7)
    seed = torch.tensor([9]) if p else None
    pools = [adapters.pool_a, adapters.pool_b, adapters.row_offset, adapters.rank, adapters.scaling]
    entries = [(slot, e) for slot, e in enumerate(adapters.entries) if e is not None]
    owners = [n for slot, e in entries for n in (slot, slot * adapters.max_rank, e.lora_A.shape[0])]
    params = [t.detach().clone().requires_grad_() for _, e in entries for t in e[:2]]
    return (x, [weight], params, pools, [ids], bias, seed, [5, 7, -1], owners, adapters.max_rank, p, "torch")


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_operator_passes_opcheck(p):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    results = torch.library.opcheck(_operator, operator_arguments(p))
    assert set(results.values()) == {"SUCCESS"}


def test_routing_operator_passes_opcheck():
    """Would catch tables whose size differs from what the fake says."""
    from peftkern.ops.adapter_route import _operator as route

    results = torch.library.opcheck(route, (torch.tensor([2, 0, -1, 2, 1]), 3))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout_p):
    """Would catch a check or a plan that Dynamo cannot trace, ids or a seed that are frozen into the graph."""
    x, weight, bias, adapters, ids = make(6, 5, 7)
    tensors = leaves(x, weight, bias, adapters)

    def run(x, weight, bias, ids):
        return multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for each in (ids, ids.flip(0)):
        results = []
        for function in (run, compiled):
            torch.manual_seed(3)
            for t in tensors:
                t.grad = None
            y = function(x, weight, bias, each)
            y.square().sum().backward()
            results.append([y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


def test_an_adapter_can_come_and_go_without_recompilation():
    """Would catch tables or a rank that were made constants of the compiled graph."""
    x, weight, bias, adapters, _ = make(6, 5, 7, grad=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x, ids: multi_lora_linear(x, weight, adapters, ids, bias), backend=counter, fullgraph=True
    )
    ids = torch.tensor([0, 1, 2, 3, 4, -1])
    with torch.no_grad():
        run(x, ids)
        before = counter.frame_count
        adapters.drop(0)
        adapters.put(1, torch.randn(2, 7), torch.randn(5, 2), 3.0)
        got = run(x, ids)
        assert counter.frame_count == before
        torch.testing.assert_close(got, multi_lora_linear(x, weight, adapters, ids, bias))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing_repeats_the_dropout(use_reentrant, dropout_p):
    """Would catch a mask drawn anew in the recomputation."""
    x, weight, bias, adapters, ids = make(12, 5, 7)
    tensors = leaves(x, weight, bias, adapters)

    def run(x):
        return multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p)

    def step(function):
        torch.manual_seed(11)
        for t in tensors:
            t.grad = None
        function(x).square().sum().backward()
        return [t.grad for t in tensors if t.grad is not None]

    again = step(lambda x: checkpoint(run, x, use_reentrant=use_reentrant))
    for plain, repeated in zip(step(run), again, strict=True):
        assert torch.equal(plain, repeated)


def test_autocast():
    """Would catch a result in the wrong dtype, or gradients that do not come back in their parameter's dtype."""
    x, weight, bias, adapters, ids = make(9, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = multi_lora_linear(x, weight, adapters, ids, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    tensors = leaves(x, weight, bias, adapters)
    assert {t.grad.dtype for t in tensors if t.grad is not None} == {torch.float32}
    truth, magnitude = truth_and_magnitude(x, weight, bias, adapters, ids, torch.ones(9, 5))[0]
    # x, W, bias, A, B, S, the base product: each rounded to bf16 once.
    assert ((y.double() - truth).abs() <= 7 * torch.finfo(torch.bfloat16).eps / 2 * magnitude).all()


def test_what_is_kept_for_backward():
    """Would catch a copy of x, a stored mask, or activations kept under no_grad."""
    x, weight, bias, adapters, ids = make(16, 5, 24)
    weight.requires_grad_(False)
    known = {t.data_ptr() for t in (weight, *leaves(x, weight, bias, adapters)[3:], adapters.pool_a, adapters.pool_b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=0.1)
    activations = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.data_ptr() == x.data_ptr() for t in activations) == 1
    others = sorted(t.numel() for t in activations if t.data_ptr() != x.data_ptr())
    assert others == [16, 16 * adapters.max_rank], "the ids and S"
    with torch.no_grad():
        assert multi_lora_linear(x, weight, adapters, ids, bias).grad_fn is None


@pytest.mark.parametrize("asked", range(5))
def test_only_the_gradients_asked_for(asked):
    """Would catch work done, or activations kept, for gradients that nobody wants."""
    x, weight, bias, adapters, ids = make(8, 5, 7)
    tensors = leaves(x, weight, bias, adapters)[:5]
    multi_lora_linear(x, weight, adapters, ids, bias).sum().backward()
    want = tensors[asked].grad
    for t in leaves(x, weight, bias, adapters):
        t.grad = None
        t.requires_grad_(False)
    tensors[asked].requires_grad_()
    multi_lora_linear(x, weight, adapters, ids, bias).sum().backward()
    assert torch.equal(tensors[asked].grad, want)
    assert [t.grad is not None for t in tensors] == [i == asked for i in range(5)]


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty_input(shape):
    """Would catch a crash on an empty batch."""
    _, weight, bias, adapters, _ = make(1, 5, 7)
    x = torch.empty(shape, requires_grad=True)
    y = multi_lora_linear(x, weight, adapters, torch.zeros(shape[0], dtype=torch.int64), bias, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5) and x.grad.shape == shape


def test_strided_input_of_any_rank():
    """Would catch a wrong flattening of transposed activations."""
    _, weight, bias, adapters, _ = make(1, 5, 7)
    for x in (torch.randn(7, 4, 3).permute(1, 2, 0), torch.randn(4, 3, 5, 7)[:, :, ::2], torch.randn(4, 14)[:, ::2]):
        ids = torch.tensor([3, 0, 3, -1])
        rows = ids.repeat_interleave(x[0].numel() // 7)
        truth = multi_lora_linear(x.reshape(-1, 7).contiguous(), weight, adapters, rows, bias)
        got = multi_lora_linear(x, weight, adapters, ids, bias)
        torch.testing.assert_close(got.reshape(-1, 5), truth, rtol=1e-5, atol=1e-5)
    one = torch.randn(7)
    got = multi_lora_linear(one, weight, adapters, torch.tensor([3]), bias)
    assert torch.allclose(got, multi_lora_linear(one[None], weight, adapters, torch.tensor([3]), bias)[0], atol=1e-5)


def test_prepared_ids_give_the_same():
    """Would catch tables of another batch being used, or layers of other ranks sharing a plan."""
    x, weight, bias, adapters, ids = make(20, 5, 7, grad=False)
    want = multi_lora_linear(x, weight, adapters, ids, bias)
    batch = AdapterBatch(ids, adapters.slots)
    other = layer(5, 7, ranks=(1, 2, 0, 0, 3), grad=False)
    for prepared in (batch, build_routing(ids, adapters.slots), ids.int()):
        assert torch.equal(multi_lora_linear(x, weight, adapters, prepared, bias), want)
        again = multi_lora_linear(x, weight, other, prepared, bias)
        assert torch.equal(again, multi_lora_linear(x, weight, other, ids, bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_on_two_runs(dropout_p):
    """Would catch a reduction whose order is not fixed, or a mask that ignores the seed."""
    x, weight, bias, adapters, ids = make(65, 34, 70)
    tensors, runs = leaves(x, weight, bias, adapters), []
    for _ in range(2):
        for t in tensors:
            t.grad = None
        y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=dropout_p, seed=torch.tensor([7]))
        y.square().sum().backward()
        runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_change_before_backward_is_noticed():
    """Would catch gradients made from an adapter that has been replaced since forward."""
    x, weight, bias, adapters, ids = make(6, 5, 7)
    y = multi_lora_linear(x, weight, adapters, ids, bias)
    adapters.put(1, torch.randn(2, 7), torch.randn(5, 2), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    """Would catch second derivatives that are silently wrong (S has no history)."""
    x, weight, bias, adapters, ids = make(4, 5, 7)
    y = multi_lora_linear(x, weight, adapters, ids, bias)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_gradients_of_the_pools_themselves():
    """Would catch gradients put at another adapter's place in the pool."""
    x, weight, bias, adapters, ids = make(20, 5, 7)
    multi_lora_linear(x, weight, adapters, ids, bias).sum().backward()
    held = adapters.kernel_adapters()
    held.pool_a.requires_grad_()
    held.pool_b.requires_grad_()
    multi_lora_linear(x.detach(), weight, held, ids, bias).sum().backward()
    gaps = torch.ones(held.pool_a.shape[0], dtype=torch.bool)
    for slot, entry in enumerate(adapters.entries):
        if entry is not None:
            first, rank = adapters.layout.places[slot]
            assert torch.equal(held.pool_a.grad[first : first + rank], entry.lora_A.grad)
            assert torch.equal(held.pool_b.grad[first * 5 : (first + rank) * 5].view(5, rank), entry.lora_B.grad)
            gaps[first : first + rank] = False
    assert (held.pool_a.grad[gaps] == 0).all()


BAD = [
    (lambda c: c.update(x=c["x"].int()), TypeError, "x: expected float32"),
    (lambda c: c.update(x=c["x"][:, :-1]), ValueError, r"x: expected shape \[\.\.\., 7\]"),
    (lambda c: c.update(x=c["x"].tolist()), TypeError, "x: expected a tensor"),
    (
        lambda c: c.update(weight=c["weight"].bfloat16()),
        TypeError,
        "x in torch.float32 and weight in torch.bfloat16: cast x, or",
    ),
    (lambda c: c.update(weight="w"), TypeError, "weight: expected a tensor, a Weight4bit"),
    (lambda c: c.update(bank=None), TypeError, "bank: expected LayerAdapters"),
    (lambda c: c.update(bank=layer(5, 6)), ValueError, r"lora_A: expected shape \[any, 7\]"),
    (lambda c: c.update(bias=c["bias"][:-1]), ValueError, "bias: expected shape"),
    (lambda c: c.update(adapter_ids=c["adapter_ids"][:-1]), ValueError, "an id for each of x's 4 rows"),
    (lambda c: c.update(adapter_ids=c["adapter_ids"].float()), ValueError, "adapter_ids: expected int32 or int64"),
    (lambda c: c.update(adapter_ids=[0, 1, 2, 3]), TypeError, "adapter_ids: expected a tensor"),
    (lambda c: c.update(dropout_p=1.0), ValueError, "dropout_p"),
    (lambda c: c.update(dropout_p=0.1, seed=torch.tensor([1, 2])), ValueError, "seed"),
]


@pytest.mark.parametrize("damage, error, message", BAD)
def test_wrong_arguments_are_named(damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    x, weight, bias, adapters, ids = make(4, 5, 7, grad=False)
    call = {"x": x, "weight": weight, "bank": adapters, "adapter_ids": ids, "bias": bias}
    damage(call)
    with pytest.raises(error, match=message):
        multi_lora_linear(**call)


def test_backward_keeps_the_path_of_its_forward():
    """Would catch a backward that looks up the backend again: it may run outside the block, in another thread."""
    x, weight, bias, adapters, ids = make(8, 5, 7)
    with use_backend("torch"):
        y = multi_lora_linear(x, weight, adapters, ids, bias, dropout_p=0.5, seed=torch.tensor([3]))
    with use_backend("triton"):
        y.sum().backward()
    keep = mask_of(adapters, ids, 7, torch.tensor([3]), 0.5)
    truth, _ = truth_and_magnitude(x, weight, bias, adapters, ids, torch.ones(8, 5), keep, 0.5)[1]
    torch.testing.assert_close(x.grad.double(), truth, rtol=1e-5, atol=1e-5)
