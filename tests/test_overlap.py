"""Launches that run beside the persistent GEMM: where it waits, what may stand before it, and that results stay."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench.static_cases_4bit import weight_on_meta  # noqa: E402
from numerics import arch_of  # noqa: E402
from peftkern.ops._lora_linear_triton import backward_calls, forward_calls  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.gemm_tables import Tile  # noqa: E402
from peftkern_kernels.launch import Call, run_all  # noqa: E402
from peftkern_kernels.lora_linear_persistent import late_step, persistent_calls  # noqa: E402
from peftkern_kernels.lora_shrink import shrink_calls  # noqa: E402

SMALL = Tile(16, 32, 16, 4, 1, group_m=2, tma=True, persistent=True)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_wait_stands_before_s_can_be_loaded(num_stages):
    """Catches a wait behind the first load of S, which is issued num_stages - 1 steps ahead, and one that never comes
    because its step is not of the first tile."""
    for base_steps in range(1, 70):
        step = late_step(base_steps, num_stages)
        assert (step is None) == (base_steps < num_stages + 1)
        if step is not None:
            assert 0 <= step < base_steps and step + num_stages <= base_steps


def test_a_late_wait_changes_no_bit(device):
    """Catches a wait in place of a step, and a shrink of other rows than its programs'."""
    M, N, K, R, arch = 300, 96, 112, 16, arch_of(device)
    shapes = {"x": (M, K), "w": (N, K), "a": (R, K), "b": (N, R)}
    x, w, a, b = (torch.randn(shape, device=device).half() for shape in shapes.values())
    s, early, late = (torch.empty(M, width, dtype=torch.float16, device=device) for width in (R, N, N))
    run_all(shrink_calls(x, a, s, scaling=0.5, beside=True, arch=arch))
    for waits_late, y in ((False, early), (True, late)):
        options = {"bias": None, "tile": SMALL, "arch": arch, "precision": "ieee"}
        run_all(persistent_calls(x, w, s, b, y, late=waits_late, **options))
    assert torch.equal(early, late)
    truth = x.double() @ w.double().t() + 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    torch.testing.assert_close(late.double(), truth, rtol=4e-3, atol=0.1)


def layer_calls(M=8192, N=4096, K=4096, R=16, p=0.0, arch=90, path="triton", weight=None, masters=False):
    """The launches of forward and backward on the meta device."""
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    weight = x.new_empty(N, K) if weight is None else weight
    dtype = torch.float32 if masters else x.dtype
    A, B = x.new_empty(R, K, dtype=dtype), x.new_empty(N, R, dtype=dtype)
    drop = Dropout(torch.empty(1, dtype=torch.int64, device="meta"), p) if p else None
    y, s, forward = forward_calls(x, weight, A, B, 2.0, None, drop, path, arch)
    *_, backward = backward_calls(torch.empty_like(y), x, weight, A, B, s, 2.0, drop, path, arch, (True, True, True))
    return [[call for call in calls if isinstance(call, Call)] for calls in (forward, backward)]


def late_gemms(calls):
    """The GEMMs that wait late, each with the first launch of its list."""
    return [(calls[0], call) for call in calls if call.args.get("wait_step") is not None]


@pytest.mark.parametrize("R", [16, 32, 48, 64])
@pytest.mark.parametrize("M, N, K", [(8192, 4096, 4096), (4096, 14336, 4096)])
def test_hopper_s_gemm_waits_late_for_a_shrink_that_waits_first(M, N, K, R):
    """Catches a GEMM that could begin while what makes x still runs: a shrink that lets it before its own wait."""
    for calls in layer_calls(M, N, K, R):
        ((first, gemm),) = late_gemms(calls)
        assert first.constants["WAIT_FIRST"] and first is calls[0]
        between = calls[1 : calls.index(gemm)]
        assert all(call.options.get("launch_pdl") for call in between), "a link of the chain that waits for nobody"


def test_a_weight_that_is_written_out_in_between_is_waited_for():
    """Catches a GEMM that reads W while the launch before it still writes W."""
    weight = weight_on_meta(4096, 4096, blocksize=64, nested=True)
    for calls in layer_calls(weight=weight, path="dequantize:triton"):
        assert [call.name for call in calls].count("dequantize") == 1 and not late_gemms(calls)


@pytest.mark.parametrize(
    "case",
    [
        {"p": 0.1},
        {"masters": True},
        {"M": 2048},
        {"M": 40000},
        {"R": 8},
        {"R": 24},
        {"R": 128},
        {"arch": 80},
        {"arch": 100},
        {"path": "cublas"},
    ],
    ids=str,
)
def test_elsewhere_it_waits_first(case):
    """Catches a late wait behind dropout, whose tiles begin with S, and where it is slower or was not measured."""
    for calls in layer_calls(**case):
        assert not late_gemms(calls)
        assert not any(call.constants.get("WAIT_FIRST") for call in calls)
