"""Small models for tests of the PEFT face: random weights, made from a configuration, nothing downloaded."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import nn

VOCAB = 128


class Mlp(nn.Module):
    """Embedding, two linear layers and a head: enough to adapt, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(self.emb(ids)))))


def mlp(seed: int = 0) -> Mlp:
    """An `Mlp` whose weights depend on `seed` only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mlp()


def tiny_llama(seed: int = 0, cls: str = "LlamaForCausalLM", **config: Any) -> nn.Module:
    """A two-layer Llama of hidden size 64 in eval mode, equal for equal arguments."""
    import transformers

    defaults = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    defaults |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, cls)(transformers.LlamaConfig(**(defaults | config))).eval()


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length], the same on every call."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, names: tuple[str, ...] = ("lora_", "modules_to_save"), seed: int = 1) -> None:
    """Give the parameters with one of `names` in theirs random values, drawn in the order of the sorted names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in names):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def copied(module: nn.Module, how: str) -> Any:
    """A copy: by "pickle", through a file of torch's, or else by `copy.deepcopy`."""
    if how != "pickle":
        return copy.deepcopy(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that adapting could change about a model: its modules, their attributes, hooks, flags and values."""
    modules = {}
    for name, module in model.named_modules():
        content = {k: list(v) if isinstance(v, dict) else repr(v) for k, v in vars(module).items()}
        modules[name] = (id(module), type(module), content)
    values = {k: (id(p), p.requires_grad, p.detach().clone().tolist()) for k, p in model.named_parameters()}
    config = getattr(model, "config", None)
    return {"modules": modules, "values": values, "config": None if config is None else config.to_dict()}
