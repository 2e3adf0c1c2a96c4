"""CorDA and LoRA-GA beside PEFT's: what is found, the adapters that are made of it, files, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from initial_values_data import output, stepped
from loftq_data import linear, product
from peftkern import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga
from peftkern.tuners.lora.corda import preprocess_corda
from peftkern.tuners.lora.variant_configs import CordaConfig
from peftkern.utils.quantized_modules import Linear4bit
from tiny_models import mlp

peft = pytest.importorskip("peft")


def import_their_corda() -> types.ModuleType:
    """PEFT's module, which wants a dataclass of the package attrs: the standard library's does where that is not."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("attr") is None:
            attrs: Any = types.ModuleType("attr")
            attrs.dataclass = dataclasses.dataclass
            patch.setitem(sys.modules, "attr", attrs)
        return importlib.import_module("peft.tuners.lora.corda")


their_corda = import_their_corda()
their_config = pytest.importorskip("peft.tuners.lora.config")

TARGETS = {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"]}


def a_batch(seed=0):
    return torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(seed))


def run(model):
    return lambda: [model(a_batch(seed)) for seed in range(3)]


def learn(model):
    """Three backward passes: gradients that have to be averaged."""

    def train_step():
        for seed in range(3):
            # Without the head, of whose five outputs gradients would have five components.
            y = model.down(torch.relu(model.up(model.emb(a_batch(seed)))))
            (y.float() - 3).square().mean().mul(300).backward()

    return train_step


def corda(library, base, settings=None, config=None, **options):
    """`base` adapted by CorDA of a library: "ours" or "theirs"."""
    ours = library == "ours"
    kind, sub = (LoraConfig, CordaConfig) if ours else (peft.LoraConfig, their_config.CordaConfig)
    config = kind(**(TARGETS | options), init_lora_weights="corda", corda_config=sub(**(settings or {})))
    (preprocess_corda if ours else their_corda.preprocess_corda)(base, config, run_model=run(base))
    torch.manual_seed(7)
    return (get_peft_model if ours else peft.get_peft_model)(base, config)


def loraga(library, base, settings=None, **options):
    ours = library == "ours"
    kind, sub = (LoraConfig, LoraGAConfig) if ours else (peft.LoraConfig, peft.LoraGAConfig)
    config = kind(**(TARGETS | options), init_lora_weights="lora_ga", lora_ga_config=sub(**(settings or {})))
    (preprocess_loraga if ours else peft.preprocess_loraga)(base, config, learn(base))
    torch.manual_seed(7)
    return (get_peft_model if ours else peft.get_peft_model)(base, config)


def assert_alike(ours, theirs, base, rtol=1e-3, atol=1e-4):
    for name in ("up", "down"):
        mine, other = (m.base_model.model.get_submodule(name) for m in (ours, theirs))
        assert mine.weight.dtype == other.weight.dtype and mine.scaling == other.scaling
        close = {"rtol": rtol, "atol": atol * product(other).abs().max().item()}
        torch.testing.assert_close(product(mine), product(other), **close)
        torch.testing.assert_close(mine.weight, other.weight, rtol=rtol, atol=atol)
        assert (mine.weight - base.get_submodule(name).weight).abs().max() > 10 * atol
        for A, B in ((mine.lora_A, other.lora_A), (mine.lora_B, other.lora_B)):
            sizes = B["default"].weight.abs()  # signs of singular vectors are free
            torch.testing.assert_close(A["default"].weight.abs(), sizes, rtol=10 * rtol, atol=10 * atol)
    torch.testing.assert_close(output(ours), output(base), rtol=rtol, atol=atol)


PATTERNS = {"rank_pattern": {"up": 6}, "alpha_pattern": {"down": 5}}


# --- beside PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS])
def test_corda_agrees_with_peft(method, options):
    """Would catch covariances that are not divided by the number of calls, the other end of the components, ranks of
    patterns left out, and a scaling in the wrong place."""
    settings = {"corda_method": method}
    ours, theirs = (corda(library, mlp(), settings, **options) for library in ("ours", "theirs"))
    if method == "ipm":
        assert_alike(ours, theirs, mlp())
        return
    # The smallest components lie close together, so that rounding turns them: what they make up is small, and alike.
    for name in ("up", "down"):
        mine, other = (m.base_model.model.get_submodule(name) for m in (ours, theirs))
        torch.testing.assert_close(mine.weight, other.weight, rtol=0, atol=1e-3)
    torch.testing.assert_close(output(ours), output(mlp()), rtol=1e-4, atol=1e-5)


DIRECTIONS = [{"direction": name} for name in ("ArBr", "A2rBr", "ArB2r", "random")]
SCALES = [{"scale": name} for name in ("weight_svd", "gd_scale", "unit")]


@pytest.mark.parametrize("settings", [*DIRECTIONS, *SCALES, {"stable_gamma": 64}])
def test_loraga_agrees_with_peft(settings):
    """Would catch gradients that are summed, rows and columns of other components, other draws, and a scale that is
    left out."""
    assert_alike(*(loraga(library, mlp(), settings) for library in ("ours", "theirs")), mlp())


@pytest.mark.parametrize("options", [{"use_rslora": True}, PATTERNS])
def test_loraga_under_patterns_agrees_with_peft(options):
    """Would catch the configuration's rank and alpha where a pattern has others."""
    assert_alike(*(loraga(library, mlp(), {}, **options) for library in ("ours", "theirs")), mlp())


@pytest.mark.parametrize("start", [corda, loraga])
def test_sixteen_bits_agree_with_peft(start):
    """Would catch a residual of factors that were rounded where PEFT's were not, or the other way round."""
    ours, theirs = (start(library, mlp().to(torch.bfloat16)) for library in ("ours", "theirs"))
    for name in ("up", "down"):
        mine, other = (m.base_model.model.get_submodule(name) for m in (ours, theirs))
        assert mine.weight.dtype == torch.bfloat16 and mine.lora_A["default"].weight.dtype == torch.float32
        assert (mine.weight != other.weight).float().mean() < 0.02
        step = torch.finfo(torch.bfloat16).eps
        magnitude = (mine.lora_B["default"].weight.abs() @ mine.lora_A["default"].weight.abs()).detach()
        assert ((product(mine) - product(other)).abs() <= 4 * step * magnitude).all()


@pytest.mark.parametrize("start", [corda, loraga])
def test_conv1d_is_turned(start):
    """Would catch a weight or a gradient taken as it is stored, and PEFT's scale by in_features of such a layer."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    turned, plain = mlp(), mlp()
    for name in ("up", "down"):
        old = turned.get_submodule(name)
        new = conv1d(old.out_features, old.in_features)
        new.weight, new.bias = nn.Parameter(old.weight.detach().t().contiguous()), old.bias
        turned.set_submodule(name, new)
    mine, other = start("ours", turned, fan_in_fan_out=True), start("ours", plain)
    for name in ("up", "down"):
        one, two = (m.base_model.model.get_submodule(name) for m in (mine, other))
        torch.testing.assert_close(one.weight.t(), two.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(product(one), product(two), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output(mine), output(mlp()), rtol=1e-4, atol=1e-5)


def test_a_preparation_by_peft_is_taken():
    """Would catch other names on the layers than PEFT's, under which its users look."""
    base = mlp()
    config = peft.LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=their_config.CordaConfig())
    their_corda.preprocess_corda(base, config, run_model=run(base))
    ours = get_peft_model(base, LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=CordaConfig()))
    assert_alike(ours, corda("theirs", mlp()), mlp())
    assert not hasattr(ours.base_model.model.up.get_base_layer(), "eigens")


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_corda_s_files_go_both_ways(tmp_path, kind):
    """Would catch files that PEFT does not read, or that are not read, and a model that is run for nothing."""
    for writer, reader in (("ours", "theirs"), ("theirs", "ours"), ("ours", "ours")):
        settings = {kind: str(tmp_path / writer / reader / "kept.pt")}
        first, base = corda(writer, mlp(), settings), mlp()
        if reader == "ours":
            config = LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=CordaConfig(**settings))
            preprocess_corda(base, config)
            second = get_peft_model(base, config)
        else:
            config = peft.LoraConfig(
                **TARGETS, init_lora_weights="corda", corda_config=their_config.CordaConfig(**settings)
            )
            their_corda.preprocess_corda(base, config)
            second = peft.get_peft_model(base, config)
        assert_alike(first, second, mlp())


def test_loraga_s_file_goes_both_ways(tmp_path):
    """Would catch a file that PEFT does not read, and training that is done for nothing."""

    def never():
        raise AssertionError("trained although the file is there")

    for writer, reader in (("ours", "theirs"), ("theirs", "ours")):
        gradients = []
        for library in (writer, reader):
            ours, base = library == "ours", mlp()
            kind, sub = (LoraConfig, LoraGAConfig) if ours else (peft.LoraConfig, peft.LoraGAConfig)
            config = kind(**TARGETS, init_lora_weights="lora_ga", lora_ga_config=sub())
            step = learn(base) if library == writer else never
            (preprocess_loraga if ours else peft.preprocess_loraga)(
                base, config, step, str(tmp_path / writer / "gradients.pt")
            )
            gradients.append(base.up._peft_loraga_grad)
        assert torch.equal(*gradients)


# --- the model meanwhile and afterwards -------------------------------------------------------------------------------


def test_preparing_leaves_the_model_as_it_was():
    """Would catch hooks, modes, gradients and flags that stay behind, in good times and bad."""
    base = mlp()
    base.up.eval()
    base.head.weight.requires_grad_(False)
    base.up.weight.grad = torch.ones_like(base.up.weight)
    before = {name: (p, p.detach().clone(), p.requires_grad, p.grad) for name, p in base.named_parameters()}

    def failing():
        run(base)()
        raise RuntimeError("stop")

    for action in (run(base), failing):
        for prepare, init in ((preprocess_corda, "corda"), (preprocess_loraga, "lora_ga")):
            name = "corda_config" if init == "corda" else "lora_ga_config"
            config = LoraConfig(**TARGETS, init_lora_weights=init, **{name: {}})
            targets = copy.deepcopy(config.target_modules)
            if action is failing:
                with pytest.raises(RuntimeError, match="stop"):
                    prepare(base, config, failing)
            else:
                prepare(base, config, run(base) if init == "corda" else learn(base))
            assert config.target_modules == targets
            for key, (p, value, requires_grad, grad) in before.items():
                now = base.get_parameter(key)
                assert now is p and torch.equal(now, value) and now.requires_grad == requires_grad and now.grad is grad
            assert not any(module._forward_hooks for module in base.modules())
            assert base.training and not base.up.training and base.down.training


@pytest.mark.parametrize("start", [corda, loraga])
def test_an_error_leaves_the_whole_model_as_it_was(start):
    """Would catch a preparation that is used up by a try that failed, and weights that it left changed."""
    base = mlp()
    made = start("ours", copy.deepcopy(base))
    options = {"corda_config": {}} if start is corda else {"lora_ga_config": {}}
    config = LoraConfig(**TARGETS, init_lora_weights="corda" if start is corda else "lora_ga", **options)
    if start is corda:
        preprocess_corda(base, config, run(base))
        base.down.eigens.S_WC[0] = float("nan")
    else:
        preprocess_loraga(base, config, learn(base))
        base.down._peft_loraga_grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite|NaN"):
        get_peft_model(base, config)
    assert isinstance(base.up, nn.Linear) and torch.equal(base.up.weight, mlp().up.weight)
    assert hasattr(base.up, "eigens" if start is corda else "_peft_loraga_grad")
    assert not torch.equal(made.base_model.model.up.weight, base.up.weight)


@pytest.mark.parametrize("start", [corda, loraga])
def test_a_converted_file_goes_onto_the_original_base(tmp_path, start):
    """Would catch adapters that can only be used over a base which nobody saved."""
    model = start("ours", mlp())
    model.save_pretrained(tmp_path / "start")
    stepped(model, lr=0.1).save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    close = {"rtol": 0, "atol": 1e-4 * output(model).abs().max().item()}
    for library in (PeftModel, peft.PeftModel):
        torch.testing.assert_close(output(library.from_pretrained(mlp(), tmp_path / "end")), output(model), **close)
    assert (output(model) - output(mlp())).abs().max() > 100 * close["atol"], "training was too short to tell"


def test_loading_says_what_is_missing(tmp_path):
    """Would catch an adapter that is loaded over a base that it does not belong to, without a word as in PEFT."""
    model = corda("ours", mlp(), {"cache_file": str(tmp_path / "kept.pt")})
    stepped(model).save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(ValueError, match="no eigens on a Linear: call preprocess_corda first"):
            PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        base = mlp()
        preprocess_corda(base, LoraConfig.from_pretrained(tmp_path))
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-4)
    model = loraga("ours", mlp())
    residual = copy.deepcopy(model)
    stepped(model, lr=0.01).save_pretrained(tmp_path / "ga")
    residual = residual.base_model.unload()
    with pytest.warns(UserWarning, match="no gradient of preprocess_loraga waits"):
        again = PeftModel.from_pretrained(residual, tmp_path / "ga")
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)


# --- errors ----------------------------------------------------------------------------------------------------------


def zeros_in(model):
    def zero_inputs():
        with torch.no_grad():
            model.emb.weight.zero_()
        run(model)()

    return zero_inputs


@pytest.mark.parametrize(
    "settings, options, action, match",
    [
        (None, {}, run, "lora_config.corda_config: expected a CordaConfig, got None"),
        ({}, {"r": 17}, run, r"r is 17 at up, whose weight is \[24, 16\]"),
        ({}, {}, lambda model: None, "run_model: needed where corda_config has no cache_file"),
        ({}, {}, lambda model: lambda: None, "run_model: it does not call 'up', 'down'"),
        ({}, {}, zeros_in, "the input of up is zero, or has NaN or infinity"),
        ({"corda_method": None}, {}, run, "corda_method: expected 'ipm' or 'kpm' without a cache_file, got None"),
        ({}, {"target_modules": ["emb"]}, run, "CorDA: target_modules=.* names no linear layer"),
    ],
)
def test_corda_refuses_by_name(settings, options, action, match):
    """Would catch torch's own errors, after a long run."""
    base = mlp()
    config = LoraConfig(**(TARGETS | options), init_lora_weights="corda", corda_config=settings or {})
    config.corda_config = None if settings is None else config.corda_config
    with pytest.raises(ValueError, match=match):
        preprocess_corda(base, config, action(base))


def test_the_other_errors(tmp_path):
    """Would catch files of another model, quantized weights, ranks that do not fit, and unknown words."""
    for prepare, init in ((preprocess_corda, "corda"), (preprocess_loraga, "lora_ga")):
        base = mlp()
        base.up = Linear4bit.from_linear(base.up)
        name = "corda_config" if init == "corda" else "lora_ga_config"
        config = LoraConfig(**TARGETS, init_lora_weights=init, **{name: {}})
        with pytest.raises(ValueError, match="needs dense weights, got a quantized one at 'up'"):
            prepare(base, config, run(base))
    path = str(tmp_path / "kept.pt")
    corda("ours", mlp(), {"cache_file": path}, target_modules=["up"])
    config = LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=CordaConfig(cache_file=path))
    with pytest.raises(ValueError, match=r"kept.pt: no 'down.eigens.S_WC', .* in it; was it made for another model"):
        preprocess_corda(mlp(), config)
    (tmp_path / "kept.pt").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="kept.pt"):
        preprocess_corda(mlp(), config)
    base = mlp()
    config = LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(base, config, run(base))
    with pytest.raises(ValueError, match=r"S_WC must have shape \[3\], got \[4\]"):
        get_peft_model(base, LoraConfig(**(TARGETS | {"r": 3}), init_lora_weights="corda", corda_config=CordaConfig()))
    with pytest.raises(ValueError, match=r"2r must be at most .* got r=9 for \[24, 16\]"):
        loraga("ours", mlp(), r=9)
    with pytest.raises(ValueError, match="needs a scaling above 0, got 0"):
        corda("ours", mlp(), lora_alpha=0)
    with pytest.raises(ValueError, match="lora_ga_config: expected a LoraGAConfig, got None"):
        preprocess_loraga(mlp(), LoraConfig(**TARGETS), lambda: None)
    with pytest.warns(UserWarning, match="train_step gave no gradient to 'up', 'down'"):
        preprocess_loraga(mlp(), LoraConfig(**TARGETS, init_lora_weights="lora_ga", lora_ga_config={}), lambda: None)
    with pytest.raises(ValueError, match="corda_method must be one of 'ipm', 'kpm', None, got 'x'"):
        CordaConfig(corda_method="x")
    with pytest.raises(ValueError, match="direction must be one of 'ArBr', .*got 'AB'"):
        LoraGAConfig(direction="AB")
    with pytest.raises(ValueError, match="scale must be one of 'stable', .*got 2"):
        LoraGAConfig(scale=2)
    with pytest.raises(ValueError, match="stable_gamma must be above 0, got 0"):
        LoraGAConfig(stable_gamma=0)


@pytest.mark.parametrize(
    "init, name, kind", [("corda", "corda_config", CordaConfig), ("lora_ga", "lora_ga_config", LoraGAConfig)]
)
def test_config_goes_both_ways(init, name, kind):
    """Would catch a file that PEFT reads as something else, and settings that are dropped without a word."""
    theirs = getattr(their_config, kind.__name__)
    ours = LoraConfig(init_lora_weights=init, **{name: kind()})
    text = json.dumps(peft.LoraConfig(init_lora_weights=init, **{name: theirs()}).to_dict())
    assert ours.to_json_dict() == json.loads(text)
    assert LoraConfig.from_dict(ours.to_json_dict()) == ours
    with pytest.warns(UserWarning, match=f"init_lora_weights='{init}' without {name}"):
        assert getattr(LoraConfig(init_lora_weights=init), name) == kind()
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect with init_lora_weights=True"):
        LoraConfig(**{name: kind()})
    with pytest.raises(ValueError, match=rf"{name} must have no fields but .*\['other'\]"):
        LoraConfig(init_lora_weights=init, **{name: {"other": 1}})


def test_a_quantized_layer_of_the_model_is_refused_by_corda_itself():
    """Would catch packed bytes taken as a weight, where a preparation waits on a layer that was quantized since."""
    model = nn.ModuleDict({"up": Linear4bit.from_linear(linear())})
    with pytest.raises(TypeError, match="'corda' needs a dense weight, but a Linear4bit"):
        get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights="corda", corda_config=CordaConfig()))
