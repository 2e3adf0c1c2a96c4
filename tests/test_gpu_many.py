"""Many adapters on a GPU: a captured graph that serves adapters which come later, and each as its rows alone.

`python -m pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkern import AdapterBank, LoraConfig, explain
from peftkern.ops import lora_linear

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """Two linear layers, [..., 256] -> [..., 256], a smooth function between them: a ReLU's gates flip where two paths
    round differently, and with them whole elements of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def filled(bank: AdapterBank, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for name in bank.names:
            for p in bank.parameters(name):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, device="cuda"))


def alone(bank: AdapterBank, name: str, x: torch.Tensor) -> torch.Tensor:
    """One adapter by itself, by `lora_linear`."""
    block = bank.model.get_base_model()
    for layer, after in ((block.up, torch.tanh), (block.down, lambda t: t)):
        base = layer.base_layer
        if name in layer.lora_A:
            factors = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            x = after(lora_linear(x, base.weight, *factors, base.bias))
        else:
            x = after(base(x))
    return x


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_captured_graph_serves_adapters_that_come_later(tokens):
    """Would catch a host synchronisation, a grid made from what was active, or a pool that is made anew."""
    bank = AdapterBank(Block().cuda().bfloat16(), slots=4, max_rank=16, target_modules=["up", "down"])
    for name, r in (("a", 16), ("b", 5)):
        bank.add(name, LoraConfig(r=r, target_modules=["up", "down"]), trainable=False)
    filled(bank, 1)
    assert not set(explain(bank.model, 4 * tokens, mixed=True).paths) & {"torch", "unfused"}
    x = torch.randn(4, tokens, 256, device="cuda").bfloat16()
    ids = bank.ids(["a", "b", "__base__", "a"])

    def step() -> torch.Tensor:
        with bank.batch(ids):
            return bank.model(x)

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        for change in range(3):
            order = ["a", "b", "__base__", "a"]
            if change == 1:
                bank.remove("a")
                bank.add("c", LoraConfig(r=3, target_modules=["down"]), trainable=False)
                bank.add("d", LoraConfig(r=16, target_modules=["up", "down"]), trainable=False)
                filled(bank, 2)
                order = ["d", "c", "b", "__base__"]
            elif change == 2:
                bank.replace("b", LoraConfig(r=9, target_modules=["up"]), trainable=False)
                filled(bank, 3)
                order = ["b", "b", "c", "d"]
            ids.copy_(bank.ids(order))
            graph.replay()
            for i, name in enumerate(order):
                want = alone(bank, name, x[i])
                assert (y[i] - want).float().norm() <= 0.02 * want.float().norm(), (change, name)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_graph_captured_within_a_block_reads_ids_anew(tokens):
    """Bug: tables that the block kept from before the capture, of other ids and in memory that is free by a replay."""
    bank = AdapterBank(Block().cuda().bfloat16(), slots=4, max_rank=16, target_modules=["up", "down"])
    for name in ("a", "b"):
        bank.add(name, LoraConfig(r=8, target_modules=["up", "down"]), trainable=False)
    filled(bank, 1)
    x = torch.randn(4, tokens, 256, device="cuda").bfloat16()
    ids = bank.ids(["a", "b", "__base__", "a"])
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with bank.batch(ids):
            bank.model(x)
            with torch.cuda.graph(graph):
                y = bank.model(x)
            bank.model(x)
        ids.copy_(bank.ids(["b", "__base__", "a", "b"]))
        taken = [torch.full((64,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]  # what the block let go
        graph.replay()
        with bank.batch(ids):
            assert torch.equal(y, bank.model(x)), len(taken)


@pytest.mark.parametrize("tokens", [16, 300])
def test_training_gives_each_adapter_its_own_gradients(tokens):
    """Would catch a gradient that another adapter's rows reach."""
    bank = AdapterBank(Block().cuda().bfloat16(), slots=3, max_rank=16, target_modules=["up", "down"])
    for name, r in (("a", 16), ("b", 5), ("c", 8)):
        bank.add(name, LoraConfig(r=r, target_modules=["up", "down"]))
    filled(bank, 1)
    order = ["b", "a", "b"]
    x, dy = (torch.randn(3, tokens, 256, device="cuda").bfloat16() for _ in range(2))
    with bank.batch(order):
        bank.model(x).backward(dy)
    assert all(p.grad is None for p in bank.parameters("c"))
    for name in ("a", "b"):
        got = [p.grad.clone() for p in bank.parameters(name)]
        rows = [i for i, other in enumerate(order) if other == name]
        for p in bank.parameters(name):
            p.grad = None
        alone(bank, name, x[rows]).backward(dy[rows])
        for grad, p in zip(got, bank.parameters(name), strict=True):
            assert (grad - p.grad).norm() <= 0.02 * p.grad.norm()
