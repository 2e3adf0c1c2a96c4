"""The loss of a batch of many adapters, such that each is trained as if its rows were alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def per_adapter_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    adapter_names: Sequence[str],
    *,
    ignore_index: int = -100,
    shift: bool = True,
) -> dict[str, torch.Tensor]:
    """Each adapter's mean cross-entropy (nats a token) over its own rows' labels.

    A model's own loss is the mean over the whole batch, so that an adapter with a few short rows would learn as if
    from a small part of a batch. The sum of these has, for each adapter, the gradient of that adapter's run alone:

        sum(per_adapter_loss(logits, labels, names).values()).backward()

    Args:
        logits: [batch, tokens, vocabulary] of any float dtype, or [rows, classes] with labels [rows] and `shift=False`.
        labels: int64 [batch, tokens].
        adapter_names: the adapter of each row; "__base__" for the base alone, whose loss is one more in the result.
        ignore_index: a label that is not counted.
        shift: whether the label of token t + 1 is what the logits of token t predict, as in a language model.

    Returns:
        A float32 scalar for each name, in order of appearance; 0 for one whose rows have no label.

    Raises:
        TypeError: `adapter_names` is no list of names, or an argument's type or dtype is not one of the above.
        ValueError: shapes or devices do not fit each other.
    """
    _check(logits, labels, ignore_index)
    listed = isinstance(adapter_names, Sequence) and not isinstance(adapter_names, str)
    if not listed or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
    if len(adapter_names) != labels.shape[0]:
        expected, got = labels.shape[0], len(adapter_names)
        raise ValueError(f"adapter_names: expected one for each of {expected} rows, got {got}")
    names = list(dict.fromkeys(adapter_names))
    if not names:
        return {}
    slots = {name: slot for slot, name in enumerate(names)}
    ids = torch.tensor([slots[name] for name in adapter_names], dtype=torch.int64, device=logits.device)
    losses = per_slot_loss(logits, labels, ids, len(names), ignore_index=ignore_index, shift=shift)
    return dict(zip(names, losses.unbind(), strict=True))


def per_slot_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    adapter_ids: torch.Tensor,
    slots: int,
    *,
    ignore_index: int = -100,
    shift: bool = True,
) -> torch.Tensor:
    """`per_adapter_loss` by slots, without waiting for the device: float32 [slots].

    Rows whose id is no slot, such as -1, count nowhere. Arguments otherwise as there; adapter_ids: int [batch].

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes or devices do not fit each other, or `slots` is not positive.
    """
    _check(logits, labels, ignore_index)
    if not isinstance(adapter_ids, torch.Tensor):
        raise TypeError(f"adapter_ids: expected a tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.dtype == torch.bool or adapter_ids.is_floating_point() or adapter_ids.is_complex():
        raise TypeError(f"adapter_ids: expected integers, got {adapter_ids.dtype}")
    if adapter_ids.device != logits.device:
        raise ValueError(f"adapter_ids: expected device {logits.device} as logits, got {adapter_ids.device}")
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ValueError(f"slots: expected an int of at least 1, got {slots!r}")
    if adapter_ids.dim() != 1 or adapter_ids.shape[0] != labels.shape[0]:
        expected, got = labels.shape[0], list(adapter_ids.shape)
        raise ValueError(f"adapter_ids: expected one for each of {expected} rows, got shape {got}")
    if shift and labels.dim() < 2:
        raise ValueError(f"labels: expected [batch, tokens] to shift, got {list(labels.shape)}; or pass shift=False")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.reshape(-1, logits.shape[-1]).float()
    each = F.cross_entropy(wide, labels.reshape(-1), reduction="none", ignore_index=ignore_index)
    rows = labels.shape[0], math.prod(labels.shape[1:])  # not -1, which an empty batch leaves open
    each = each.view(rows).sum(1)
    counts = (labels != ignore_index).reshape(rows).sum(1).float()
    # [slots, batch]: a product in a fixed order, where scattering would add in any.
    mine = adapter_ids[None, :] == torch.arange(slots, device=adapter_ids.device)[:, None]
    return torch.where(mine, each, 0.0).sum(1) / torch.where(mine, counts, 0.0).sum(1).clamp(min=1)


def _check(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> None:
    """Refuse logits and labels that are none, or do not fit each other."""
    for name, t in (("logits", logits), ("labels", labels)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected floats, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., vocabulary] of rows, got {list(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {list(logits.shape[:-1])} to fit logits, got {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels: expected device {logits.device} as logits, got {labels.device}")
