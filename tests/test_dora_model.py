"""DoRA in models beside real PEFT: steps, files both ways, damaged files, several adapters, compile, checkpointing."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import AdapterBank, AdapterFileError, LoraConfig, PeftModel, get_peft_model
from peftkern.helpers import rescale_adapter_scale
from peftkern.nn import LoraLinear, load_adapter, save_adapter
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIBRARIES = (peftkern, peft)


def tiny_gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=32, resid_pdrop=0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields, attn_pdrop=0.0, embd_pdrop=0.0))


# name -> (model, the configuration's fields)
CASES = {
    "llama": (tiny_llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
    "defaults": (tiny_llama, {}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}),
    "gaussian": (tiny_llama, {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"}),
    "random": (tiny_llama, {"target_modules": ["o_proj"], "init_lora_weights": False}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "whole": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bias": (mlp, {"target_modules": ["up", "down"], "bias": "lora_only"}),
    "mlp": (mlp, {"target_modules": ["emb", "up"]}),
}


def adapted(case, library, seed=1, **more):
    """The base model with a DoRA adapter, of random values unless `seed` is None."""
    make, fields = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = library.get_peft_model(make(), library.LoraConfig(**{"use_dora": True, **fields, **more}))
    if seed is not None:
        randomize(model, ("lora_A", "lora_B", "lora_embedding"), seed)
        stir(model)
    return model.train()


def stir(model, seed=2):
    """Magnitudes that are not the norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "magnitude" in name:
            parameter.data.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))


def loss_of(model, tokens):
    out = model(tokens)
    logits = out.logits if hasattr(out, "logits") else out
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten() % logits.shape[-1])


def steps(model, count=3):
    """Losses and the gradients of the first of some steps of SGD."""
    losses, grads = [], {}
    for i in range(count):
        model.zero_grad()
        loss = loss_of(model, ids(seed=i))
        loss.backward()
        losses.append(loss.detach())
        if not grads:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return torch.stack(losses), grads


def output(model):
    with torch.no_grad():
        out = model.eval()(ids())
    return out.logits if hasattr(out, "logits") else out


# -- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, None], ids=["random", "initial"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_peft(case, seed):
    """Catches a parameter that is not trained, a gradient that differs, and what adds up over steps."""
    ours, theirs = (adapted(case, library, seed) for library in LIBRARIES)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    (losses, grads), (want, want_grads) = steps(ours), steps(theirs)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    assert list(grads) == list(want_grads)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=2e-3, atol=1e-6, msg=name)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def test_loftq_comes_before_the_magnitude():
    """Catches norms of the weight that LoftQ replaces, or without its adapter."""
    config = dict(target_modules=["up"], use_dora=True, r=4, lora_alpha=4)
    quantization = peftkern.LoftQConfig()
    model = get_peft_model(mlp(), LoraConfig(**config, init_lora_weights="loftq", loftq_config=quantization))
    layer = model.base_model.model.up
    want = (layer.weight + layer.get_delta_weight("default")).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_gpt2_learns_and_merges_into_its_own_class(bits):
    """Catches norms along the wrong axis of a Conv1D, whose weight is turned before it is quantized and turned back."""
    settings = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    base = peftkern.quantize_model(tiny_gpt2(), transformers.BitsAndBytesConfig(**settings), progress=False)
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn", "c_proj"], use_dora=True, r=4))
    start = output(model)
    with model.disable_adapter():
        torch.testing.assert_close(start, output(model), rtol=1e-3, atol=1e-4)
    losses, _ = steps(model.train(), 4)
    assert losses.isfinite().all()
    randomize(model, ("lora_A", "lora_B"))
    stir(model)
    want = output(model)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(output(merged), want, rtol=1e-3, atol=1e-4)
    assert (want - start).norm() > 0.01 * start.norm()


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(tmp_path, case):
    """Catches `.weight` at the end of a magnitude's name, a configuration without use_dora, and values that are not
    read again."""
    models = {library: adapted(case, library) for library in LIBRARIES}
    for library, model in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / library.__name__)
    mine, other = (load_file(tmp_path / library.__name__ / WEIGHTS) for library in LIBRARIES)
    assert sorted(mine) == sorted(other)
    assert any(name.endswith("lora_magnitude_vector") for name in mine)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=0)
    content = json.loads((tmp_path / "peftkern" / CONFIG).read_text())
    assert content["use_dora"] is True and content["peft_type"] == "LORA"
    make, _ = CASES[case]
    for reader in LIBRARIES:
        for writer in LIBRARIES:
            again = reader.PeftModel.from_pretrained(make(), tmp_path / writer.__name__)
            torch.testing.assert_close(output(again), output(models[writer]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_an_adapter_is_read_under_another_name(tmp_path, low):
    """Catches a magnitude that keeps the name it was saved under, or the values that it was made with."""
    saved = adapted("llama", peftkern)
    saved.save_pretrained(tmp_path)
    model = adapted("defaults", peftkern)
    model.load_adapter(tmp_path, "late", low_cpu_mem_usage=low)
    model.set_adapter("late")
    torch.testing.assert_close(output(model), output(saved))
    held = [p for name, p in model.named_parameters() if "magnitude_vector.late.weight" in name]
    assert len(held) == 14 and not any(p.is_meta for p in held)


def _drop_one(tensors):
    del tensors[next(name for name in tensors if name.endswith("magnitude_vector"))]


def _drop_pair(tensors):
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    for part in ("lora_A.weight", "lora_B.weight"):
        del tensors[name.replace("lora_magnitude_vector", part)]


def _of_shape(*shape):
    def change(tensors):
        tensors[next(name for name in tensors if name.endswith("magnitude_vector"))] = torch.ones(*shape)

    return change


def _integers(tensors):
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    tensors[name] = tensors[name].to(torch.int32)


DAMAGE = {
    "missing": (_drop_one, "lora_magnitude_vector.*missing"),
    "alone": (_drop_pair, "lora_magnitude_vector.*lora_A and lora_B are missing"),
    "too short": (_of_shape(3), r"shape is \[3\]"),
    "a column": (_of_shape(24, 1), r"shape is \[24, 1\]"),
    "integers": (_integers, "int32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_magnitudes_are_refused_before_the_base_is_touched(tmp_path, kind):
    """Catches PEFT's silence: a magnitude that is missing stays what it was made with."""
    adapted("bias", peftkern).save_pretrained(tmp_path)
    change, words = DAMAGE[kind]
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    base = mlp()
    before = list(base.state_dict())
    with pytest.raises(AdapterFileError, match=f"(?s){words}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == before
    model = adapted("bias", peftkern)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    # Tensors without a file are compared with the model alone.
    with pytest.raises(AdapterFileError, match="lora_"):
        peftkern.set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_files_with_and_without_dora_are_not_taken_for_each_other(tmp_path):
    """Catches magnitudes that are dropped, and an adapter that keeps those it was made with."""
    adapted("bias", peftkern).save_pretrained(tmp_path / "dora")
    adapted("bias", peftkern, use_dora=False).save_pretrained(tmp_path / "lora")
    for name, value, words in (("dora", False, "has no use_dora"), ("lora", True, "use_dora .* asks for")):
        file = tmp_path / name / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": value}))
        with pytest.raises(AdapterFileError, match=words):
            PeftModel.from_pretrained(mlp(), tmp_path / name)


def test_layers_that_a_file_leaves_out_are_warned_about(tmp_path):
    """Catches a part of an adapter that is refused for the magnitudes of the layers that it lacks, or whose layers have
    no values where low_cpu_mem_usage left them to the file."""
    adapted("bias", peftkern).save_pretrained(tmp_path)
    tensors = {name: value for name, value in load_file(tmp_path / WEIGHTS).items() if ".down." not in name}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded = []
    for low in (False, True):
        with pytest.warns(UserWarning, match="down"):
            loaded.append(PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low))
    torch.testing.assert_close(output(loaded[1]), output(loaded[0]))


def test_nan_in_a_magnitude_is_warned_about(tmp_path):
    """Catches NaN that loads without a word."""
    model = adapted("bias", peftkern)
    model.base_model.model.up.lora_magnitude_vector["default"].weight.data[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="NaN.*up.lora_magnitude_vector"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_networks_of_layers_go_both_ways(tmp_path):
    """Catches layers of peftkern.nn whose files do not say use_dora, or that are loaded from LoRA's."""

    def network(use_dora):
        net = nn.Sequential(nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 10))
        for name in "02":
            setattr(net, name, LoraLinear.from_linear(net[int(name)], r=3, use_dora=use_dora))
        return net

    net = network(True)
    randomize(net)
    stir(net)
    save_adapter(net, tmp_path / "dora")
    bare = copy.deepcopy(net)
    for name in "02":
        setattr(bare, name, bare.get_submodule(name).base_layer)
    x = torch.randn(3, 12)
    for library in LIBRARIES:
        again = library.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "dora")
        torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-6)
    other = copy.deepcopy(net)
    randomize(other, seed=4)
    load_adapter(other, tmp_path / "dora")
    assert torch.equal(other(x), net(x))
    save_adapter(network(False), tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="magnitude"):
        load_adapter(network(False), tmp_path / "dora")
    with pytest.raises(AdapterFileError, match="magnitude"):
        load_adapter(net, tmp_path / "lora")
    mixed = network(True)
    mixed[0] = network(False)[0]
    with pytest.raises(ValueError, match="use_dora must be the same"):
        save_adapter(mixed, tmp_path / "mixed")


# -- several adapters, and what models do with them ----------------------------------------------------------------


def two(library, active):
    """A DoRA adapter and a plain one on the same layers."""
    model = adapted("llama", library)
    model.add_adapter("plain", library.LoraConfig(target_modules=["q_proj", "up_proj"], r=3))
    model.add_adapter("other", library.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, use_dora=True))
    randomize(model, ("lora_A", "lora_B"), seed=6)
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize("active", [["default"], ["other", "plain"], ["plain", "default", "other"]], ids=len)
def test_several_adapters_switch_merge_and_go(active):
    """Catches an order, a switch, a disabled model or a merge that is not PEFT's, and a base that stays changed."""
    ours, theirs = two(peftkern, active), two(peft, active)
    (losses, _), (want, _) = steps(ours, 2), steps(theirs, 2)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-5)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-6)
    with rescale_adapter_scale(ours, 0.5), peft.helpers.rescale_adapter_scale(theirs, 0.5):
        torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-5)
    before = output(ours)
    for safe in (False, True):
        ours.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(output(ours), before, rtol=1e-3, atol=1e-4)
        ours.unmerge_adapter()
        torch.testing.assert_close(output(ours), before, rtol=1e-3, atol=1e-4)
    for model in (ours, theirs):
        model.delete_adapter("other")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-5)
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    assert not any("lora_" in name for name in merged[0].state_dict())
    torch.testing.assert_close(output(merged[0]), output(merged[1]), rtol=1e-3, atol=1e-4)


def test_unloading_gives_the_base_back():
    """Catches a base weight that a magnitude changed."""
    want = output(tiny_llama())
    assert torch.equal(output(adapted("llama", peftkern).unload()), want)


def test_status_and_flags():
    """Catches a magnitude that is trained when its adapter is not, and layers whose status leaves it out."""
    model = two(peftkern, ["plain"])
    names = {n for n, p in model.named_parameters() if p.requires_grad and "magnitude" in n}
    assert not names
    model.set_adapter("other")
    names = {n for n, p in model.named_parameters() if p.requires_grad and "magnitude" in n}
    assert names and all(".other." in name for name in names)
    layer = next(x for x in model.get_layer_status() if x.name.endswith("0.self_attn.q_proj"))
    assert layer.requires_grad == {"default": False, "plain": False, "other": True}
    held = model.base_model.model.model.layers[0].self_attn.q_proj.lora_magnitude_vector
    held["other"].weight.requires_grad = False
    layer = next(x for x in model.get_layer_status() if x.name.endswith("0.self_attn.q_proj"))
    assert layer.requires_grad["other"] == "irregular"


def test_projections_with_dora_run_alone_and_say_so():
    """Catches q, k and v that are computed together without their scales, and an explanation that says they were."""
    model = adapted("llama", peftkern)
    row = next(row for row in peftkern.explain(model).rows if row.name.endswith("q_proj"))
    assert row.path == "torch" and "by itself: a layer of q_proj, k_proj, v_proj has DoRA" in row.reason
    big = tiny_llama(hidden_size=256, num_attention_heads=4)  # many enough elements to be computed together
    config = dict(target_modules=["q_proj", "k_proj", "v_proj"], r=2)
    models = [library.get_peft_model(copy.deepcopy(big), library.LoraConfig(**config)) for library in LIBRARIES]
    for library, each in zip(LIBRARIES, models, strict=True):
        each.add_adapter("dora", library.LoraConfig(**config, use_dora=True))
        randomize(each)
        each.set_adapter("dora")
    tokens = ids(4, 48)
    ours, theirs = (each.eval()(tokens).logits for each in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_batch_of_many_adapters_refuses_dora_by_name():
    """Catches rows that take A and B without the magnitude; PEFT refuses too."""
    ours, theirs = two(peftkern, ["plain"]), two(peft, ["plain"])
    names = ["plain", "default"]
    for model, words in ((ours, "adapter_names: 'default' has DoRA"), (theirs, "DoRA")):
        with pytest.raises(ValueError, match=words):
            model.eval()(ids(), adapter_names=names)
    mixed = [model(ids(), adapter_names=["plain", "__base__"]).logits for model in (ours, theirs)]
    torch.testing.assert_close(*mixed, rtol=1e-4, atol=1e-5)
    paths = {row.name: row for row in peftkern.explain(ours, mixed=True).rows}
    refused = next(row for name, row in paths.items() if name.endswith("v_proj"))
    assert refused.path == "refused" and "DoRA" in refused.reason


def test_a_bank_refuses_dora_by_name(tmp_path):
    """Catches an adapter in a bank's pools that would be taken without its magnitude."""
    adapted("bias", peftkern, bias="none").save_pretrained(tmp_path)
    bank = AdapterBank(mlp(), slots=2, max_rank=8, target_modules=["up", "down"])
    with pytest.raises(ValueError, match="'x'.*DoRA"):
        bank.add("x", tmp_path)
    with pytest.raises(ValueError, match="DoRA"):
        bank.add("x", LoraConfig(target_modules=["up"], use_dora=True))
    with pytest.raises(ValueError, match="AdapterBank's, and DoRA"):
        bank.model.add_adapter("x", LoraConfig(target_modules=["up"], use_dora=True))
    assert bank.names == []
    with pytest.raises(ValueError, match=r"\['default'\] have DoRA"):
        AdapterBank(adapted("bias", peftkern, bias="none"))


# -- compile, checkpointing, autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant, dropout):
    """Catches a forward that is computed again with another mask or other norms."""
    results = []
    for checkpointing in (False, True):
        model = adapted("llama", peftkern, lora_dropout=dropout)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(9)
        loss = loss_of(model, ids())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_is_one_graph_and_computes_the_same(checkpointing):
    """Catches a graph break, and norms that are taken for constants of the graph."""
    model = adapted("llama", peftkern)
    model.base_model.model.config.use_cache = False  # of which transformers warns, which is a graph break
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = []
        for each in (compiled, model):
            model.zero_grad()
            loss = loss_of(each, ids())
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad


def test_autocast_trains_beside_peft():
    """Catches norms or magnitudes in autocast's dtype."""
    losses = []
    for library in LIBRARIES:
        model = adapted("llama", library)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(model, ids()))
        losses[-1].backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


# -- the memory of a step ------------------------------------------------------------------------------------------


def test_an_estimate_counts_magnitudes_and_the_output_that_each_layer_keeps():
    """Catches an estimate of LoRA's under DoRA's name."""
    config = tiny_llama().config
    plain, dora = (
        peftkern.estimate_memory(config, r=4, seq=32, quant="none", checkpointing=False, use_dora=use_dora)
        for use_dora in (False, True)
    )
    outputs = sum(
        p.numel() for name, p in adapted("llama", peftkern).named_parameters() if "lora_magnitude_vector" in name
    )
    assert dora.part("adapters") - plain.part("adapters") == 4 * outputs
    kept = dora.part("saved activations") - plain.part("saved activations")
    assert kept >= 32 * outputs * 2 * 0.9 and "DoRA r 4" in str(dora)
