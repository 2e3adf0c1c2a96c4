"""What transformers leaves dense when it quantizes, and we with it: stacked experts, routers, subclasses of nn.Linear;
and checkpoints in which the experts are matrices of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import QuantizedFileError, load_quantized, quantize_model, save_quantized
from peftkern.utils.quantized_modules import weight_of
from quantized_models import NOT_ON_CPU, ours, read, same_tensors, theirs
from tiny_models import VOCAB, ids

pytest.importorskip("bitsandbytes")

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0, num_experts_per_tok=2)
# Twelve: an order by letters would put expert 10 before expert 2. Phimoe's routers are a subclass of nn.Linear.
FAMILIES = {
    "Mixtral": dict(num_local_experts=12),
    "Qwen3Moe": dict(num_experts=12, moe_intermediate_size=64, head_dim=16),
    "Phimoe": dict(num_local_experts=12, router_jitter_noise=0.0, input_jitter_noise=0.0),
}


def moe(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory) -> Path:
    """The folder of a tiny dense mixture of experts in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    moe(request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["nested", "int8"])
def test_what_transformers_leaves_dense_is_left_dense(dense, name):
    """Catches an expert, a router or a subclass of nn.Linear that one of the two quantizes and the other does not."""
    with pytest.warns(UserWarning) as told:
        mine = ours(dense, name)
    words = " ".join(str(warning.message) for warning in told)
    assert "stacked experts stay dense: 'model.layers.0.mlp.experts.gate_up_proj'" in words
    assert ("PhimoeTopKRouter layers (a subclass of nn.Linear) stay dense" in words) == (dense.name.startswith("Phi"))
    other = theirs(dense, name)
    same_tensors(mine.state_dict(), other.state_dict(), but=NOT_ON_CPU if name == "nested" else ())
    quantized = [module for module, m in mine.named_modules() if weight_of(m) is not None]
    assert len(quantized) == 8 and all("self_attn" in module for module in quantized)
    assert mine.get_parameter("model.layers.0.mlp.experts.gate_up_proj").shape == (12, 128, 64)
    assert mine.get_parameter("model.layers.0.mlp.experts.gate_up_proj").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nested", "int8"])
def test_checkpoints_of_transformers_load_here(dense, tmp_path, name):
    """Catches experts that are reported as missing because transformers writes them one by one, under the names of
    older checkpoints; experts or halves of gate_up_proj in another order. In float32, or a rounding would send a token
    to another expert."""
    other = theirs(dense, name, torch.float32)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    other.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    names = {key for f in (tmp_path / "theirs").glob("*.safetensors") for key in load_file(f)}
    assert any(".experts.11." in key for key in names), "transformers writes stacked experts now"
    loaded = load_quantized(tmp_path / "theirs")
    same_tensors(state, loaded.state_dict())
    a, b = loaded(ids()).logits, other.train()(ids()).logits
    assert (a - b).abs().max() <= 1e-3 * b.abs().max()
    base = load_without_head(tmp_path / "theirs")
    same_tensors({k: v for k, v in state.items() if k != "lm_head.weight" and k != "lm_head.bias"}, base)

    save_quantized(loaded, tmp_path / "ours")
    same_tensors(state, load_quantized(tmp_path / "ours").state_dict())
    same_tensors(state, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict())


def load_without_head(folder: Path) -> dict[str, torch.Tensor]:
    """The state of the base model of a checkpoint, under the names that it has with a head."""
    with pytest.warns(UserWarning, match="no place in the model for 'lm_head"):
        base = load_quantized(folder, transformers.AutoModel)
    return {f"model.{key}": value for key, value in base.state_dict().items()}


def test_adapters_over_a_mixture_of_experts():
    """Catches "all-linear" that fails on a model whose experts are parameters and whose attention is quantized: eight
    layers of attention, and in two layers the router and both projections of the experts."""
    with pytest.warns(UserWarning, match="stacked experts"):
        base = quantize_model(moe("Mixtral"), {"load_in_4bit": True}, progress=False)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8 + 2 * 3 and all(g.abs().sum() > 0 for g in gradients)


W1 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def drop(number: int):
    return lambda t: t.pop(W1.format(number))


def rename(number: int, to: str):
    return lambda t: t.update({W1.format(to): t.pop(W1.format(number))})


# what is done to the tensors of a file, words of the error
DAMAGE = {
    "last gone": (drop(11), ["w1", "experts.gate_up_proj", "does not fit together"]),
    "one gone": (drop(3), ["w1", "0 to 10"]),
    "another number": (rename(3, "77"), ["w1", "0 to 11"]),
    "a number of many digits": (rename(3, "7" * 5000), ["w1", "0 to 11"]),
    "twice": (lambda t: t.update({W1.format("03"): t[W1.format(3)].clone()}), ["w1", "0 to 12"]),
    "another size": (lambda t: t.update({W1.format(3): torch.ones(3, 64, dtype=torch.bfloat16)}), ["w1"]),
    "all of another size": (
        lambda t: t.update({W1.format(i): torch.ones(65, 64, dtype=torch.bfloat16) for i in range(12)}),
        ["w1", "[12, 129, 64]", "[12, 128, 64]"],
    ),
    "integers": (
        lambda t: t.update({k: v.int() for k, v in t.items() if ".0.block_sparse_moe.experts." in k}),
        ["w1", "int32"],
    ),
    "all gone": (
        lambda t: [t.pop(W1.format(i)) for i in range(12)],
        ["w3", "experts.gate_up_proj", "does not fit together"],
    ),
    "both gone": (
        lambda t: [t.pop(k) for k in list(t) if "layers.0.block_sparse_moe.experts" in k],
        ["2 tensors are missing", "model.layers.0.mlp.experts.gate_up_proj"],
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A 4-bit Mixtral as transformers writes it."""
    folder = tmp_path_factory.mktemp("good")
    moe("Mixtral").save_pretrained(folder / "dense")
    theirs(folder / "dense", "nf4").save_pretrained(folder / "nf4")
    return folder / "nf4"


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_experts_are_refused_by_name(good, tmp_path, name):
    """Catches experts that move up where one is missing, and an error of torch's that names no tensor."""
    damage, words = DAMAGE[name]
    tensors = {key: value.clone() for key, value in load_file(good / "model.safetensors").items()}
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    with pytest.raises(QuantizedFileError) as caught:
        load_quantized(tmp_path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 1000


def test_a_model_of_subclasses_alone_has_nothing_to_quantize(tmp_path):
    """Catches Falcon's layers, which transformers leaves dense, quantized here; and silence about it."""
    size = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**size)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    other = theirs(tmp_path / "dense", "nf4")
    same_tensors(other.state_dict(), read(tmp_path / "dense").state_dict())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no nn.Linear or Conv1D to quantize in FalconForCausalLM"):
        quantize_model(model, {"load_in_4bit": True})
    same_tensors(before, model.state_dict())
