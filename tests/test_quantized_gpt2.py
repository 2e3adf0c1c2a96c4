"""GPT-2, whose layers are transformers' Conv1D, in 4 and 8 bits: quantized, saved, loaded, adapted, merged; beside
transformers, bitsandbytes and PEFT."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import load_quantized, quantize_model, save_quantized
from peftkern.nn import LoraLinear
from peftkern.ops import dequantize
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from quantized_models import BITS4, CONFIGS, NOT_ON_CPU, ours, read, same_tensors, saved_gpt2, theirs, tiny_gpt2
from tiny_models import ids, randomize

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The folder of a tiny dense GPT-2 in bfloat16."""
    return saved_gpt2(tmp_path_factory.mktemp("gpt2"))


def assert_near(got: torch.Tensor, want: torch.Tensor, part: float) -> None:
    """Within `part` of the largest."""
    assert (got - want).abs().max() <= part * want.abs().max()


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if weight_of(m) is not None}


# --- quantizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_quantize_model_makes_what_transformers_and_bitsandbytes_make(dense, name):
    """Catches GPT-2 left dense or quantized as it lies ([in, out]), other bits, a tied lm_head that is not any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left dense, so nothing is said
        mine = ours(dense, name)
    other = theirs(dense, name)
    same_tensors(mine.state_dict(), other.state_dict(), but=NOT_ON_CPU if name == "nested" else ())
    layers = quantized_layers(mine)
    assert list(layers) == [f"transformer.h.{i}.{layer}" for i in range(2) for layer in LAYERS]
    assert all(m.source_cls is Conv1D and not m.weight.requires_grad for m in layers.values())
    assert layers["transformer.h.0.attn.c_attn"].out_features == 192
    assert mine.lm_head.weight is mine.transformer.wte.weight
    assert mine.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    # bitsandbytes' int8 forward rounds activations to 8 bits
    assert_near(mine(ids()).logits, other.train()(ids()).logits, 0.02 if name != "int8" else 0.05)


def test_bits_are_those_of_the_turned_weight_in_odd_sizes():
    """Catches a weight that is quantized along its other axis, which a square one's shape does not show, and int8 rows
    with the strides of a transpose, which cannot be saved."""
    model = tiny_gpt2(n_embd=36)
    truth = {name: m.weight.detach().T.contiguous() for name, m in model.named_modules() if isinstance(m, Conv1D)}
    four, eight = (quantize_model(copy.deepcopy(model), {key: True}) for key in ("load_in_4bit", "load_in_8bit"))
    assert len(truth) == 8
    for name, weight in truth.items():
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
        got = weight_of(four.get_submodule(name))
        assert torch.equal(got.packed, packed.view(-1)) and torch.equal(got.absmax, state.absmax)
        assert got.shape == weight.shape
        data, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        held = eight.get_submodule(name).weight
        assert torch.equal(held, data) and held.is_contiguous()
        assert torch.equal(weight_of(eight.get_submodule(name)).scale, scale)


def test_a_conv1d_that_is_skipped_stays_one(tmp_path):
    """Catches a file that transformers, or `load_quantized`, reads as if its dense Conv1D were packed bytes."""
    model = quantize_model(tiny_gpt2(), BITS4, skip_modules=["c_attn", "lm_head"])
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D and len(quantized_layers(model)) == 6
    skips = model.config.quantization_config.llm_int8_skip_modules
    assert skips == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "lm_head"]
    save_quantized(model, tmp_path)
    for load in (load_quantized, transformers.AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded.transformer.h[1].attn.c_attn) is Conv1D
        same_tensors(model.state_dict(), loaded.state_dict())


class DoublingConv1D(Conv1D):
    """A Conv1D that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class NamedConv1D(Conv1D):
    """A Conv1D by another name."""


def test_a_conv1d_with_a_forward_of_its_own_stays_dense_and_is_told():
    """Catches a layer whose own forward is lost, as in transformers; and one by another name that is not quantized."""
    model = nn.ModuleDict({"a": DoublingConv1D(8, 6), "b": NamedConv1D(8, 6)})
    with pytest.warns(UserWarning, match=r"DoublingConv1D layers \(a subclass of Conv1D\) stay dense: 'a'"):
        quantize_model(model, BITS4)
    assert type(model["a"]) is DoublingConv1D
    assert isinstance(model["b"], Linear4bit) and model["b"].source_cls is NamedConv1D


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_go_both_ways(dense, tmp_path, name):
    """Catches a turned weight that is turned again on loading, by either side, and a round trip that changes a byte."""
    other = theirs(dense, name)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    other.save_pretrained(tmp_path / "theirs")
    loaded = load_quantized(tmp_path / "theirs")
    same_tensors(state, loaded.state_dict())
    assert {m.source_cls for m in quantized_layers(loaded).values()} == {Conv1D}
    assert_near(loaded(ids()).logits, other.train()(ids()).logits, 0.02 if name != "int8" else 0.05)

    model = ours(dense, name)
    save_quantized(model, tmp_path / "a")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(back.transformer.h[0].mlp.c_proj).__module__.startswith("bitsandbytes")
    same_tensors(model.state_dict(), back.state_dict())
    again = load_quantized(tmp_path / "a")
    same_tensors(model.state_dict(), again.state_dict())
    assert torch.equal(again(ids()).logits, model.eval()(ids()).logits)
    for saved, folder in ((again, "b"), (back, "c")):
        save_quantized(saved, tmp_path / folder)
        files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("a", folder)]
        assert files[0] == files[1], f"{folder} differs"


def test_a_checkpoint_of_bitsandbytes_loads_without_it(dense, tmp_path):
    """Catches an import of bitsandbytes on the way to GPT-2's logits."""
    theirs(dense, "nf4").save_pretrained(tmp_path)
    code = f"""
        import sys
        sys.modules["bitsandbytes"] = None
        import peftkern
        from tiny_models import ids
        model = peftkern.load_quantized({str(tmp_path)!r})
        print(model(ids()).logits.float().sum().item())
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[0]) == load_quantized(tmp_path)(ids()).logits.float().sum().item()


def test_a_weight_of_the_other_orientation_is_refused(dense, tmp_path):
    """Catches a quantized weight [in, out] that is taken for [out, in]."""
    model = ours(dense, "nf4")
    wrong = nn.Linear(192, 64)
    model.transformer.h[0].attn.c_attn = Linear4bit.from_linear(wrong.to(torch.bfloat16))
    save_quantized(model, tmp_path)
    with pytest.raises(peftkern.QuantizedFileError, match=r"c_attn.weight.*\[64, 192\].*expects \[192, 64\]"):
        load_quantized(tmp_path)


# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(library, base: nn.Module, method: str, **options) -> nn.Module:
    """`base` with an adapter on the default targets, of seeded values."""
    config = getattr(library, f"{method}Config")(task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # PEFT's, under this transformers
        warnings.filterwarnings("error", ".*fan_in_fan_out")
        model = library.get_peft_model(base, config)
    names = ("lora_",) if method == "Lora" else ("ia3_",)
    randomize(model, names)
    if method == "IA3":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "ia3_" in name:
                    p.add_(1)
    return model.train()


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids(), labels=ids()).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("method", ["Lora", "IA3"])
@pytest.mark.parametrize("name", ["nested", "int8"])
def test_adapters_over_transformers_own_are_those_of_peft(dense, tmp_path, name, method, fan):
    """Catches a delta that is turned because the configuration says fan_in_fan_out, a configuration that comes back
    other than PEFT's, other parameters, gradients or files.

    In float32, where both compute from the same dequantized weight; PEFT's IA3 fails beside 16-bit norms on a CPU.
    """
    models = [
        adapted(library, theirs(dense, name, torch.float32), method, fan_in_fan_out=fan) for library in (peft, peftkern)
    ]
    other, mine = models
    assert mine.peft_config["default"].fan_in_fan_out is other.peft_config["default"].fan_in_fan_out is fan
    (want, gradients), (loss, got) = map(step, models)
    assert loss == pytest.approx(want, rel=1e-5)
    assert got.keys() == gradients.keys() and len(got) == 4
    for key, gradient in gradients.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    assert all(row.path.startswith("dequantize:") for row in peftkern.explain(mine).rows)

    folders = tmp_path / "theirs", tmp_path / "ours"
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(str(folder))
    same_tensors(*(load_file(folder / WEIGHTS) for folder in folders))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    for config in configs:
        config |= {key: sorted(value) for key, value in config.items() if isinstance(value, list)}
    assert configs[0] == configs[1]
    here = peftkern.PeftModel.from_pretrained(theirs(dense, name, torch.float32), folders[0]).train()
    there = peft.PeftModel.from_pretrained(theirs(dense, name, torch.float32), str(folders[1])).train()
    for loaded in (here, there):
        assert loaded(input_ids=ids(), labels=ids()).loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("method", ["Lora", "IA3"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_adapters_over_our_own_are_those_over_bitsandbytes(dense, tmp_path, name, method):
    """Catches layers of ours that "all-linear" or the defaults do not find, and numbers that hang on whose class holds
    the same bits. The adapter is also loaded over the dense model, whose Conv1D it fits."""
    options = {"target_modules": "all-linear"} if method == "Lora" else {}
    bases = theirs(dense, name), load_of(theirs(dense, name), tmp_path / "base")
    results = []
    for base in bases:
        model = adapted(peftkern, base, method, **options)
        results.append((*step(model), model))
    (want, gradients, _), (loss, got, model) = results
    assert loss == pytest.approx(want, rel=1e-3)
    assert len(got) == len(gradients) == (16 if method == "Lora" else 4)
    model.save_pretrained(tmp_path / "adapter")
    for library in (peftkern, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out, corrected by both
            over = library.PeftModel.from_pretrained(read(dense), str(tmp_path / "adapter"))
        assert over(input_ids=ids(), labels=ids()).loss.item() == pytest.approx(want, rel=0.05)


def load_of(model: nn.Module, folder: Path) -> nn.Module:
    """The same bits in layers of ours."""
    model.save_pretrained(folder)
    return load_quantized(folder)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("method", ["Lora", "IA3"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_merging_makes_a_conv1d_that_transformers_reads(dense, tmp_path, name, method, whose):
    """Catches an `nn.Linear` in the place of a Conv1D: its weight is saved turned, which shows in c_attn's shape and
    not in c_proj's."""
    base = ours(dense, name) if whose == "ours" else theirs(dense, name)
    model = adapted(peftkern, base, method, target_modules=["c_attn", "attn.c_proj"], **feedforward(method))
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "base_layer")}
    truth = {}
    for key, layer in layers.items():
        total = dequantize(weight_of(layer.base_layer), torch.float32)
        layer.merge_weight(total, "default")
        truth[key] = total
    before = model(ids()).logits
    model.merge_adapter(safe_merge=True)
    assert all(isinstance(layer.base_layer, Conv1D) for layer in layers.values())
    assert_near(model(ids()).logits, before, 0.02)
    model.unmerge_adapter()
    assert torch.equal(model(ids()).logits, before)

    merged = model.merge_and_unload()
    for key, weight in truth.items():
        layer = merged.get_submodule(key)
        assert type(layer) is Conv1D and layer.weight.is_contiguous() and (layer.nx, layer.nf) == layer.weight.shape
        stored = weight.to(torch.bfloat16 if name == "nf4" or whose == "ours" else torch.float16)
        assert torch.equal(layer.weight, stored.T.to(torch.bfloat16))
    assert_near(merged(ids()).logits, before, 0.02)
    assert sorted(quantized_layers(merged)) == [
        f"transformer.h.{i}.mlp.{n}" for i in range(2) for n in ("c_fc", "c_proj")
    ]
    save_quantized(merged, tmp_path)
    for load in (load_quantized, transformers.AutoModelForCausalLM.from_pretrained):
        same_tensors(merged.state_dict(), load(tmp_path).state_dict())


def feedforward(method: str) -> dict[str, list[str]]:
    return {"feedforward_modules": ["attn.c_proj"]} if method == "IA3" else {}


def test_a_model_merged_whole_is_saved_as_the_gpt2_that_it_is(dense, tmp_path):
    """Catches a merged model that `from_pretrained` cannot read, or reads with square weights turned."""
    model = adapted(peftkern, ours(dense, "nf4"), "Lora", target_modules="all-linear")
    logits = model.eval()(ids()).logits
    merged = model.merge_and_unload()
    assert not quantized_layers(merged) and not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path)
    again = read(tmp_path)
    same_tensors(merged.state_dict(), again.state_dict())
    assert_near(again(ids()).logits, logits, 0.02)


@pytest.mark.parametrize("name", ["storage", "int8"])
def test_requantizing_keeps_what_the_layer_stands_for(dense, tmp_path, name):
    """Catches a requantized layer that forgets that it was a Conv1D, or whose checkpoint has the other orientation."""
    model = adapted(peftkern, ours(dense, name), "Lora")
    truth = {
        key: dequantize(weight_of(m.base_layer), torch.float32) + m.get_delta_weight("default")
        for key, m in model.base_model.model.named_modules()
        if hasattr(m, "base_layer")
    }
    with pytest.warns(UserWarning, match="requantized: 2"):
        merged = model.merge_and_unload(requantize=True)
    assert all(m.source_cls is Conv1D for m in quantized_layers(merged).values())
    for key, weight in truth.items():
        held = dequantize(weight_of(merged.get_submodule(key)), torch.float32)
        assert (held - weight).norm() < 0.12 * weight.norm()
    save_quantized(merged, tmp_path)
    same_tensors(merged.state_dict(), load_quantized(tmp_path).state_dict())


@pytest.mark.parametrize("method", ["Lora", "IA3"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_mixed_batch_is_its_rows_alone(name, method):
    """Catches rows of a batch with adapter_names that take each other's adapter, or the wrong side of a vector."""
    base = quantize_model(tiny_gpt2(), CONFIGS[name] | {"bnb_4bit_compute_dtype": torch.float32})
    model = adapted(peftkern, base, method).eval()
    model.add_adapter("second", getattr(peftkern, f"{method}Config")(task_type="CAUSAL_LM", **second(method)))
    randomize(model, (".second",), seed=3)
    names = ["second", "default", "__base__"]
    tokens = ids(batch=1).expand(3, -1)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=names).logits
        for row, who in enumerate(names):
            if who == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=tokens[row : row + 1]).logits
            else:
                model.set_adapter(who)
                alone = model(input_ids=tokens[row : row + 1]).logits
            assert_near(mixed[row], alone[0], 1e-4)
            others = torch.cat([mixed[:row], mixed[row + 1 :]])
            assert all((other - alone[0]).abs().max() > 1e-2 * alone.abs().max() for other in others)
    rows = peftkern.explain(model, 4, mixed=True).rows
    assert len(rows) == (2 if method == "Lora" else 4)
    assert all(row.path.startswith("dequantize:") for row in rows)


def second(method: str) -> dict[str, int]:
    return {"r": 3, "lora_alpha": 6} if method == "Lora" else {}


def test_loftq_finds_the_originals_of_turned_weights(dense):
    """Catches an original that is compared as it lies in the file: [in, out], where the layer holds [out, in]."""
    dense_model = read(dense)
    model = adapted(peftkern, ours(dense, "nf4"), "Lora", r=8, lora_alpha=8, target_modules="all-linear")
    peftkern.replace_lora_weights_loftq(model, dense)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 8
    for name, layer in layers.items():
        original = dense_model.get_submodule(name).weight.detach().float().T
        lost = original - dequantize(weight_of(layer.base_layer), torch.float32)
        made_up = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (lost - made_up).norm() < 0.95 * lost.norm(), name


def test_a_loop_of_its_own_quantizes_a_conv1d():
    """Catches `from_linear(..., quantization=...)` that takes `nn.Linear` alone, or turns nothing."""
    conv1d = Conv1D(20, 12)
    for quantization, kind in (("nf4", Linear4bit), ("int8", Linear8bit)):
        layer = LoraLinear.from_linear(conv1d, r=2, quantization=quantization)
        held = layer.get_base_layer()
        assert type(held) is kind and held.source_cls is Conv1D and tuple(weight_of(held).shape) == (20, 12)
        error = dequantize(weight_of(held), torch.float32) - conv1d.weight.detach().T
        assert error.norm() < 0.12 * conv1d.weight.norm()
        assert layer(torch.randn(3, 12)).shape == (3, 20)
    with pytest.raises(TypeError, match="expected an nn.Linear or a Conv1D to quantize, got DoublingConv1D"):
        LoraLinear.from_linear(DoublingConv1D(20, 12), quantization="nf4")
