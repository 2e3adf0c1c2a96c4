"""What tests share: awkward tensors, and the bound that a correctly rounded result must keep."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftkern import reference

EPS32 = torch.finfo(torch.float32).eps


def arch_of(device: str) -> int:
    """The kernels' number for where a test runs: 0 in the interpreter, else the GPU's compute capability times ten."""
    if device == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def padded_randn(
    *shape: int, pad: int, dtype: torch.dtype, device: str = "cpu", seed: int | None = None
) -> torch.Tensor:
    """A matrix of normal numbers that is a view into a larger one filled with NaN.

    Reading past a row's end, or assuming that rows are contiguous, then shows up as NaN in the result.
    """
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    *rows, columns = shape
    storage = torch.full((*rows, columns + pad), float("nan"), dtype=dtype, device=device)
    view = storage[..., :columns]
    view.copy_(torch.randn(*shape, generator=generator).to(dtype))
    return view


def canvas(M: int, C: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN [M + 1, C + 3]: what is stored past M or C shows."""
    return torch.full((M + 1, C + 3), float("nan"), dtype=dtype, device=device)


def untouched(out: torch.Tensor, M: int, C: int) -> bool:
    """Whether nothing of a `canvas` but [M, C] was stored to."""
    return bool(out[M].isnan().all() and out[:M, C:].isnan().all())


def lora_linear_truth(
    tensors: list[torch.Tensor], dy: torch.Tensor, scaling: float, keep: torch.Tensor | None, p: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y and the gradients of x, weight, A, B and bias (`tensors`) in fp64: the truth, and the magnitude for
    `assert_rounded`."""

    def exact(transform: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        wide = [transform(t.detach().double()).requires_grad_() for t in tensors]
        y = reference.lora_linear(*wide[:4], scaling, wide[4], keep, p)
        y.backward(transform(dy.detach().double()))
        return [y.detach(), *(t.grad for t in wide)]

    return exact(lambda t: t), exact(torch.abs)


def assert_rounded(
    out: torch.Tensor,
    truth: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    terms: int,
    rounded: float = 0.0,
    accumulate_eps: float | None = None,
) -> None:
    """Assert that `out` is `truth` up to the errors that its arithmetic implies, and no more.

    The bound, elementwise, with eps the spacing at 1 of `out`'s dtype:
        eps/2 * |truth|  +  terms * eps_acc * magnitude  +  rounded * eps/2 * magnitude
    the store's rounding, the accumulation of `terms` products in fp32 (fp64 for fp64 results), and one term for each
    intermediate that is rounded to the dtype on the way (`rounded` counts them: S, dS, cast A and B).

    Args:
        out: result under test.
        truth: the same formula in fp64.
        magnitude: the same formula in fp64 on absolute values: an upper bound of every partial sum.
        terms: number of products added for one element.
        rounded: intermediates rounded to `out`'s dtype; fractions where only part of the magnitude passes through.
        accumulate_eps: eps of the accumulator, fp32's by default.
    """
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} elements are not finite"
    info = torch.finfo(out.dtype)
    accumulate = accumulate_eps if accumulate_eps is not None else min(EPS32, info.eps)
    if out.dtype == torch.float64:
        accumulate = info.eps
    bound = info.eps / 2 * truth.abs() + (terms * accumulate + rounded * info.eps / 2) * magnitude
    bound = bound + info.smallest_normal * info.eps * (1 + rounded)  # half a step among subnormals
    error = (out.double() - truth).abs()
    worst = (error - bound).argmax()
    at = tuple(int(i) for i in torch.unravel_index(worst, error.shape)) if error.numel() else ()
    assert (error <= bound).all(), (
        f"at {at}: got {out[at].item()!r}, truth {truth[at].item()!r}, error {error[at].item():.3e}, "
        f"bound {bound[at].item():.3e}; {int((error > bound).sum())} of {error.numel()} elements are outside"
    )
