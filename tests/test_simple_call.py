"""A layer's forward that is what its last one was: the same products, and whatever has changed since is seen."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import peftkern
from peftkern.nn import LoraLinear
from peftkern.tuners.lora.layer import Linear
from tiny_models import copied, ids, randomize, tiny_llama


def layer(dtype=torch.float32, adapter_dtype=None, dropout=0.0, bias=True):
    torch.manual_seed(0)
    base = nn.Linear(24, 33, bias=bias, dtype=dtype)
    made = LoraLinear.from_linear(base, r=4, lora_alpha=8, lora_dropout=dropout, adapter_dtype=adapter_dtype)
    with torch.no_grad():
        made.lora_B["default"].weight.copy_(0.3 * torch.randn(33, 4))
    return made


def in_general(made, x):
    """Output, and gradients of x, A and B, by the way that looks at everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "_simple_call", None)
        held = made.__dict__.pop("_simple_call", None)
        results = run(made, x)
        if held is not None:
            made.__dict__["_simple_call"] = held
    return results


def run(made, x):
    x = x.detach().requires_grad_()
    y = made(x)
    learning = [p for p in made.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *learning])]


def serves(made, x):
    call = made.__dict__.get("_simple_call")
    return call is not None and call.operands(made.__dict__, x) is not None


def same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (24,), (2, 3, 24), (0, 24), (50, 24), (3, 2, 40, 24)])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, False), (torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_general_forward_to_the_bit(shape, dtype, masters, bias):
    """Would catch another order of products, a bias that is left out, and rows that are flattened otherwise."""
    made = layer(dtype, torch.float32 if masters else dtype, bias=bias)
    x = torch.randn(shape).to(dtype)
    want = in_general(made, x)
    run(made, x)
    assert serves(made, x)
    same(run(made, x), want)
    with torch.no_grad():
        torch.testing.assert_close(made(x), want[0], rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(made(x.clone()), want[0], rtol=0, atol=0)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class TimesThree(nn.Module):
    def forward(self, x):
        return 3 * x


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)


A = "default"
CHANGES = {
    "values": lambda m: m.lora_B[A].weight.data.mul_(3),
    "data elsewhere": lambda m: setattr(m.lora_B[A].weight, "data", m.lora_B[A].weight.data * 3),
    "another parameter": lambda m: setattr(m.lora_B[A], "weight", nn.Parameter(m.lora_B[A].weight.detach() * 3)),
    "another module": lambda m: m.lora_A.__setitem__(A, nn.Linear(24, 4, bias=False)),
    "another rank": lambda m: [
        setattr(m.lora_A[A], "weight", nn.Parameter(torch.randn(2, 24))),
        setattr(m.lora_B[A], "weight", nn.Parameter(torch.randn(33, 2))),
    ],
    "another container": lambda m: setattr(m, "lora_A", nn.ModuleDict({A: nn.Linear(24, 4, bias=False)})),
    "a bias of B": lambda m: [
        setattr(m.lora_B[A], "bias", nn.Parameter(torch.ones(33))),
        m.lora_bias.__setitem__(A, True),
    ],
    "scaling": lambda m: m.scaling.__setitem__(A, 9.0),
    "a hook on B": lambda m: m.lora_B[A].register_forward_hook(lambda module, args, out: 3 * out),
    "a hook before A": lambda m: m.lora_A[A].register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "a hook on the base": lambda m: m.base_layer.register_forward_hook(lambda module, args, out: 3 * out),
    "A's own forward": lambda m: own_forward(m.lora_A[A]),
    "the base's own forward": lambda m: own_forward(m.base_layer),
    "A's own class": lambda m: setattr(m.lora_A[A], "__class__", Tripled),
    "a parametrized A": lambda m: nn.utils.parametrize.register_parametrization(m.lora_A[A], "weight", TimesThree()),
    "a dropout of one's own": lambda m: m.lora_dropout.__setitem__(A, TimesThree()),
    "base weight": lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.randn(33, 24), requires_grad=False)),
    "base bias": lambda m: setattr(m.base_layer, "bias", nn.Parameter(torch.randn(33), requires_grad=False)),
    "base layer": lambda m: setattr(m, "base_layer", nn.Linear(24, 33).requires_grad_(False)),
    "disabled": lambda m: m.enable_adapters(False),
    "double": lambda m: m.double(),
    "backend": lambda m: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False])
def test_what_has_changed_is_seen(change, grad):
    """Would catch a forward of what has been replaced, moved, hooked, rescaled or switched off since."""
    made = layer()
    x = torch.randn(5, 24)
    before = run(made, x)
    assert serves(made, x)
    CHANGES[change](made)
    if change == "double":
        x = x.double()
    if change == "backend":
        with peftkern.use_backend("unfused"):
            assert not serves(made, x)
        return
    with torch.set_grad_enabled(grad):
        got = made(x).detach()
    if grad:
        same(run(made, x), in_general(made, x))
    torch.testing.assert_close(got, in_general(made, x)[0], rtol=0, atol=0)
    assert got.dtype is not before[0].dtype or not torch.allclose(got, before[0])


def test_other_inputs_and_modes_are_seen():
    """Would catch autocast, dropout, a base that learns, a dtype or a shape that the last forward had not."""
    made = layer(dropout=0.5)
    x = torch.randn(5, 24)
    made.eval()
    want = made(x)
    assert serves(made, x)
    made.train()
    assert not serves(made, x) and not torch.allclose(made(x), want)
    made.eval()
    made(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype is torch.bfloat16
    assert torch.equal(made(x), want)
    with pytest.raises(TypeError, match="x"):
        made(x.double())
    with pytest.raises(ValueError, match="x"):
        made(x[:, :20])
    with pytest.raises((TypeError, ValueError)):
        made(x[0, 0])
    made.base_layer.weight.requires_grad_()
    made(x).sum().backward()
    assert made.base_layer.weight.grad is not None


def test_adapters_in_another_dtype_are_refused_as_they_were():
    """Would catch an adapter that was cast behind the layer's back, and is now cast back without a word."""
    made = layer()
    x = torch.randn(5, 24)
    made(x)
    for module in (made.lora_A["default"], made.lora_B["default"]):
        module.weight.data = module.weight.data.bfloat16()
    assert not serves(made, x)


def test_transforms_and_tracing_are_seen():
    """Would catch operations that torch.func, forward-mode differentiation or torch.jit.trace cannot look into."""
    made = layer().eval()
    x = torch.randn(5, 24)
    want = made(x)
    assert serves(made, x)
    torch.testing.assert_close(torch.func.vmap(made)(x), want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(made(dual)).tangent is not None
    traced = torch.jit.trace(made, x)
    made.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(traced(x), made(x))


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_of_the_layer_has_none(how):
    """Would catch a copy that multiplies by the original's weights."""
    made = layer()
    x = torch.randn(5, 24)
    want = made(x)
    assert serves(made, x)
    other = copied(made, how)
    assert other.__dict__.get("_simple_call") is None
    with torch.no_grad():
        other.lora_B["default"].weight.zero_()
    assert not torch.allclose(other(x), want) and torch.equal(made(x), want)


def test_a_deleted_adapter_is_not_kept_alive():
    """Would catch memory of an adapter that is gone, held by a layer that has none."""
    made = layer()
    x = torch.randn(5, 24)
    made(x)
    held = weakref.ref(made.lora_A["default"].weight)
    made.delete_adapter("default")
    made(x)
    gc.collect()
    assert held() is None


def test_a_model_trains_and_switches_adapters_by_it():
    """Would catch an adapter that is not active any more, and rows of a mixed batch that all take the last one."""
    config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peftkern.get_peft_model(tiny_llama(), peftkern.LoraConfig(r=4, **config), "one")
    model.add_adapter("two", peftkern.LoraConfig(r=2, **config))
    randomize(model)
    model.eval()
    x = ids(2)

    def logits(**options):
        with torch.no_grad():
            return model(input_ids=x, **options).logits

    first = logits()
    assert torch.equal(first, logits())
    mixed = logits(adapter_names=["two", "one"])
    model.set_adapter("two")
    second = logits()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1]]), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        base = logits()
    assert not torch.allclose(base, second)
    model.merge_adapter()
    torch.testing.assert_close(logits(), second, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(), second, rtol=1e-4, atol=1e-4)
    model.train().set_adapter("one")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
