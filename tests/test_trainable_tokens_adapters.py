"""Trained rows of several adapters in a model: which are active, merged, in a file, and what is refused."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
import tiny_models
from peftkern.tuners.trainable_tokens import TrainableTokensWrapper
from peftkern.utils import get_base_model_state_dict
from peftkern.utils.adapter_error import AdapterFileError
from test_trainable_tokens import adapted, both, gradients, ids

FIELD = "trainable_token_indices"


def config(lib: Any = peftkern, indices: Any = None, **options: Any) -> Any:
    return lib.LoraConfig(**({"r": 2, "target_modules": ["q_proj"], FIELD: indices} | options))


def add(model: Any, name: str, indices: Any, seed: int = 2, **options: Any) -> None:
    """Another adapter, LoRA and rows random."""
    model.add_adapter(
        name, config(peft if type(model).__module__.startswith("peft.") else peftkern, indices, **options)
    )
    generator = torch.Generator().manual_seed(seed)
    for key, p in sorted(model.named_parameters()):
        if name in key.split("."):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def three(**options: Any) -> list[Any]:
    """Models of PEFT and peftkern with "default" [3, 1, 7], "b" [1, 5] and "plain", which trains no rows."""
    models = list(both([3, 1, 7], **options))
    for model in models:
        add(model, "b", [1, 5])
        add(model, "plain", None, seed=3)
    return models


def rows_of(model: Any) -> Any:
    return model.get_input_embeddings().token_adapter.trainable_tokens_delta


def same(models: list[Any]) -> None:
    """Logits and what learns are equal."""
    torch.testing.assert_close(models[1](ids()).logits, models[0](ids()).logits, rtol=1e-6, atol=1e-6)
    flags = [{n: p.requires_grad for n, p in m.named_parameters() if "lora_" in n or "tokens_" in n} for m in models]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("tied", [False, True])
def test_switching_is_as_in_peft(tied):
    """Catches rows of an adapter that is not active, also those of the last one where the active one has none; and
    rows that learn while they are not."""
    models = three(tied=tied)
    same(models)
    for name in ("b", "plain", "default", "plain", "b"):
        for model in models:
            model.set_adapter(name)
        same(models)
    with models[0].disable_adapter(), models[1].disable_adapter():
        same(models)
    same(models)
    for model in models:
        model.base_model.set_adapter(["default", "plain"])
    same(models)
    for model in models:
        model.set_adapter("default")
        model.delete_adapter("b")
    assert [list(rows_of(model)) for model in models] == [["default"]] * 2
    same(models)


def test_two_adapters_active_at_once():
    """Catches a token of which nobody can say whose row it takes, a model that is half switched after that error, and
    rows for other tokens that are left out (PEFT refuses these too)."""
    model = three()[1]
    before = tiny_models.fingerprint(model)
    with pytest.raises(ValueError, match=r"indices of adapters 'default' and 'b': both have rows for \[1\]"):
        model.base_model.set_adapter(["default", "b"])
    assert tiny_models.fingerprint(model) == before
    add(model, "apart", [9, 2])
    model.base_model.set_adapter(["apart", "b"])
    embedding, x = model.get_input_embeddings(), torch.tensor([9, 1, 2, 5, 3])
    rows = torch.cat([rows_of(model)["apart"], rows_of(model)["b"]])[[0, 2, 1, 3]]
    assert torch.equal(embedding(x)[:4], rows) and torch.equal(embedding(x), embedding.weight[x])
    assert torch.equal(embedding(x)[4], embedding.original_module(x)[4])
    assert all("4 trained rows" in row.reason for row in peftkern.explain(model).rows if "token" in row.name)


def test_deleting_the_active_adapter():
    """Catches a head that stays on the deleted rows while its embedding leaves them; rows of an adapter that is not
    the next one (PEFT's layer takes its own next)."""
    model = three()[1]
    add(model, "z", [2])
    model.set_adapter("b")
    model.base_model.delete_adapter("default")
    with pytest.warns(UserWarning, match="'plain' is active now"):
        model.delete_adapter("b")
    for wrapper in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert wrapper.active_adapters == [] and wrapper._adapters == {"z"}
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(ids()), embedding.original_module(ids()))
    model.set_adapter("z")
    assert torch.equal(embedding(torch.tensor([2])), rows_of(model)["z"])


@pytest.mark.parametrize("tied", [False, True])
def test_merging_is_as_in_peft(tied):
    """Catches rows written to other places, a tied head that is left out, and unmerging that restores anything but the
    very rows that were there."""
    models = three(tied=tied)
    clean = [m.get_input_embeddings().original_module.weight.clone() for m in models]
    unmerged = models[1](ids()).logits
    for model in models:
        model.merge_adapter()
    weights = [m.get_input_embeddings().original_module.weight for m in models]
    assert torch.equal(*weights) and not torch.equal(weights[0], clean[0])
    assert torch.equal(weights[1][[3, 1, 7]], rows_of(models[1])["default"])
    same(models)
    torch.testing.assert_close(models[1](ids()).logits, unmerged, rtol=1e-4, atol=1e-5)
    for model in models:
        model.unmerge_adapter()
    assert torch.equal(models[1].get_input_embeddings().original_module.weight, clean[1])
    same(models)
    whole = [model.merge_and_unload() for model in models]
    assert torch.equal(whole[0].get_input_embeddings().weight, whole[1].get_input_embeddings().weight)
    assert (whole[1].lm_head.weight is whole[1].model.embed_tokens.weight) == tied
    assert whole[1].config.tie_word_embeddings == tied
    assert type(whole[1].lm_head) is nn.Linear and type(whole[1].model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(whole[1](ids()).logits, unmerged, rtol=1e-4, atol=1e-5)


def test_merging_several_adapters():
    """Catches two rows for one token, of which the later would win; an adapter without rows that is in the way (PEFT
    fails at one); and a base that is changed before the error."""
    model = three()[1]
    add(model, "apart", [9, 2])
    clean = model.get_input_embeddings().original_module.weight.clone()
    before = tiny_models.fingerprint(model)
    with pytest.raises(ValueError, match=r"'default' and 'b': both have rows for \[1\]"):
        model.merge_adapter(["default", "b"])
    assert tiny_models.fingerprint(model) == before
    model.merge_adapter(["apart", "plain"])
    with pytest.raises(ValueError, match="adapter 'apart' is merged"):
        model.delete_adapter("apart")
    with pytest.warns(UserWarning, match="beside the adapters already merged"):
        model.merge_adapter(["b"])
    weight = model.get_input_embeddings().original_module.weight
    assert torch.equal(weight[[9, 2, 1, 5]], torch.cat([rows_of(model)["apart"], rows_of(model)["b"]]))
    with pytest.warns(UserWarning, match="unmerged before others are set active"):
        model.set_adapter("default")
    assert torch.equal(weight, clean)


def test_safe_merge():
    """Catches a NaN that is written into the base."""
    model = three()[1]
    rows_of(model)["default"].data[1, 2] = float("nan")
    before = {k: v.clone() for k, v in get_base_model_state_dict(model).items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="safe_merge.*'default'.*not finite"):
            merge(safe_merge=True)
    assert all(torch.equal(v, before[k]) for k, v in get_base_model_state_dict(model).items())


@pytest.mark.parametrize("indices", [{"lm_head": [1, 2]}, {"embed_tokens": [1, 3], "lm_head": [1, 4]}], ids=str)
def test_rows_that_a_tied_weight_cannot_take_are_not_merged(indices):
    """Catches PEFT's merging of them, after which the other module has them too, and the output is another."""
    model = adapted(peftkern, indices)
    before = tiny_models.fingerprint(model)
    with pytest.raises(ValueError, match=r"rows of tokens cannot be merged.*'(model.embed_tokens|lm_head)'"):
        model.merge_adapter()
    assert tiny_models.fingerprint(model) == before
    model.unload()


def test_rows_of_a_pair_that_is_tied_no_longer_are_not_merged():
    """Catches rows that are merged into the embedding alone, and are then lost in the head."""
    model = adapted(peftkern, [3, 1])
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before = model(ids()).logits
    with pytest.raises(ValueError, match="the weight of 'lm_head', which was tied to the embedding's, is another one"):
        model.merge_adapter()
    assert torch.equal(model(ids()).logits, before)


def test_unload():
    """Catches a wrapper that is left, and what unloading leaves of rows that were not merged."""
    base = tiny_models.tiny_llama(tie_word_embeddings=True)
    expected, names = base(ids()).logits, list(base.state_dict())
    model = adapted(peftkern, [3, 1])
    bare = model.unload()
    assert torch.equal(bare(ids()).logits, expected) and list(bare.state_dict()) == names


# -- many adapters in a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_batches(tied):
    """Catches a row of the batch with another one's trained rows, one for which they are left out, and gradients that
    go to another adapter."""
    model = three(tied=tied)[1].eval()
    x = torch.tensor([[1, 5, 3, 7], [1, 5, 3, 7], [1, 5, 3, 7], [1, 3, 5, 9], [1, 5, 7, 2]])
    names = ["default", "b", "__base__", "default", "plain"]
    mixed = model(x, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[row : row + 1]).logits
        else:
            model.set_adapter(name)
            expected = model(x[row : row + 1]).logits
        torch.testing.assert_close(mixed[row], expected[0], rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    model.set_requires_grad(["default", "b", "plain"])
    found = {}
    for which in (names, ["b"] * 5):
        model.zero_grad()
        model(x, adapter_names=which).logits[1].square().sum().backward()
        found[tuple(which)] = rows_of(model)["b"].grad.clone()
        assert rows_of(model)["default"].grad is None or not rows_of(model)["default"].grad.any()
    torch.testing.assert_close(*found.values())
    assert found[tuple(names)].any()


def test_a_bank_of_adapters():
    """Catches an adapter whose rows the bank leaves out, keeps after it was replaced, or does not save."""
    model = tiny_models.tiny_llama(tie_word_embeddings=True)
    bank = peftkern.AdapterBank(model, slots=3, max_rank=4, target_modules=["q_proj"])
    with torch.no_grad():
        plain = model(ids()).logits
    bank.add("law", config(indices=[1, 3]))
    bank.add("code", config(indices=[3]))
    for name in ("law", "code"):
        for _, p in bank.named_parameters(name):
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    assert sum("tokens_delta" in key for key, _ in bank.named_parameters("law")) == 1
    x = ids()[:1].expand(3, -1)
    with bank.batch(["law", "__base__", "code"]):
        logits = model(x).logits
    with bank.batch(bank.ids(["law", "__base__", "code"])):
        by_slot = model(x).logits
    torch.testing.assert_close(by_slot, logits)
    torch.testing.assert_close(logits[1], plain[0])
    bank.model.set_adapter("law")
    torch.testing.assert_close(model(x[:1]).logits[0], logits[0], rtol=1e-4, atol=1e-4)
    saved = bank.state_dict("code")
    assert [key for key in saved if "token" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    bank.replace("law", config(indices=[3]), state_dict=saved)
    with bank.batch(["law", "code"]):
        logits = model(x[:2]).logits
    torch.testing.assert_close(logits[0], logits[1])
    bank.remove("law")
    with bank.batch(["code"]):
        torch.testing.assert_close(model(x[:1]).logits[0], logits[1])


def test_a_bank_of_a_model_that_has_rows():
    """Catches rows that were there before the bank and that its batches leave out."""
    model = three()[1].eval()
    x, names = ids()[:1].expand(3, -1), ["default", "b", "__base__"]
    expected = model(x, adapter_names=names).logits
    bank = peftkern.AdapterBank(model, slots=4)
    with bank.batch(names):
        torch.testing.assert_close(bank.model(x).logits, expected)
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[1], expected[2])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["auto", True])
@pytest.mark.parametrize(
    "indices", [[3, 1, 7], {"embed_tokens": [1, 3], "lm_head": [4, 1]}, {"lm_head": [2, 1]}], ids=str
)
def test_files_load_both_ways(tmp_path, indices, embeddings, tied):
    """Catches a name, a shape or a configuration in a file that the other library does not understand."""
    models = both(indices, tied=tied)
    folders = [tmp_path / "theirs", tmp_path / "ours"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder, save_embedding_layers=embeddings)
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    saved = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert saved[0][FIELD] == saved[1][FIELD] == indices
    expected = models[0](ids()).logits
    for lib, folder in ((peft, folders[1]), (peftkern, folders[0]), (peftkern, folders[1])):
        base = tiny_models.tiny_llama(tie_word_embeddings=tied)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected|unknown).*")
            again = lib.PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-6, atol=1e-6)
        assert not any(p.requires_grad for p in again.parameters())


def test_files_of_further_adapters(tmp_path):
    """Catches rows of another adapter in a file, and an adapter without rows that cannot be saved (PEFT fails)."""
    models = three()
    for name in ("b", "plain"):
        models[1].save_pretrained(tmp_path, selected_adapters=[name], save_embedding_layers=True)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        rows = {k: v for k, v in tensors.items() if "delta" in k}
        assert all(torch.equal(v, rows_of(models[1])["b"]) for v in rows.values()) and len(rows) == 2 * (name == "b")
    expected = models[1]
    expected.set_adapter("b")
    for lib in (peft, peftkern):
        again = adapted(lib, [3, 1, 7])
        again.load_adapter(tmp_path / "b", "other", is_trainable=True)
        again.set_adapter("other")
        torch.testing.assert_close(again(ids()).logits, expected(ids()).logits, rtol=1e-6, atol=1e-6)
        assert rows_of(again)["other"].requires_grad


def test_pefts_own_functions_see_the_rows():
    """Catches a model that Trainer, which asks PEFT's functions, saves without its rows."""
    models = both([3, 1, 7])
    states = [peft.get_peft_model_state_dict(model) for model in models]
    assert states[0].keys() == states[1].keys()
    changed = {key: torch.zeros_like(value) for key, value in states[0].items()}
    peft.set_peft_model_state_dict(models[1], changed)
    assert not rows_of(models[1])["default"].any()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_damaged_file_changes_nothing(tmp_path, low_cpu_mem_usage):
    """Catches rows of another number than the configuration has, that are missing, or for ids that the model has not:
    all refused by name, with a model as it was."""
    source = adapted(peftkern, [3, 1, 7])
    source.save_pretrained(tmp_path)
    file, described = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, settings = load_file(file), json.loads(described.read_text())
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    cases = [(good | {key: good[key][:2].clone()}, [3, 1, 7], r"trainable_tokens_delta.*\[2, 64\].*\[3, 64\]")]
    cases += [({k: v for k, v in good.items() if k != key}, [3, 1, 7], "trainable_tokens_delta.*missing")]
    cases += [(good, [3, 1, 500], rf"{FIELD}.*\[0, 128\).*\[500\]"), (good, [3, 1, -7], f"{FIELD}.*-7")]
    base = tiny_models.tiny_llama(tie_word_embeddings=True)
    other = adapted(peftkern, [9])
    before = tiny_models.fingerprint(base), tiny_models.fingerprint(other)
    for tensors, indices, match in cases:
        save_file(tensors, file)
        described.write_text(json.dumps(settings | {FIELD: indices}))
        with pytest.raises(AdapterFileError, match=match):
            peftkern.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        with pytest.raises(AdapterFileError, match=match):
            other.load_adapter(tmp_path, "b", low_cpu_mem_usage=low_cpu_mem_usage)
        assert (tiny_models.fingerprint(base), tiny_models.fingerprint(other)) == before
    save_file(good, file)
    described.write_text(json.dumps(settings))
    again = peftkern.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(again(ids()).logits, source.eval()(ids()).logits, rtol=1e-6, atol=1e-6)


def test_names_of_the_base_model():
    """Catches a base model's state dict with the wrapper's names, or with trained rows in it."""
    names = list(tiny_models.tiny_llama(tie_word_embeddings=True).state_dict())
    assert list(get_base_model_state_dict(adapted(peftkern, [3, 1]))) == names


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    ([], ValueError, "at least one id"),
    ({}, ValueError, "at least one id"),
    ({"embed_tokens": []}, ValueError, "at least one id"),
    ([-1], ValueError, "-1"),
    ([1, 2, 1], ValueError, r"once, got \[1\]"),
    ([True], TypeError, "True"),
    ([1.0], TypeError, "1.0"),
    (["1"], TypeError, "'1'"),
    ("1", TypeError, "'1'"),
    ({1, 2}, TypeError, "set"),
    ({"embed_tokens": 3}, TypeError, r"\['embed_tokens'\].*3"),
    ({3: [1]}, TypeError, "3"),
    ({"": [1]}, ValueError, "empty name"),
    ([torch.tensor(1)], TypeError, "Tensor"),
]


@pytest.mark.parametrize("value, error, match", WRONG, ids=[str(value) for value, _, _ in WRONG])
def test_wrong_indices_are_refused_by_the_configuration(value, error, match):
    """Catches an index that counts from the end, one of two rows that would be lost, a bool that is a 1."""
    with pytest.raises(error, match=rf"{FIELD}.*{match}"):
        config(indices=value)


HEAD_APART = {"embed_tokens": [2], "lm_head": [3]}
CANNOT = [
    ({"indices": [1, 128]}, ValueError, r"\[0, 128\).*\[128\]"),
    ({"indices": {"nowhere": [1]}}, ValueError, "'nowhere'"),
    ({"indices": {"norm": [1]}}, TypeError, "LlamaRMSNorm"),
    ({"indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}, ValueError, r"\[1\], \[2\]"),
    ({"indices": [1], "modules_to_save": ["embed_tokens"]}, ValueError, "modules_to_save"),
    ({"indices": [1], "modules_to_save": ["model"]}, ValueError, "modules_to_save"),
    ({"indices": [1], "target_modules": ["embed_tokens"]}, TypeError, "target_modules"),
    ({"indices": HEAD_APART, "ensure_weight_tying": True}, ValueError, r"ensure_weight_tying.*\[2\].*\[3\]"),
]


@pytest.mark.parametrize("options, error, match", CANNOT, ids=[str(options) for options, _, _ in CANNOT])
def test_what_a_model_cannot_take_leaves_it_as_it_was(options, error, match):
    """Catches a model that is half adapted, as a first adapter, a second one and an injected one."""
    base = tiny_models.tiny_llama(tie_word_embeddings=True)
    before = tiny_models.fingerprint(base)
    for put in (peftkern.get_peft_model, lambda model, c: peftkern.inject_adapter_in_model(c, model)):
        with pytest.raises(error, match=match), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put(base, config(**options))
        base.__dict__.pop("peft_config", None)
    assert tiny_models.fingerprint(base) == before
    model = adapted(peftkern, None)
    before = tiny_models.fingerprint(model)
    with pytest.raises(error, match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("b", config(**options))
    assert tiny_models.fingerprint(model) == before


SECOND = [
    ([1], {"target_modules": ["embed_tokens"]}, ValueError, f"target_modules.*{FIELD}"),
    ([1], {"modules_to_save": ["embed_tokens"]}, TypeError, "modules_to_save.*TrainableTokensWrapper"),
    ([1], {"indices": HEAD_APART}, ValueError, r"'lm_head' has rows of the embedding.*\['default'\]"),
    ({"lm_head": [1]}, {"indices": [4, 5]}, ValueError, r"'lm_head' has rows of its own.*\['default'\]"),
]


@pytest.mark.parametrize("first, options, error, match", SECOND, ids=[str(case[:2]) for case in SECOND])
def test_a_second_adapter_that_cannot_share_an_embedding(first, options, error, match):
    """Catches a copy of trained rows, and a tied head of which one adapter has rows of its own (PEFT then writes the
    one's ids over the other's, or leaves the head out)."""
    model = adapted(peftkern, first)
    before = tiny_models.fingerprint(model)
    with pytest.raises(error, match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("b", config(**options))
    assert tiny_models.fingerprint(model) == before


@pytest.mark.parametrize(
    "first",
    [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["model"]}],
    ids=str,
)
def test_rows_of_an_embedding_that_another_adapter_has(first):
    """Catches rows beside an adapter, or beside a copy that is trained whole."""
    head = {"target_modules": ["lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(tiny_models.tiny_llama(), config(**(head | first)))
    before = tiny_models.fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=rf"{FIELD}.*(target_modules|modules_to_save|has a copy)"):
        model.add_adapter("b", config(indices=[1], **head))
    assert tiny_models.fingerprint(model) == before


def test_ensure_weight_tying():
    """Catches a request that is ignored (see also test_tied_weights.py), and an untied model that nobody is told of."""
    with pytest.warns(UserWarning, match="ensure_weight_tying.*not tied"):
        peftkern.get_peft_model(tiny_models.tiny_llama(), config(indices=[1], ensure_weight_tying=True))
    model = tiny_models.tiny_llama(tie_word_embeddings=True)
    made = peftkern.get_peft_model(model, config(indices={"embed_tokens": [1]}, ensure_weight_tying=True))
    layers = [wrapper.token_adapter for wrapper in (made.get_input_embeddings(), made.get_output_embeddings())]
    assert layers[1].tied_adapter is layers[0]


def test_embeddings_with_a_forward_of_their_own():
    """Catches rows that would be looked up by other ids than the class looks up (OPT's positions)."""
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    model = nn.ModuleDict({"positions": OPTLearnedPositionalEmbedding(8, 4), "up": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=rf"{FIELD}.*'positions'.*forward of its own"):
        peftkern.get_peft_model(model, config(indices={"positions": [1]}, target_modules=["up"]))


# -- the rest of the house ---------------------------------------------------------------------------------------------


def test_injected_into_a_bare_model():
    """Catches rows that `inject_adapter_in_model` leaves out; names with a prefix."""
    models = [tiny_models.tiny_llama(tie_word_embeddings=True) for _ in range(2)]
    for lib, model in zip((peft, peftkern), models, strict=True):
        lib.inject_adapter_in_model(config(lib, [3, 1]), model)
        tiny_models.randomize(model, ("lora_", "tokens_delta"))
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert list(gradients(models[0])) == list(gradients(models[1]))
    theirs = peft.get_peft_model_state_dict(models[0])
    ours = peftkern.get_peft_model_state_dict(models[1])
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    torch.testing.assert_close(models[1](ids()).logits, models[0](ids()).logits, rtol=1e-6, atol=1e-6)


def test_a_model_that_cannot_tell_its_embedding():
    """Catches a list for a model without get_input_embeddings that is not PEFT's "embed_tokens"."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.up = nn.Embedding(8, 4), nn.Linear(4, 4)

    for lib in (peft, peftkern):
        made = lib.get_peft_model(Named(), config(lib, [1], target_modules=["up"]))
        assert [n for n, _ in made.named_parameters() if "delta" in n] == [
            "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
        ]
    with pytest.raises(ValueError, match="'embed_tokens'"):
        peftkern.get_peft_model(tiny_models.mlp(), config(indices=[1], target_modules=["up"]))


def test_an_encoder_and_a_decoder_that_share_their_embedding():
    """Catches one of several tied places that keeps the base's rows."""
    import transformers

    settings = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    x, results = torch.tensor([[1, 2, 3, 4]]), []
    for lib in (peft, peftkern):
        torch.manual_seed(0)
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings, tie_word_embeddings=True))
        model = lib.get_peft_model(base.eval(), config(lib, [2, 4], target_modules=["q"]))
        tiny_models.randomize(model, ("lora_", "tokens_delta"))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        (rows,) = (p for n, p in model.named_parameters() if "delta" in n)
        results.append((loss.detach(), rows.grad, list(model.state_dict())))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-5, atol=1e-6)
    assert results[0][2] == results[1][2]
    whole = model.merge_and_unload()
    torch.testing.assert_close(whole(input_ids=x, labels=x).loss, results[1][0], rtol=1e-5, atol=1e-6)


def test_explained():
    """Catches trained rows that `explain` does not speak of."""
    model = adapted(peftkern, [3, 1, 7])
    rows = {row.name: row for row in peftkern.explain(model).rows if "token_adapter" in row.name}
    assert [(row.kind, row.path) for row in rows.values()] == [("Embedding", "unfused"), ("Linear", "unfused")]
    assert all("3 trained rows" in row.reason for row in rows.values())
    assert all("plain PyTorch" in row.reason for row in peftkern.explain(model, mixed=True).rows if row.r == 0)
    with model.disable_adapter():
        assert "disabled" in peftkern.explain(model).rows[0].reason


def test_weighted_adapters_leave_rows_out_and_say_so():
    """Catches a combination that is taken to have the rows of one of its sources."""
    model = three()[1]
    with pytest.warns(UserWarning, match=rf"rows of tokens that \['default', 'b'\].*{FIELD}"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", combination_type="cat")
    embedding = model.get_input_embeddings()
    assert torch.equal(rows_of(model)["sum"], embedding.original_module.weight[[3, 1, 7]])


def test_the_wrapper_by_itself():
    """Catches PEFT's methods of a wrapper that do not reach its rows."""
    model = three()[1]
    wrapper = model.get_input_embeddings()
    assert isinstance(wrapper, TrainableTokensWrapper) and isinstance(wrapper, peft.utils.other.TrainableTokensWrapper)
    wrapper.set_adapter("b")
    assert wrapper.active_adapters == wrapper.active_adapter == ["b"] and rows_of(model)["b"].requires_grad
    wrapper.enable_adapters(False)
    assert wrapper.disable_adapters and torch.equal(wrapper(ids()), wrapper.original_module(ids()))
    wrapper.enable_adapters(True)
    wrapper.set_requires_grad("default")
    assert rows_of(model)["default"].requires_grad
    wrapper.delete_adapter("b", ["default"])
    assert wrapper.active_adapters == ["default"] and wrapper._adapters == {"default"}
    state = {key: value for key, value in wrapper.state_dict().items()}
    saved = wrapper.adapter_state_dict("default", state)
    assert [*saved] == ["token_adapter.trainable_tokens_delta"] and wrapper.adapter_state_dict("plain", state) == {}
