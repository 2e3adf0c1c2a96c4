"""What is measured: problems (a shape, a rank, a dropout, a dtype), and which of them are the headline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True, slots=True)
class Problem:
    """One adapted layer at work.

    Attributes:
        name: of the shape, such as "S1".
        M, K, N, R: tokens, in_features, out_features, rank.
        dropout: probability.
        dtype: of x and the frozen weight.
        decoder: a whole Llama decoder layer in place of one linear layer (K hidden, N intermediate size).
    """

    name: str
    M: int
    K: int
    N: int
    R: int
    dropout: float
    dtype: torch.dtype
    decoder: bool = False

    @property
    def key(self) -> str:
        """Unique within a run, and readable: "S1 r16 bfloat16 dropout 0.1"."""
        end = f" dropout {self.dropout}" if self.dropout else ""
        return f"{self.name} r{self.R} {str(self.dtype).removeprefix('torch.')}{end}"


# (name, M, K, N): S1 and S2 are the two shapes that the design reckons with; M512 is where launches begin to show.
HEADLINE_SHAPES = (("S1", 8192, 4096, 4096), ("S2", 4096, 4096, 14336), ("M512", 512, 4096, 4096))
# The linear layers of Llama 3 8B: q and o, k and v, gate and up, down.
LLAMA_8B = (("q,o", 4096, 4096), ("k,v", 4096, 1024), ("gate,up", 4096, 14336), ("down", 14336, 4096))


def headline() -> list[Problem]:
    """24 cases of `lora_linear` (12 problems, forward and forward + backward) and one decoder layer."""
    bf16 = torch.bfloat16
    problems = [
        Problem(name, M, K, N, R, dropout, bf16)
        for name, M, K, N in HEADLINE_SHAPES
        for R in (16, 64)
        for dropout in (0.0, 0.1)
    ]
    return [*problems, decoder_layer(16, 0.0, bf16)]


def decoder_layer(R: int, dropout: float, dtype: torch.dtype) -> Problem:
    """One decoder layer of an 8B Llama over 4096 tokens, LoRA on all of its linear layers."""
    return Problem("Llama-8B layer", 4096, 4096, 14336, R, dropout, dtype, decoder=True)


def full() -> list[Problem]:
    """The headline, then the rest of the grid: 8B shapes, few and many tokens, other ranks and dtypes."""
    bf16 = torch.bfloat16
    grid = headline()
    for name, K, N in LLAMA_8B:
        grid += [Problem(f"8B {name} M{M}", M, K, N, 16, 0.0, bf16) for M in (1, 16, 128, 2048, 8192)]
    grid += [Problem(name, M, K, N, R, 0.0, bf16) for name, M, K, N in HEADLINE_SHAPES for R in (8, 32, 128)]
    for dtype in (torch.float16, torch.float32):
        grid += [Problem(name, M, K, N, 16, p, dtype) for name, M, K, N in HEADLINE_SHAPES for p in (0.0, 0.1)]
    grid.append(decoder_layer(16, 0.1, bf16))
    return list(dict.fromkeys(grid))


def smoke(device: torch.device) -> list[Problem]:
    """Tiny, odd problems that run the whole program in seconds; not worth measuring."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        Problem("tiny", 48, 40, 56, 4, 0.0, dtype),
        Problem("tiny", 48, 40, 56, 4, 0.1, dtype),
        Problem("tiny layer", 32, 64, 96, 4, 0.0, dtype, decoder=True),
    ]
