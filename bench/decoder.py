"""One decoder layer of a Llama with an adapter on each of its linear layers, as a workload.

The model code is transformers', the weights random. The measure of right is the same layer in fp32 with the formula
written out, and the bound is twice the error that plain PyTorch makes with the formula in the same dtype, or a single
layer's bound if that is more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.adapters import Rival, by_hand
from bench.cases import Problem
from bench.check import WrongResultError, relative_error, tolerance
from bench.workload import Subject
from peftkern import reference

HEAD_DIM = 128


def formula(
    x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
) -> torch.Tensor:
    """LoRA as the paper writes it; dropout is left out, for it is checked without."""
    return reference.lora_linear(x, weight, A, B, scaling)


PLAIN = Rival("formula", "check", by_hand(formula))


def set_linear(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` at the dotted `name` of `module`."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


class DecoderWorkload:
    """A Llama decoder layer on random hidden states [1, M, K], K hidden and N intermediate features."""

    scaling = 2.0

    def __init__(self, problem: Problem, device: torch.device) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.problem, self.device = problem, device
        p = problem
        heads = max(1, p.K // HEAD_DIM)
        config = LlamaConfig(
            hidden_size=p.K,
            intermediate_size=p.N,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=max(p.M, 2048),
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.layer = LlamaDecoderLayer(config, 0).to(p.dtype)
            self.x = torch.randn(1, p.M, p.K).to(p.dtype).requires_grad_()
            self.dy = torch.randn(1, p.M, p.K).to(p.dtype)
            rotary = LlamaRotaryEmbedding(config)
            self.positions = rotary(self.x, torch.arange(p.M)[None])
        self.layer.requires_grad_(False)
        self.names = [name for name, m in self.layer.named_modules() if isinstance(m, nn.Linear)]
        self._truth: list[torch.Tensor] | None = None
        self._plain_error: float | None = None

    def subject(self, rival: Rival) -> Subject:
        """`rival`'s adapter on every linear layer, with the same A and B for every rival."""
        return self._subject(rival, self.layer, self.x, self.dy)

    def _subject(self, rival: Rival, layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Subject:
        p = self.problem
        # Linear layers are shared between subjects, everything around them is too: only the tree is copied.
        tree = copy.deepcopy(layer, {id(t): t for t in layer.parameters()})
        generator = torch.Generator(self.device).manual_seed(1)
        adapters: list[torch.Tensor] = []
        for name in self.names:
            linear = tree.get_submodule(name)
            adapted = rival.wrap(linear, p.R, self.scaling * p.R, p.dropout)
            set_linear(tree, name, adapted.module)
            if adapted.lora_A is None or adapted.lora_B is None:
                continue
            for t, scale in ((adapted.lora_A, linear.in_features**-0.5), (adapted.lora_B, 0.5 * p.R**-0.5)):
                with torch.no_grad():  # rounded to the layer's dtype, so that fp32 adapters start from the same values
                    random = torch.randn(t.shape, generator=generator, device=self.device)
                    t.copy_(random.mul_(scale * 0.02 * p.K**0.5).to(p.dtype))
                adapters.append(t)
        if rival.finish is not None:
            rival.finish(tree)
        module: Callable[..., Any] = tree
        if rival.compiled:
            torch._dynamo.reset()
            module = torch.compile(tree, dynamic=False)
        positions = tuple(t.to(x.dtype) for t in self.positions)

        def call() -> torch.Tensor:
            with rival.context(p, self.device):
                out = module(x, position_embeddings=positions)
            return out[0] if isinstance(out, tuple) else out

        return Subject(tree, call, [x, *adapters], dy)

    def check(self, rival: Rival, subject: Subject) -> dict[str, float]:
        """Largest relative error of y, dX and every dA and dB, in evaluation mode.

        Raises:
            WrongResultError: it is more than twice that of the formula in plain PyTorch and the same dtype, and
                more than a single layer may have.
        """
        if len(subject.inputs) == 1:
            return {}
        if self._truth is None:
            wide = copy.deepcopy(self.layer).float()
            exact = self._subject(PLAIN, wide, self.x.detach().float().requires_grad_(), self.dy.float())
            self._truth = _results(exact)
            self._plain_error = _worst(_results(self._subject(PLAIN, self.layer, self.x, self.dy)), self._truth)
        error = _worst(_results(subject), self._truth)
        bound = max(2 * (self._plain_error or 0.0), tolerance(self.problem.dtype, self.problem.N))
        if not error <= bound:
            raise WrongResultError(f"largest relative error of y and the gradients: {error:.2e} (bound {bound:.2e})")
        return {"largest": error}


def _results(subject: Subject) -> list[torch.Tensor]:
    subject.module.eval()
    results = [subject.forward().detach(), *subject.forward_backward()]
    subject.module.train()
    return results


def _worst(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return max(relative_error(g, t.double()) for g, t in zip(got, truth, strict=True))
