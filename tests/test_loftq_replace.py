"""`replace_lora_weights_loftq`: adapters over weights in 4 bits, from the original's checkpoint; PEFT beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from loftq_data import adapted, linear, on_cpu, peft_loftq, product, weight
from peftkern import LoraConfig, get_peft_model, replace_lora_weights_loftq
from peftkern.ops import dequantize
from peftkern.tuners.lora.base_weight import low_rank_factors
from peftkern.utils.quantized_modules import Linear4bit, weight_of
from tiny_models import tiny_llama


def saved_llama(folder, intermediate_size=96, **options):
    """A Llama in 16 bits, saved; its down projection has 96 columns, so that blocks of 64 straddle rows."""
    model = tiny_llama(intermediate_size=intermediate_size).to(torch.bfloat16)
    model.save_pretrained(folder, **options)
    return model


def quantized_llama(folder, double_quant=True, r=8, **config):
    transformers = pytest.importorskip("transformers")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peftkern.quantize_model(base, settings | {"bnb_4bit_compute_dtype": "bfloat16"}, progress=False)
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", **config))


def layers_of(model):
    return {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("double_quant, files", [(False, "one"), (True, "several")])
def test_replacement_is_the_formula_on_every_layer(tmp_path, double_quant, files):
    """Would catch a layer left out, another layer's original, scales that are not the layer's own, and a residual that
    is no smaller."""
    dense = saved_llama(tmp_path, **({} if files == "one" else {"max_shard_size": "20KB"}))
    assert (tmp_path / "model.safetensors").exists() == (files == "one")
    model = quantized_llama(tmp_path, double_quant)
    stored = {name: weight_of(layer.get_base_layer()).packed.clone() for name, layer in layers_of(model).items()}
    path = tmp_path / "model.safetensors" if double_quant else tmp_path
    replace_lora_weights_loftq(model, path)
    assert len(layers_of(model)) == 14
    for name, layer in layers_of(model).items():
        W = dense.get_submodule(name).weight.detach().float()
        Q = dequantize(weight_of(layer.get_base_layer()), torch.bfloat16).float()
        A, B = low_rank_factors(W - Q, 8)
        torch.testing.assert_close(product(layer), B @ A)
        assert (W - Q - product(layer)).norm() < 0.95 * (W - Q).norm()
        assert torch.equal(weight_of(layer.get_base_layer()).packed, stored[name])
        assert layer.lora_A["default"].weight.requires_grad


def test_replacement_brings_the_output_nearer(tmp_path):
    """Would catch an adapter whose error adds to the quantization's."""
    dense, model = saved_llama(tmp_path), quantized_llama(tmp_path, r=32)
    ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = dense(ids).logits.float()
        before = (model(ids).logits.float() - truth).norm()
        replace_lora_weights_loftq(model)  # the model says what it was loaded from
        after = (model(ids).logits.float() - truth).norm()
    assert after < 0.8 * before


def test_replacement_agrees_with_peft(tmp_path, monkeypatch):
    """Would catch other factors than PEFT's on the same layers of bitsandbytes, read by either's own way."""
    peft, loftq_utils = pytest.importorskip("peft"), peft_loftq()
    transformers = pytest.importorskip("transformers")
    # In 128: bitsandbytes' own dequantization is wrong on some CPUs where blocks straddle rows.
    saved_llama(tmp_path, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_cpu(loftq_utils._loftq_init_new))
    products, names = [], []
    for library in (peft, peftkern):
        model = library.get_peft_model(
            copy.deepcopy(base), library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        called: list[str] = []
        for _ in range(2):  # the second time everything is refused
            library.replace_lora_weights_loftq(
                model, str(tmp_path), callback=lambda m, name, called=called: called.append(name) or len(called) <= 14
            )
        names.append(called)
        products.append({name: product(layer) for name, layer in layers_of(model).items()})
    assert names[0] == names[1] and len(names[0]) == 28
    assert products[0].keys() == products[1].keys()
    for name, theirs in products[0].items():
        assert (products[1][name] - theirs).norm() < 1e-3 * theirs.norm(), name


def test_callback_decides_layer_by_layer(tmp_path):
    """Would catch a refusal that takes back too much or too little, and a name that is not the layer's."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before, seen = factors(model), []

    def keep_mlp(given, name):
        assert given is model and not torch.is_grad_enabled()
        layer = model.get_base_model().get_submodule(name)
        assert layer.lora_B["default"].weight.any(), "called before the change"
        seen.append(name)
        return "mlp" in name

    replace_lora_weights_loftq(model, tmp_path, callback=keep_mlp)
    assert seen == list(layers_of(model))
    changed = {name for name, value in factors(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "mlp" in name}


def test_an_error_in_the_callback_takes_everything_back(tmp_path):
    """Would catch a model of which half is replaced."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before, calls = factors(model), []

    def fail_late(_, name):
        calls.append(name)
        return len(calls) < 5 or 1 / 0

    with pytest.raises(ZeroDivisionError):
        replace_lora_weights_loftq(model, tmp_path, callback=fail_late)
    assert len(calls) == 5 and unchanged(model, before)


def damaged(state, how):
    """A state dict with one wrong entry, and what the error says of it."""
    key = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del state[key]
        return rf"'{key}': the original weight is missing; found 'model.layers.0.mlp.up_proj.weight'"
    if how == "shape":
        state[key] = state[key].T.contiguous()
        return rf"'{key}': expected shape \[96, 64\], got \[64, 96\]"
    if how == "quantized":
        state[key] = state[key].to(torch.int8)
        return rf"'{key}': expected the original weight in one of .*, got I8"
    if how == "nan":
        state[key][3, 3] = float("nan")
        return rf"'{key}': NaN or Inf"
    state[key] = state["model.layers.0.mlp.up_proj.weight"].clone()
    return rf"'{key}': it is not what model.layers.1.mlp.up_proj was quantized from"


@pytest.mark.parametrize("how", ["missing", "shape", "quantized", "nan", "another"])
def test_a_wrong_checkpoint_is_refused_by_name_and_nothing_is_changed(tmp_path, how):
    """Would catch factors of a wrong weight, which nothing would show but a worse model; and a change halfway."""
    dense = saved_llama(tmp_path / "right")
    model = quantized_llama(tmp_path / "right")
    before, calls = factors(model), []
    state = {name: t.clone() for name, t in dense.state_dict().items()}
    match = damaged(state, how)
    (tmp_path / "wrong").mkdir()
    save_file(state, tmp_path / "wrong" / "model.safetensors")
    with pytest.raises(peftkern.QuantizedFileError, match=match):
        replace_lora_weights_loftq(model, tmp_path / "wrong", callback=lambda _, name: calls.append(name) or True)
    assert unchanged(model, before)
    # Names, shapes and dtypes are looked at first; values when their turn comes.
    assert bool(calls) == (how in ("nan", "another"))


def test_names_with_and_without_the_prefix_of_the_model(tmp_path):
    """Would catch a checkpoint refused that was saved without its head, or with one more."""
    dense = saved_llama(tmp_path / "whole")
    dense.model.save_pretrained(tmp_path / "body")
    model = quantized_llama(tmp_path / "whole")
    replace_lora_weights_loftq(model, tmp_path / "whole")
    want = factors(model)
    body = tiny_llama(cls="LlamaModel")
    body.load_state_dict(dense.model.state_dict())
    peftkern.quantize_model(
        body.to(torch.bfloat16),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
        progress=False,
    )
    inner = get_peft_model(body, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    for given, folder in ((model, "body"), (inner, "whole")):
        replace_lora_weights_loftq(given, tmp_path / folder)
        got = factors(given)
        assert len(got) == len(want) == 28
        for name, value in want.items():
            name = name if given is model else name.replace(".model.model.", ".model.")
            assert torch.equal(got[name], value)


def test_what_cannot_be_done_is_refused(tmp_path):
    """Would catch a silent return where nothing was replaced."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before = factors(model)
    with pytest.raises(TypeError, match="peft_model: expected a PeftModel, got LlamaForCausalLM"):
        replace_lora_weights_loftq(model.get_base_model(), tmp_path)
    with pytest.raises(ValueError, match=r"no adapter 'other'; there are \['default'\]"):
        replace_lora_weights_loftq(model, tmp_path, "other")
    with pytest.raises(ValueError, match="on no layer with a 4-bit weight"):
        replace_lora_weights_loftq(adapted(linear())[0], tmp_path)
    with pytest.raises(ValueError, match="expected model.safetensors or model.safetensors.index.json here"):
        (tmp_path / "empty").mkdir()
        replace_lora_weights_loftq(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="model_path: expected a folder or a Hub id"):
        bare = nn.ModuleDict({"up": Linear4bit.from_linear(linear())})
        replace_lora_weights_loftq(get_peft_model(bare, LoraConfig(target_modules=["up"])))
    assert unchanged(model, before)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged into model.layers.0.*unmerge them first"):
        replace_lora_weights_loftq(model, tmp_path)


def test_a_turned_conv1d_finds_its_original(tmp_path):
    """Would catch transformers' way with GPT-2: its [in, out] is turned before it is quantized, which a square weight
    does not show."""
    made = Linear4bit.from_linear(linear(64, 64))
    made.source_cls = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = get_peft_model(nn.ModuleDict({"up": made}), LoraConfig(target_modules=["up"]))
    save_file({"up.weight": weight(64, 64).T.contiguous()}, tmp_path / "model.safetensors")
    replace_lora_weights_loftq(model, tmp_path)
    A, B = low_rank_factors(weight(64, 64) - dequantize(weight_of(made), torch.float32), 8)
    torch.testing.assert_close(product(model.base_model.model["up"]), B @ A)


def test_the_original_may_have_names_of_before_transformers_5(tmp_path):
    """Would catch an original that is not found because its file knows the language model by an older name."""
    import transformers

    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=size | dict(model_type="llama", vocab_size=128),
        vision_config=size | dict(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=64),
    )
    base = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    dense = copy.deepcopy(base)
    peftkern.quantize_model(base, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, progress=False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["up_proj"]))
    replace_lora_weights_loftq(model, tmp_path)
    for name, layer in layers_of(model).items():
        lost = dense.get_submodule(name).weight.float() - dequantize(weight_of(layer.get_base_layer()), torch.float32)
        assert (lost - product(layer)).norm() < 0.95 * lost.norm()


def test_replacement_takes_dora_s_magnitude_along(tmp_path):
    """Would catch a magnitude of the quantized weight, under which the adapter's rows are scaled away from the
    original's, and one that is not put back with A and B."""
    dense, model = saved_llama(tmp_path), quantized_llama(tmp_path, use_dora=True)
    before = factors(model)
    replace_lora_weights_loftq(model, callback=lambda *_: False)
    assert unchanged(model, before)
    ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = dense(ids).logits.float()
        error = (model(ids).logits.float() - truth).norm()
        replace_lora_weights_loftq(model)
        assert (model(ids).logits.float() - truth).norm() < 0.9 * error
    for name, layer in layers_of(model).items():
        Q = dequantize(weight_of(layer.get_base_layer()), torch.bfloat16).float()
        norms = (Q + layer.scaling["default"] * product(layer)).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norms, msg=name)
