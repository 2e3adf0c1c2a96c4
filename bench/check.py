"""Is it right? Asked of every implementation before it is timed; one that is wrong is reported, not timed.

Without dropout y, dX, dA and dB are compared with float64. With dropout each implementation draws a mask of its own, so
what is checked is what any mask implies: its share and scale, and that forward and all gradients used the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.workload import LinearWorkload, Subject

EPS32 = torch.finfo(torch.float32).eps


class WrongResultError(Exception):
    """An implementation's result lies outside its bound."""


@dataclass(frozen=True)
class Truth:
    """float64 results of a problem without dropout; `base` is y without the adapter."""

    y: torch.Tensor
    dx: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor
    base: torch.Tensor


def truth_of(work: LinearWorkload) -> Truth:
    """The formulas in float64, on the operands as they are stored."""
    x, w, a, b, dy = (t.detach().double() for t in (work.x, work.linear.weight, work.lora_A, work.lora_B, work.dy))
    s = work.scaling * x @ a.T
    ds = work.scaling * dy @ b
    base = x @ w.T
    return Truth(base + s @ b.T, dy @ w + ds @ a, ds.T @ x, dy.T @ s, base)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Largest accepted relative error, in the root-mean-square sense, of a sum of `terms` products.

    Four roundings to `dtype` (x A^T, the adapter's part, the sum, and one to spare) at their worst, and fp32
    accumulation whose errors add up like a random walk. The largest single error may be ten times that.
    """
    return 4.0 * (torch.finfo(dtype).eps + terms**0.5 * EPS32)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """|got - truth| / |truth| in the root-mean-square sense; infinite if something is not finite."""
    error = ((got.double() - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


def _compare(name: str, got: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, terms: int) -> float:
    if got.shape != truth.shape:
        raise WrongResultError(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    bound = tolerance(dtype, terms)
    error = relative_error(got, truth)
    worst = ((got.double() - truth).abs().max() / truth.square().mean().sqrt()).item()
    if not (error <= bound and worst <= 10 * bound):
        raise WrongResultError(
            f"{name}: relative error {error:.2e} (bound {bound:.2e}), largest {worst:.2e} (bound {10 * bound:.2e})"
        )
    return error


def check(work: LinearWorkload, truth: Truth, subject: Subject) -> dict[str, float]:
    """Relative errors by name.

    Raises:
        WrongResultError: one is outside its bound.
    """
    p = work.problem
    if len(subject.inputs) == 1:
        (dx,) = subject.forward_backward()
        base_dx = work.dy.double() @ work.linear.weight.double()
        return {
            "y": _compare("y", subject.forward().detach(), truth.base, p.dtype, p.K),
            "dX": _compare("dX", dx, base_dx, p.dtype, p.N),
        }
    if p.dropout:
        subject.module.eval()
    y, (dx, da, db) = subject.forward().detach(), subject.forward_backward()
    errors = {
        "y": _compare("y", y, truth.y, p.dtype, p.K),
        "dX": _compare("dX", dx, truth.dx, p.dtype, p.N),
        "dA": _compare("dA", da, truth.da, p.dtype, p.M + p.N),
        "dB": _compare("dB", db, truth.db, p.dtype, p.M + p.K),
    }
    if p.dropout:
        subject.module.train()
        # The same mask in every run, however many were drawn before: what is expected of one is a matter of chance.
        with torch.random.fork_rng():
            torch.manual_seed(p.M)
            y = subject.call()
        errors |= check_dropout(work, truth, y.detach(), *torch.autograd.grad(y, subject.inputs, work.dy))
    return errors


def check_dropout(
    work: LinearWorkload, truth: Truth, y: torch.Tensor, dx: torch.Tensor, da: torch.Tensor, db: torch.Tensor
) -> dict[str, float]:
    """What holds for any mask: see the module. Arguments come from one forward and backward in training mode.

    With delta = y - base and delta0 without dropout, E[delta] = delta0, and for independent normal x the root mean
    square of delta - delta0 is sqrt(p / (1 - p)) of delta0's. For one mask delta is linear in x, A and B, so row by row
    <delta, dY> = <x, dX of the adapter>, and likewise for A by column of x and for B by column of y.
    """
    p = work.problem
    x, w, a, b, dy = (t.detach().double() for t in (work.x, work.linear.weight, work.lora_A, work.lora_B, work.dy))
    delta, delta0 = y.double() - truth.base, truth.y - truth.base
    dx_adapter = dx.double() - dy @ w
    spread = (p.dropout / (1 - p.dropout)) ** 0.5
    share = ((delta * delta0).sum() / delta0.square().sum()).item()
    noise = ((delta - delta0).norm() / delta0.norm()).item()
    slack = 0.01 + 6 * spread / (p.M * min(p.R, p.N)) ** 0.5
    if abs(share - 1) > slack or abs(noise / spread - 1) > 0.2 + slack:
        raise WrongResultError(
            f"dropout {p.dropout}: the adapter's part is {share:.3f} of what it is without (expected 1 within "
            f"{slack:.3f}), its spread {noise:.3f} (expected {spread:.3f})"
        )
    pairs = {
        "mask of dX": ((x * dx_adapter).sum(1), (delta * dy).sum(1)),
        "mask of dA": ((a * da.double()).sum(0), (x * dx_adapter).sum(0)),
        "mask of dB": ((b * db.double()).sum(1), (delta * dy).sum(0)),
    }
    bound = 3 * tolerance(p.dtype, max(p.K, p.M, p.N))  # two results enter each side
    errors = {}
    for name, (got, expected) in pairs.items():
        errors[name] = relative_error(got, expected)
        if not errors[name] <= bound:
            raise WrongResultError(f"{name}: differs from forward's by {errors[name]:.2e} (bound {bound:.2e})")
    return errors
