"""`gated_lora_linear` and fused MLPs on a GPU: real tiles, CUDA graphs, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from gated_data import ACTIVATIONS, GatedProjection
from peftkern import fuse_mlps, reference
from peftkern.ops import gated_lora_linear, quantize_4bit
from peftkern_kernels import replay
from tiny_models import ids, randomize, tiny_llama

pytestmark = pytest.mark.gpu


def nf4(w):
    return quantize_4bit(w, "nf4", 64, True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "M, N, K, R, dtype, masters, quantize",
    [
        (1000, 512, 3072, 16, torch.bfloat16, False, None),
        (300, 500, 1030, 12, torch.float16, True, None),
        (257, 256, 520, 16, torch.float32, False, None),
        (9, 512, 1024, 16, torch.bfloat16, False, None),
        (12, 512, 1024, 16, torch.bfloat16, False, nf4),
        (200, 512, 1024, 16, torch.bfloat16, True, nf4),
        (1500, 512, 1024, 16, torch.bfloat16, False, nf4),
    ],
)
def test_matches_fp64_with_the_same_bits_twice(M, N, K, R, dtype, masters, quantize, activation, dropout_p):
    """Would catch a path that the passes over the activations do not go with, and launches that are replayed with
    another call's tensors."""
    operands = GatedProjection(M, N, K, R, dtype, masters, device="cuda", quantize=quantize)
    seed = torch.tensor([1234], device="cuda")
    keep = reference.dropout_mask(seed, M, K, dropout_p) if dropout_p else None
    replay._kept.clear()
    first = operands.run(activation, dropout_p=dropout_p, seed=seed)
    operands.check(first, operands.truth(activation, keep, dropout_p))
    again = operands.run(activation, dropout_p=dropout_p, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "other bits on the second run"


def test_records_in_a_cuda_graph():
    """Would catch a host synchronisation, or a buffer that the graph does not own."""
    operands = GatedProjection(256, 512, 1024, 16, torch.bfloat16, device="cuda")

    def step():
        return operands.run("silu")

    eager = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, recorded, strict=True))


def test_memory_is_two_tensors_less():
    """Would catch an MLP that keeps act(gate) or the product, which a test on a CPU counts and a GPU must show."""
    M, K, N = 4096, 8192, 256
    operands = GatedProjection(M, N, K, 16, torch.bfloat16, device="cuda")
    parts = (operands.weight, operands.A, operands.B, 0.75, operands.bias)

    def held(function):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = function()
        after = torch.cuda.memory_allocated() - y.numel() * y.element_size()
        y.backward(operands.dy)
        return after - before

    wide = M * K * 2
    from peftkern.ops import lora_linear

    fused = held(lambda: gated_lora_linear(operands.gate, operands.up, *parts))
    apart = held(lambda: lora_linear(torch.nn.functional.silu(operands.gate) * operands.up, *parts))
    assert fused < wide // 4 and apart > 2 * wide


def test_a_model_trains_as_before():
    """Would catch gradients of a fused MLP that differ by more than one rounding from those of its class's forward."""
    import peftkern

    base = tiny_llama(hidden_size=256, intermediate_size=768, num_hidden_layers=2).cuda().bfloat16()
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model)
    results = []
    for enabled in (True, False):
        assert len(fuse_mlps(model, enabled=enabled)) == 2
        model.zero_grad()
        output = model(input_ids=ids(4, 64).cuda(), labels=ids(4, 64).cuda())
        output.loss.backward()
        results.append([output.logits.float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert ((one - other).norm() <= 0.02 * other.norm()).item()
