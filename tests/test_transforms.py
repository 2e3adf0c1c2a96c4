"""Adapted layers under what takes a model's operations apart: torch.func, forward-mode derivatives, torch.jit.trace.

PEFT's layers are plain PyTorch, so they are the truth here, on the same weights. Fused operations are unknown to all of
these, so our layers have to run without them, and with them again afterwards.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import peftkern
from peftkern.tuners.lora import shared_input
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
PART = ("lora_", "ia3_")


def adapted(library: Any, method: str = "lora", model: nn.Module | None = None, seed: int = 1) -> Any:
    """An adapted `Mlp` (LoRA on an embedding too), or `model`, equal in both libraries."""
    if method != "ia3":
        targets = ["up", "down", "emb"] if model is None else "all-linear"
        config = library.LoraConfig(r=4, target_modules=targets, use_dora=method == "dora")
    else:
        config = library.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    made = library.get_peft_model(mlp() if model is None else model, config)
    randomize(made, PART, seed)
    return made


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if any(part in name for part in PART)}


def gradients(model: Any) -> list[torch.Tensor]:
    found = grad(lambda p: functional_call(model, p, (ids(),)).pow(2).sum())(adapters(model))
    return [found[name] for name in sorted(found)]


def gradients_of_each_row(model: Any) -> list[torch.Tensor]:
    def loss(p: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, p, (row[None],)).pow(2).sum()

    found = vmap(grad(loss), (None, 0))(adapters(model), ids())
    return [found[name] for name in sorted(found)]


def directional(model: Any) -> list[torch.Tensor]:
    x, tangents = ids(), {name: torch.ones_like(p) for name, p in adapters(model).items()}
    return list(jvp(lambda p: functional_call(model, p, (x,)), (adapters(model),), (tangents,)))


def forward_mode(model: Any) -> list[torch.Tensor]:
    layer, x = model.base_model.model.up, torch.ones(3, 16)
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(layer(forward_ad.make_dual(x, 2 * x))).tangent]


def jacobian(model: Any) -> list[torch.Tensor]:
    return [jacrev(model.base_model.model.down)(torch.ones(2, 24))]


def mapped(model: Any) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 5 * 3 * 16).view(5, 3, 16)
    return [vmap(model.base_model.model.up)(x)]


def twice(model: Any) -> list[torch.Tensor]:
    """Curvature along the adapters: a gradient of a gradient."""
    ones = {name: torch.ones_like(p) for name, p in adapters(model).items()}
    inner = grad(lambda p: functional_call(model, p, (ids(),)).pow(2).sum())
    _, found = jvp(inner, (adapters(model),), (ones,))
    return [found[name] for name in sorted(found)]


USES = [gradients, gradients_of_each_row, directional, forward_mode, jacobian, mapped, twice]


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_transforms_of_a_model_give_what_peft_gives(use, method):
    """Would catch: an autograd function that torch.func refuses; a layer that stays plain when it is over; norms of
    DoRA written to memory of one's own, or with a tangent."""
    ours, theirs = adapted(peftkern, method), adapted(peft, method)
    for got, want in zip(use(ours), use(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert "unfused" not in peftkern.explain(ours).paths


def test_layers_that_share_x_under_a_transform(monkeypatch):
    """Would catch: q, k and v computed together by a fused operation, or outputs left that outlive their transform."""
    monkeypatch.setattr(shared_input, "JOINED_ELEMENTS", 0)
    found = []
    for library in (peftkern, peft):
        model = adapted(library, model=tiny_llama())
        x = model.get_input_embeddings()(ids()).detach()

        def loss(p: dict[str, torch.Tensor], x: torch.Tensor, model: Any = model) -> torch.Tensor:
            return functional_call(model, p, (), {"inputs_embeds": x, "use_cache": False}).logits.pow(2).sum()

        inside = grad(loss)(adapters(model), x)
        loss(dict(model.named_parameters()), x).backward()
        found.append((inside, {name: p.grad for name, p in model.named_parameters() if name in inside}))
    for got, want in zip(*found, strict=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_row_of_models_at_once(method):
    """Would catch: parameters of several adapters, stacked for vmap, in an operation that takes them for one's; norms
    of several adapters written to one's memory."""
    models = [adapted(peftkern, method, seed=seed) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    tokens = ids()
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (tokens,)))(stacked, buffers)
    torch.testing.assert_close(got, torch.stack([model(tokens) for model in models]))


def test_a_batch_of_many_adapters_under_a_transform():
    """Would catch: adapter_names whose batch is decided to be one operation, which then refuses."""
    model = adapted(peftkern)
    model.add_adapter("two", peftkern.LoraConfig(r=2, target_modules=["up"]))
    randomize(model, PART)
    names = ["default", "two"]

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, p, (ids(),), {"adapter_names": names}).pow(2).sum()

    got = grad(loss)(adapters(model))
    model.set_requires_grad(names)
    loss(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], torch.zeros_like(p) if p.grad is None else p.grad)


def penalty(model: Any) -> list[torch.Tensor]:
    """Gradients of a gradient penalty, the one kind of double backward that training runs."""
    x = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16).requires_grad_()
    y = model.base_model.model.down(torch.relu(model.base_model.model.up(x))).pow(2).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    dx.pow(2).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_gradients_of_gradients_are_those_of_peft(method, monkeypatch):
    """Would catch: a layer that still runs fused under "unfused", a setting that outlives its block."""
    # IA3 on few rows is torch's own operations, whose gradients have gradients.
    monkeypatch.setattr(importlib.import_module("peftkern.ops.ia3_linear"), "SHORT_ROWS", 0)
    ours, theirs = adapted(peftkern, method), adapted(peft, method)
    with pytest.raises(RuntimeError, match="double backward.*use_backend\\('unfused'\\)"):
        penalty(ours)
    ours.zero_grad()
    with peftkern.use_backend("unfused"):
        assert set(peftkern.explain(ours).paths) == {"unfused"}
        got = penalty(ours)
    assert "unfused" not in peftkern.explain(ours).paths
    for mine, want in zip(got, penalty(theirs), strict=True):
        torch.testing.assert_close(mine, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_unfused_is_another_way_to_the_same_numbers(method):
    """Would catch: operations that refuse the setting, a batch of many adapters or a compiled model that ignores it."""
    torch._dynamo.reset()
    model = adapted(peftkern, method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    many = {"adapter_names": ["default", "__base__"]}
    calls = [lambda: compiled(ids()), lambda: model(ids()), lambda: model(ids(), **many)]
    for call in calls[:2] if method == "dora" else calls:  # DoRA is not mixed in a batch
        want = call()
        with peftkern.use_backend("unfused"):
            torch.testing.assert_close(call(), want)


def test_compiled_gradients():
    """Would catch: an operator in a compiled transform, which has no rule for it."""
    torch._dynamo.reset()
    model = adapted(peftkern)
    loss = grad(lambda p: functional_call(model, p, (ids(),)).pow(2).sum())
    got = torch.compile(loss, backend="aot_eager")(adapters(model))
    for name, want in loss(adapters(model)).items():
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_traced_model_serves_other_sizes(method):
    """Would catch: a plan, a shape or a question about the CPU that a trace meets as an operator or a number."""
    model = adapted(peftkern, method).eval()
    traced = torch.jit.trace(model.get_base_model(), (ids(),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch, length in ((2, 12), (3, 7), (1, 1)):
        torch.testing.assert_close(loaded(ids(batch, length)), model(ids(batch, length)))
