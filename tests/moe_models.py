"""Tiny mixtures of experts of transformers, and modules of one's own with parameters to adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, vocab_size=40, max_position_embeddings=64, pad_token_id=0, num_experts_per_tok=2)
FULL = ["full_attention"] * 2
NEMOTRON: dict[str, Any] = dict(layers_block_type=["attention", "moe"], n_routed_experts=4, moe_intermediate_size=24)
NEMOTRON |= dict(moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1, head_dim=8, mamba_num_heads=2)
NEMOTRON |= dict(mamba_head_dim=8, n_groups=1)
LLAMA4: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24, head_dim=8)
LLAMA4 |= dict(interleave_moe_layer_step=1, attn_temperature_tuning=False)
# Name -> configuration's class, model's class, fields. Experts: gated; gated, an odd number of them; transposed, with
# biases, gate and up interleaved; without a gate; with a forward of their own.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=4)),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(num_experts=5, moe_intermediate_size=24, head_dim=8)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(num_local_experts=4, head_dim=8, layer_types=FULL)),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", NEMOTRON),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4),
}


def moe(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model of two layers in eval mode, equal for equal arguments; its experts have random values too."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # of sizes that no one would train
    config, model, fields = FAMILIES[family]
    made = getattr(transformers, model)(getattr(transformers, config)(**(SIZES | fields | more))).to(dtype).eval()
    fill(made)
    return made


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values in every parameter, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1 if "norm" in name else 0))


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Token ids, the same on every call."""
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, adapter: str = "", seed: int = 1) -> None:
    """Random values in the adapters (of one name, if given), drawn in the order of the sorted names."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name and (not adapter or f".{adapter}." in name):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)


class Odd(nn.Module):
    """A matrix [out, in] and a stack [experts, out, in] in a module that is no layer; the first may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(9, 7))
        self.stack = nn.Parameter(torch.randn(3, 5, 9))
        self.numbers = nn.Parameter(torch.arange(4), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(5))
        self.fails = False

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        h = torch.tanh(x @ self.matrix.T)
        if self.fails:
            raise ArithmeticError("as asked")
        return scale * torch.einsum("th,eoh->to", h, self.stack) + self.offset


class Net(nn.Module):
    """An `Odd` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.odd = Odd()
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.odd(self.first(x), scale=0.5))


def net(seed: int = 0) -> Net:
    """A `Net` whose values depend on `seed` only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()
