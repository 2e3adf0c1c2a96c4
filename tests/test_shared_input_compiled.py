"""Layers that are called with the same x in a compiled model: one operator for all, and everything that must not be.

What is compared with is each layer by itself, in eager mode, on the same tensors.
"""

from __future__ import annotations

import collections
import contextlib
import gc

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.nn import LoraLinear, share_input
from peftkern.ops import plan as plans
from peftkern.ops._lora_linear_traced import _Left
from test_shared_input import MODULE, adapted, alone, layers, results
from tiny_models import ids, randomize

OPS = torch.ops.peftkern
SHARED = {OPS.lora_linear_shared.default: 1, OPS.lora_linear_shared_backward.default: 1}


@pytest.fixture(autouse=True)
def joined_at_any_size(monkeypatch):
    """Eager groups share small sizes too, so that they draw one dropout seed as compiled ones do."""
    monkeypatch.setattr(MODULE, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    torch._dynamo.reset()


class Counted:
    """A backend that counts this library's operators in what was traced, and the graphs."""

    def __init__(self):
        self.operators: collections.Counter = collections.Counter()
        self.graphs = 0
        self.backend = aot_autograd(fw_compiler=self._compile)

    def _compile(self, graph, _):
        self.graphs += 1
        self.operators.update(n.target for n in graph.graph.nodes if str(n.target).startswith("peftkern."))
        return make_boxed_func(graph.forward)

    def compile(self, function, fullgraph=True, **options):
        return torch.compile(function, backend=self.backend, fullgraph=fullgraph, **options)

    @property
    def forwards(self):
        return {str(target).split(".")[1]: n for target, n in self.operators.items() if "backward" not in str(target)}


@pytest.fixture
def counted():
    return Counted()


def untied(*made):
    """The layers, not tied for the length of a with block."""
    stack = contextlib.ExitStack()
    for layer in made:
        held, layer._shared_input = layer._shared_input, None
        stack.callback(setattr, layer, "_shared_input", held)
    return stack


def learned(made, x):
    return [x, *(p for layer in made for p in layer.parameters() if p.requires_grad)]


def gradients(ys, leaves):
    dys = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in ys]
    alive = [i for i, y in enumerate(ys) if y.requires_grad]
    if not alive:
        return []
    return torch.autograd.grad([ys[i] for i in alive], leaves, [dys[i] for i in alive], allow_unused=True)


def assert_close(got, want):
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.requires_grad == other.requires_grad
            torch.testing.assert_close(one, other, rtol=5e-5, atol=5e-5)


def check(made, compiled, function, x, sees_gradients=True):
    """`compiled` gives what `function` gives with layers that are not tied."""
    got = compiled(x)
    with untied(*made):
        want = function(x)
    assert_close(got, want)
    if sees_gradients:
        assert_close(gradients(got, learned(made, x)), gradients(want, learned(made, x)))


def make(*outs, x=(7, 16), **options):
    made = layers(*(outs or (8, 12, 5)), **options)
    return made, torch.randn(*x, requires_grad=True)


# -- what is shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("x_learns", [True, False])
def test_one_operator_forward_and_one_backward(options, x_learns, counted):
    """Would catch a compiled model in which each layer runs by itself, another result, and a mask for each layer."""
    made, x = make(**options)
    x.requires_grad_(x_learns)
    leaves = learned(made, x)[0 if x_learns else 1 :]
    found = []
    for run in (counted.compile(lambda x: [layer(x) for layer in made]), lambda x: [layer(x) for layer in made]):
        torch.manual_seed(5)
        ys = run(x)
        found.append([*ys, *gradients(ys, leaves)])
    assert_close(*found)
    assert counted.operators == SHARED
    assert all(layer._shared_input._left is None and layer._shared_input._misses == 0 for layer in made)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model(checkpointed, counted):
    """Would catch a model whose projections are traced one by one, or whose checkpointed blocks compute other
    gradients."""
    model = adapted(lora_dropout=0.0)
    expected = results(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        model.config.use_cache = False
    compiled = counted.compile(model)
    model.zero_grad()
    output = compiled(input_ids=ids(), labels=ids())
    output.loss.backward()
    got = [output.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # two layers: q, k, v and gate, up; o_proj and down_proj by themselves
    backwards = {n for t, n in counted.operators.items() if "backward" in str(t)}
    assert counted.forwards["lora_linear_shared"] == (8 if checkpointed else 4) and backwards == {4}
    assert counted.graphs == 2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_layers(quantization, counted):
    """Would catch views of a packed weight, made anew by each call, that are not known as the same weight."""
    made = [LoraLinear.from_linear(nn.Linear(64, n), r=3, lora_alpha=6, quantization=quantization) for n in (8, 12)]
    for layer in made:
        randomize(layer)
    share_input(*made)
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        x = torch.randn(7, 64, dtype=dtype, requires_grad=True)

        def run(x):
            return [layer(x) for layer in made]

        got = counted.compile(run)(x)
        with untied(*made):
            want = run(x)
        tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        for one, other in zip([*got, *gradients(got, [x])], [*want, *gradients(want, [x])], strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    assert counted.operators == {target: 2 for target in SHARED}


def test_bitsandbytes_layers(counted):
    """Would catch a group of bitsandbytes' layers of which each computes all."""
    bnb = pytest.importorskip("bitsandbytes")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name, n in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
                setattr(self, name, bnb.nn.Linear4bit(64, n, bias=False, compute_dtype=torch.float32))

        def forward(self, x):
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    block = Block().to("cpu")
    model = peftkern.get_peft_model(block, peftkern.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    randomize(model)
    assert len(peftkern.share_inputs(model)) == 1
    made = [block.q_proj, block.k_proj, block.v_proj]
    check(made, counted.compile(block), block, torch.randn(7, 64, requires_grad=True))
    assert counted.operators == SHARED


def test_under_autocast(counted):
    """Would catch a cast of x for each layer that hides that they share it, and outputs of another dtype."""
    made, x = make()

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [layer(x) for layer in made]

    got = counted.compile(run)(x)
    with untied(*made):
        want = run(x)
    for one, other in zip([*got, *gradients(got, [x])], [*want, *gradients(want, [x])], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert counted.operators == SHARED


def test_quantized_layers_under_autocast_keep_the_dtype_of_x():
    """Would catch an output of a group, eager or compiled, in another dtype than each layer's by itself."""
    made = [LoraLinear.from_linear(nn.Linear(64, n), r=3, lora_alpha=6, quantization="nf4") for n in (8, 12)]
    share_input(*made)
    x = torch.randn(7, 64)

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [layer(x) for layer in made]

    with untied(*made):
        wanted = [y.dtype for y in run(x)]
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        assert [y.dtype for y in function(x)] == wanted


def test_inductor_and_its_cache():
    """Would catch a graph from the cache that is not the one that this model traces to."""
    made, x = make()

    def run(x):
        x = x * 2
        return [layer(x) + 1 for layer in made]

    for _ in range(2):
        torch._dynamo.reset()
        check(made, torch.compile(run, fullgraph=True), run, x)


def test_lengths_do_not_recompile():
    """Would catch a group that asks for the number of tokens as a constant."""
    made, _ = make()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x):
        return [layer(x) for layer in made]

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for M in (40, 50, 900):
        x = torch.randn(M, 16, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        check(made, compiled, run, x)
    assert counter.frame_count == 1


def test_blocks_compiled_one_by_one_share_a_graph():
    """Would catch a graph that is guarded on one block's layers, and compiled anew for each block of a model."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = layers(8, 12)

        def forward(self, x):
            return self.q_proj(x).sum() + self.k_proj(x).sum()

    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(7, 16)
    for _ in range(10):
        block = Block()
        block.compile(backend=counter, fullgraph=True)
        block(x)
    assert counter.frame_count == 1


# -- what must not be ---------------------------------------------------------------------------------------------


def change_x(x, layer):
    x.add_(1.0)


def change_a_view_of_x(x, layer):
    x[1:].mul_(3.0)


def change_the_base_of_x(x, layer):
    x._base.mul_(2.0)


def change_x_by_its_data(x, layer):
    x.data.mul_(2.0)


def change_adapter(x, layer):
    layer.lora_B["default"].weight.mul_(2.0)


def change_adapter_by_its_data(x, layer):
    layer.lora_A["default"].weight.data.mul_(2.0)


def change_base(x, layer):
    layer.base_layer.weight.mul_(2.0)


def change_scale(x, layer):
    layer.set_scale("default", 3.0)


CHANGES = [
    change_x, change_a_view_of_x, change_x_by_its_data, change_adapter, change_adapter_by_its_data, change_base,
    change_scale,
]  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "eager"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_in_between_is_seen(change, backend):
    """Would catch a layer that takes what was computed before its input, weights or adapter changed."""
    found = []
    for tied in (True, False):
        torch._dynamo.reset()
        a, b = layers(8, 12)
        if not tied:
            a._shared_input = b._shared_input = None

        def run(x, a=a, b=b):
            x = x * 1.0
            first = a(x)
            with torch.no_grad():
                change(x, b)
            return first, b(x)

        with torch.no_grad():
            found.append(torch.compile(run, backend=backend)(torch.linspace(-1, 1, 7 * 16).view(7, 16)))
    assert_close(*found)
    with torch.no_grad():
        x = torch.linspace(-1, 1, 7 * 16).view(7, 16)
        same = [layer(x) for layer in layers(8, 12)]
    assert not torch.equal(found[0][1], same[1])


def test_a_packed_weight_that_changes_in_between():
    """Would catch a packed weight told apart by versions alone: each call sees it through a `.data` of its own."""
    made = [LoraLinear.from_linear(nn.Linear(64, n), r=3, lora_alpha=6, quantization="nf4") for n in (8, 12)]
    share_input(*made)
    x = torch.randn(7, 64)

    def run(x):
        first = made[0](x)
        made[1].base_layer.weight.data.zero_()
        return first, made[1](x)

    with torch.no_grad():
        got = torch.compile(run, backend="aot_eager")(x)
        assert_close(got, [alone(layer, x) for layer in made])


def test_graph_break_in_between(counted):
    """Would catch outputs that outlive their graph, or are waited for by the next one."""
    made, x = make()

    def run(x):
        first = made[0](x)
        torch._dynamo.graph_break()
        return first, made[1](x), made[2](x)

    check(made, counted.compile(run, fullgraph=False), run, x)
    assert counted.forwards == {"lora_linear_shared": 1, "lora_linear": 2}


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2), (0, 2), (0, 1, 1, 2), (0, 0, 1, 2)])
def test_any_order_of_calls(order, counted):
    """Would catch an output that is handed out twice or to another layer, and a layer that waits for the first."""
    made, x = make()

    def run(x):
        return [made[i](x) for i in order]

    check(made, counted.compile(run), run, x)


def test_another_x_of_the_same_values(counted):
    """Would catch tensors that are told by their values or memory: a copy and a view have histories of their own."""
    made, x = make()

    def run(x):
        return made[0](x), made[1](x.clone()), made[2](x.view(7, 16) * 1.0)

    check(made, counted.compile(run), run, x)
    assert counted.forwards == {"lora_linear_shared": 1, "lora_linear": 2}


def test_modes_in_between(counted):
    """Would catch an output without a history where gradients are recorded, and autocast's dtype without it."""
    made, x = make()

    def run(x):
        with torch.no_grad():
            first = made[0](x)
        second = made[1](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            third = made[2](x)
        return first, second, third

    got = counted.compile(run)(x)
    assert [(y.requires_grad, y.dtype) for y in got] == [
        (False, torch.float32), (True, torch.float32), (True, torch.bfloat16)
    ]  # fmt: skip
    with untied(*made):
        for one, other in zip(got, run(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, counted):
    """Would catch versions asked of tensors that have none."""
    made, x = make()
    with mode():
        check(made, counted.compile(lambda x: [layer(x) for layer in made]), lambda x: [f(x) for f in made], x, False)


@pytest.mark.parametrize("region", ["all", "first", "others"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointed_regions(region, p, counted):
    """Would catch outputs that a recomputation takes from the first forward, and a mask that it draws anew."""
    made, x = make(lora_dropout=p)

    def run(x):
        x = x.sin()
        if region == "all":
            return checkpoint(lambda x: [layer(x) for layer in made], x, use_reentrant=False)
        if region == "first":
            return [checkpoint(made[0], x, use_reentrant=False), made[1](x), made[2](x)]
        return [made[0](x), *checkpoint(lambda x: [made[1](x), made[2](x)], x, use_reentrant=False)]

    if not p:
        return check(made, counted.compile(run), lambda x: [layer(x.sin()) for layer in made], x)
    ys = counted.compile(run)(x)
    for layer, y, dB in zip(made, ys, gradients(ys, [m.lora_B["default"].weight for m in made]), strict=True):
        # y is linear in B: by the same mask, <dY, y - base> is <dB, B>.
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
        part = (dy * (y - layer.base_layer(x.sin()))).sum()
        torch.testing.assert_close(part, (dB * layer.lora_B["default"].weight).sum(), rtol=1e-4, atol=1e-4)
    return None


@pytest.mark.parametrize("region", ["all", "first", "others"])
def test_nested_regions(region):
    """Would catch an output that leaves the graph of a region that was traced by itself."""
    made, x = make()

    @torch.compiler.nested_compile_region
    def inside(x):
        first = () if region == "others" else (made[0](x).cos() if region == "first" else made[0](x),)
        return first if region == "first" else (*first, made[1](x), made[2](x))

    def run(x):
        x = x.sin()
        before = (made[0](x),) if region == "others" else ()
        return (*before, *inside(x), *((made[1](x), made[2](x)) if region == "first" else ()))

    def plain(x):
        x = x.sin()
        ys = [layer(x) for layer in made]
        return [ys[0].cos(), *ys[1:]] if region == "first" else ys

    check(made, torch.compile(run, backend="aot_eager", fullgraph=True), plain, x)


def test_branches():
    """Would catch an output of one branch that is taken in the other, or after both."""
    made, x = make()

    def run(x):
        y = torch.cond(x.sum() > 0, lambda x: made[0](x).sin(), lambda x: made[0](x).cos(), (x,))
        return y, made[1](x)

    with torch.no_grad():
        for x in (torch.ones(7, 16), -torch.ones(7, 16)):
            got = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
            first, second = alone(made[0], x), alone(made[1], x)
            assert_close(got, [first.sin() if x.sum() > 0 else first.cos(), second])


def test_compiled_layers_in_an_eager_model(counted):
    """Would catch the others' outputs computed by a layer that is compiled by itself, and state that it leaves."""
    made, x = make()
    made[0].compile(backend=counted.backend, fullgraph=True)
    for _ in range(2):
        check(made, lambda x: [layer(x) for layer in made], lambda x: [layer(x) for layer in made], x)
    assert set(counted.forwards) == {"lora_linear"}
    assert made[0]._shared_input._left is None


def test_eager_calls_between_compiled_ones(counted):
    """Would catch a compiled layer that takes an eager one's output, or the other way round."""
    made, x = make()
    others = counted.compile(lambda x: [layer(x) for layer in made[1:]])
    first = counted.compile(lambda x: made[0](x))
    check(made, lambda x: [made[0](x), *others(x)], lambda x: [layer(x) for layer in made], x)
    x = torch.randn(7, 16, requires_grad=True)
    check(made, lambda x: [first(x), made[1](x), made[2](x)], lambda x: [layer(x) for layer in made], x)


def test_states_that_keep_them_apart(counted):
    """Would catch a group whose base learns, whose dropouts differ, or whose adapters are off."""
    made, x = make()
    run = [lambda x: [layer(x) for layer in made]] * 2

    def fresh():
        torch._dynamo.reset()
        counted.operators.clear()
        return counted.compile(run[0]), run[1], x

    made[1].base_layer.weight.requires_grad_()
    check(made, *fresh())
    assert counted.forwards == {"lora_linear": 3}
    made[1].base_layer.weight.requires_grad_(False)
    made[1].lora_dropout["default"] = nn.Dropout(0.5)
    counted.compile(made[0])(x)
    fresh()[0](x)
    assert counted.forwards == {"lora_linear": 3}
    made[1].lora_dropout["default"] = nn.Identity()
    made[2].enable_adapters(False)
    check(made, *fresh(), sees_gradients=False)
    assert counted.forwards == {"lora_linear": 2}
    made[2].enable_adapters(True)
    for layer in made:
        layer.set_scale("default", 0.25)
    check(made, *fresh())
    assert counted.operators == SHARED


def test_a_change_between_two_calls_of_a_compiled_model(counted):
    """Would catch a compiled graph that goes on with the scaling or the weights that it was traced with."""
    made, x = make()
    compiled = counted.compile(lambda x: [layer(x) for layer in made])
    for change in (lambda: None, lambda: made[1].set_scale("default", 3.0), lambda: made[2].enable_adapters(False)):
        change()
        check(made, compiled, lambda x: [layer(x) for layer in made], x, sees_gradients=False)
    made[2].enable_adapters(True)
    with torch.no_grad():
        made[1].lora_B["default"].weight.add_(1.0)
        made[1].base_layer.weight.add_(1.0)
    check(made, compiled, lambda x: [layer(x) for layer in made], x)


@pytest.mark.parametrize("calls", [(0,), (0, 1, 2)])
def test_nothing_outlives_the_tracing(calls):
    """Would catch outputs that nobody took and that keep a tracer, its graph and all its tensors alive."""
    made, x = make()
    torch.compile(lambda x: [made[i](x) for i in calls], backend="aot_eager")(x)
    torch._dynamo.reset()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is _Left]


def test_errors_name_the_argument():
    """Would catch a mistake that surfaces in the middle of tracing as torch's complaint about shapes."""
    made, _ = make()
    compiled = torch.compile(lambda x: [layer(x) for layer in made], backend="aot_eager")
    with pytest.raises(Exception, match=r"x: expected shape \[..., 16\] to fit weight"):
        compiled(torch.randn(7, 15))


def test_exported_program():
    """Would catch a program whose later layers wait for what only tracing leaves."""
    made, x = make()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(made)

        def forward(self, x):
            return [layer(x) for layer in self.parts]

    with torch.no_grad():
        program = torch.export.export(Block(), (x.detach(),))
        got = program.module()(x.detach())
        assert_close(got, [alone(layer, x.detach()) for layer in made])
