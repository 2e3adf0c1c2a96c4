"""LoRA+: the groups of PEFT's function on PEFT's model, and the training that they make."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.optimizers import create_loraplus_optimizer
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
BOTH = (
    (peftkern, create_loraplus_optimizer),
    (peft, importlib.import_module("peft.optimizers").create_loraplus_optimizer),
)
RATES = {"lr": 1e-2, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}


def adapted(library: Any, base: nn.Module, **fields: Any) -> Any:
    model = library.get_peft_model(base, library.LoraConfig(r=4, **fields))
    randomize(model)
    return model


def normed() -> nn.Module:
    """A network with what goes to each of the groups."""
    model = mlp()
    model.norm = nn.LayerNorm(5)
    head = model.head
    model.head = nn.Sequential(head, model.norm)
    return model


CASES = {
    "linear and embedding": (mlp, {"target_modules": ["up", "emb"], "bias": "all"}),
    "norms and biases": (normed, {"target_modules": ["up"], "modules_to_save": ["norm", "down"], "lora_bias": True}),
    "llama": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_those_of_peft(case):
    """Would catch: LoRA on embeddings trained at the rate of A (as PEFT's function does with our layers), norms and
    biases that decay, a parameter in no group or in two."""
    base, fields = CASES[case]
    found = []
    for library, create in BOTH:
        model = adapted(library, base(), **fields)
        names = {id(p): name for name, p in model.named_parameters()}
        made = create(model, torch.optim.AdamW, betas=(0.8, 0.9), **RATES)
        groups = made.param_groups
        held = [[names[id(p)] for p in group.pop("params")] for group in groups]
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert sorted(trained) == sorted(name for group in held for name in group)
        found.append((groups, held))
    assert found[0] == found[1]


def test_training_is_that_of_peft():
    """Would catch: rates that are in the groups and not in the steps."""
    ends = []
    for library, create in BOTH:
        model = adapted(library, mlp(), target_modules=["up", "down", "emb"])
        optimizer = create(model, torch.optim.AdamW, **RATES)
        for step in range(4):
            model(ids(seed=step)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, want in ends[1].items():
        torch.testing.assert_close(ends[0][name], want, rtol=1e-4, atol=1e-5)


def test_embeddings_trained_whole_keep_32_bits():
    """Would catch: bitsandbytes' 8-bit states for an embedding, which PEFT's function keeps in 32."""
    bnb = pytest.importorskip("bitsandbytes")
    model = adapted(peftkern, mlp(), target_modules=["up"], modules_to_save=["emb"])
    create_loraplus_optimizer(model, bnb.optim.AdamW8bit, **RATES)
    overrides = bnb.optim.GlobalOptimManager.get_instance().module_weight_config_triple
    copies = [module for module, name, config in overrides if name == "weight" and config == {"optim_bits": 32}]
    assert any(module is model.base_model.model.emb.modules_to_save["default"] for module in copies)
