"""Adapters that take the place of others (`utils.hotswap`), against models that load them, and against PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import peftkern
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.utils import hotswap
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(folder: Path, name: str, seed: int, base: Any = tiny_llama, **fields: Any) -> Path:
    """A saved adapter of random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peftkern.LoraConfig(**({"target_modules": TARGETS, "r": 4, "lora_alpha": 8} | fields))
        model = peftkern.get_peft_model(base(), config)
    randomize(model, ("lora_", "modules_to_save", "trainable_tokens_delta"), seed)
    model.save_pretrained(folder / name)
    return folder / name


def loaded(path: Path, base: Any = tiny_llama, library: Any = peftkern) -> Any:
    return library.PeftModel.from_pretrained(base(), str(path)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        y = model(ids())
    return y if isinstance(y, torch.Tensor) else y.logits


OTHERS: dict[str, dict[str, Any]] = {
    "the same": {},
    "another alpha": {"lora_alpha": 3},
    "a smaller rank": {"r": 2, "lora_alpha": 8},
    "a larger rank": {"r": 7, "lora_alpha": 5},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 5}},
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_a_swapped_model_is_the_other_one_and_is_saved_as_it(tmp_path, other, prepared):
    """Would catch a scaling, rank or pattern that stays the old adapter's, zeros in the wrong place, and a
    configuration that says other than what is held."""
    first, second = adapter(tmp_path, "first", 1), adapter(tmp_path, "second", 2, **OTHERS[other])
    model, before = loaded(first), logits(loaded(first))
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(logits(model), before)
    held = {name: p for name, p in model.named_parameters() if "lora_" in name}
    hotswap.hotswap_adapter(model, second, "default")
    want = logits(loaded(second))
    assert not torch.allclose(before, want, atol=1e-4)
    torch.testing.assert_close(logits(model), want)
    if prepared or other in ("the same", "another alpha"):
        now = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert now.keys() == held.keys() and all(now[name] is held[name] for name in held)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded(tmp_path / "again")), want)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 1.0)
    torch.testing.assert_close(logits(model), want)


@pytest.mark.parametrize("other", OTHERS)
def test_pefts_swap_gives_the_same(tmp_path, other):
    """Would catch another meaning than PEFT's."""
    peft = pytest.importorskip("peft")
    from peft.utils import hotswap as theirs_hotswap

    first, second = adapter(tmp_path, "first", 1), adapter(tmp_path, "second", 2, **OTHERS[other])
    theirs = loaded(first, library=peft)
    ours = loaded(first)
    if other in ("rsLoRA", "patterns"):  # which PEFT refuses
        with pytest.raises(ValueError, match="incompatible"):
            theirs_hotswap.hotswap_adapter(theirs, str(second), "default")
        theirs = loaded(second, library=peft)
    else:
        for library, model in ((theirs_hotswap, theirs), (hotswap, ours)):
            library.prepare_model_for_compiled_hotswap(model, target_rank=8)
        theirs_hotswap.hotswap_adapter(theirs, str(second), "default", torch_device="cpu")
    hotswap.hotswap_adapter(ours, str(second), "default", torch_device="cpu")
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_a_prepared_model_is_compiled_once(tmp_path):
    """Would catch a swap that changes a shape or a number that the compiled graph holds."""
    paths = [adapter(tmp_path, str(i), i, **fields) for i, fields in enumerate(OTHERS.values())]
    model = loaded(paths[0])
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for path in paths:
        hotswap.hotswap_adapter(compiled, path, "default")
        torch.testing.assert_close(logits(compiled), logits(loaded(path)))
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="compiled already"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=16)
    with pytest.warns(UserWarning, match="compiled already"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=16, check_compiled="warn")
    torch.testing.assert_close(logits(compiled), logits(loaded(paths[-1])))
    torch._dynamo.reset()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_biases_and_other_adapters(tmp_path, prepared, dtype):
    """Would catch an embedding's factors filled up the wrong way round, a lora_bias that keeps its scaling, and a
    second adapter that is changed too."""

    def base() -> nn.Module:
        return mlp().to(dtype)

    # In 16 bits scalings of which one is twice the other: their quotient in B is no rounding more.
    alphas = {2: 6, 3: 6} if dtype is torch.float32 else {2: 4, 3: 12}
    fields: Any = {"target_modules": ["up", "down"], "lora_bias": True}
    on_embedding: Any = {"target_modules": ["emb", "up"]}
    for i, options in enumerate((fields, on_embedding)):
        paths = [
            adapter(tmp_path, f"{i}{r}", r, base, r=r, lora_alpha=alphas[r], modules_to_save=["head"], **options)
            for r in (2, 3)
        ]
        model = loaded(paths[0], base)
        model.load_adapter(str(paths[1]), "kept")
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
        model.set_adapter("kept")
        kept = logits(model)
        hotswap.hotswap_adapter(model, paths[1], "default")
        torch.testing.assert_close(logits(model), kept, rtol=0, atol=0)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), logits(loaded(paths[1], base)))


def test_layers_that_the_new_adapter_lacks_are_the_base_alone(tmp_path):
    """Would catch values of the old adapter that stay."""
    first = adapter(tmp_path, "first", 1)
    part: Any = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    second = adapter(tmp_path, "second", 2, r=3, use_rslora=True, **part)
    third = adapter(tmp_path, "third", 3, r=6)
    for prepared in (False, True):
        model = loaded(first)
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap.hotswap_adapter(model, second, "default")
        torch.testing.assert_close(logits(model), logits(loaded(second)))
        model.save_pretrained(tmp_path / "again")  # of ranks and scalings that the configuration tells
        torch.testing.assert_close(logits(loaded(tmp_path / "again")), logits(loaded(second)))
        if not prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap.hotswap_adapter(model, third, "default")
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(logits(loaded(tmp_path / "again")), logits(loaded(third)))


def test_files_that_hold_the_base_models_embedding(tmp_path):
    """Would catch files that `save_pretrained` writes and a swap does not take, and another embedding that is lost."""
    fields: Any = {"target_modules": ["embed_tokens", "q_proj"]}
    first, second = (adapter(tmp_path, str(r), r, r=r, **fields) for r in (2, 3))
    other = adapter(tmp_path, "other", 4, base=lambda: tiny_llama(seed=1), **fields)
    model = loaded(first)
    hotswap.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(logits(model), logits(loaded(second)))
    with pytest.raises(ValueError, match="is another embedding than the model's"):
        hotswap.hotswap_adapter(model, other, "default")
    torch.testing.assert_close(logits(model), logits(loaded(second)))


def test_a_state_dict_takes_an_adapters_place_in_a_plain_module(tmp_path):
    """Would catch names that are read as a file's, and a module without a PeftModel around it."""
    second = peftkern.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
    first = peftkern.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"])
    models = []
    for config in (first, second):
        model = mlp()
        peftkern.inject_adapter_in_model(config, model, "mine")
        randomize(model, seed=config.r)
        models.append(model)
    state = {name: value.clone() for name, value in models[1].state_dict().items() if ".mine." in name}
    other = copy.deepcopy(models[0])
    hotswap.hotswap_adapter_from_state_dict(models[0], state, "mine", second)
    torch.testing.assert_close(logits(models[0]), logits(models[1]))
    hotswap.prepare_model_for_compiled_hotswap(other, target_rank=3, config=first)
    hotswap.hotswap_adapter_from_state_dict(other, state, adapter_name="mine", config=second)
    torch.testing.assert_close(logits(other), logits(models[1]))
    assert (first.r, first.lora_alpha) == (3, 7.5)


def test_dora_swaps_with_dora_only(tmp_path):
    """Would catch a magnitude that stays the old adapter's, and one adapter's kind in another's place."""
    first, second = (adapter(tmp_path, str(r), r, r=r, lora_alpha=7, use_dora=True) for r in (2, 3))
    plain = adapter(tmp_path, "plain", 5)
    part = adapter(tmp_path, "part", 5, use_dora=True, target_modules=["q_proj"])
    for prepared in (False, True):
        model = loaded(first)
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
        hotswap.hotswap_adapter(model, second, "default")
        torch.testing.assert_close(logits(model), logits(loaded(second)))
        for path, message in ((plain, "use_dora is True and False"), (part, "magnitude nothing can stand for")):
            with pytest.raises(ValueError, match=message):
                hotswap.hotswap_adapter(model, path, "default")
        torch.testing.assert_close(logits(model), logits(loaded(second)))


def test_trained_rows_and_whole_modules_are_swapped_along(tmp_path):
    """Would catch rows of tokens, or modules trained whole, that stay the old adapter's."""
    fields: Any = {"trainable_token_indices": [3, 7], "modules_to_save": ["norm"]}
    first, second = (adapter(tmp_path, str(r), r, r=r, lora_alpha=5, **fields) for r in (2, 3))
    for prepared in (False, True):
        model = loaded(first)
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
        hotswap.hotswap_adapter(model, second, "default")
        torch.testing.assert_close(logits(model), logits(loaded(second)))


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up.T @ self.down.T


@pytest.mark.parametrize("prepared", [False, True])
def test_patterns_of_parameters_are_followed(tmp_path, prepared):
    """Would catch an alpha that is looked for under the name of a wrapper, which no pattern means: the adapter would be
    scaled as the configuration scales those without one."""
    base, x = lambda: nn.ModuleDict({"m": Matrices()}), torch.randn(3, 4)
    fields = {"base": base, "target_modules": [], "target_parameters": ["m.up", "m.down"]}
    first = adapter(tmp_path, "first", 1, **fields)
    second = adapter(tmp_path, "second", 2, alpha_pattern={"m.up": 3, "down": 16}, **fields)
    model = loaded(first, base)
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap.hotswap_adapter(model, second, "default")
    want = loaded(second, base).base_model.model["m"](x)
    torch.testing.assert_close(model.base_model.model["m"](x), want)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(loaded(tmp_path / "again", base).base_model.model["m"](x), want)


def test_what_cannot_be_swapped_leaves_the_model_as_it_was(tmp_path):
    """Would catch an error that comes after something was written."""
    first, wide = adapter(tmp_path, "first", 1), adapter(tmp_path, "wide", 2, r=6)
    more = adapter(tmp_path, "more", 3, target_modules=[*TARGETS, "k_proj"], r=2)
    torn = adapter(tmp_path, "torn", 4, r=3)
    weights = (torn / "adapter_model.safetensors").read_bytes()
    (torn / "adapter_model.safetensors").write_bytes(weights[:-8])
    shapes = adapter(tmp_path, "shapes", 4, r=3, base=lambda: tiny_llama(intermediate_size=80))
    tokens = adapter(tmp_path, "tokens", 4, trainable_token_indices=[1])
    pissa = adapter(tmp_path, "pissa", 4, init_lora_weights="pissa")
    ia3 = tmp_path / "ia3"
    peftkern.get_peft_model(tiny_llama(), peftkern.IA3Config(task_type="CAUSAL_LM")).save_pretrained(ia3)
    model = loaded(first)
    for prepared in (False, True):
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
        before, config = fingerprint(model), json.dumps(model.peft_config["default"].to_dict(), default=str)
        wrong = [
            (more, "has no place for .*k_proj"),
            (torn, "torn"),
            (shapes, "its shape is"),
            (ia3, "LoRA"),
            (pissa, "'pissa' changed its own"),
            (tokens, "trainable_token_indices is None and"),
        ]
        wrong += [(wide, "has rank 6 .* is prepared for 5")] if prepared else []
        for path, message in wrong:
            with pytest.raises(ValueError, match=message):
                hotswap.hotswap_adapter(model, path, "default")
            assert fingerprint(model) == before
            assert json.dumps(model.peft_config["default"].to_dict(), default=str) == config
    with pytest.raises(ValueError, match="no adapter 'other'"):
        hotswap.hotswap_adapter(model, first, "other")
    with pytest.raises(ValueError, match="target_rank=2: adapter 'default' has rank 5"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ValueError, match="target_rank must be an int"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=0)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        hotswap.prepare_model_for_compiled_hotswap(mlp())
    with pytest.raises(ValueError, match="no LoRA adapter"):
        of_adalora = peftkern.AdaLoraConfig(total_step=5, target_modules=["up"])
        hotswap.prepare_model_for_compiled_hotswap(peftkern.get_peft_model(mlp(), of_adalora), target_rank=16)
    for wrong in (5, {"default": 5}, {"other": model.peft_config["default"]}):
        before = json.dumps(model.peft_config["default"].to_dict(), default=str)
        with pytest.raises(TypeError, match="config: expected a LoraConfig"):
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=wrong)  # type: ignore[arg-type]
        assert json.dumps(model.peft_config["default"].to_dict(), default=str) == before
    held = {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}
    config = model.peft_config["default"]
    one = next(name for name in held if "lora_A" in name)
    for state, error, message in (
        ({}, ValueError, "no tensor of adapter 'default'"),
        (None, TypeError, "state_dict: expected a dict of names to tensors"),
        ({**held, one: held[one][:2]}, ValueError, "its rank is 2"),
        ({**held, one: held[one][:0]}, ValueError, "expected a matrix"),
        ({name: value for name, value in held.items() if name != one}, ValueError, "its partner lora_A is missing"),
    ):
        with pytest.raises(error, match=message):
            hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown arguments: colour"):
        hotswap.hotswap_adapter(model, first, "default", colour="red")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged: unmerge it before swapping it"):
        hotswap.hotswap_adapter(model, first, "default")


def test_mixed_batches_and_remembered_forwards_see_the_new_adapter(tmp_path):
    """Would catch a pool, or a forward that is repeated, with the old adapter's values or scaling."""
    paths = [adapter(tmp_path, str(i), i, r=r, lora_alpha=a) for i, (r, a) in enumerate([(4, 8), (4, 8), (2, 9)])]
    x = torch.randint(1, 128, (2, 1), generator=torch.Generator().manual_seed(0))
    for prepared in (False, True):
        model = loaded(paths[0])
        model.load_adapter(str(paths[1]), "b")
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
        fresh = loaded(paths[2])
        fresh.load_adapter(str(paths[1]), "b")
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=x, adapter_names=["default", "b"])
                model(input_ids=x)
            hotswap.hotswap_adapter(model, paths[2], "default")
            for names in (None, ["default", "b"], ["b", "default"]):
                options = {} if names is None else {"adapter_names": names}
                torch.testing.assert_close(model(input_ids=x, **options).logits, fresh(input_ids=x, **options).logits)
