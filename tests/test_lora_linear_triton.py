"""`ops.lora_linear` on Triton kernels: every path, forward and every gradient, through the public operation.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from held_paths import GEMM_PATHS, hold_lora_linear
from numerics import assert_rounded, lora_linear_truth, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import lora_linear

SCALING = 0.75
# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.lora_linear")
SHAPES = [(65, 70, 40, 12), (33, 17, 130, 40), (5, 33, 70, 3), (1, 64, 64, 16)]


@pytest.fixture(params=GEMM_PATHS)
def path(request, monkeypatch):
    """The path of sizes above a decode step's."""
    return hold_lora_linear(monkeypatch, request.param)


def run(tensors, dy, **options):
    for t in tensors:
        t.grad = None
    with use_backend("triton"):
        y = lora_linear(*tensors[:4], SCALING, tensors[4], **options)
        y.backward(dy)
    return [y.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("M, N, K, R", SHAPES)
def test_output_and_gradients_match_fp64(M, N, K, R, dtype, masters, dropout_p, path, device):
    """Would catch a kernel handed the wrong operand, a mask that backward draws differently, a lost scaling."""
    adapter_dtype = torch.float32 if masters else dtype
    shapes = [((M, K), dtype), ((N, K), dtype), ((R, K), adapter_dtype), ((N, R), adapter_dtype)]
    tensors = [padded_randn(*s, pad=i + 1, dtype=d, device=device) for i, (s, d) in enumerate(shapes)]
    tensors.append(torch.randn(N, device=device).to(dtype))
    tensors = [t.detach().requires_grad_() for t in tensors]
    tensors[1].requires_grad_(False)
    dy = padded_randn(M, N, pad=5, dtype=dtype, device=device)
    seed = torch.tensor([1234], device=device)
    outputs = run(tensors, dy, dropout_p=dropout_p, seed=seed)

    keep = reference.dropout_mask(seed, M, K, dropout_p) if dropout_p else None
    results = lora_linear_truth(tensors, dy, SCALING, keep, dropout_p)
    # Rounded on the way: S, its base product on cuBLAS; dS, likewise; dS; S. Masters are rounded to x's dtype as well,
    # and their gradients, though fp32, carry the 16-bit roundings.
    eps = torch.finfo(dtype).eps
    base = int(path == "cublas")
    base_in_dx = int(path == "cublas")
    casts = 2 if masters else 0
    for index, rounded in ((0, 1 + base + casts), (1, 1 + base_in_dx + casts), (3, 1 + casts), (4, 1 + casts), (5, 0)):
        out, truth, magnitude = outputs[index], results[0][index], results[1][index]
        factor = eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded * factor)


def test_same_bits_on_two_runs(path, device):
    """Would catch a reduction in an order that is not fixed."""
    shapes = [(65, 70), (34, 70), (12, 70), (34, 12), (34,)]
    tensors = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
    dy, seed = torch.randn(65, 34, device=device), torch.tensor([7], device=device)
    runs = [run(tensors, dy, dropout_p=0.2, seed=seed) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("asked", [0, 2, 3])
def test_only_the_gradients_asked_for(asked, path, device):
    """Would catch a kernel that needs an operand which was not kept."""
    shapes = [(20, 24), (18, 24), (5, 24), (18, 5), (18,)]
    tensors = [torch.randn(*shape, device=device) for shape in shapes]
    full = [t.clone().requires_grad_() for t in tensors]
    tensors[asked].requires_grad_()
    dy = torch.randn(20, 18, device=device)
    alone, together = run(tensors, dy)[1 + asked], run(full, dy)[1 + asked]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_paths_agree_in_a_training_step_with_tokens_in_three_dimensions(path, device):
    """Would catch a wrong flattening of [batch, sequence, features] on the way into or out of the kernels."""
    layer = [torch.randn(s, device=device, requires_grad=True) for s in ((2, 9, 24), (18, 24), (5, 24), (18, 5), (18,))]
    dy = torch.randn(2, 9, 18, device=device)
    kernels = run(layer, dy)
    for t in layer:
        t.grad = None
    with use_backend("torch"):
        y = lora_linear(*layer[:4], SCALING, layer[4])
        y.backward(dy)
    for got, want in zip(kernels, [y.detach(), *(t.grad for t in layer)], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiled_graph_takes_the_kernels(device):
    """Would catch an operator that falls back to plain PyTorch under torch.compile."""
    layer = [torch.randn(s, device=device, requires_grad=True) for s in ((20, 24), (18, 24), (5, 24), (18, 5), (18,))]
    with use_backend("triton"):
        compiled = torch.compile(
            lambda x: lora_linear(x, *layer[1:4], SCALING, layer[4]), backend="aot_eager", fullgraph=True
        )
        y = compiled(layer[0])
        y.sum().backward()
        first = [t.grad.clone() for t in layer]
        eager = run(layer, torch.ones_like(y))
    assert torch.equal(y, eager[0])
    assert all(torch.equal(g, e) for g, e in zip(first, eager[1:], strict=True))


def test_float64_is_refused_by_name_where_kernels_are_asked_for(device):
    """Would catch a silent fallback: use_backend('triton') promises kernels or an error."""
    tensors = [torch.randn(4, 4, dtype=torch.float64, device=device) for _ in range(4)]
    with use_backend("triton"), pytest.raises(RuntimeError, match="no kernel for float64"):
        lora_linear(*tensors, SCALING)


def test_precision_follows_torch_however_it_was_set():
    """Would catch the read of torch's older switch, which raises once somebody (Trainer, say) has set the newer one;
    and "tf32" for AMD, where kernels do not compile with it."""
    script = """
import torch
from peftkern.ops._lora_linear_triton import precision
said = [precision()]
torch.backends.fp32_precision = "tf32"
said.append(precision())
torch.backends.cuda.matmul.fp32_precision = "ieee"
said.append(precision())
torch.backends.cuda.matmul.allow_tf32 = True
said.append(precision())
torch.version.hip = "7.0"
print(*said, precision())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee"], done.stderr
