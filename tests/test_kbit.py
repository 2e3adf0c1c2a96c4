"""`prepare_model_for_kbit_training`: beside PEFT's, and with embeddings left in 16 bits."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import peftkern
from peftkern import quantize_model
from peftkern.ops import dequantize
from peftkern.utils.quantized_modules import weight_of
from quantized_models import CONFIGS, ours, read, saved_llama, theirs
from tiny_models import ids


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The folder of a tiny dense Llama in bfloat16."""
    return saved_llama(tmp_path_factory.mktemp("dense"))


def prepared(model: nn.Module, **kwargs) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peftkern.prepare_model_for_kbit_training(model, **kwargs)


def is_checkpointed(model: nn.Module) -> bool:
    """By transformers' name for it since 5.20, or by the older one."""
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")


def test_upcast_embeddings_is_peft(dense):
    """Catches a parameter that PEFT widens and we do not, or the other way, and a difference in checkpointing."""
    import peft

    for name in ("nested", "int8"):
        mine = prepared(theirs(dense, name), upcast_embeddings=True)
        other = peft.prepare_model_for_kbit_training(theirs(dense, name))
        for (key, a), (other_key, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
            assert (key, a.dtype, a.requires_grad) == (other_key, b.dtype, b.requires_grad)
        assert is_checkpointed(mine) and is_checkpointed(other)
        assert torch.equal(mine.train()(ids()).logits, other.train()(ids()).logits)


def test_default_saves_the_embeddings_and_keeps_the_numbers(dense):
    """Catches an embedding widened after all, a norm that is not, and a product of two dtypes without autocast."""
    model = ours(dense, "storage")
    packed = [t.clone() for m in model.modules() if (w := weight_of(m)) is not None for t in w.tensors()[:2]]
    saved = 2 * 128 * 64 * 2 / 2**20  # embedding and lm_head, two bytes an element saved
    with pytest.warns(UserWarning, match=rf"saves {saved:,.1f} MiB; upcast_embeddings=True"):
        assert peftkern.prepare_model_for_kbit_training(model) is model
    dtypes = {name: p.dtype for name, p in model.named_parameters() if not name.endswith("proj.weight")}
    sixteen = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert sixteen == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {dtypes[name] for name in set(dtypes) - sixteen} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    after = [t for m in model.modules() if (w := weight_of(m)) is not None for t in w.tensors()[:2]]
    assert all(torch.equal(a, b) for a, b in zip(packed, after, strict=True)), "packed bytes were widened"

    wide = prepared(ours(dense, "storage"), upcast_embeddings=True)
    hidden = [m.model(ids()).last_hidden_state for m in (model, wide)]
    assert hidden[0].dtype == torch.float32 and torch.equal(*hidden)
    a, b = model(ids()).logits, wide(ids()).logits
    assert a.dtype == torch.bfloat16 and (a - b).abs().max() <= 2**-7 * b.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.embed_tokens(ids()).dtype == torch.bfloat16, "autocast needs no wide residual stream"
        assert torch.isfinite(model(ids()).logits).all()


@pytest.mark.parametrize("name", ["nested", "storage", "int8"])
def test_a_quantized_lm_head_keeps_its_input(dense, name):
    """Catches an lm_head's input cast to the dtype of its packed bytes (uint8, int8), which leaves nothing of it."""
    config = transformers.BitsAndBytesConfig(**CONFIGS[name], llm_int8_skip_modules=[])
    mine = quantize_model(read(dense), config, progress=False)
    other = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16)
    for model in (prepared(mine), prepared(other).train()):
        assert weight_of(model.lm_head) is not None
        hidden = model.model(ids()).last_hidden_state
        logits = model(ids()).logits
        assert hidden.dtype == torch.float32 and torch.equal(logits, model.lm_head.forward(hidden))
        truth = nn.functional.linear(hidden, dequantize(weight_of(model.lm_head), torch.float32))
        assert (logits - truth).abs().max() <= 2**-5 * truth.abs().max()


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_reach_an_adapter_through_checkpointing(dense, reentrant):
    """Catches checkpointing whose first input asks for no gradient, so that adapters get none, in silence."""
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = prepared(ours(dense, "nested"), **options).train()
    layer = model.model.layers[0].mlp.down_proj
    shift = nn.Parameter(torch.zeros(64))
    layer.register_forward_hook(lambda module, inputs, output: output + shift)
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    assert shift.grad.abs().sum() > 0
    assert is_checkpointed(prepared(ours(dense, "nested"), use_gradient_checkpointing=False)) is False


def test_preparing_twice_adds_no_second_hook(dense):
    """Catches hooks that pile up where a trainer prepares again what the user prepared."""
    model = prepared(prepared(ours(dense, "nf4"), use_gradient_checkpointing=False), use_gradient_checkpointing=False)
    assert len(model.model.embed_tokens._forward_hooks) == 1 and len(model.lm_head._forward_pre_hooks) == 1


def test_dense_models_are_frozen_and_not_checkpointed(dense):
    """Catches checkpointing switched on for a model that is not quantized, which PEFT does not do."""
    model = prepared(read(dense))
    assert not is_checkpointed(model) and not any(p.requires_grad for p in model.parameters())
