"""Which modules a configuration adapts, beside real PEFT's choice on the same models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from peftkern.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peftkern.tuners.targets import check_target_module_exists, get_pattern_key, shortest_suffixes
from tiny_models import mlp, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def adapted(model: nn.Module, kind: type) -> list[str]:
    """Names of the adapted layers of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def both(model: nn.Module, **arguments) -> tuple[LoraModel, peft.LoraModel]:
    """The same configuration injected by peftkern and by PEFT into equal models."""
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            LoraModel(model, LoraConfig(**arguments), "default"),
            peft.LoraModel(other, peft.LoraConfig(**arguments), "default"),
        )


def assert_same(model: nn.Module, **arguments) -> LoraModel:
    """Asserts that both adapt the same layers, with the same ranks, and would save the same target_modules."""
    ours, theirs = both(model, **arguments)
    names = adapted(ours, LoraLayer)
    assert names and names == adapted(theirs, peft.tuners.lora.LoraLayer)
    for name in names:
        a, b = ours.get_submodule(name), theirs.get_submodule(name)
        assert (a.r, a.lora_alpha, a.scaling) == (b.r, b.lora_alpha, b.scaling)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    assert ours.targeted_module_names == theirs.targeted_module_names
    return ours


LLAMA_CASES = [
    {},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj", "layers.0.mlp.down_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 64}},
    {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 2}},
]


@pytest.mark.parametrize("arguments", LLAMA_CASES, ids=str)
def test_llama_targets_are_those_of_peft(arguments):
    """Catches a matching rule that differs from PEFT's, and a saved target_modules that does."""
    assert_same(tiny_llama(), **arguments)


def test_many_layers_are_shortened_as_in_peft():
    """Catches a config that saves hundreds of names, or suffixes that match more than was asked."""
    model = tiny_llama(num_hidden_layers=4)
    ours = assert_same(model, target_modules="all-linear")
    assert len(ours.peft_config["default"].target_modules) == 7
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qkvo" if (i, p) != (0, "q")]
    assert_same(tiny_llama(num_hidden_layers=4), target_modules=[*names, "up_proj", "down_proj", "a", "b", "c", "d"])


def test_shortest_suffixes_matches_peft():
    """Catches a shortening that loses a target or takes in another module."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    targets = {f"model.decoder.layers.{i}.self_attn.{p}" for i in range(30) for p in ("q_proj", "v_proj")}
    others = [f"model.encoder.layers.{i}.self_attn.k_proj" for i in range(30)] + ["model.encoder.v_proj"]
    assert shortest_suffixes(targets, others) == _find_minimal_target_modules(targets, others)


@pytest.mark.parametrize(
    "cls, arguments",
    [
        ("LlamaForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("LlamaModel", {"target_modules": "all-linear"}),
        ("LlamaForTokenClassification", {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    ],
)
def test_all_linear_leaves_the_head_out_as_peft_does(cls, arguments):
    """Catches an adapter on a classification head, which is trained whole."""
    assert_same(tiny_llama(cls=cls), **arguments)


def test_architectures_with_other_layers():
    """Catches defaults of encoder-decoders and of Conv1D models that do not match PEFT's."""
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    assert_same(transformers.GPT2LMHeadModel(gpt2))
    assert_same(transformers.GPT2LMHeadModel(gpt2), target_modules="all-linear")
    assert_same(
        transformers.GPT2LMHeadModel(gpt2), target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h"
    )
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=32)
    assert_same(transformers.T5ForConditionalGeneration(t5))
    assert_same(transformers.T5ForConditionalGeneration(t5), target_modules=["q", "wo"])


def test_experts_are_counted_by_their_layer():
    """Catches layers_to_transform taking the expert's number for the layer's."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Module()
            self.body.layers = nn.ModuleList(Block() for _ in range(3))

    for pattern in (None, "layers"):
        arguments = {"target_modules": ["w"], "layers_to_transform": [2], "layers_pattern": pattern}
        ours = assert_same(Model(), **arguments)
        assert ours.targeted_module_names == [f"body.layers.2.experts.{i}.w" for i in range(3)]


def test_a_second_adapter_finds_the_adapted_layers():
    """Catches a second adapter that lands inside the first one, and "all-linear" that no longer sees adapted layers."""
    ours, theirs = both(mlp(), target_modules=["up", "down"])
    for model, config in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        model.peft_config["second"] = config(target_modules="all-linear", r=2)
        model.inject_adapter(model.model, "second")
    assert (
        adapted(ours, LoraLayer)
        == adapted(theirs, peft.tuners.lora.LoraLayer)
        == [
            "model.up",
            "model.down",
            "model.head",
        ]
    )
    assert ours.peft_config["second"].target_modules == {"up", "down", "head"}
    assert dict(ours.state_dict()).keys() == dict(theirs.state_dict()).keys()


def test_state_dict_decides_when_given():
    """Catches an injection that follows target_modules although the file says otherwise."""
    keys = {"up.lora_A.weight": torch.zeros(0), "up.lora_B.weight": torch.zeros(0)}
    words = "state_dict decides which modules are adapted, not target_modules: 'up' by it alone, 'down' not$"
    with pytest.warns(RuntimeWarning, match=words):
        model = LoraModel(mlp(), LoraConfig(target_modules=["down"]), "default", state_dict=keys)
    assert model.targeted_module_names == ["up"]


def test_nothing_matched_says_what_was_asked_and_what_is_near():
    """Catches a bare "not found" for a typo."""
    with pytest.raises(ValueError, match=r"\['q_porj', 'v_prjo'\].*Near names: q_proj.*v_proj"):
        LoraModel(tiny_llama(), LoraConfig(target_modules=["q_porj", "v_prjo"]), "default")
    with pytest.raises(ValueError, match="exclude_modules and modules_to_save left out 1"):
        LoraModel(mlp(), LoraConfig(target_modules=["up"], exclude_modules=["up"]), "default")
    for chosen in (7, [9]):
        with pytest.raises(
            ValueError, match=r"layers_to_transform=\[?[79]\]?.* Modules of these names are in layers 0 to 1$"
        ):
            LoraModel(tiny_llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=chosen), "default")
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="blocks")
    with pytest.raises(ValueError, match="layers_pattern='blocks'.* are in no layer that has an index"):
        LoraModel(tiny_llama(), config, "default")
    with pytest.raises(ValueError, match="Near names: q_proj"):  # no layer has it: the name is at fault
        LoraModel(tiny_llama(), LoraConfig(target_modules=["q_porj"], layers_to_transform=1), "default")
    with pytest.raises(ValueError, match="characters left out") as caught:
        LoraModel(tiny_llama(), LoraConfig(target_modules=["q" * 100_000]), "default")
    assert len(str(caught.value)) < 2000
    with pytest.warns(UserWarning, match="characters left out") as told:
        LoraModel(
            mlp(), LoraConfig(target_modules=["up"], exclude_modules=["x" * 9999], rank_pattern={"y" * 9999: 1}), "a"
        )
    assert len(told) == 2 and all(len(str(warning.message)) < 2000 for warning in told)
    with pytest.raises(ValueError, match="Names in the model end in: down, emb, head, up"):
        LoraModel(mlp(), LoraConfig(target_modules=["zzz"]), "default")
    with pytest.raises(ValueError, match="at least one module"):
        LoraModel(mlp(), LoraConfig(target_modules=[]), "default")


def test_unknown_architecture_needs_targets():
    """Catches a guess where no default is known."""
    with pytest.raises(ValueError, match="target_modules must be given: .*without a model_type"):
        LoraModel(mlp(), LoraConfig(), "default")
    model = mlp()
    model.config = {"model_type": "brand_new"}
    with pytest.raises(ValueError, match="brand_new"):
        LoraModel(model, LoraConfig(), "default")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.attention = nn.MultiheadAttention(8, 2, kdim=4)


@pytest.mark.parametrize(
    "targets, words",
    [
        (["first", "norm"], "'norm', a BatchNorm2d"),
        (["first", "attention"], "'attention', a MultiheadAttention: expected query, key and value of one size"),
        (["first", "out_proj"], "'attention.out_proj'.*without calling"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named_and_nothing_is_changed(targets, words):
    """Catches an adapter that is half injected, or one that would silently do nothing."""
    model = Mixed()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        LoraModel(model, LoraConfig(target_modules=targets), "default")
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


def test_all_linear_leaves_out_what_attention_reads_without_calling():
    """Catches "all-linear" that raises for models with a SigLIP pooling head (Gemma 3, Aya Vision), where nobody named
    the layer, and a shortened list of names that means it after all."""
    model = nn.ModuleDict({f"block{i}": Mixed() for i in range(25)})
    model["last"] = nn.ModuleDict({"out_proj": nn.Linear(4, 4)})
    adapted = LoraModel(model, LoraConfig(target_modules="all-linear", r=2), "default")
    names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert names == {"model.last.out_proj", *(f"model.block{i}.first" for i in range(25))}
    assert adapted.peft_config["default"].target_modules == {"first", "last.out_proj"}


def test_mamba_layers_that_are_never_called_are_refused():
    """Catches an adapter that Mamba's kernel would bypass."""
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    with pytest.raises(ValueError, match="'out_proj'.*'mamba'"):
        LoraModel(transformers.MambaForCausalLM(config), LoraConfig(target_modules=["out_proj"]), "default")


def test_names_that_nothing_answers_to_are_warned_about():
    """Catches a pattern with a typo that is silently without effect."""
    with pytest.warns(UserWarning, match="exclude_modules=.*matched no module"):
        LoraModel(mlp(), LoraConfig(target_modules=["up"], exclude_modules=["dwon"]), "default")
    with pytest.warns(UserWarning, match=r"rank_pattern: \['dwon'\]"):
        LoraModel(mlp(), LoraConfig(target_modules=["up"], rank_pattern={"dwon": 2, "up": 3}), "default")
    with pytest.warns(UserWarning, match="modules_to_save: .*'haed'"):
        LoraModel(mlp(), LoraConfig(target_modules=["up"], modules_to_save=["haed", "head"]), "default")


def test_patterns_that_a_file_puts_in_another_order_are_warned_about(tmp_path):
    """Catches an adapter that means something else, without a word, once it was saved and loaded."""
    patterns = {"up": 2, ".*u.*": 3, "down": 5}
    with pytest.warns(UserWarning, match=r"alpha_pattern: 'up' decides for 'up' here, but '\.\*u\.\*' .*\(1 modules\)"):
        made = LoraModel(mlp(), LoraConfig(target_modules=["up"], alpha_pattern=patterns), "default")
    made.peft_config["default"].save_pretrained(tmp_path)
    assert made.model.up.lora_alpha["default"] == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decides for")
        read = LoraModel(mlp(), LoraConfig.from_pretrained(tmp_path), "default")
        assert read.model.up.lora_alpha["default"] == 3
        # Equal values, or patterns that share no module, lose nothing.
        LoraModel(mlp(), LoraConfig(target_modules=["up"], alpha_pattern={"up": 2, ".*u.*": 2}), "default")
        LoraModel(mlp(), LoraConfig(target_modules=["up", "down"], alpha_pattern={"up": 2, "down": 3}), "default")


def test_a_misspelt_target_beside_a_right_one_is_warned_about():
    """Catches a typo in a list whose other names match: that layer would be left out without a word."""
    with pytest.warns(UserWarning, match=r"target_modules=\['v_porj'\] matched no module \(near names: v_proj") as seen:
        model = LoraModel(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_porj"]), "default")
    assert len(model.targeted_module_names) == 2 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"exclude_modules=\['dwon'\] matched no module"):
        LoraModel(
            tiny_llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["0.self_attn", "dwon"]), "default"
        )
    many = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)] + [f"model.layers.9.x{i}" for i in range(20)]
    with pytest.warns(UserWarning, match=r"target_modules=\['model.layers.9.x0', .*'model.layers.9.x9'\] matched"):
        LoraModel(tiny_llama(), LoraConfig(target_modules=many), "default")


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*(q|v_porj)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*v_proj"},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.self_attn.v_proj"]},
        {},
    ],
    ids=str,
)
def test_names_that_something_answers_to_are_not(arguments):
    """Catches a warning about an entry whose modules another setting leaves out, or about what nobody wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(tiny_llama(), LoraConfig(**arguments), "default")
    phi = transformers.PhiConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, num_attention_heads=2)
    phi.model_type = "blip-2"  # whose default has names of several language models
    model = transformers.PhiForCausalLM(phi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = LoraModel(model, LoraConfig(), "default").peft_config["default"].to_json_dict()
        again = LoraConfig.from_dict(saved)
        LoraModel(transformers.PhiForCausalLM(phi), again, "default")


def test_one_of_the_two_classifier_names_is_enough():
    """Catches a warning on every sequence classifier, whose head goes by one of two names."""
    model = tiny_llama(cls="LlamaForSequenceClassification")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(model, LoraConfig(modules_to_save=["classifier", "score"], task_type="SEQ_CLS"), "default")


def test_tied_weights_are_warned_about():
    """Catches an adapter on one of two tied layers without a word."""
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied between model.embed_tokens and lm_head"):
        LoraModel(model, LoraConfig(target_modules=["embed_tokens"]), "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]), "default")
        LoraModel(tiny_llama(tie_word_embeddings=False), LoraConfig(target_modules=["embed_tokens"]), "default")


def test_pattern_and_suffix_rules():
    """Catches a suffix that matches in the middle of a name."""
    config = LoraConfig(target_modules=["proj"])
    assert not check_target_module_exists(config, "a.q_proj")
    assert check_target_module_exists(config, "a.proj") and check_target_module_exists(config, "proj")
    assert not check_target_module_exists(config, "a.proj.b")
    assert get_pattern_key(["proj", r"a\..*"], "a.q_proj") == r"a\..*"
    assert get_pattern_key(["proj"], "q_proj") == "q_proj"


def test_stacked_experts_are_no_linear_layers():
    """Catches a mixture whose experts, most of it, stay frozen under "all-linear" without a word."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    sizes |= dict(num_local_experts=2, num_key_value_heads=1)
    config = transformers.GptOssConfig(head_dim=8, layer_types=["full_attention"], **sizes)
    with pytest.warns(UserWarning, match="stacked experts stay frozen.*layers.0.mlp.experts.gate_up_proj"):
        LoraModel(transformers.GptOssForCausalLM(config), LoraConfig(target_modules="all-linear"), "default")
    both = LoraConfig(target_modules="all-linear", target_parameters=["experts.gate_up_proj"])
    with pytest.warns(UserWarning, match=r"stacked experts stay frozen.*: 'model.layers.0.mlp.experts.down_proj' \("):
        LoraModel(transformers.GptOssForCausalLM(config), both, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(mlp(), LoraConfig(target_modules="all-linear"), "default")
