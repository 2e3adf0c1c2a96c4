"""Principal components of rows that come in batches, without keeping them (Ross et al. 2008, "Incremental learning for
robust visual tracking").

Of n rows seen, what is kept is their mean, the sum of their squared distances from it, and the k largest singular
values S and right singular vectors V of the centred rows. A batch X of m rows with mean x turns them into those of

    [S V; X - x; sqrt(n m / (n + m)) (mean - x)]

found by `torch.svd_lowrank` from vectors drawn with one seed, whatever state torch's generator is in. Draws, dtypes and
signs are those of PEFT 0.21.2, so that the same batches give the same components.
"""

from __future__ import annotations

import torch

_SEED = 42
_ITERATIONS = 4


class RunningSvd:
    """Components of what `add` was given so far.

    Args:
        k: How many.

    Attributes:
        components: [k, K], rows of norm 1, the largest singular value first; None before the first batch.
        singular_values: [k].
        explained: [k], each component's share of the variance.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.components: torch.Tensor | None = None
        self.singular_values: torch.Tensor
        self.explained: torch.Tensor
        self._n = 0
        self._mean: torch.Tensor
        self._spread: torch.Tensor

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Takes in a batch [m, K], float32, m >= k; not changed."""
        m = x.shape[0]
        mean = x.sum(0, dtype=torch.float64) / m
        spread = (x - mean).square().sum(0, dtype=torch.float64)
        if self.components is None:
            rows = (x - mean).to(x.dtype)
            self._mean, self._spread = mean, spread
        else:
            own = x.mean(0)
            moved = (self._n * m / (self._n + m)) ** 0.5 * (self._mean - own)
            rows = torch.vstack([self.singular_values[:, None] * self.components, x - own, moved])
            self._spread = self._spread + spread + self._n * m / (self._n + m) * (self._mean - mean).square()
            self._mean = (self._n * self._mean + m * mean) / (self._n + m)
        self._n += m
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            _, S, V = torch.svd_lowrank(rows, 2 * self.k, _ITERATIONS)
        Vh = V.mH
        largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
        self.components = (Vh * largest.sign())[: self.k]
        self.singular_values = S[: self.k]
        self.explained = (S.square() / self._spread.sum())[: self.k]
