"""The interpreter's check of addresses finds what it is there for, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402


@triton.jit
def _copy(x_ptr, out_ptr, first, stop, BLOCK: tl.constexpr, UNMASKED: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs) if UNMASKED else tl.load(x_ptr + offs, mask=offs < stop, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < stop)


@triton.jit
def _copy_by_descriptor(x, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], x.load([0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_lanes_that_are_masked_off_may_point_anywhere(dtype):
    """Bugs: a check that refuses right kernels, or that changes what they compute."""
    x, out = torch.arange(5).to(dtype), torch.zeros(5, dtype=dtype)
    _copy[(1,)](x, out, 0, 5, BLOCK=8, UNMASKED=False)
    assert torch.equal(x, out)
    _copy[(1,)](x, out, 10**9, 5, BLOCK=8, UNMASKED=False)


@pytest.mark.parametrize(
    "first, stop, unmasked, message",
    [
        (0, 5, True, "load outside the arguments, 4 bytes past x_ptr, in 3 of 8 lanes"),
        (-1, 5, False, "load outside the arguments, 4 bytes before x_ptr, in 1 of 8 lanes"),
        (0, 6, False, "load outside the arguments, 4 bytes past x_ptr, in 1 of 8 lanes"),
    ],
)
def test_a_wild_load_is_refused(first, stop, unmasked, message):
    """Bugs: a check that rounds a view up to its storage, looks at the first lane only, or at unmasked loads only."""
    storage = torch.zeros(64)
    x, out = storage[16:21], torch.zeros(64)
    with pytest.raises(Exception, match=message):
        _copy[(1,)](x, out, first, stop, BLOCK=8, UNMASKED=unmasked)


def test_a_wild_store_is_refused():
    """Bugs: loads alone are checked."""
    with pytest.raises(Exception, match="_copy: store outside the arguments, 4 bytes past out_ptr"):
        _copy[(1,)](torch.zeros(8), torch.zeros(12)[:7], 0, 8, BLOCK=8, UNMASKED=False)


def test_descriptors_have_memory_too():
    """Bugs: a kernel with a tensor descriptor whose loads are all refused."""
    x, out = torch.randn(16, 16), torch.zeros(16, 16)
    _copy_by_descriptor[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, BLOCK=16)
    assert torch.equal(x, out)
