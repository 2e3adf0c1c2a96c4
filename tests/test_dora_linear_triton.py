"""`ops.dora_linear` on Triton kernels: every path, forward and every gradient, through the public operation.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from dora_data import check, make
from numerics import padded_randn
from peftkern import reference
from peftkern.ops.plan import Plan
from test_dora_linear import run

MODULE = importlib.import_module("peftkern.ops.dora_linear")


@pytest.fixture(params=["triton", "cublas", "decode"])
def path(request, monkeypatch):
    """The path, whatever the plan would choose for so few tokens."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(request.param, "forced by a test"))
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, masters", [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("M, N, K, R", [(65, 34, 40, 5), (7, 5, 70, 20)])
def test_output_and_gradients_match_fp64(M, N, K, R, dtype, masters, p, path, device):
    """Would catch a kernel handed the wrong operand, dropout of the wrong part, c on one product of the two."""
    if path == "decode" and M > 16:
        pytest.skip("decodes at most 16 tokens")
    tensors = make(M, N, K, R, dtype, masters=masters, device=device)
    dy, seed = padded_randn(M, N, pad=5, dtype=dtype, device=device), torch.tensor([11], device=device)
    outputs = run(tensors, dy, dropout_p=p, seed=seed)
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    check(outputs, tensors, dy, keep, p, extra=2)  # A and B are rounded in the norm too
