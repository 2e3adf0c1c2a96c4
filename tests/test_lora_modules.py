"""LoRA layers of whose modules somebody wants more than their weights, and batches over them, against PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peftkern
from tiny_models import ids, tiny_llama

peft = pytest.importorskip("peft")
NAMES = ["default", "__base__", "default"]


def network(library: Any, **fields: Any) -> Any:
    """Two adapted linear layers with random adapters, the same of both libraries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        options = {"target_modules": ["0", "2"], "r": 2, "init_lora_weights": False} | fields
        return library.get_peft_model(base, library.LoraConfig(**options)).eval()


def x() -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def outcome(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """The output, and the gradients of all that learns."""
    model.zero_grad()
    y = model(x(), **options)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | {name: grad.clone() for name, grad in grads.items() if grad is not None}


def same(changed: Any, **options: Any) -> None:
    """`changed(model)` for both libraries' models gives the same outputs and gradients."""
    found = []
    for library in (peftkern, peft):
        model = network(library)
        changed(model)
        found.append(outcome(model, **options))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def last(model: Any) -> Any:
    return model.base_model.model[2]


def backward_hook(model: Any) -> None:
    last(model).lora_dropout["default"].register_full_backward_hook(lambda m, gi, go: (gi[0] * 10,))


def own_forward(model: Any) -> None:
    last(model).lora_dropout["default"].forward = lambda x: x * 10


def biased_factors(model: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        last(model).lora_A["default"], last(model).lora_B["default"] = nn.Linear(6, 2), nn.Linear(2, 6)


@pytest.mark.parametrize("change", [backward_hook, own_forward, biased_factors])
def test_a_changed_module_is_called(change):
    """Would catch hooks or a forward of a dropout, and biases of A and B, that are passed over without a word."""
    same(change)
    model = network(peftkern)
    change(model)
    row = next(row for row in peftkern.explain(model, 3).rows if row.name.endswith("2"))
    assert row.path == "unfused" and ("dropout" in row.reason or "bias" in row.reason)


def test_biases_of_factors_are_in_a_mixed_batch_too():
    """Would catch them left out of rows whose adapter has them."""
    models = [network(library) for library in (peftkern, peft)]
    for model in models:
        biased_factors(model)
    with torch.no_grad():
        ours, theirs = (model(x(), adapter_names=NAMES) for model in models)
    torch.testing.assert_close(ours, theirs)


def test_hooks_of_all_modules_see_each_module():
    """Would catch layers that are not called while every module is watched, also right after a remembered forward."""
    models = [network(library) for library in (peftkern, peft)]
    calls: list[list[str]] = []
    ys = []
    for model in models:
        with torch.no_grad():
            for _ in range(2):
                model(x())
                model(x(), adapter_names=NAMES)
            seen: list[str] = []

            def hook(module: nn.Module, args: Any, y: Any, seen: list[str] = seen) -> Any:
                seen.append(type(module).__name__)
                return y * 2 if type(module) is nn.Linear else None

            handle = nn.modules.module.register_module_forward_hook(hook)
            try:
                ys.append((model(x()), model(x(), adapter_names=NAMES)))
            finally:
                handle.remove()
            calls.append([kind for kind in seen if kind == "Linear" or kind == "Identity"])
            ys[-1] += (model(x()), model(x(), adapter_names=NAMES))
    torch.testing.assert_close(ys[0], ys[1])
    assert calls[0] and calls[0][:7] == calls[1][:7]


def test_several_adapters_under_autocast_to_the_other_16_bits():
    """Would catch adapters joined by a function that autocast has no dtype for."""
    model = network(peftkern).to(torch.bfloat16)
    model.add_adapter("b", peftkern.LoraConfig(r=2, target_modules=["0", "2"]), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "b"])
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        y = model(x().bfloat16())
        with peftkern.use_backend("unfused"):
            want = model(x().bfloat16())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


# -- batches whose rows want different adapters ------------------------------------------------------------------------


@pytest.mark.parametrize("within", [False, True], ids=["two layers", "one layer"])
def test_a_parameter_that_adapters_share_is_learned_by_all(within):
    """Would catch a pool that keeps a copy of a parameter which lies in another pool."""
    models = []
    for library in (peftkern, peft):
        model = network(library)
        if within:
            model.add_adapter("b", library.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=True))
            with torch.no_grad():
                last(model).lora_B["b"].weight.copy_(last(model).lora_B["default"].weight.flip(0))
            last(model).lora_A["b"].weight = last(model).lora_A["default"].weight
        else:
            model.base_model.model[0].lora_A["default"].weight = last(model).lora_A["default"].weight
        models.append(model)
    names = ["default", "__base__", "b" if within else "default"]
    for _ in range(3):
        ys = []
        for model in models:
            with torch.no_grad():
                model(x(), adapter_names=names)
                last(model).lora_A["default"].weight.add_(1.0)  # an optimizer's step
                ys.append(model(x(), adapter_names=names))
        torch.testing.assert_close(*ys)


def test_an_adapter_may_get_another_rank():
    """Would catch a pool that goes by the rank which an adapter had, or has no room for a larger one."""

    def cut(layer: Any) -> None:
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data[:1]
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data[:, :1]

    def widened(layer: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            layer.lora_A["default"], layer.lora_B["default"] = (
                nn.Linear(6, 5, bias=False),
                nn.Linear(5, 6, bias=False),
            )

    models = [network(library) for library in (peftkern, peft)]
    for change in (None, cut, widened, cut):
        for grad in (False, True):
            ys = []
            for model in models:
                if change is not None and not grad:
                    change(last(model))
                with torch.set_grad_enabled(grad):
                    ys.append((model(x(), adapter_names=NAMES), model(x(), adapter_names=NAMES), model(x())))
            torch.testing.assert_close(*ys)


@pytest.mark.parametrize("tokens", [3, 300])
def test_a_mixed_batch_has_autocasts_dtype(tokens):
    """Would catch q, k and v that are computed together in another dtype than each by itself."""
    model = peftkern.get_peft_model(tiny_llama(), peftkern.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    attention = model.base_model.model.model.layers[0].self_attn
    seen: list[torch.dtype] = []
    for projection in (attention.q_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    some = ids(2, 64)[:, torch.arange(tokens) % 64]
    positions = torch.arange(tokens) % 64
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=some, position_ids=positions[None], adapter_names=["default", "__base__"])
    assert set(seen) == {torch.bfloat16}


def test_a_quantized_base_may_have_wide_biases():
    """Would catch a bias that only a forward with gradients casts: QLoRA's preparation leaves biases in fp32."""
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = peftkern.prepare_model_for_kbit_training(peftkern.quantize_model(base, nf4))
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.dtype == torch.float32
    options = {"input_ids": ids(), "adapter_names": ["default", "__base__"]}
    want = model(**options).logits.detach()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**options).logits, want, rtol=0, atol=0)
    model.generate(input_ids=ids(), max_new_tokens=2, adapter_names=["default", "__base__"])


def test_modules_to_save_names_what_is_quantized():
    """Would catch torch's message about gradients of integers, which names no module."""
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = peftkern.quantize_model(tiny_llama(), nf4)
    config = peftkern.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    with pytest.raises(TypeError, match=r"modules_to_save cannot train a LlamaMLP whose parameter .* is quantized"):
        peftkern.get_peft_model(base, config)
