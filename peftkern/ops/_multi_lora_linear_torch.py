"""`multi_lora_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

The base product is one product for the whole batch. To it, in place, the adapters' parts are added group by group (see
`_adapter_groups`): for 8 adapters at 8 rows that is two batched products. Neither x nor y is copied or widened, but
where an adapter's rows do not lie together. The dropout mask is drawn again in backward from its seed. Projections of
one x (`multi_lora_linear_shared`) are served together: a group's rows are taken and masked once for all.

On a GPU this path reads ids and tables on the host, which waits for the device: kernels are for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from peftkern.ops._adapter_groups import Group
from peftkern.ops._common import in_dtype
from peftkern.ops._lora_linear_torch import Kept, _as_number, apply_mask, dense_rows, keep_mask
from peftkern_kernels.routing import slot_seed

Gradients = dict[int, list[torch.Tensor | None]]  # slot -> [dA, dB]


def masks(groups: Sequence[Group], seed: torch.Tensor | None, K: int, p: float) -> list[torch.Tensor] | list[None]:
    """The dropout mask [P * L, K] of each group's rows; an adapter's are those that its rows draw alone."""
    if seed is None:
        return [None] * len(groups)
    counts: dict[int, int] = {}
    for group in groups:
        for slot in group.slots:
            counts[slot] = counts.get(slot, 0) + group.length
    drawn = {slot: keep_mask(slot_seed(seed, slot), count, K, p) for slot, count in counts.items()}
    used = dict.fromkeys(counts, 0)
    found = []
    for group in groups:
        parts = []
        for slot in group.slots:  # an adapter's pieces come in the batch's order
            parts.append(drawn[slot][used[slot] : used[slot] + group.length])
            used[slot] += group.length
        found.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return found


@dataclass(slots=True)
class Projection:
    """One layer's part in a product over the groups; layers that share x are served together.

    Attributes:
        rows: y [M, N] in forward, added to in place; dY [M, N] in backward.
        pool_a, pool_b: in x's dtype or float32.
        scalings: of each slot.
        s: S [M, max_rank], in forward zeros that are written; None where nobody asks for it.
        wanted: slots whose gradients are asked for; [dA, dB] of each are added up there, in the pools' dtype.
    """

    rows: torch.Tensor
    pool_a: torch.Tensor
    pool_b: torch.Tensor
    scalings: Sequence[float]
    s: Kept
    wanted: Gradients = field(default_factory=dict)


def add_adapters(
    x: torch.Tensor,
    projections: Sequence[Projection],
    groups: Sequence[Group],
    kept: Sequence[torch.Tensor | None],
    p: float,
    wide: bool,
) -> None:
    """Adds the adapters' parts to each y in place, and writes S = scaling * dropout(x) A^T.

    A group's rows of x are taken and masked once, whatever the number of projections.

    Args:
        x: [M, K] in y's dtype.
        kept: the mask of each group, or None.
        wide: multiply in fp32.
    """
    work = torch.float32 if wide else x.dtype
    for group, mask in zip(groups, kept, strict=True):
        P, L, rows = len(group.slots), group.length, group.rows
        part = take(x, rows)
        if part.dtype != work:
            part = part.to(work)
        if mask is not None:
            part = apply_mask(part, mask)
        for each in projections:
            a = in_dtype(group.factors_a(each.pool_a), work)
            b = in_dtype(group.factors_b(each.pool_b, each.rows.shape[1]), work)
            low = torch.bmm(part.view(P, L, -1), a.transpose(1, 2))
            scale = scale_of(group, each.scalings, p if mask is not None else 0.0, low)
            if isinstance(scale, torch.Tensor):
                low, scale = low.mul_(scale), 1.0
            if each.s is not None:
                _write(each.s, rows, group.rank, low * scale)
            add_products(each.rows, rows, [(low, b.transpose(1, 2))], None, wide, scale)


def backward(
    x: Kept,
    dx: torch.Tensor | None,
    projections: Sequence[Projection],
    groups: Sequence[Group],
    kept: Sequence[torch.Tensor | None],
    p: float,
    wide: bool,
) -> None:
    """Adds the adapters' parts of all projections to dx [M, K] in place, and their gradients into each's `wanted`.

    A group's rows of x and of dx are taken and masked once, as in `add_adapters`.
    """
    for group, mask in zip(groups, kept, strict=True):
        P, L, rows = len(group.slots), group.length, group.rows
        seen: Kept = None
        products = []
        for each in projections:
            needs = any(slot in each.wanted for slot in group.slots)
            if not needs and dx is None:
                continue
            dy, pool_a, pool_b = each.rows, each.pool_a, each.pool_b
            N, K = dy.shape[1], pool_a.shape[1]
            work = torch.float32 if wide else dy.dtype
            part = in_dtype(take(dy, rows), work).view(P, L, N)
            b = in_dtype(group.factors_b(pool_b, N), work)
            low = torch.bmm(part, b)
            low.mul_(scale_of(group, each.scalings, p if mask is not None else 0.0, low))
            if dx is not None:
                products.append((low, in_dtype(group.factors_a(pool_a), work)))
            if needs:
                if seen is None:
                    seen = in_dtype(take(x, rows), work)
                    seen = seen if mask is None else apply_mask(seen, mask)
                da = torch.bmm(low.transpose(1, 2), seen.view(P, L, K))
                s_part = take(each.s, rows)[:, : group.rank]
                db = torch.bmm(part.transpose(1, 2), in_dtype(s_part, work).view(P, L, group.rank))
                _collect(each.wanted, group.slots, in_dtype(da, pool_a.dtype), in_dtype(db, pool_b.dtype))
        if dx is not None and products:
            add_products(dx, rows, products, mask, wide)


def add_products(
    out: torch.Tensor,
    rows: slice | torch.Tensor,
    products: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mask: Kept,
    wide: bool,
    alpha: float = 1.0,
) -> None:
    """Adds alpha * low [P, L, r] x factor [P, r, C], summed, where the mask keeps it, to the rows of out [M, C]."""
    P, L, _ = products[0][0].shape
    C = out.shape[1]
    # Rows that do not lie together are taken out and put back: `index_add_` takes far longer on a CPU.
    part = _lying(out, rows) if isinstance(rows, slice) else out.index_select(0, rows)
    if mask is None and not wide:
        for low, factor in products:
            part.view(P, L, C).baddbmm_(low, factor, alpha=alpha)
    else:
        added = torch.bmm(*products[0])
        for low, factor in products[1:]:
            added.baddbmm_(low, factor)
        added = added.view(-1, C)
        part.add_(added if mask is None else added.mul_(_as_number(mask, added.dtype)), alpha=alpha)
    if not isinstance(rows, slice):
        out.index_copy_(0, rows, part)


def _collect(wanted: Gradients, slots: Sequence[int], da: torch.Tensor, db: torch.Tensor) -> None:
    """Adds [P, r, K] and [P, N, r] to the gradients of the slots that they are of."""
    for slot, *parts in zip(slots, da.unbind(0), db.unbind(0), strict=True):
        sums = wanted.get(slot)
        if sums is None:
            continue
        for i, part in enumerate(parts):
            have = sums[i]
            # Out of place: the first was a view of a group's whole.
            sums[i] = part if have is None else have + part


def take(t: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """These rows of t [M, C], as a product's operand: a view where they lie together."""
    return dense_rows(_lying(t, rows)) if isinstance(rows, slice) else t.index_select(0, rows)


def _lying(t: torch.Tensor, rows: slice) -> torch.Tensor:
    """t[rows]; t itself, which costs nothing, where these are all."""
    return t if rows.start == 0 and rows.stop == t.shape[0] else t[rows]


def scale_of(group: Group, scalings: Sequence[float], p: float, like: torch.Tensor) -> float | torch.Tensor:
    """What multiplies S of each piece: a number, or [P, 1, 1]."""
    numbers = [scalings[slot] for slot in group.slots]
    if numbers.count(numbers[0]) == len(numbers):
        return numbers[0] / (1.0 - p)
    numbers = [number / (1.0 - p) for number in numbers]
    wide = torch.promote_types(like.dtype, torch.float32)  # as exact as one number for all
    return torch.tensor(numbers, dtype=wide, device=like.device).to(like.dtype)[:, None, None]


def _write(s: torch.Tensor, rows: slice | torch.Tensor, rank: int, low: torch.Tensor) -> None:
    flat = in_dtype(low, s.dtype).view(-1, rank)
    if isinstance(rows, slice):
        s[rows, :rank] = flat
    else:
        s[:, :rank].index_copy_(0, rows, flat)
