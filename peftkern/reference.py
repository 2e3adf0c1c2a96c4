"""What each operation means, in a few lines of plain PyTorch: the oracle of every test.

Nothing here is fast, and everything works in float64, save quantized formats, which say how they round. Formulas use
the names of the kernels: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftkern.weights import Weight4bit, Weight8bit
from peftkern_kernels.routing import slot_seed

# Philox-4x32 constants: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
DROPOUT_ROUNDS = 7


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`y = x W^T + bias + scaling * (keep * x / (1 - p)) A^T B^T`.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N] or None; keep, of x's shape, or None.
    """
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    y = x @ weight.T + scaling * (dropped @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate) * up` for "silu", "gelu" (by erf) or "gelu_tanh" (its approximation)."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def ia3_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """`(x W^T + bias) * scale` with scale [N] (or [..., N]); feed-forward: `(x * scale) W^T + bias` with scale [K].

    x [..., K], weight [N, K], bias [N] or None.
    """
    z = (x * scale if is_feedforward else x) @ weight.T
    if bias is not None:
        z = z + bias
    return z if is_feedforward else z * scale


def multi_ia3_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """`ia3_linear` with `scales[ids]` for each row; scales [slots, N] or [slots, K], ids [...] with -1 for ones."""
    rows = torch.cat([scales, torch.ones_like(scales[:1])])[ids.long()]
    return ia3_linear(x, weight, rows, bias, is_feedforward=is_feedforward)


def multi_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None],
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`y[m] = x[m] W^T + bias + scaling[i] * (keep * x / (1 - p))[m] A_i^T B_i^T`, `i = ids[m]`.

    x [M, K], weight [N, K], bias [N] or None; adapters: (A [r, K], B [N, r], scaling) or None for each slot, any r;
    ids: int [M]. An id that is no slot, or that of an empty one, is the base alone.
    """
    y = x @ weight.T if bias is None else x @ weight.T + bias
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            lora_A, lora_B, scaling = adapter
            y = y + (ids == slot)[:, None] * (scaling * (dropped @ lora_A.T) @ lora_B.T)
    return y


def grouped_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y[t] = x[t] W_e^T + b_e + scaling * (x[t] A_e^T) B_e^T`, e the expert of row t; 0 for rows of no expert.

    x [T, K], rows sorted by expert; offsets int [E], the end of each expert's rows; weight [E, N, K], lora_A [E, R, K],
    lora_B [E, N, R] (both None: the experts alone), bias [E, N] or None.
    """
    parts, start = [], 0
    for expert, stop in enumerate(offsets.tolist()):
        rows = x[start:stop]
        y = rows @ weight[expert].T if bias is None else rows @ weight[expert].T + bias[expert]
        if lora_A is not None and lora_B is not None:
            y = y + scaling * (rows @ lora_A[expert].T) @ lora_B[expert].T
        parts.append(y)
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[1])])


def lora_embedding(
    input: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`y = W[i] + scaling * A[:, i]^T B^T`; input [...] int, W [V, E], A [R, V], B [E, R] -> y [..., E]."""
    return weight[input] + scaling * lora_A.T[input] @ lora_B.T


def _philox_4x32(counter: list[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Philox-4x32 on int64 tensors that hold unsigned 32-bit words."""

    def multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The 64-bit product of two 32-bit words does not fit int64's sign, so halves of b are multiplied.
        high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
        return high & _MASK32, (a * b) & _MASK32

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(DROPOUT_ROUNDS):
        high0, low0 = multiply(_PHILOX_M0, c0)
        high1, low1 = multiply(_PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """The number below which 16 random bits drop their element: `round(p * 2^16)`."""
    return round(p * 2**16)


def dropout_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """The mask that every kernel draws: a pure function of (seed, row, column), True where the element is kept.

    Bits 16 (k % 8) and up, 16 of them, of the 128 of `philox_4x32_7(key = seed, counter = (k // 8, m, 0, 0))` are
    compared with `round(p * 2^16)`. Kernels with different tiles therefore agree, and nothing but the seed need be
    stored. p counts in steps of 2^-16.

    Args:
        seed: int64 tensor of one element.
        M, K: rows and columns.
        p: probability of dropping, in [0, 1).

    Returns:
        bool [M, K] on the seed's device.
    """
    seed = seed.reshape(()).to(torch.int64)
    groups = -(-K // 8)
    columns = torch.arange(groups, device=seed.device).expand(M, groups)
    rows = torch.arange(M, device=seed.device)[:, None].expand(M, groups)
    zero = torch.zeros_like(columns)
    words = _philox_4x32([columns, rows, zero, zero], (seed & _MASK32, (seed >> 32) & _MASK32))
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return bits.reshape(M, groups * 8)[:, :K] >= dropout_threshold(p)


def multi_dropout_mask(seed: torch.Tensor, ids: torch.Tensor, K: int, p: float) -> torch.Tensor:
    """The mask for rows of many adapters: those of one slot draw `dropout_mask(slot_seed(seed, slot), ...)`.

    So an adapter's rows draw the same mask whatever other rows lie between them, and two adapters draw different ones.
    Rows without an adapter drop nothing.

    Args:
        seed: int64 tensor of one element.
        ids: int [M], the slot of each row or a negative number.
        K, p: as for `dropout_mask`.

    Returns:
        bool [M, K] on the seed's device.
    """
    mask = torch.ones(ids.numel(), K, dtype=torch.bool, device=seed.device)
    for slot in ids[ids >= 0].unique().tolist():
        mine = ids == slot
        mask[mine] = dropout_mask(slot_seed(seed, slot), int(mine.sum()), K, p)
    return mask


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """`w[i] = round(code[nibble of i] * s[i // blocksize])` as `peftkern.weights` has it; [N, K] of `dtype`.

    Worked out in float32, with the roundings that the format names: its bits are the truth.
    """
    i = torch.arange(weight.shape.numel(), device=weight.device)
    byte = weight.packed[i // 2].long()
    nibble = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    block = i // weight.blocksize
    scale = weight.absmax[block]
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.offset is not None:
        scale = weight.nested_code[scale.long()] * weight.nested_absmax[block // 256] + weight.offset
    return (weight.code[nibble] * scale).to(dtype).view(weight.shape)


def dequantize_8bit(weight: Weight8bit, dtype: torch.dtype) -> torch.Tensor:
    """`w[n, k] = round(data[n, k] * fl(scale[n] * fl(1 / 127)))` in float32; [N, K] of `dtype`."""
    step = weight.scale * torch.tensor(1 / 127, dtype=torch.float32, device=weight.device)
    return (weight.data.float() * step[:, None]).to(dtype)
