"""Layers that a model calls with the same x, computed together: what is shared, and everything that must not be."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers
from torch import nn

import peftkern
from peftkern.nn import LoraLinear, share_input
from peftkern.ops import plan as plans
from peftkern.tuners.lora.shared_input import MODEL_TYPES, MOST_MISSES
from peftkern.utils.quantized_modules import Linear4bit
from tiny_models import VOCAB, copied, ids, randomize, tiny_llama

MODULE = importlib.import_module("peftkern.tuners.lora.shared_input")


@pytest.fixture(autouse=True)
def joined_at_any_size(monkeypatch):
    """Small sizes are tied together too, which in plain PyTorch does not pay."""
    monkeypatch.setattr(MODULE, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)


@pytest.fixture
def shared(monkeypatch):
    """The number of projections of each call of `lora_linear_shared`."""
    calls = []

    def counted(operation):
        def call(x, weights, *rest, **options):
            calls.append(len(weights))
            return operation(x, weights, *rest, **options)

        return call

    for name in ("lora_linear_shared", "lora_linear_shared_on", "run_eagerly"):
        monkeypatch.setattr(MODULE, name, counted(getattr(MODULE, name)))
    return calls


def adapted(model=None, **config):
    """A tiny Llama with random adapters, in training mode."""
    config = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | config
    model = peftkern.get_peft_model(tiny_llama() if model is None else model, peftkern.LoraConfig(**config))
    randomize(model)
    return model.train()


def results(model):
    """Logits, and the gradient of every adapter."""
    model.zero_grad()
    output = model(input_ids=ids(), labels=ids())
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def layers(*outs, in_features=16, r=3, **options):
    """LoRA layers of a few outputs, tied, with random adapters."""
    torch.manual_seed(1)
    made = [LoraLinear(in_features, n, r=r, lora_alpha=6, **options) for n in outs]
    for layer in made:
        randomize(layer)
    share_input(*made)
    return made


def alone(layer, x):
    """What the layer gives by itself."""
    held, layer._shared_input = layer._shared_input, None
    try:
        return layer(x)
    finally:
        layer._shared_input = held


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_every_known_model_gives_them_the_same_tensor(model_type, shared):
    """Would catch a model whose q, k and v do not all get one tensor: outputs would be computed and left lying."""
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=VOCAB, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    model = adapted(base, target_modules=names)
    together = results(model)
    tied = [m for m in model.modules() if m.__dict__.get("_shared_input") is not None]
    groups = {id(m._shared_input): m._shared_input for m in tied}.values()
    assert len(groups) >= 2 and shared == [len(g.layers) for g in groups]
    assert all(g._left is None and g._misses == 0 for g in groups)
    peftkern.share_inputs(model, enabled=False)
    for one, other in zip(together, results(model), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    assert len(shared) == len(groups)


def test_the_decoder_in_a_model_that_sees(shared):
    """Would catch a known decoder that is not tied for being part of another model, and layers of a vision tower, which
    nobody has looked at, that are."""
    text = tiny_llama().config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB - 1)
    model = adapted(transformers.LlavaForConditionalGeneration(config), target_modules=["q_proj", "k_proj", "v_proj"])
    names = [name for name, m in model.named_modules() if m.__dict__.get("_shared_input") is not None]
    assert len(names) == 3 * text.num_hidden_layers and all("language_model" in name for name in names)
    model.zero_grad()
    together = model(input_ids=ids(), labels=ids()).loss
    together.backward()
    assert shared == [3] * text.num_hidden_layers
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    peftkern.share_inputs(model, enabled=False)
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(grads, again, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    model.add_adapter("later", peftkern.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    assert not any(m.__dict__.get("_shared_input") for m in model.modules())


def test_small_products_are_not_tied(shared, monkeypatch):
    """Would catch Python around a group that takes longer than its products, and explain that says otherwise."""
    monkeypatch.undo()
    a, b = layers(8, 12)
    x = torch.randn(7, 16)
    assert {type(layer(x).grad_fn).__name__ for layer in (a, b)} == {"_ProductsBackward"}
    for tokens, tied in ((8, False), (2048, False), (2049, True)):
        reason = peftkern.explain(nn.ModuleList([a, b]), tokens).rows[0].reason
        assert ("one shrink, dX and dA pass" in reason) == tied


def test_saves_adds_and_shrinks():
    """Would catch a group that shares nothing: an autograd node for each layer, and dX added by torch."""
    made = layers(8, 12, 5)
    x = torch.randn(7, 16, requires_grad=True)
    nodes = {layer(x).grad_fn for layer in made}
    assert len(nodes) == 1 and type(next(iter(nodes))).__name__ == "_LoraLinearSharedBackward"


def test_the_others_take_theirs_once():
    """Would catch an output that is handed out twice, or kept after all have been taken."""
    a, b, c = layers(8, 12, 5)
    x = torch.randn(7, 16)
    ys = [a(x), b(x), c(x)]
    group = a._shared_input
    assert group._left is None
    again = b(x)
    assert again is not ys[1] and again.grad_fn is not ys[1].grad_fn
    torch.testing.assert_close(again, ys[1])


def change_x(x, layer):
    x.add_(1.0)


def change_adapter(x, layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2.0)


def change_base(x, layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(2.0)


def change_scale(x, layer):
    layer.set_scale("default", 3.0)


def replace_adapter(x, layer):
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(3, 16))


def move_adapter(x, layer):
    layer.lora_A["default"].weight.data = torch.ones(3, 16)


def disable(x, layer):
    layer.enable_adapters(False)


def merge(x, layer):
    layer.merge()


def add_hook(x, layer):
    layer.base_layer.register_forward_hook(lambda *_: torch.zeros(7, 12))


def freeze(x, layer):
    layer.requires_grad_(False)


CHANGES = [change_x, change_adapter, change_base, change_scale, replace_adapter, move_adapter]


@pytest.mark.parametrize("change", [*CHANGES, disable, merge, add_hook, freeze], ids=lambda f: f.__name__)
def test_what_changes_in_between_is_seen(change):
    """Would catch a layer that hands out what was computed before its input, weights, adapters or state changed."""
    a, b = layers(8, 12)
    x = torch.randn(7, 16)
    a(x)
    change(x, b)
    got = b(x)
    want = alone(b, x)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad


def test_modes_in_between():
    """Would catch an output with a graph under no_grad, one without where gradients are recorded, and autocast's."""
    a, b = layers(8, 12)
    x = torch.randn(7, 16)
    a(x)
    with torch.no_grad():
        assert not b(x).requires_grad
        a(x)
    assert b(x).requires_grad
    a(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert b(x).dtype == torch.bfloat16


def test_another_stream_in_between(monkeypatch):
    """Would catch an output that is read on a CUDA stream which does not wait for the one that it is computed on, or in
    a graph that was captured without it."""
    a, b = layers(8, 12)
    x, stream = torch.randn(7, 16), [1]
    monkeypatch.setattr(MODULE, "stream_of", lambda _: stream[0])
    a(x)
    ((left, _),) = a._shared_input._left.outputs.values()
    stream[0] = 2
    assert b(x).grad_fn is not left.grad_fn
    stream[0] = 1
    assert b(x) is left


def test_another_input_runs_alone_and_then_the_group_gives_up(shared):
    """Would catch work thrown away for ever where layers do not share their input, and explain not saying so."""
    a, b = layers(8, 12)
    for i in range(5):
        x, z = torch.randn(2, 40, 16).unbind()
        torch.testing.assert_close(a(x), alone(a, x))
        torch.testing.assert_close(b(z), alone(b, z))
        expected = (
            "seen to have other inputs" if i >= MOST_MISSES else "one shrink, dX and dA pass for layer 0, layer 1"
        )
        assert expected in peftkern.explain(nn.ModuleList([a, b])).rows[0].reason
    assert shared == [2] * MOST_MISSES


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_few_tokens_share_two_launches(quantization, shared, device):
    """Would catch layers that decode one by one where their launches could be shared, or share them unlike as they are,
    and explain not saying which."""
    pytest.importorskip("triton")

    def made(biases):
        bases = [nn.Linear(32, n, bias=bias).to(torch.bfloat16) for n, bias in zip((24, 16, 8), biases, strict=True)]
        found = [LoraLinear.from_linear(base, r=4, lora_alpha=8, quantization=quantization) for base in bases]
        for layer in found:
            randomize(layer)
            layer.to(device)
        share_input(*found)
        return found

    x = torch.randn(3, 32, dtype=torch.bfloat16, device=device)
    for biases, words in (
        ((True, True, True), "two launches for layer 0, layer 1, layer 2"),
        ((True, False, True), "two launches a projection: some have a bias and some have not"),
    ):
        layers = made(biases)
        with peftkern.use_backend("triton"), torch.no_grad():
            for layer, y in [(layer, layer(x)) for layer in layers]:
                torch.testing.assert_close(y, alone(layer, x), rtol=2e-2, atol=2e-2)
            row = peftkern.explain(nn.ModuleList(layers), tokens=3).rows[0]
        assert row.path == ("decode" if quantization is None else "decode_4bit") and words in row.reason
    assert shared == [3]


def test_equal_values_are_not_the_same_tensor():
    """Would catch a group that compares values: x and its copy have histories of their own."""
    a, b = layers(8, 12)
    x, z = torch.randn(7, 16, requires_grad=True), torch.randn(7, 16, requires_grad=True)
    with torch.no_grad():
        z.copy_(x)
    a(x)
    (gradient,) = torch.autograd.grad(b(z).sum(), z)
    assert gradient.shape == z.shape


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, shared):
    """Would catch outputs of the recomputation that are left lying, and other gradients than without it."""
    plain, model = adapted(lora_dropout=0.0), adapted(lora_dropout=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(MOST_MISSES + 2):
        for one, other in zip(results(plain), results(model), strict=True):
            assert torch.equal(one, other)
    assert len(shared) == (MOST_MISSES + 2) * 3 * 4  # two models, one of which computes twice; two layers, two groups


def test_dropout_falls_on_the_same_elements():
    """Would catch a mask for each layer, which would need a pass over x for each."""
    a, b = layers(8, 8, r=16, lora_dropout=0.5)
    b.load_state_dict(a.state_dict())
    x = torch.randn(7, 16)
    first, second = a(x), b(x)
    assert torch.equal(first, second) and not torch.equal(first, a(x))


def test_mixed_states_run_alone(shared):
    """Would catch a group of layers whose adapters, dropouts or modes differ."""
    a, b = layers(8, 12)
    x = torch.randn(7, 16)
    b.lora_bias["default"] = True  # a bias of its own, which learns
    torch.testing.assert_close(a(x), alone(a, x))
    b.lora_bias["default"] = False
    b.lora_dropout["default"] = nn.Dropout(0.5)
    b.train()
    a(x)
    assert not shared
    b.eval()
    a(x)
    b(x)
    assert shared == [2]


def test_another_adapter_is_shared_too(shared):
    """Would catch a group that goes on with the adapter that was active when it was made."""
    model = adapted(lora_dropout=0.0)
    model.add_adapter("other", peftkern.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    randomize(model, seed=7)
    model.set_adapter("other")
    together = results(model)
    assert not shared  # k_proj and gate_proj have no adapter of that name
    peftkern.share_inputs(model, enabled=False)
    for one, other in zip(together, results(model), strict=True):
        assert torch.equal(one, other)


def test_untied_stays_untied(shared):
    """Would catch adapters that tie layers again which the user has untied."""
    model = adapted()
    groups = peftkern.share_inputs(model, enabled=False)
    assert len(groups) == 4 and groups[0][0].endswith("layers.0.self_attn.q_proj")
    model.add_adapter("other", peftkern.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    results(model)
    assert not shared
    assert len(peftkern.share_inputs(model)) == 4
    results(model)
    assert len(shared) == 4


def test_a_model_that_is_not_known_is_left_alone(shared):
    """Would catch layers tied by their names in a model whose forward nobody has looked at."""
    base = tiny_llama()
    base.config.model_type = "something_else"
    results(adapted(base))
    assert not shared


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_layers(double_quant, shared):
    """Would catch a quantized group that computes in x's dtype, or another y than each layer by itself."""
    made = [
        LoraLinear.from_linear(nn.Linear(64, n).to(torch.bfloat16), r=4, lora_alpha=8, quantization="nf4")
        for n in (48, 32)
    ]
    for layer in made:
        randomize(layer)
    share_input(*made)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(5, 64, dtype=dtype)
        for layer, y in [(layer, layer(x)) for layer in made]:
            want = alone(layer, x)
            assert y.dtype == want.dtype
            torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
    assert shared == [2, 2]


def test_copies_and_pickles_in_the_middle_of_a_forward():
    """Would catch a copy whose layers wait for the original's outputs, or a tensor with a history that cannot be
    copied."""
    made = nn.ModuleList(layers(8, 12))
    x = torch.randn(7, 16)
    made[0](x)
    for other in (copied(made, "deepcopy"), copied(made, "pickle")):
        group = other[0]._shared_input
        assert group is other[1]._shared_input and group.layers == tuple(other) and group._left is None
        torch.testing.assert_close(other[1](x), alone(made[1], x))


@pytest.fixture
def shared_by_many(monkeypatch):
    """The number of projections of each call of `multi_lora_linear_shared`."""
    calls = []
    operation = MODULE.multi_lora_linear_shared

    def counted(x, weights, *rest, **options):
        calls.append(len(weights))
        return operation(x, weights, *rest, **options)

    monkeypatch.setattr(MODULE, "multi_lora_linear_shared", counted)
    return calls


def with_two_adapters():
    model = adapted(lora_dropout=0.0)
    model.add_adapter("other", peftkern.LoraConfig(r=2, target_modules="all-linear"))
    randomize(model, seed=7)
    model.set_requires_grad(["default", "other"])
    return model


def mixed_results(model, names=("default", "__base__", "other")):
    model.zero_grad()
    output = model(input_ids=ids(3), labels=ids(3), adapter_names=list(names))
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_batch_of_many_adapters_is_shared(shared_by_many, shared):
    """Would catch projections that share their input but not their launches where rows name their adapters."""
    model = with_two_adapters()
    together = mixed_results(model)
    assert sorted(shared_by_many) == [2, 2, 3, 3] and not shared
    peftkern.share_inputs(model, enabled=False)
    apart = mixed_results(model)
    assert len(together) == len(apart) == 1 + 2 * 2 * 7 * 2  # logits; A and B of two adapters, 7 layers in each block
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(shared_by_many) == 4


def test_generation_for_many_adapters_is_shared_in_inference_mode(shared_by_many):
    """Would catch a server, where each token counts launches, whose projections each take their own."""
    model = with_two_adapters().eval()
    options = {"adapter_names": ["default", "__base__", "other"], "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(input_ids=ids(3), pad_token_id=0, **options)
    shared_by_many.clear()
    with torch.inference_mode():
        got = model.generate(input_ids=ids(3), pad_token_id=0, **options)
    assert torch.equal(got, expected)
    assert sorted(shared_by_many) == [2] * 6 + [3] * 6


def test_checkpointed_batch_of_many_adapters(shared_by_many):
    """Would catch a recomputation in backward that takes another batch's outputs, or leaves some lying."""
    plain, model = with_two_adapters(), with_two_adapters()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for names in (("default", "__base__", "other"), ("other", "other", "default")):
        for one, other in zip(mixed_results(plain, names), mixed_results(model, names), strict=True):
            assert torch.equal(one, other)
    assert len(shared_by_many) == 2 * 3 * 4


@pytest.mark.parametrize("change", [change_x, change_adapter, change_base], ids=lambda f: f.__name__)
def test_a_batch_of_many_sees_changes_in_between(change):
    """Would catch a layer that hands out what was computed before its adapters in the pool, or its input, changed."""
    model = with_two_adapters()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, 4, 64)
    tuner = model.base_model
    with tuner.mixed_batch(["default", "__base__", "other"]):
        attention.q_proj(x)
        before = attention.k_proj(x)
        attention.q_proj(x)
        change(x, attention.k_proj)
        got = attention.k_proj(x)
        held, attention.k_proj._shared_input = attention.k_proj._shared_input, None
        want = attention.k_proj(x)
        attention.k_proj._shared_input = held
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, before)


def test_inference_mode(shared):
    """Would catch versions asked of tensors that have none, and a server whose layers each run by themselves."""
    made = layers(8, 12, 5)
    expected = [alone(layer, torch.ones(7, 16)) for layer in made]
    with torch.inference_mode():
        x = torch.ones(7, 16)
        for layer, y in zip(made, expected, strict=True):
            torch.testing.assert_close(layer(x), y)
        assert shared == [3]
        assert made[0]._shared_input._left is None


@pytest.mark.parametrize("where", ["pre-hook", "hook", "global"])
def test_inference_mode_with_hooks(shared, where):
    """Would catch an x that a hook changed in place, which an inference tensor does not tell."""
    made = layers(8, 12)

    def change(module, args, *_):
        if module is made[0]:
            args[0].add_(1.0)

    register = {
        "pre-hook": made[0].register_forward_pre_hook,
        "hook": made[0].register_forward_hook,
        "global": torch.nn.modules.module.register_module_forward_hook,
    }[where]
    handle = register(change)
    try:
        with torch.inference_mode():
            x = torch.ones(7, 16)
            made[0](x)
            y = made[1](x)
    finally:
        handle.remove()
    torch.testing.assert_close(y, alone(made[1], torch.full((7, 16), 2.0)))
    assert not shared


def test_adapters_made_in_inference_mode(shared):
    """Would catch outputs of all layers that are made and thrown away, as nothing tells whether they still hold."""
    with torch.inference_mode():
        made = layers(8, 12)
        x = torch.ones(7, 16)
        for layer in made:
            torch.testing.assert_close(layer(x), alone(layer, x))
    assert not shared


def test_weights_quantized_in_inference_mode(shared):
    """Would catch a version asked of a 4-bit weight that has none, which torch refuses to tell."""
    with torch.inference_mode():
        bases = [Linear4bit.from_linear(nn.Linear(64, n, bias=False)) for n in (64, 32)]
    made = [LoraLinear.from_linear(base, r=3, lora_alpha=6) for base in bases]
    for layer in made:
        randomize(layer)
    share_input(*made)
    x = torch.randn(7, 64)
    with torch.no_grad():
        for layer in made:
            torch.testing.assert_close(layer(x), alone(layer, x))
    assert not shared


def test_errors_name_the_argument():
    """Would catch layers that are tied although they cannot share anything."""
    a, b = layers(8, 12)
    with pytest.raises(TypeError, match="expected LoRA layers on linear layers, got Linear"):
        share_input(a, nn.Linear(16, 4))
    with pytest.raises(ValueError, match="two or more, each once, got 1"):
        share_input(a)
    with pytest.raises(ValueError, match="two or more, each once, got 2"):
        share_input(a, a)
    with pytest.raises(ValueError, match=r"the same in_features, got \[16, 8\]"):
        share_input(a, LoraLinear(8, 4, r=2, lora_alpha=2))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        peftkern.share_inputs(b.lora_A["default"].weight)
