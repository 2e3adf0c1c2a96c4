"""Tensors, truths and bounds that the tests of `gated_lora_linear` share."""

from __future__ import annotations

import torch

from numerics import assert_rounded, padded_randn
from peftkern import reference
from peftkern.ops import dequantize, gated_lora_linear

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def bounds(gate: torch.Tensor, activation: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bounds of the partial sums of an activation and of its derivative, in fp64.

    GELU is g (1 + erf(g / sqrt 2)) / 2, whose sum cancels where g is far below 0; and so do the derivatives' sums.
    Functions are computed in fp32, so of what cancels there only fp32's share of the dtype's eps is counted.
    """
    k = (2 / torch.pi) ** 0.5
    if activation == "silu":
        part = torch.sigmoid(gate)
        steep, whole = part * (1 - part), part
    elif activation == "gelu":
        part = 0.5 * (1 + torch.erf(gate / 2**0.5))
        steep, whole = torch.exp(-(gate**2) / 2) / (2 * torch.pi) ** 0.5, torch.ones_like(gate)
    else:
        part = torch.sigmoid(2 * k * (gate + 0.044715 * gate**3))
        steep, whole = part * (1 - part) * 2 * k * (1 + 0.134145 * gate**2), torch.ones_like(gate)
    cancelled = torch.finfo(torch.float32).eps / max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    slope = (part + gate * steep).abs() + cancelled * (whole + gate.abs() * steep)
    return (gate * part).abs() + cancelled * (gate * whole).abs(), slope


class GatedProjection:
    """Random operands with NaN-padded rows, and a dy. gate reaches from -8 to 8 and holds 0."""

    def __init__(self, M, N, K, R, dtype=torch.float32, masters=False, bias=True, device="cpu", quantize=None):
        kind = torch.float32 if masters else dtype
        self.gate, self.up = (padded_randn(M, K, pad=i + 1, dtype=dtype, device=device) for i in range(2))
        self.gate[:, ::3] *= 4
        self.gate[:, ::7] = 0.0
        self.dense = padded_randn(N, K, pad=2, dtype=dtype, device=device)
        self.weight = self.dense if quantize is None else quantize(self.dense.contiguous())
        if quantize is not None:
            self.dense = dequantize(self.weight, dtype)
        self.A = padded_randn(R, K, pad=3, dtype=kind, device=device)
        self.B = padded_randn(N, R, pad=4, dtype=kind, device=device)
        self.bias = torch.randn(N, device=device).to(dtype) if bias else None
        self.dy = padded_randn(M, N, pad=5, dtype=dtype, device=device)
        self.scaling, self.dtype, self.masters = 0.75, dtype, masters
        for leaf in self.leaves:
            leaf.requires_grad_()

    @property
    def leaves(self):
        return [self.gate, self.up, self.A, self.B]

    def run(self, activation, **options):
        """y and the gradients of gate, up, A and B."""
        parts = (self.weight, self.A, self.B, self.scaling, self.bias)
        y = gated_lora_linear(self.gate, self.up, *parts, activation=activation, **options)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def truth(self, activation, keep=None, p=0.0):
        """The results of `run` in fp64, and an upper bound of the partial sums of each."""
        gate, up, A, B = (t.detach().double().requires_grad_() for t in self.leaves)
        W, dy, bias = self.dense.double(), self.dy.double(), None if self.bias is None else self.bias.double()
        h = reference.gated(gate, up, activation)
        y = reference.lora_linear(h, W, A, B, self.scaling, bias, keep, p)
        exact = [y.detach(), *torch.autograd.grad(y, (gate, up, A, B), dy)]
        act, slope = bounds(gate.detach(), activation, self.dtype)
        up, W, A, B, dy = (t.detach().abs() for t in (up, W, A, B, dy))
        h = act * up
        kept = 1.0 if keep is None else keep / (1 - p)
        dh = dy @ W + kept * self.scaling * (dy @ B @ A)
        sizes = [
            reference.lora_linear(h, W, A, B, self.scaling, None if bias is None else bias.abs(), keep, p),
            dh * up * slope,
            dh * act,
            self.scaling * (dy @ B).T @ (h * kept),
            self.scaling * dy.T @ ((h * kept) @ A.T),
        ]
        return exact, sizes

    def check(self, got, truth):
        """Every result within the bound of its arithmetic.

        Roundings on the way to y: act, h, S, the base's sum, and what masters and a mask add; to dgate and dup: dS,
        dX's sum, dh * up; to dA and dB: act, h, S or dS. fp32's functions are right to a few eps, which count as terms.
        """
        M, N = self.dy.shape
        terms = M + N + sum(self.A.shape) + 16
        for out, exact, size in zip(got, *truth, strict=True):
            factor = torch.finfo(self.dtype).eps / torch.finfo(out.dtype).eps
            assert_rounded(out, exact, size, terms=terms, rounded=(5 + 2 * self.masters) * factor)
