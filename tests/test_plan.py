"""`ops.plan` as a pure function: which path for which sizes, dtypes and device, and that the reason is in words."""

from __future__ import annotations

import pytest
import torch

from peftkern.backend import DeviceInfo
from peftkern.ops.plan import SMALL_PRODUCT, plan_lora_embedding, plan_lora_linear

NATIVE_CPU = DeviceInfo("cpu", 0, "no CPU backend")
SCALAR_CPU = DeviceInfo("cpu", 0, "no CPU backend", (torch.bfloat16, torch.float16))
HOPPER = DeviceInfo("cuda", 90)
OLD = DeviceInfo("cuda", 75, "sm_75 is older than sm_80")


def path(M, N=4096, K=4096, R=16, dtype=torch.bfloat16, device=HOPPER, aligned=True, backend="auto"):
    plan = plan_lora_linear(M, N, K, R, dtype, device, aligned, backend)
    assert plan.reason
    return plan.path


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, 942, 1100])
def test_sixteen_bits_take_kernels(arch):
    """Would catch an architecture that falls back silently."""
    device = DeviceInfo("cuda", arch)
    assert path(8192, device=device) == "triton"
    assert path(17, device=device) == ("cublas" if arch == 90 else "triton")
    assert path(16, device=device) == "decode"
    assert path(1, device=device, dtype=torch.float16) == "decode"


def test_cublas_where_triton_has_no_matrix_instruction_or_no_aligned_rows():
    """Would catch fp32 on FFMA in Triton, and synchronous loads at large sizes."""
    assert path(8192, dtype=torch.float32) == "cublas"
    assert path(8192, K=4095, aligned=False) == "cublas"
    assert path(64, K=4095, device=DeviceInfo("cuda", 89), aligned=False) == "triton"


def test_plain_path_elsewhere():
    """Would catch kernels on devices that they were not compiled for."""
    assert path(8192, device=OLD) == "torch"
    assert path(8192, dtype=torch.float64) == "torch"
    assert path(0) == "torch"
    assert path(8192, backend="torch") == "torch"
    assert path(8192, device=DeviceInfo("mps", 0, "no kernels for device type mps")) == "torch"


def test_cpu_without_16_bit_matrix_instructions():
    """Would catch scalar loops over 16-bit matrices, and casts around products too small to be worth them."""
    assert path(512, device=NATIVE_CPU) == "torch"
    assert path(512, device=SCALAR_CPU) == "torch_fp32"
    assert path(512, device=SCALAR_CPU, backend="torch") == "torch_fp32"
    assert path(512, device=SCALAR_CPU, dtype=torch.float32) == "torch"
    assert path(1, SMALL_PRODUCT, 1, device=SCALAR_CPU) == "torch"
    assert path(1, SMALL_PRODUCT + 1, 1, device=SCALAR_CPU) == "torch_fp32"


@pytest.mark.parametrize("device", [NATIVE_CPU, OLD])
def test_kernels_asked_for_where_they_cannot_run(device):
    """Would catch a silent fallback under use_backend('triton')."""
    with pytest.raises(RuntimeError, match="use_backend\\('triton'\\)"):
        path(64, device=device, backend="triton")
    with pytest.raises(RuntimeError, match="use_backend\\('triton'\\)"):
        plan_lora_embedding(64, torch.bfloat16, device, "triton")


def test_embedding():
    """Would catch the embedding's plan drifting from the linear layer's."""
    assert plan_lora_embedding(64, torch.bfloat16, HOPPER).path == "triton"
    assert plan_lora_embedding(0, torch.bfloat16, HOPPER).path == "torch"
    assert plan_lora_embedding(64, torch.float64, HOPPER).path == "torch"
    assert plan_lora_embedding(64, torch.float32, NATIVE_CPU).path == "torch"
