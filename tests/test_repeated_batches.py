"""`adapter_names` that are given again: what the last forward found is used, and whatever has changed since is seen."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import peftkern
from tiny_models import ids, mlp, randomize, tiny_llama

NAMES = ["one", "__base__", "two", "one"]
OTHERS = ["two", "two", "one", "__base__"]


def adapted(base=None, dropout=0.0, **options):
    """An `Mlp` (or `base`) with the adapters "one" and "two" of different ranks on its two layers."""
    base = mlp() if base is None else base
    options = {"target_modules": ["up", "down"], "lora_dropout": dropout} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=4, **options), "one")
        model.add_adapter("two", peftkern.LoraConfig(r=2, lora_alpha=4, **options))
    randomize(model)
    return model.eval()


def mixed_of(model):
    return model.base_model.mixed_adapters()


@torch.no_grad()
def run(model, names=NAMES):
    return model(ids(4), adapter_names=names)


def remembers(model):
    """Whether the next forward with the same names would use what the last one found."""
    last = mixed_of(model)._last_use
    return last is not None and last.holds(mixed_of(model).names)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_the_same_names_again_decide_nothing_again(grad, monkeypatch):
    """Would catch a memory that never serves: layers would be looked through, and rows grouped, at every token."""
    from peftkern.tuners.lora.mixed import LayerBatch, MixedAdapters

    model = adapted()
    with grad():
        first = model(ids(4), adapter_names=NAMES)
        for cls, name in ((LayerBatch, "decide"), (MixedAdapters, "sync")):
            monkeypatch.setattr(cls, name, lambda *_: pytest.fail("decided again"))
        again = model(ids(4), adapter_names=list(NAMES))
    assert torch.equal(first, again)


def test_an_llama_decodes_by_it_and_gives_what_each_row_gives_alone():
    """Would catch a batch that keeps the prompt's shape, or another row's adapter, for the tokens that follow."""
    model = adapted(tiny_llama(), target_modules="all-linear")
    with torch.inference_mode():
        mixed = [model(input_ids=ids(4)[:, :length], adapter_names=NAMES).logits for length in (5, 1, 1, 5)]
        for i, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids(4)[i : i + 1, :5]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids(4)[i : i + 1, :5]).logits
            torch.testing.assert_close(mixed[0][i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed[0], mixed[3]) and torch.equal(mixed[1], mixed[2])


def new_parameter(model, layer):
    layer.lora_B["one"].weight = nn.Parameter(layer.lora_B["one"].weight.detach() * 3)


def data_elsewhere(model, layer):
    layer.lora_B["one"].weight.data = layer.lora_B["one"].weight.data * 3


def values(model, layer):
    layer.lora_B["one"].weight.data.mul_(3)


def scaling(model, layer):
    layer.scaling["one"] *= 3


def another_module(model, layer):
    layer.lora_B["one"] = nn.Linear(4, layer.out_features, bias=False)


def hook_on_an_adapter(model, layer):
    layer.lora_B["one"].register_forward_hook(lambda module, args, out: 3 * out)


def hook_after_others(model, layer):
    for _ in range(3):
        model.register_forward_pre_hook(lambda module, args: None).remove()
    layer.lora_A["one"].register_forward_pre_hook(lambda module, args: (3 * args[0],))


def forward_of_its_own(model, layer):
    forward = layer.lora_A["one"].forward
    layer.lora_A["one"].forward = lambda x: 3 * forward(x)


def class_of_its_own(model, layer):
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    layer.lora_A["one"].__class__ = Tripled


def parametrized(model, layer):
    class Tripled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    nn.utils.parametrize.register_parametrization(layer.lora_A["one"], "weight", Tripled())


def dropout_of_its_own(model, layer):
    class Tripled(nn.Module):
        def forward(self, x):
            return 3 * x

    layer.lora_dropout["one"] = Tripled()


def hook_on_the_base(model, layer):
    layer.base_layer.register_forward_hook(lambda module, args, out: 3 * out)


def other_base_weight(model, layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 3)


def other_base_layer(model, layer):
    layer.base_layer = nn.Linear(layer.in_features, layer.out_features)


def other_base_bias(model, layer):
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.detach() + 1)


def doubled(model, layer):
    model.double()


def deleted_and_added(model, layer):
    model.delete_adapter("one")
    model.add_adapter("one", peftkern.LoraConfig(r=3, target_modules=["up", "down"]))
    randomize(model, seed=5)


def one_more(model, layer):
    model.add_adapter("three", peftkern.LoraConfig(r=8, target_modules=["up", "head"]))
    randomize(model, seed=5)


def bias_of_an_adapter(model, layer):
    layer.lora_B["one"].bias = nn.Parameter(torch.ones(layer.out_features))
    layer.lora_bias["one"] = True


def set_scale(model, layer):
    layer.set_scale("one", 3.0)


CHANGES = [new_parameter, data_elsewhere, values, scaling, another_module, hook_on_an_adapter, hook_after_others]
CHANGES += [forward_of_its_own, class_of_its_own, parametrized, dropout_of_its_own, hook_on_the_base]
CHANGES += [
    bias_of_an_adapter,
    other_base_weight,
    other_base_layer,
    other_base_bias,
    doubled,
    deleted_and_added,
    one_more,
    set_scale,
]


@pytest.mark.parametrize("first", [NAMES, OTHERS], ids=["same names", "other names"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_seen(change, first):
    """Would catch rows that are served by what has been replaced, moved, hooked or rescaled since, whether the batch
    before had the same names or others."""
    torch.manual_seed(0)
    model = adapted()
    before = run(copy.deepcopy(model))
    run(model, first)
    assert remembers(model)
    change(model, model.base_model.model.up)
    got, want = run(model), run(copy.deepcopy(model))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.dtype is not before.dtype or not torch.allclose(got, before)
    # And once more: what was found last is what is there.
    torch.testing.assert_close(run(model), want, rtol=0, atol=0)


def test_other_names_look_at_no_layer_again(monkeypatch):
    """Would catch a server's next request, of other adapters, that has each adapter of each layer looked through."""
    from peftkern.tuners.lora import mixed

    model = adapted()
    want = run(copy.deepcopy(model), OTHERS)
    run(model)
    monkeypatch.setattr(mixed.MixedAdapters, "sync", lambda *_: pytest.fail("brought up to date again"))
    monkeypatch.setattr(mixed, "_is_simple", lambda *_: pytest.fail("looked through again"))
    assert torch.equal(run(model, OTHERS), want) and torch.equal(run(model, ["__base__"] * 4), mlp()(ids(4)))
    assert torch.equal(run(model, OTHERS), want) and remembers(model)


def test_modes_names_and_threads_are_seen():
    """Would catch a memory that is of another batch, of training, of a backend or of another thread."""
    model = adapted(dropout=0.5)
    want = run(model)
    assert remembers(model)
    other = run(model, ["two", "one", "__base__", "two"])
    torch.testing.assert_close(other[2], run(model, ["__base__"] * 4)[2])
    assert not torch.allclose(other, want)
    assert torch.equal(run(model), want)
    dropped = run(model.train())
    assert not torch.allclose(dropped, want)
    assert torch.equal(run(model.eval()), want)
    model.base_model.model.up.lora_dropout["one"].train()
    assert not torch.allclose(run(model), want)
    model.eval()
    with peftkern.use_backend("unfused"):
        torch.testing.assert_close(run(model), want)
    found = []
    thread = threading.Thread(target=lambda: found.append(run(model)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], want) and torch.equal(run(model), want)


def test_merged_and_disabled_adapters_are_noticed_again():
    """Would catch a second forward that adds an adapter which is inside the base weight already, or disabled."""
    model = adapted()
    mixed = run(model)
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="merged into the base weights"):
        run(model)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), mixed)
    for _ in range(2):
        with model.disable_adapter():
            base = run(model)
            with torch.no_grad():
                torch.testing.assert_close(base, model(ids(4)), rtol=0, atol=0)
        assert not torch.equal(base, run(model))
    first = next(m for m in model.modules() if hasattr(m, "enable_adapters"))
    first.enable_adapters(False)
    with pytest.raises(ValueError, match="adapters are disabled in some layers"):
        run(model)


def test_training_after_inference_with_the_same_names():
    """Would catch ids that autograd cannot keep, being inference tensors, and gradients that are not recorded."""
    model = adapted()
    model.set_requires_grad(["one", "two"])
    with torch.inference_mode():
        first = model(ids(4), adapter_names=NAMES)
        again = model(ids(4), adapter_names=NAMES)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        y = model(ids(4), adapter_names=NAMES)
        y.square().sum().backward()
        optimizer.step()
    assert torch.equal(first, again) and not torch.allclose(run(model), first)
    torch.testing.assert_close(run(model), run(copy.deepcopy(model)), rtol=0, atol=0)


def test_a_copy_remembers_nothing():
    """Would catch a copy of a model that serves its rows from the original's pools."""
    model = adapted()
    want = run(model)
    copied = copy.deepcopy(model)
    assert mixed_of(copied)._last_use is None and mixed_of(copied)._last_batch is None
    for layer in (copied.base_model.model.up, copied.base_model.model.down):
        layer.lora_B["one"].weight.data.zero_()
    zeroed = run(copied)
    torch.testing.assert_close(zeroed[0], run(copied, ["__base__"] * 4)[0])
    assert torch.equal(run(model), want) and not torch.allclose(zeroed, want)


def test_quantized_layers_are_served_too():
    """Would catch a memory that is for dense layers alone, or that keeps a weight which has been replaced."""
    base = peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True}, progress=False)
    model = adapted(base, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        first = model(input_ids=ids(4), adapter_names=NAMES).logits
        assert remembers(model)
        assert torch.equal(model(input_ids=ids(4), adapter_names=NAMES).logits, first)
        layer = next(m for name, m in model.named_modules() if name.endswith("q_proj.base_layer"))
        other = next(m for name, m in model.named_modules() if name.endswith("1.self_attn.q_proj.base_layer"))
        layer.load_state_dict(other.state_dict())
        got, want = (m(input_ids=ids(4), adapter_names=NAMES).logits for m in (model, copy.deepcopy(model)))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert not torch.allclose(got, first)


def test_a_bank_by_names_is_served_too_and_slots_in_a_tensor_are_read_each_time():
    """Would catch ids that were changed in place between two batches."""
    with torch.no_grad():
        bank = peftkern.AdapterBank(mlp(), slots=2, max_rank=4, target_modules=["up", "down"])
        for name in ("one", "two"):
            bank.add(name)
        randomize(bank.model)
        slots = bank.ids(["one", "two", "__base__", "two"])
        with bank.batch(slots):
            first = bank.model(ids(4))
        with bank.batch(["one", "two", "__base__", "two"]):
            torch.testing.assert_close(bank.model(ids(4)), first)
        slots.copy_(bank.ids(["two", "two", "one", "__base__"]))
        with bank.batch(slots):
            other = bank.model(ids(4))
        with bank.batch(["two", "two", "one", "__base__"]):
            torch.testing.assert_close(bank.model(ids(4)), other)
    assert not torch.allclose(first, other)
