"""On a GPU: the persistent GEMM waits late for the shrink beside it, and reads nothing before it is there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of  # noqa: E402
from peftkern.ops import lora_linear  # noqa: E402
from peftkern.ops._lora_linear_triton import backward_calls, forward_calls  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.reduce import PlaneSum, reduce_calls  # noqa: E402

pytestmark = pytest.mark.gpu
REPETITIONS = 60


def refill(t, device):
    """Launches that write t anew, and let the next begin before they have."""
    return reduce_calls([PlaneSum(t.float()[None], t)], arch=arch_of(device))


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("R", [16, 32, 64])
@pytest.mark.parametrize("M, N, K", [(8192, 4096, 4096), (4096, 14336, 4096)])
def test_same_bits_while_the_input_is_written_just_before_and_just_behind(M, N, K, R, masters, device):
    """Catches x, W, S or the cast factor read before it is there, and x read after the launches are over."""
    arch, half = arch_of(device), torch.bfloat16
    x, dy = (torch.randn(M, width, device=device).to(half) for width in (K, N))
    w = (torch.randn(N, K, device=device) / K**0.5).to(half)
    dtype = torch.float32 if masters else half
    A, B = (torch.randn(R, K, device=device) / K**0.5).to(dtype), (torch.randn(N, R, device=device) / R**0.5).to(dtype)
    y, s, forward = forward_calls(x, w, A, B, 2.0, None, None, "triton", arch)
    dx, da, db, backward = backward_calls(dy, x, w, A, B, s, 2.0, None, "triton", arch, (True, True, True))
    for calls in (forward, backward):
        for call in calls:
            call.run()
            torch.cuda.synchronize()
    results = (y, s, dx, da, db)
    apart = [t.clone() for t in results]
    truth = x.float() @ w.float().t() + 2.0 * (x.float() @ A.float().t()) @ B.float().t()
    assert ((y.float() - truth).norm() / truth.norm()).item() < 6e-3
    anew, anew_dy = refill(x, device), refill(dy, device)
    differs = torch.zeros(REPETITIONS, dtype=torch.bool, device=device)
    for i in range(REPETITIONS):
        for t in results:
            t.fill_(float("nan"))
        x.fill_(float("nan"))
        dy.fill_(float("nan"))
        run_all([*anew, *forward])
        x.fill_(float("nan"))
        run_all([*anew, *anew_dy, *backward])
        dy.fill_(float("nan"))
        differs[i] = torch.stack([(t != before).any() for t, before in zip(results, apart, strict=True)]).any()
    assert not differs.any(), f"{int(differs.sum())} of {REPETITIONS} runs"


def test_two_layers_one_after_the_other_from_recordings(device):
    """Catches y of one layer read by the next before it is there, in launches that are replayed."""
    M, K, R = 8192, 4096, 16
    x = torch.randn(M, K, device=device).bfloat16().requires_grad_()
    w = [(torch.randn(K, K, device=device) / K**0.5).bfloat16() for _ in range(2)]
    A = [(torch.randn(R, K, device=device) / K**0.5).bfloat16().requires_grad_() for _ in range(2)]
    B = [(torch.randn(K, R, device=device) / R**0.5).bfloat16().requires_grad_() for _ in range(2)]
    seen = []
    for _ in range(12):
        y = x
        for weight, a, b in zip(w, A, B, strict=True):
            y = lora_linear(y, weight, a, b, 0.5)
        seen.append([y.detach(), *torch.autograd.grad(y, [x, *A, *B], torch.ones_like(y))])
    assert all(torch.equal(first, other) for run in seen[1:] for first, other in zip(seen[0], run, strict=True))
