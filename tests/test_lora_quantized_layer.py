"""LoRA on layers with a quantized weight, bitsandbytes' and peftkern's: forward, merging, files; and beside PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern import LoraConfig, get_peft_model
from peftkern.nn import LoraLinear
from peftkern.ops import dequantize, lora_linear, quantize_4bit
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of

bnb = pytest.importorskip("bitsandbytes")


def ours(linear, **options):
    return Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16, **options)


def bitsandbytes_4bit(linear):
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4"
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def bitsandbytes_8bit(linear):
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


KINDS = {
    "peftkern 4-bit": ours,
    "peftkern 8-bit": Linear8bit.from_linear,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
}


@pytest.fixture(params=KINDS)
def base(request):
    torch.manual_seed(0)
    return KINDS[request.param](nn.Linear(96, 80)).requires_grad_(False)


def adapted(base, **options):
    """A model of the one layer, with an adapter whose B is not zero."""
    model = get_peft_model(nn.ModuleDict({"up": base}), LoraConfig(r=4, target_modules=["up"], **options))
    layer = model.base_model.model["up"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    return model, layer


def expected(layer, x):
    """What the layer means, from its parts."""
    weight = weight_of(layer.get_base_layer())
    dtype = getattr(layer.get_base_layer(), "compute_dtype", None) or x.dtype
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = layer.get_base_layer().bias.to(dtype)
    return lora_linear(x.to(dtype), dequantize(weight, dtype), A, B, layer.scaling["default"], bias).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_dequantized_weight(base, dtype):
    """Would catch a layer that calls the base as it is (dense again in backward), or computes in the wrong dtype."""
    _, layer = adapted(base)
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    row = layer.explain_row()
    assert row.fused, row.reason
    results = []
    for function in (layer, lambda x: expected(layer, x)):
        y = function(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), wanted)])
    assert results[0][0].dtype == dtype
    assert len(results[0]) == 4
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_adapters_start_in_float32_and_stay_on_the_device(base):
    """Would catch adapters cast to the bytes' dtype."""
    _, layer = adapted(base)
    assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {torch.float32}


def test_disabled_adapters_leave_the_base_as_it_was(base):
    """Would catch bitsandbytes' CPU forward in eval mode, which repacks the weight and rounds its scales."""
    model, layer = adapted(base)
    model.eval()
    before = [None if t is None else t.clone() for t in weight_of(layer.get_base_layer()).tensors()]
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    with torch.no_grad(), model.disable_adapter():
        alone = layer(x)
    after = weight_of(layer.get_base_layer()).tensors()
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    dense = dequantize(weight_of(layer.get_base_layer()), torch.bfloat16)
    assert torch.equal(alone, nn.functional.linear(x, dense, layer.get_base_layer().bias.bfloat16()))


def test_merge_makes_a_dense_layer_and_unmerge_brings_the_bits_back(base):
    """Would catch a merge that loses the adapter between two codes, and an unmerge that only comes near."""
    model, layer = adapted(base)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    before, stored = layer(x), [t.clone() for t in weight_of(base).tensors() if t is not None]
    delta = layer.get_delta_weight("default")
    truth = dequantize(weight_of(base), torch.float32) + delta
    model.merge_adapter(safe_merge=True)
    merged = layer.get_base_layer()
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, truth.to(weight_of(base).dtype))
    torch.testing.assert_close(layer(x), before, rtol=5e-2, atol=5e-2)
    assert "_quantized_base" not in "".join(model.state_dict())
    model.unmerge_adapter()
    assert layer.get_base_layer() is base
    after = [t for t in weight_of(base).tensors() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, stored, strict=True))
    assert torch.equal(layer(x), before)


def test_merge_and_unload_leaves_a_dense_layer(base):
    """Would catch a wrapper left behind, or a quantized layer that the adapter never reached."""
    model, layer = adapted(base)
    truth = dequantize(weight_of(base), torch.float32) + layer.get_delta_weight("default")
    plain = model.merge_and_unload()["up"]
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, truth.to(plain.weight.dtype))
    assert torch.equal(plain.bias, base.bias.to(plain.weight.dtype))


@pytest.mark.parametrize("kind", ["peftkern 4-bit", "bitsandbytes 4-bit"])
def test_requantizing_keeps_how_the_bytes_are_stored(kind):
    """Would catch bytes stored as another dtype than other layers', which FSDP refuses; a lost compute dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80)
    if kind == "peftkern 4-bit":
        base = Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)
    else:
        base = bnb.nn.Linear4bit(96, 80, True, torch.bfloat16, True, "nf4", quant_storage=torch.bfloat16)
        base.load_state_dict(linear.state_dict())
        base = base.to("cpu")
    model, _ = adapted(base.requires_grad_(False))
    with pytest.warns(UserWarning, match="requantiz"):
        merged = model.merge_and_unload(requantize=True)["up"]
    assert merged.weight.dtype == base.weight.dtype == torch.bfloat16
    assert merged.compute_dtype == torch.bfloat16


def test_requantizing_merge_says_what_it_lost(base):
    """Would catch a silent loss: the merged weight lies nearer to the old codes than to itself."""
    model, layer = adapted(base)
    truth = dequantize(weight_of(base), torch.float32) + layer.get_delta_weight("default")
    old = weight_of(base)
    with pytest.warns(UserWarning, match=r"requantizing a merged 80 x 96 weight moved it by"):
        layer.merge(requantize=True)
    merged = layer.get_base_layer()
    weight = weight_of(merged)
    assert type(weight) is type(old)
    assert getattr(weight, "blocksize", None) == getattr(old, "blocksize", None)
    error = (dequantize(weight, torch.float32) - truth).norm() / truth.norm()
    assert error < 0.12  # a 4-bit weight is within about 9 % of what it was made from


def test_requantizing_a_model_warns_once_and_names_the_worst_layer():
    """Would catch a warning for each layer of a model, by its shape, so that nobody can tell which lost what."""
    torch.manual_seed(0)
    net = nn.Sequential(*(ours(nn.Linear(96, 96)) for _ in range(4)))
    model = peftkern.get_peft_model(net, peftkern.LoraConfig(r=4, target_modules=["0", "2", "3"]))
    with torch.no_grad():
        for i, size in (("0", 1.0), ("2", 0.01), ("3", 1.0)):
            net.get_submodule(i).lora_B["default"].weight.normal_().mul_(size)
    words = r"requantized: 3; more was lost than was merged in 1 of them. The worst is '2': requantizing moved it by \d"
    with pytest.warns(UserWarning, match=words) as seen:
        model.merge_adapter(requantize=True)
    assert len(seen) == 1 and seen[0].filename == __file__
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=words) as seen:
        model.merge_and_unload(requantize=True)
    assert len(seen) == 1 and seen[0].filename == __file__


def test_merge_of_lora_bias_scales_it():
    """Would catch PEFT's fault: its 4-bit merge drops the scaling of the bias."""
    torch.manual_seed(0)
    model, layer = adapted(ours(nn.Linear(96, 80)), lora_bias=True, lora_alpha=12)
    with torch.no_grad():
        layer.lora_B["default"].bias.normal_()
    bias = layer.get_base_layer().bias + 3.0 * layer.lora_B["default"].bias
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    before = layer(x)
    plain = model.merge_and_unload()["up"]
    torch.testing.assert_close(plain.bias, bias)
    torch.testing.assert_close(plain(x.to(plain.weight.dtype)).bfloat16(), before, rtol=5e-2, atol=5e-2)


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(base):
    """Would catch a check that comes after the swap."""
    model, layer = adapted(base)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert layer.get_base_layer() is base
    assert not layer.merged


def test_two_adapters_merge_one_after_the_other():
    """Would catch the first adapter merged twice, or lost, when the second joins."""
    torch.manual_seed(0)
    base = ours(nn.Linear(96, 80))
    model, layer = adapted(base)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up"]))
    with torch.no_grad():
        layer.lora_B["second"].weight.normal_(std=0.1)
    truth = dequantize(weight_of(base), torch.float32)
    for name in ("default", "second"):
        model.merge_adapter([name])
        truth = truth + layer.get_delta_weight(name)
    torch.testing.assert_close(layer.get_base_layer().weight.float(), truth)
    assert layer.merged_adapters == ["default", "second"]


def test_saved_adapter_is_loaded_beside_a_dense_base(tmp_path):
    """Would catch names that depend on how the base is stored."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80)
    model, layer = adapted(ours(copy.deepcopy(linear)))
    model.save_pretrained(tmp_path)
    dense = peftkern.PeftModel.from_pretrained(nn.ModuleDict({"up": linear}), tmp_path)
    loaded = dense.base_model.model["up"]
    assert torch.equal(loaded.lora_A["default"].weight, layer.lora_A["default"].weight)


def test_from_linear_quantizes():
    """Would catch an option that is accepted and ignored."""
    linear = nn.Linear(96, 80, dtype=torch.bfloat16)
    layer = LoraLinear.from_linear(linear, r=4, quantization="nf4")
    weight = weight_of(layer.get_base_layer())
    want = quantize_4bit(linear.weight.detach(), "nf4")
    assert torch.equal(weight.packed, want.packed)
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantization: expected one of"):
        LoraLinear.from_linear(linear, quantization="int3")


def test_explain_names_the_path_and_the_kind():
    """Would catch a table that shows the bytes' dtype, or no reason."""
    model, _ = adapted(ours(nn.Linear(96, 80)))
    text = str(peftkern.explain(model, tokens=8))
    assert "Linear4bit" in text
    assert "dequantize:" in text


def tiny_llama_4bit(folder):
    """A small Llama that transformers loads through bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def loss_and_gradients(library, base, ids):
    """Of `base` with adapters of seeded values, and the adapted model."""
    settings = library.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = library.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(2)
    adapters = sorted((name, p) for name, p in model.named_parameters() if "lora_" in name)
    with torch.no_grad():
        for _, p in adapters:
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in adapters}, model


def test_a_loaded_4bit_model_is_adapted_in_place_and_trains_as_with_peft(tmp_path):
    """Would catch a base converted or copied on the way, and gradients further from the truth than PEFT's."""
    peft = pytest.importorskip("peft")
    base = tiny_llama_4bit(tmp_path)
    stored = {p.data_ptr() for p in base.parameters() if p.dtype == torch.uint8}
    assert len(stored) == 14
    exact = copy.deepcopy(base)
    for name, module in list(exact.named_modules()):
        if (weight := weight_of(module)) is not None:
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(dequantize(weight, torch.bfloat16).float())
            exact.set_submodule(name, dense)
    exact.is_loaded_in_4bit = exact.is_quantized = False
    ids = torch.randint(128, (2, 12))
    truth, want, _ = loss_and_gradients(peft, exact.float(), ids)
    errors = []
    for library, model in ((peft, copy.deepcopy(base)), (peftkern, base)):
        loss, got, model = loss_and_gradients(library, model, ids)
        assert got.keys() == want.keys()
        total = sum(g.square().sum() for g in want.values()) ** 0.5
        errors.append(sum((got[name] - want[name]).square().sum() for name in want) ** 0.5 / total)
        assert loss == pytest.approx(truth, rel=1e-2)
    assert errors[1] < 1.5 * errors[0]
    assert {p.data_ptr() for p in model.parameters() if p.dtype == torch.uint8} == stored


@pytest.mark.parametrize("how", ["transformers", "peftkern"])
def test_trainer_trains_and_saves_an_adapter_over_a_4bit_model(how, tmp_path):
    """Would catch a model that Trainer refuses as quantized, checkpointing that loses gradients, a dense save."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    base = tiny_llama_4bit(tmp_path / "base")
    if how == "peftkern":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        base = peftkern.quantize_model(base, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    base = peftkern.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(128, (8, 12))]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
