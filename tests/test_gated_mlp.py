"""Gated MLPs whose forward is taken over: what they keep, and everything that must be as it was."""

from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch
import transformers
from torch import nn

import peftkern
from peftkern.nn import LoraLinear
from peftkern.tuners.lora.gated_mlp import is_fused
from tiny_models import VOCAB, copied, fingerprint, ids, randomize, tiny_llama

MODULE = importlib.import_module("peftkern.tuners.lora.gated_mlp")
# Each of the three codes, each activation: model_type and what its configuration needs beside the sizes.
MODELS = {"llama": {}, "gemma": {}, "qwen3": {}, "phi3": {}, "glm": {"partial_rotary_factor": 0.5}, "granite": {}}
MODELS |= {"mistral": {"hidden_act": "gelu"}}


@pytest.fixture(autouse=True)
def no_tokens_are_few(monkeypatch):
    """Small models and few tokens as if they were many: else a CPU would have the MLP's own forward for them."""
    monkeypatch.setattr(MODULE, "FEW_ELEMENTS", -1)


@pytest.fixture
def calls(monkeypatch):
    """The activation of each call of `gated_lora_linear`."""
    found = []

    def counted(*args, activation, **options):
        found.append(activation)
        return operation(*args, activation=activation, **options)

    operation = MODULE.gated_lora_linear
    monkeypatch.setattr(MODULE, "gated_lora_linear", counted)
    return found


def decoder(model_type="llama", **config):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    sizes |= dict(num_key_value_heads=2, vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=64)
    config = transformers.AutoConfig.for_model(model_type, **(sizes | MODELS[model_type] | config))
    return transformers.AutoModelForCausalLM.from_config(config)


def adapted(model=None, **config):
    config = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | config
    model = peftkern.get_peft_model(decoder() if model is None else model, peftkern.LoraConfig(**config))
    randomize(model)
    return model.train()


def results(model, **options):
    """Logits, and the gradient of every adapter."""
    model.zero_grad()
    output = model(input_ids=ids(), labels=ids(), **options)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one, other):
    assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def mlps(model):
    return [m for m in model.modules() if is_fused(m)]


@pytest.mark.parametrize("model_type", MODELS)
def test_known_models_compute_what_they_did(model_type, calls):
    """Would catch gate and up in each other's place, another activation, an MLP of known code that is not found."""
    model = adapted(decoder(model_type))
    assert len(mlps(model)) == 2
    fused = results(model)
    name = {"gemma": "gelu_tanh", "mistral": "gelu"}.get(model_type, "silu")
    assert calls == [name] * 2
    assert len(peftkern.fuse_mlps(model, enabled=False)) == 2 and not mlps(model)
    again = results(model)
    if model_type in ("phi3", "glm"):  # there torch takes silu of rows with gaps, by other instructions
        for one, other in zip(fused, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        same(fused, again)  # the same operations on a CPU
    assert len(calls) == 2


def test_two_tensors_are_kept_where_there_were_four():
    """Would catch an MLP that keeps act(gate) or the product after all."""
    model = adapted(decoder(intermediate_size=512), target_modules=["gate_proj", "up_proj", "down_proj"])

    def wide():
        kept = {}

        def pack(t):
            if t.numel() == ids().numel() * 512:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        return len(kept)

    assert wide() == 2 * 2
    peftkern.fuse_mlps(model, enabled=False)
    assert wide() == 2 * 4


@pytest.mark.parametrize("case", ["dropout", "autocast", "nf4", "bf16", "checkpointing", "no_grad"])
def test_in_other_circumstances(case, calls):
    """Would catch a mask drawn otherwise, a cast left out, a quantized layer's own dtype lost."""
    base = decoder()
    if case == "bf16":
        base = base.bfloat16()
    if case == "nf4":
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = peftkern.quantize_model(base, config, progress=False)
    model = adapted(base, lora_dropout=0.5 if case == "dropout" else 0.0)
    if case == "checkpointing":
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})

    def run():
        torch.manual_seed(0)
        if case == "no_grad":
            with torch.no_grad():
                return [model(input_ids=ids()).logits]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            return results(model)

    fused = run()
    assert calls
    peftkern.fuse_mlps(model, enabled=False)
    same(fused, run())


@pytest.mark.parametrize("case", ["disabled", "merged", "two adapters", "mixed", "no adapter"])
def test_other_adapters_than_one_take_the_own_forward(case, calls):
    """Would catch an adapter that is left out or counted twice."""
    model = adapted()
    model.add_adapter("other", peftkern.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model)

    def run():
        options = {"adapter_names": ["default", "other"]} if case == "mixed" else {}
        if case in ("disabled", "merged"):
            with model.disable_adapter() if case == "disabled" else _merged(model), torch.no_grad():
                return [model(input_ids=ids()).logits]
        if case == "two adapters":
            model.base_model.set_adapter(["default", "other"])
        if case == "no adapter":
            model.base_model.set_adapter([])
            return [model(input_ids=ids()).logits.detach()]
        return results(model, **options)

    fused = run()
    assert not calls
    peftkern.fuse_mlps(model, enabled=False)
    for one, other in zip(fused, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # merging twice moves the weights


class _merged:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.merge_adapter()

    def __exit__(self, *_):
        self.model.unmerge_adapter()


@pytest.mark.parametrize("where", ["act_fn", "down_proj", "everywhere", "backward"])
def test_hooks_see_what_they_saw(where, calls):
    """Would catch a module that is no longer called although a hook waits for it."""
    model, seen = adapted(), []
    mlp = mlps(model)[0]
    hook = lambda m, args, output: seen.append((m, args[0].detach().clone() if args else m))  # noqa: E731
    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif where == "backward":
        handle = mlp.down_proj.register_full_backward_hook(lambda m, grads, outer: seen.append((m, grads[0])))
    else:
        handle = getattr(mlp, where).register_forward_hook(hook)
    results(model)
    handle.remove()
    wanted = mlp.act_fn if where == "act_fn" else mlp.down_proj
    assert any(m is wanted for m, _ in seen) and len(calls) == (0 if where == "everywhere" else 1)
    if where != "backward":
        assert {t.shape[-1] for m, t in seen if m is wanted} == {48}


def test_hooks_on_gate_and_up_work_with_it(calls):
    """Would catch projections whose weights are used without calling them."""
    model, seen = adapted(), []
    mlp = mlps(model)[0]
    mlp.gate_proj.register_forward_hook(lambda m, args, output: output * 0)
    mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    output = {}
    mlp.register_forward_hook(lambda m, args, out: output.update(y=out))
    results(model)
    assert seen and len(calls) == 2 and not output["y"].any(), "silu(0) * up is 0"


def test_compiles_to_what_it_was():
    """Would catch a graph break, and another result under the compiler, which makes the product again by itself."""
    model = adapted()
    eager = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(eager, results(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_by_itself(how):
    """Would catch a copy whose MLPs run the original's layers."""
    model = adapted()
    other = copied(model, how)
    same(results(model), results(other))
    assert len(mlps(other)) == 2
    for mlp in mlps(other):
        assert mlp.forward.args[0] is mlp
    with torch.no_grad():
        for mlp in mlps(model):
            mlp.down_proj.lora_B["default"].weight.zero_()
            mlp.down_proj.base_layer.weight.zero_()
    assert not torch.equal(results(model)[0], results(other)[0])


def test_unloading_leaves_no_trace():
    """Would catch a base model that keeps a forward of ours once the adapters are gone."""
    base = tiny_llama()
    before = fingerprint(base)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(mlps(model)) == 2
    peftkern.fuse_mlps(model, enabled=False)
    peftkern.fuse_mlps(model)
    after = fingerprint(model.unload())
    assert before["modules"].keys() == after["modules"].keys()
    assert all("forward" not in vars(m) and "_peftkern_own_forward" not in vars(m) for m in base.modules())


def test_a_forward_of_someone_else_is_left(calls):
    """Would catch a patched class or instance whose code is passed over."""
    base, seen = decoder(), []
    patched = base.model.layers[0].mlp
    own = type(patched).forward
    patched.forward = functools.partial(lambda mlp, x: seen.append("instance") or own(mlp, x), patched)
    model = adapted(base)
    assert len(mlps(model)) == 1
    results(model)
    assert seen == ["instance"] and len(calls) == 1
    kind = type(patched)
    try:
        kind.forward = lambda mlp, x: seen.append("class") or own(mlp, x)
        results(model)
    finally:
        kind.forward = own
    assert seen == ["instance", "instance", "class"] and len(calls) == 1


class Other(nn.Module):
    """An MLP of one's own, with layers of peftkern.nn; `code` says which forward it has."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (LoraLinear(8, 12, r=2, lora_alpha=4) for _ in range(2))
        self.down_proj = LoraLinear(12, 8, r=2, lora_alpha=4)
        self.act_fn = nn.SiLU()

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Clamped(Other):
    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden).clamp(-1, 1))


def test_layers_of_ones_own(calls):
    """Would catch code that is taken for a known one, or an argument by name that gets lost."""
    model = nn.Sequential(Other(), Clamped())
    randomize(model)
    x = torch.randn(3, 8)
    expected = model(x)
    assert peftkern.fuse_mlps(model) == ["0"] and [is_fused(m) for m in model] == [True, False]
    torch.testing.assert_close(model(x), expected)
    assert calls == ["silu"]
    torch.testing.assert_close(model[1](model[0](hidden=x)), expected)
    model[0].act_fn = nn.SiLU(inplace=True)
    torch.testing.assert_close(model(x), expected)
    model[0].act_fn = nn.Tanh()
    assert not torch.equal(model(x), expected) and len(calls) == 1


def test_off_stays_off():
    """Would catch an adapter that is added later and takes forwards over that were given back."""
    model = adapted()
    assert len(peftkern.fuse_mlps(model, enabled=False)) == 2
    model.add_adapter("other", peftkern.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert not mlps(model)
    peftkern.fuse_mlps(model)
    assert len(mlps(model)) == 2
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        peftkern.fuse_mlps("llama")


@pytest.mark.parametrize("end", ["off", "unload"])
def test_a_hook_of_accelerate_before_it(end, calls):
    """Would catch a forward that was given back, or whose adapters are gone, and that an accelerate hook brings back
    when it is removed."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = adapted()
    expected = results(model)
    mlp = mlps(model)[0]
    hooks.add_hook_to_module(mlp, hooks.ModelHook())
    same(results(model), expected)
    assert len(calls) == 4 and len(mlps(model)) == 2
    if end == "off":
        assert len(peftkern.fuse_mlps(model, enabled=False)) == 2
        same(results(model), expected)
    else:
        model.unload()
    assert not mlps(model)
    hooks.remove_hook_from_module(mlp)
    assert not is_fused(mlp) and mlp.forward == type(mlp).forward.__get__(mlp)
    if end == "off":
        same(results(model), expected)
    assert len(calls) == 4


def test_explain_says_so():
    """Would catch a table that does not tell which layers are computed otherwise than alone."""
    model = adapted()
    rows = {row.name.rpartition(".")[2]: row.reason for row in peftkern.explain(model).rows}
    assert "made again in backward" in rows["down_proj"] and "made again" not in rows["up_proj"]
    peftkern.fuse_mlps(model, enabled=False)
    assert not any("made again" in row.reason for row in peftkern.explain(model).rows)


def test_a_few_tokens_on_a_cpu_take_the_own_forward(calls, monkeypatch):
    """Would catch a product that is made twice where that saves next to nothing, and an explanation of the other."""
    model = adapted()
    tokens = ids().numel()
    many = results(model)
    assert len(calls) == 2
    monkeypatch.setattr(MODULE, "FEW_ELEMENTS", 32 * tokens)
    few = results(model)
    assert len(calls) == 2
    for one, other in zip(few, many, strict=True):
        torch.testing.assert_close(one, other)
    few, many = ([r.reason for r in peftkern.explain(model, n).rows if "down" in r.name] for n in (tokens, 99))
    assert not any("made again" in reason for reason in few) and all("made again" in reason for reason in many)


@pytest.mark.parametrize("case", ["dora", "two adapters", "hook", "instance", "class"])
def test_explain_says_so_only_where_it_is_so(case, monkeypatch, calls):
    """Would catch a table that tells of a fused MLP where down_proj's adapter has DoRA, or others' forwards run."""
    model = adapted(use_dora=case == "dora")
    kind = type(mlps(model)[0])
    own = kind.forward
    if case == "two adapters":
        model.add_adapter("other", peftkern.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "other"])
    for mlp in mlps(model):
        if case == "hook":
            mlp.act_fn.register_forward_hook(lambda *_: None)
        if case == "instance":  # as kernels are patched in
            mlp.forward = types.MethodType(lambda mlp, x: own(mlp, x), mlp)
    if case == "class":
        monkeypatch.setattr(kind, "forward", lambda mlp, x: own(mlp, x))
    assert not any("made again" in row.reason for row in peftkern.explain(model).rows)
    results(model)
    assert not calls


def test_explain_between_forward_and_backward_changes_nothing():
    """Would catch a table that has a layer forget the batch which a checkpointed forward is computed again for."""
    model = adapted()
    model.add_adapter("other", peftkern.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for asked in (False, True):
        model.zero_grad()
        loss = model(input_ids=ids(), labels=ids(), adapter_names=["other", "default"]).loss
        if asked:
            peftkern.explain(model)
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same(*found)
