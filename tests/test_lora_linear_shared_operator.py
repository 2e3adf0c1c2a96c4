"""`peftkern::lora_linear_shared`, the operator behind `lora_linear_shared` under torch.compile, fake tensors and modes.

What it computes is the eager door's, bit for bit; these tests are about everything that tracing could lose.
"""

from __future__ import annotations

import collections
import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from held_paths import by_parity, hold_lora_linear
from numerics import padded_randn
from peftkern import use_backend
from peftkern.ops import lora_linear_shared, quantize_8bit
from peftkern.ops import plan as plans
from peftkern.ops._common import rank_columns
from peftkern.ops._lora_linear_shared_operator import _operator, _operator_backward, flatten_all
from test_lora_linear_shared import SCALINGS, Projections, nf4, one_by_one

OUTS = [(24, 7), (12, 2), (5, 3)]
MIXED_SCALINGS = (0.75, -0.5, 2.0)
MODES = {
    "plain": {},
    "dropout": {"p": 0.5},
    "no bias": {"bias": False},
    "masters": {"dtype": torch.bfloat16, "masters": True},
    "nf4": {"quantize": nf4, "K": 64},
    "int8 with dropout": {"quantize": quantize_8bit, "K": 64, "p": 0.5},
}
FORWARD, BACKWARD = (
    torch.ops.peftkern.lora_linear_shared.default,
    torch.ops.peftkern.lora_linear_shared_backward.default,
)


@pytest.fixture(autouse=True)
def joined_at_any_size(monkeypatch):
    """The eager door is taken at small sizes too, to compare with."""
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    torch._dynamo.reset()


def make(M=33, K=40, outs=OUTS, p=0.0, **options):
    torch.manual_seed(4)
    return Projections(M, K, outs, **options), p


def call(projections, x, p, **options):
    scalings = MIXED_SCALINGS[: len(projections.weights)]
    return lora_linear_shared(
        x, projections.weights, projections.As, projections.Bs, scalings, projections.biases, dropout_p=p, **options
    )


def counting(counts):
    """A backend that counts this library's operators in what autograd traced, forward and backward together."""

    def compiler(graph, _):
        counts.update(n.target for n in graph.graph.nodes if str(n.target).startswith("peftkern."))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler)


def grads_of(ys, projections, leaves=None):
    return torch.autograd.grad(ys, projections.leaves if leaves is None else leaves, projections.dys)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("mode", MODES)
def test_passes_opcheck(mode):
    """Would catch a fake that lies about shapes or dtypes, an output that aliases another, and an autograd formula that
    tracing does not see."""
    projections, p = make(**MODES[mode])
    seed = torch.tensor([9]) if p else None
    held = [b for b in projections.biases if b is not None]
    biased = [b is not None for b in projections.biases]
    path = projections.plan("torch").path.replace("torch_fp32", "torch")  # that one goes one by one
    operands = (projections.As, projections.Bs, *flatten_all(projections.weights))
    rest = (seed, list(MIXED_SCALINGS), p, path)
    found = torch.library.opcheck(_operator, (projections.x, *operands, held, biased, *rest))
    assert set(found.values()) == {"SUCCESS"}

    x, As, Bs, *weights = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, (projections.x, *operands))
    _, s, mask = _operator(x, As, Bs, *weights, held, biased, *rest)
    starts = [columns.start for columns in rank_columns(As)]
    saved = (s, mask if p else None, None, list(MIXED_SCALINGS), starts, p, path)
    for needs in ((True, True, [True, False, True]), (False, True, [False] * 3), (True, False, [False] * 3)):
        found = torch.library.opcheck(_operator_backward, (projections.dys, x, As, Bs, *weights, *saved, *needs))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_eager_in_two_operators(mode):
    """Would catch a graph with an operator for each projection, and any output or gradient that tracing changes."""
    projections, p = make(**MODES[mode])
    if projections.plan("auto").path == plans.APART:
        pytest.skip("this CPU multiplies 16-bit matrices in fp32, each projection by itself")
    seed = torch.tensor([9])
    counts: collections.Counter = collections.Counter()
    compiled = torch.compile(lambda x: call(projections, x, p, seed=seed), backend=counting(counts), fullgraph=True)
    eager, traced = call(projections, projections.x, p, seed=seed), compiled(projections.x)
    assert_same(traced, eager)
    assert_same(grads_of(traced, projections), grads_of(eager, projections))
    assert counts == {FORWARD: 1, BACKWARD: 1}


def test_single_calls_are_three_times_as_many():
    """Would catch a count that counts nothing."""
    projections, _ = make()
    counts: collections.Counter = collections.Counter()
    compiled = torch.compile(lambda x: one_by_one(projections, MIXED_SCALINGS), backend=counting(counts))
    grads_of(compiled(projections.x), projections)
    single = torch.ops.peftkern.lora_linear
    assert counts == {single.default: 3, torch.ops.peftkern.lora_linear_backward.default: 3}


@pytest.mark.parametrize("learned", ["A B", "x B0 B2 A1 A2", "x B", "x A", "A2", "x", "A1 B1 B2"])
@pytest.mark.parametrize("which", [(0, 1, 2), (0, 2), (2,)])
def test_only_the_gradients_asked_for(learned, which):
    """Would catch a dX for a frozen x, gradients in another adapter's place, an output with a history that it should
    not have, and S columns of a projection whose output took no part."""
    projections, _ = make()
    named = {"x": projections.x, **{f"A{i}": t for i, t in enumerate(projections.As)}}
    named |= {f"B{i}": t for i, t in enumerate(projections.Bs)}
    for name, t in named.items():
        t.requires_grad_(name in learned.split() or name[0] in learned.split())
    needs = []

    def compiler(graph, _):
        needs.extend(n.args[-3:] for n in graph.graph.nodes if n.target is BACKWARD)
        return make_boxed_func(graph.forward)

    def run(x):
        ys = call(projections, x, 0.0)
        return [ys[i] for i in which]

    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    eager, traced = run(projections.x), compiled(projections.x)
    assert [y.requires_grad for y in traced] == [y.requires_grad for y in eager]
    alive = [i for i, y in enumerate(eager) if y.requires_grad]
    dys = [projections.dys[which[i]] for i in alive]
    leaves = [t for t in projections.leaves if t.requires_grad]
    if alive:
        results = [
            torch.autograd.grad([ys[i] for i in alive], leaves, dys, allow_unused=True) for ys in (traced, eager)
        ]
        assert_same(*results)
        assert len(needs) == 1 and needs[0][0] is projections.x.requires_grad
        assert needs[0][1] == any(projections.As[i].requires_grad for i in which)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast(p):
    """Would catch outputs in another dtype than the eager door's, and a cast that tracing leaves out."""
    projections, _ = make(K=64)
    seed = torch.tensor([9])

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(projections, x, p, seed=seed)

    eager, traced = run(projections.x), torch.compile(run, backend="aot_eager", fullgraph=True)(projections.x)
    assert_same(traced, eager)
    projections.dys = [dy.bfloat16() for dy in projections.dys]
    for got, want in zip(grads_of(traced, projections), grads_of(eager, projections), strict=True):
        assert torch.equal(got, want)


def test_inductor():
    """Would catch lists of tensors that Inductor cannot hand over."""
    projections, _ = make(quantize=nf4, K=64, outs=[(24, 7), (12, 2)])

    def run(x):
        return [y * 2 for y in call(projections, x * 2, 0.3, seed=torch.tensor([9]))]

    eager, traced = run(projections.x), torch.compile(run, fullgraph=True)(projections.x)
    for got, want in zip(
        [*traced, *grads_of(traced, projections)], [*eager, *grads_of(eager, projections)], strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dims", [(), (2,), (2, 3)])
def test_any_rank(dims):
    """Would catch an operator that flattens tokens, or a fake of another shape than the result's."""
    projections, _ = make(M=24)
    x = projections.x.detach()[0] if not dims else projections.x.detach().reshape(*dims, -1, 40)
    eager, traced = call(projections, x, 0.0), torch.compile(call, backend="aot_eager")(projections, x, 0.0)
    assert_same(traced, eager)
    assert [y.shape for y in traced] == [(*x.shape[:-1], N) for N, _ in OUTS]


def test_empty_input():
    """Would catch a fake or a formula that divides by the number of rows."""
    projections, _ = make(M=0)
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)(projections, projections.x, 0.0)
    assert [y.shape for y in traced] == [(0, N) for N, _ in OUTS]
    for grad, leaf in zip(grads_of(traced, projections), projections.leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_lengths_do_not_recompile():
    """Would catch a plan that turns the number of tokens into a constant, or asks whether x is small."""
    projections, _ = make()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: call(projections, x, 0.3, seed=torch.tensor([9])), backend=counter, fullgraph=True)
    for M in (40, 50, 60, 900, 2000):
        x = padded_randn(M, 40, pad=1, dtype=torch.float32).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        projections.dys = [torch.randn(M, N) for N, _ in OUTS]
        leaves = [x, *projections.As, *projections.Bs]
        traced, eager = run(x), call(projections, x, 0.3, seed=torch.tensor([9]))
        assert_same(traced, eager)
        assert_same(grads_of(traced, projections, leaves), grads_of(eager, projections, leaves))
    assert counter.frame_count == 1


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_repeats_the_dropout(p, compiled):
    """Would catch a mask drawn anew in the recomputation, and state that a selective policy cannot cache."""
    projections, _ = make()

    def policy(_, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    routes = {"none": lambda x: call(projections, x, p)}
    for name, options in {"all": {}, "selective": {"context_fn": contexts}}.items():
        routes[name] = functools.partial(checkpoint, routes["none"], use_reentrant=False, **options)
    results = []
    for name, route in routes.items():
        torch.manual_seed(11)
        target = torch.compile(route, backend="aot_eager", fullgraph=True) if compiled and name != "none" else route
        ys = target(projections.x)
        results.append([*ys, *grads_of(ys, projections)])
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("mode", ["plain", "dropout", "nf4", "int8 with dropout"])
def test_keeps_no_more_than_the_eager_door(mode):
    """Would catch a saved copy of x, a seed beside a mask, x where no A learns, S where no B does, a dense weight."""
    projections, p = make(**MODES[mode])
    seed = torch.tensor([9])

    def kept(run, x):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            run(x)
        given = [*projections.As, *projections.Bs, *flatten_all(projections.weights)[0]]
        given = {t.data_ptr() for t in given}
        return sorted(t.nbytes for t in found if t.data_ptr() not in given)

    def under_a_mode(x):
        with FlopCounterMode(display=False):
            return run(x)

    def run(x):
        return call(projections, x, p, seed=seed)

    for frozen in ((), projections.As, projections.Bs):
        for t in projections.leaves:
            t.requires_grad_(all(t is not other for other in frozen))
        torch._dynamo.reset()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        expected = kept(run, projections.x)
        assert kept(under_a_mode, projections.x) == expected
        assert kept(compiled, projections.x) == expected


def test_fake_tensors():
    """Would catch a route that asks fake tensors for their values or addresses."""
    with FakeTensorMode() as mode:
        x, w, a, b = (mode.from_tensor(torch.randn(*s)) for s in ((2, 6, 8), (5, 8), (3, 8), (5, 3)))
        ys = lora_linear_shared(x, [w, w], [a, a.detach().requires_grad_()], [b, b], (1.0, 2.0), dropout_p=0.5)
    assert [y.shape for y in ys] == [(2, 6, 5)] * 2 and [y.requires_grad for y in ys] == [False, True]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype, masters", [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("M", [3, 33])
def test_kernels(M, dtype, masters, p, device):
    """Would catch an operator that leaves the kernels' path, a mask drawn otherwise in backward, and single launches of
    the decode kernels (M = 3)."""
    pytest.importorskip("triton")
    projections, _ = make(M, 40, OUTS[:2], dtype=dtype, masters=masters, device=device)
    seed = torch.tensor([9], device=device)
    counts: collections.Counter = collections.Counter()
    with use_backend("triton"):
        compiled = torch.compile(lambda x: call(projections, x, p, seed=seed), backend=counting(counts), fullgraph=True)
        eager, traced = call(projections, projections.x, p, seed=seed), compiled(projections.x)
        assert_same(traced, eager)
        assert_same(grads_of(traced, projections), grads_of(eager, projections))
    assert counts == {FORWARD: 1, BACKWARD: 1}


def test_weights_that_one_launch_cannot_read(device):
    """Would catch words read from an address that is no multiple of four, which only the operator can see."""
    pytest.importorskip("triton")
    projections, _ = make(2, 64, OUTS[:2], dtype=torch.bfloat16, device=device, quantize=nf4)
    weight = projections.weights[1]
    odd = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=device)[1:]
    odd.copy_(weight.packed.view(-1))
    projections.weights[1] = type(weight)(
        odd.view(weight.packed.shape), weight.absmax, weight.code, weight.shape, weight.blocksize,
        nested_absmax=weight.nested_absmax, nested_code=weight.nested_code, offset=weight.offset,
    )  # fmt: skip
    with use_backend("triton"), torch.no_grad():
        assert "stored differently" in projections.plan("triton").reason
        compiled = torch.compile(lambda x: call(projections, x, 0.0), backend="aot_eager", fullgraph=True)
        assert_same(compiled(projections.x), one_by_one(projections, MIXED_SCALINGS))


def test_double_backward_is_refused():
    """Would catch a gradient of S that is silently missing, where a mode and not a compiler looks on."""
    projections, _ = make()
    with FlopCounterMode(display=False):
        ys = lora_linear_shared(projections.x, projections.weights, projections.As, projections.Bs, SCALINGS[:3])
        with pytest.raises(RuntimeError, match="lora_linear_shared: double backward"):
            torch.autograd.grad(ys[0].sum(), projections.x, create_graph=True)


@pytest.mark.parametrize("which", [[0, 1, 2], [1, 2], [2]])
def test_paths_of_their_own(which, monkeypatch):
    """Would catch a backward that takes the paths of all projections for those whose outputs were used."""
    pytest.importorskip("triton")
    hold_lora_linear(monkeypatch, by_parity)
    projections, _ = make()

    def grads(function):
        ys = function(projections.x)
        return torch.autograd.grad(
            [ys[i] for i in which], projections.leaves, [projections.dys[i] for i in which], allow_unused=True
        )

    with use_backend("triton"):
        assert projections.plan("triton").path == "triton,triton,cublas"
        compiled = torch.compile(lambda x: call(projections, x, 0.0), backend="aot_eager", fullgraph=True)
        for got, want in zip(grads(compiled), grads(lambda x: call(projections, x, 0.0)), strict=True):
            if want is None:  # a graph gives zeros there
                assert got is None or not got.any()
            else:
                assert torch.equal(got, want)
