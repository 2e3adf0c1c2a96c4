"""`adapter_names` on layers that are given a batch's tokens in one axis: known ones are served, experts refused."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftkern
from peftkern import IA3Config, LoraConfig
from peftkern.ops.adapter_route import AdapterBatch, FlatBatch
from peftkern.tuners.token_order import FLATTENING
from test_mixed_batch import NAMES, gradients, separately, together_and_apart
from tiny_models import VOCAB, ids, randomize

transformers = pytest.importorskip("transformers")

LORA = (LoraConfig(r=4, target_modules="all-linear"), LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "q_proj"]))
IA3 = (IA3Config(), IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]))
# Sizes by the names that configurations have for them.
SIZES = dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 16)
SIZES |= dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim"), 24)
SIZES |= dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), 24)
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
SIZES |= dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1)
SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_attention_heads", "num_key_value_heads"), 2)
SIZES |= {"num_hidden_layers": 1, "head_dim": 8, "moe_latent_size": 8, "moe_hidden_size": 8, "bos_token_id": 1}
SIZES |= {"vocab_size": 32, "eos_token_id": 1, "pad_token_id": 0}


def tiny_opt(dtype=torch.float64, **more):
    """An OPT of two layers in eval mode."""
    fields = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB)
    config = transformers.OPTConfig(**fields, word_embed_proj_dim=24, max_position_embeddings=32, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(config).eval().to(dtype)


def adapted(base, *configs):
    """`base` with the adapters "one", "two", ... of these configurations, random values in all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(base, copy.deepcopy(configs[0]), adapter_name="one")
        for name, config in zip(("two", "three"), configs[1:], strict=False):
            model.add_adapter(name, copy.deepcopy(config))
    randomize(model, ("lora_", "ia3_", "modules_to_save"))
    for name, p in model.named_parameters():
        if "ia3_" in name:
            p.data.add_(1)
    return model.eval()


def assert_as_apart(model, x, names=NAMES, tolerance=1e-10):
    """Output and every gradient of a batch are those of each row run alone, relative to the largest output or gradient:
    one that is 0 in exact arithmetic, as k_proj's for a single token, is the rounding of such terms."""
    y, together, want, apart = together_and_apart(model, x, names)
    assert together and set(together) == set(apart)
    torch.testing.assert_close(y, want, rtol=0, atol=tolerance * want.abs().max().item())
    atol = tolerance * max(gradient.abs().max().item() for gradient in apart.values())
    for key, true in apart.items():
        torch.testing.assert_close(together[key], true, rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    for name in set(model.peft_config) - set(names):
        assert not any(f".{name}" in key for key in together)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_opt(method, before):
    """Would catch a token of fc1 or fc2 under another sequence's adapter, forward or backward, whatever the length."""
    model = adapted(tiny_opt(do_layer_norm_before=before), *(LORA if method == "lora" else IA3))
    assert any("fc2" in key for key, _ in model.named_parameters() if "lora_" in key or "ia3_" in key)
    assert_as_apart(model, ids(4, length=7))
    assert_as_apart(model, ids(4, length=1))
    assert_as_apart(model, ids(1, length=5), ["two"])
    assert_as_apart(model, ids(3, length=3), ["two", "two", "one"])  # as many tokens as rows


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("how", ["hooked", "whole"])
def test_opt_where_a_layer_is_no_single_operation(method, how):
    """Would catch rows that are counted as the batch's where each adapter is added, or copied whole, for its rows."""
    options = {"target_modules": ["fc1", "fc2"], "modules_to_save": ["fc1"] if how == "whole" else None}
    if how == "whole":
        options["target_modules"] = ["fc2"]
    made = LoraConfig(r=3, lora_bias=True, **options) if method == "lora" else None
    model = adapted(tiny_opt(), *[made or IA3Config(feedforward_modules=[], **options)] * 2)
    if how == "hooked":
        for layer in (m for m in model.modules() if hasattr(m, "base_layer")):
            layer.base_layer.register_forward_hook(lambda *_: None)
    assert_as_apart(model, ids(4, length=5))


def test_the_bias_of_lora_b_in_one_operation():
    """Would catch a bias that reaches the first rows only, where rows are tokens."""
    model = adapted(tiny_opt(), *[LoraConfig(r=2, lora_bias=True, target_modules=["fc1", "fc2"])] * 2)
    assert_as_apart(model, ids(4, length=5))


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_4bit_opt(method):
    """Would catch a quantized fc1 whose tokens are refused, or taken for another row's."""
    base = tiny_opt(torch.float32)
    base = peftkern.quantize_model(base, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, progress=False)
    model, x = adapted(base, *(LORA if method == "lora" else IA3)), ids(4, length=6)
    got = model(x, adapter_names=NAMES).logits
    want = torch.cat(separately(model, NAMES, lambda i: model(x[i : i + 1]).logits))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_generate(method):
    """Would catch beams, and steps of a single token, that take another prompt's adapter."""
    model, x = adapted(tiny_opt(), *(LORA if method == "lora" else IA3)), ids(4, length=5)
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        got = model.generate(input_ids=x, adapter_names=NAMES, **options)
        want = separately(model, NAMES, lambda i, o=options: model.generate(input_ids=x[i : i + 1], **o))
        assert torch.equal(got, torch.cat(want))
        assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, method):
    """Would catch a layer that is computed again in backward, after the block, and then refuses its tokens."""
    model = adapted(tiny_opt(), *(LORA if method == "lora" else IA3)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.get_base_model().model.decoder.dropout = 0.0
    for layer in model.get_base_model().model.decoder.layers:
        layer.dropout = layer.self_attn.dropout = 0.0
    model.set_requires_grad(["one", "two"])
    model.enable_input_require_grads()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        out = model(ids(4, length=6), adapter_names=NAMES, use_cache=False)
        out.logits.square().mean().backward()
        found.append(gradients(model))
    assert found[0] and set(found[0]) == set(found[1])
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_one_compilation_serves_all_batches(method):
    """Would catch a graph that breaks at the hook which sees the batch, or that it is compiled anew for each block."""
    model, x = adapted(tiny_opt(torch.float32), *(LORA if method == "lora" else IA3)), ids(4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    for names in (NAMES, ["two", "two", "one", "__base__"]):
        want = model(x, adapter_names=names).logits
        with model.base_model.mixed_batch(names):
            got = compiled(x).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == 1


@pytest.mark.parametrize("targets", [["fc1"], ["fc2", "q_proj"]])
def test_names_that_are_not_as_many_as_the_batch(targets):
    """Would catch two names for four sequences, each silently taken for two: fc1 by itself could not tell."""
    model, x = adapted(tiny_opt(), LoraConfig(r=2, target_modules=targets)), ids(4, length=6)
    for names in (["one"] * 2, ["one"] * 8, ["one"] * 5, ["one"], []):
        words = f"^adapter_names: expected one name for each of the batch's 4 rows, got {len(names)} "
        with pytest.raises(ValueError, match=words):
            model(x, adapter_names=names)
    bank = peftkern.AdapterBank(tiny_opt(), target_modules=targets)
    bank.add("one")
    with pytest.raises(ValueError, match="an id for each of x's 24 rows"), bank.batch(torch.tensor([0, 0])):
        bank.model(x)
    hooks = [m for m in (*model.modules(), *bank.model.modules()) if m._forward_pre_hooks]
    assert not hooks  # the watch ends with its block, after an error too


def test_a_bank_by_name_by_slot_and_by_token():
    """Would catch slots of sequences that are refused where names are served, or slots of tokens that no longer are."""
    bank = peftkern.AdapterBank(tiny_opt(), target_modules=["fc1", "fc2", "v_proj"], max_rank=4)
    for name in ("one", "two"):
        bank.add(name)
    randomize(bank.model)
    model, x = bank.model.eval(), ids(4, length=5)
    with torch.no_grad():
        want = torch.cat(separately(model, NAMES, lambda i: model(x[i : i + 1]).logits))
        slots = bank.ids(NAMES)
        for rows in (NAMES, slots, slots.int(), slots.repeat_interleave(5)):
            with bank.batch(rows):
                torch.testing.assert_close(model(x).logits, want, rtol=1e-9, atol=1e-10)
        mixed_up = torch.tensor([[slots[0], slots[2]] * 2 + [-1]] * 4).flatten()  # adapters within a sequence
        with bank.batch(mixed_up):
            within = model(x).logits
        assert not torch.allclose(within[0], want[0])
        with bank.batch(mixed_up.view(4, 5)[:1].flatten()):
            torch.testing.assert_close(model(x[:1]).logits, within[:1], rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_an_empty_batch():
    """Would catch a division by the number of names."""
    model = adapted(tiny_opt(), LoraConfig(r=2, target_modules=["fc1"]))
    layer = model.get_base_model().model.decoder.layers[0]
    batch = FlatBatch(model.base_model.mixed_adapters().batch([], "cpu"))
    x = torch.zeros(0, 32, dtype=torch.float64)
    assert batch.check_rows(x) == 0 and batch.entries(x).shape == (0, 32)
    with model.base_model.mixed_batch([]):
        assert layer.fc1(x).shape == (0, 48)


def test_a_flat_batch_is_that_of_its_tokens():
    """Would catch tables for the kernels, or pieces for the plain path, that count rows in another order than x has."""
    batch = AdapterBatch(torch.tensor([1, -1, 0, 1]), 2)
    flat, tokens = FlatBatch(batch), AdapterBatch(torch.tensor([1, -1, 0, 1]).repeat_interleave(3), 2)
    x = torch.randn(12, 8)
    assert flat.check_rows(x) == 12 and torch.equal(flat.row_ids(12), tokens.ids)
    assert torch.equal(flat.places_of_rows(x), tokens.places_of_rows(x))
    for got, want in zip(flat.routing(12).tensors, tokens.routing(12).tensors, strict=True):
        assert torch.equal(got, want)
    assert flat.routing(12) is batch.routing(12), "worked out twice"
    assert flat.check_rows(x.view(4, 3, 8)) == 12 and torch.equal(flat.entries(x), x.view(4, 3, 8))
    for refused in (x[:11], x.view(3, 4, 8), x.view(2, 6, 8)):
        with pytest.raises(ValueError, match="an id for each of x's"):
            flat.check_rows(refused)


class Around(nn.Module):
    """A block of a model by itself: [batch, tokens, K] in and out."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        y = self.block(x)
        return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def configuration(name):
    """A tiny configuration of transformers.models.`name`, of the text model where there are several."""
    module = pytest.importorskip(f"transformers.models.{name}.configuration_{name}")
    found = [key for key in module.__all__ if key.endswith("Config")]
    if name == "dbrx":
        made = module.DbrxFFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=16)
        return module.DbrxConfig(d_model=16, n_heads=2, n_layers=1, ffn_config=made)
    cls = getattr(module, next((key for key in found if key.endswith("TextConfig")), found[0]))
    fields = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in SIZES.items() if key in fields})


def block_of(key):
    """The module that has the entry `key` of `FLATTENING`, or what is around it where its forward takes more."""
    path, _, forward = key.partition(":")
    outer = {"AfmoeTokenChoiceRouter": "AfmoeSparseMoeBlock", "DbrxRouter": "DbrxFFN"}
    cls = getattr(pytest.importorskip(path), outer.get(forward.split(".")[0], forward.split(".")[0]), None)
    if cls is None:
        pytest.skip(f"{key} is not in transformers {transformers.__version__}")
    config = configuration(path.split(".")[2])
    config._attn_implementation = config._experts_implementation = "eager"
    return cls(config, **({"layer_idx": 0} if "layer_idx" in inspect.signature(cls.__init__).parameters else {}))


def shaken(model):
    """Random values in all of a model, whose experts transformers leaves uninitialized."""
    generator = torch.Generator().manual_seed(0)
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            t.data.copy_(torch.randn(t.shape, generator=generator) * 0.3)
    return model.eval()


def linear_layers(model, without=()):
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not set(without) & set(name.split("."))
    ]


@pytest.mark.parametrize("key", [key for key in FLATTENING if "gemma4" not in key])
def test_each_place_that_is_known(key):
    """Would catch an entry of the table whose module gives its child something else than the plain flattening."""
    model, seen = shaken(Around(block_of(key))), {}

    def look(layer, args, name):
        seen[name] = args[0].dim()

    layers = linear_layers(model, without=("self_attn",))
    handles = [model.get_submodule(n).register_forward_pre_hook(functools.partial(look, name=n)) for n in layers]
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    model(x)
    for handle in handles:
        handle.remove()
    flat = [name for name, dims in seen.items() if dims == 2]
    assert any(set(FLATTENING[key]) & set(name.split(".")) for name in flat)
    configs = [LoraConfig(r=r, target_modules=flat) for r in (3, 2)]
    assert_as_apart(adapted(model, *configs), x, tolerance=2e-5)


def test_a_gemma4_router():
    """Would catch all-linear adapters of a Gemma 4 with experts that cannot serve a batch because of the router."""
    module = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    sizes = SIZES | dict(enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, global_head_dim=8)
    fields = inspect.signature(module.Gemma4TextConfig.__init__).parameters
    config = module.Gemma4TextConfig(**{key: value for key, value in sizes.items() if key in fields})
    config._experts_implementation = "eager"
    base = shaken(module.Gemma4ForCausalLM(config))
    assert any(name.endswith("router.proj") for name, _ in base.named_modules())
    x = ids(4, length=5) % 32
    assert_as_apart(adapted(base, *[LoraConfig(r=2, target_modules=["q_proj", "proj"])] * 2), x, tolerance=2e-5)


def nllb_experts():
    """The sparse layer of an NLLB-MoE, whose experts are modules of linear layers."""
    module = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    sizes = dict(d_model=16, encoder_ffn_dim=24, num_experts=2, expert_capacity=64, router_bias=False)
    config = transformers.NllbMoeConfig(**sizes, moe_token_dropout=0.0)
    return shaken(Around(module.NllbMoeSparseMLP(config, ffn_dim=24)))


@pytest.mark.parametrize("method", ["lora", "ia3", "whole"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_are_refused(method, tokens):
    """Would catch an expert that by chance gets as many tokens as there are names, or a multiple, in another order."""
    config = LoraConfig(r=2, target_modules=["fc1"])
    if method == "ia3":
        config = IA3Config(target_modules=["fc1"], feedforward_modules=[])
    elif method == "whole":
        config = LoraConfig(r=2, target_modules=["fc2"], modules_to_save=["fc1"])
    model, seen = adapted(nllb_experts(), config, config), []
    x = torch.randn(4, tokens, 16, generator=torch.Generator().manual_seed(3))
    for expert in model.get_base_model().block.experts.values():
        expert.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    flat = x.reshape(-1, 16)
    # With two experts of which each token takes both, an expert gets all tokens: those that prefer it come first.
    assert all(rows.shape == flat.shape for rows in seen) and not all(torch.equal(rows, flat) for rows in seen)
    with pytest.raises(ValueError, match="^adapter_names: an expert is given the tokens that were routed to it"):
        model(x, adapter_names=NAMES)
    if method == "lora":
        bank = peftkern.AdapterBank(nllb_experts(), target_modules=["fc1"])
        bank.add("one")
        slots = torch.zeros(4 * tokens, dtype=torch.int64)
        with pytest.raises(ValueError, match="adapter_ids: an expert is given"), bank.batch(slots):
            bank.model(x)


class Reordered(nn.Module):
    """Flattens its tokens and gives them to its layer in another order."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc1(x.transpose(0, 1).reshape(-1, 16)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def test_what_is_not_known_is_refused():
    """Would catch a place that is known by its name, its class's name or its shape alone."""
    refused = "the model flattens its tokens before this layer and may order them anew"
    config = LoraConfig(r=2, target_modules=["fc1"])
    x = torch.randn(4, 5, 16)
    with pytest.raises(ValueError, match=refused):
        adapted(Reordered(), config)(x, adapter_names=["one"] * 4)
    made = type("OPTDecoderLayer", (Reordered,), {"__module__": "transformers.models.opt.modeling_opt"})()
    with pytest.raises(ValueError, match=refused):
        adapted(made, config)(x, adapter_names=["one"] * 4)


def test_a_layer_whose_forward_was_exchanged():
    """Would catch a subclass or an object with a forward of its own taken for what it is made of, and an FSDP class,
    which has none, refused."""
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    def other(self, *args, **kwargs):
        return OPTDecoderLayer.forward(self, *args, **kwargs)

    x = ids(4, length=5)
    for exchanged in ("nothing", "class", "object"):
        base = tiny_opt()
        for layer in base.model.decoder.layers:
            body = {"forward": other} if exchanged == "class" else {}
            layer.__class__ = type("FSDPOPTDecoderLayer", (OPTDecoderLayer,), body)
            if exchanged == "object":
                layer.forward = other.__get__(layer)
        model = adapted(base, LoraConfig(r=2, target_modules=["fc1"]))
        if exchanged == "nothing":
            assert_as_apart(model, x, ["one", "__base__", "one", "one"])
        else:
            with pytest.raises(ValueError, match="the model flattens its tokens"):
                model(x, adapter_names=["one"] * 4)


def test_a_forward_that_is_exchanged_after_the_first_batch():
    """Would catch a place that stays known once it was."""
    model, x = adapted(tiny_opt(), LoraConfig(r=2, target_modules=["fc1"])), ids(4, length=5)
    model(x, adapter_names=["one"] * 4)
    layer = model.get_base_model().model.decoder.layers[1]
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs)
    with pytest.raises(ValueError, match="the model flattens its tokens"):
        model(x, adapter_names=["one"] * 4)


def test_a_shared_expert_of_another_file():
    """Would catch tokens ordered anew by what stands between the block that flattens and the adapted layer."""
    model = shaken(Around(block_of("transformers.models.qwen2_moe.modeling_qwen2_moe:Qwen2MoeSparseMoeBlock.forward")))

    class Reversing(type(model.block.shared_expert)):
        def forward(self, x):
            return super().forward(x.flip(0)).flip(0)

    model.block.shared_expert.__class__ = Reversing
    made = adapted(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    with pytest.raises(ValueError, match="the model flattens its tokens"):
        made(torch.randn(4, 5, 16), adapter_names=["one"] * 4)


def test_a_layer_with_two_places():
    """Would catch a layer that is known in one place and also stands where nothing is known of its tokens."""
    base = tiny_opt()
    base.elsewhere = Reordered()
    base.elsewhere.fc1 = base.model.decoder.layers[0].fc1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base, LoraConfig(r=2, target_modules=["fc1"]))
    first, second = (layer.fc1 for layer in model.get_base_model().model.decoder.layers)
    model.get_base_model().elsewhere.fc1 = first
    with model.base_model.mixed_batch(["one"] * 4):
        assert type(first._mixed.batch) is AdapterBatch and type(second._mixed.batch) is FlatBatch


def test_models_without_such_layers_pay_nothing():
    """Would catch hooks, or batches of another class, on layers that see the batch as it is."""
    from tiny_models import tiny_llama

    model = adapted(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    with model.base_model.mixed_batch(["one"] * 2):
        batches = {id(m._mixed.batch): m._mixed.batch for m in model.modules() if getattr(m, "_mixed", None)}
        assert len(batches) == 1 and type(next(iter(batches.values()))).__name__ == "AdapterBatch"
        assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the table was read in transformers 5.23")
def test_the_table_names_what_is_there():
    """Would catch an entry that is misspelt, and so does nothing."""
    for key in FLATTENING:
        path, _, forward = key.partition(":")
        found = getattr(importlib.import_module(path), forward.split(".")[0]).forward
        assert f"{found.__module__}:{found.__qualname__}" == key


def tokens_first(model_type):
    """A model whose layers get [tokens, batch, K], and an input of five rows and five tokens."""
    rows, pixels = torch.randint(4, 30, (5, 5)), torch.randn(5, 3, 8, 8)  # four patches and one token more
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    if model_type == "bridgetower":
        home = importlib.import_module("transformers.models.bridgetower.modeling_bridgetower")
        config = home.BridgeTowerVisionConfig(hidden_size=64, num_hidden_layers=2, image_size=8, patch_size=4)
        return home.BridgeTowerVisionModel(config), {"image": pixels}
    if model_type == "mlcd_vision_model":
        config = transformers.MLCDVisionConfig(intermediate_size=24, **vision)
        return transformers.AutoModel.from_config(config), {"pixel_values": pixels}
    heads = ("n_head", "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
    sizes = dict.fromkeys(("d_model", "hidden_size"), 64) | dict.fromkeys(heads, 2)
    sizes |= dict.fromkeys(("n_layer", "num_hidden_layers", "encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("d_inner", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 24)
    sizes |= dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), 32) | {"attention_window": [4]}
    known = transformers.CONFIG_MAPPING[model_type]().to_dict()
    config = transformers.AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if k in known})
    inputs = {"input_ids": rows} | ({"bbox": torch.rand(5, 5, 8)} if model_type == "bros" else {})
    return transformers.AutoModel.from_config(config), inputs


@pytest.mark.parametrize(
    "model_type", ["xlnet", "fsmt", "longformer", "led", "mlcd_vision_model", "bros", "bridgetower"]
)
def test_models_with_tokens_first_are_refused(model_type):
    """Would catch as many tokens as there are names, each of them under the adapter of a sequence, without a word."""
    base, inputs = tokens_first(model_type)
    targets = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and not n.endswith("attn.out_proj")]
    model = adapted(base, *[LoraConfig(r=2, target_modules=targets)] * 2)
    with pytest.raises(ValueError, match="puts tokens first"):
        model(**inputs, adapter_names=["one", "two", "one", "two", "one"])
