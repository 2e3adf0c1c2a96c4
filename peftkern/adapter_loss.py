"""The loss of a batch of many adapters, such that each is trained as if its rows were alone."""

from __future__ import annotations

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
        logits: [batch, tokens, vocabulary], or [rows, classes] with labels [rows] and `shift=False`.
        labels: int64 [batch, tokens].
        adapter_names: the adapter of each row; "__base__" for the base alone, whose loss is one more in the result.
        ignore_index: a label that is not counted.
        shift: whether the label of token t + 1 is what the logits of token t predict, as in a language model.

    Returns:
        A float32 scalar for each name, in order of appearance; 0 for one whose rows have no label.

    Raises:
        TypeError: `adapter_names` is no list of names.
        ValueError: shapes do not fit each other.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
    names = list(dict.fromkeys(adapter_names))
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
        ValueError: shapes do not fit each other.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {list(logits.shape[:-1])} to fit logits, got {list(labels.shape)}")
    if adapter_ids.dim() != 1 or adapter_ids.shape[0] != labels.shape[0]:
        expected, got = labels.shape[0], list(adapter_ids.shape)
        raise ValueError(f"adapter_ids: expected one for each of {expected} rows, got shape {got}")
    if shift and labels.dim() < 2:
        raise ValueError(f"labels: expected [batch, tokens] to shift, got {list(labels.shape)}; or pass shift=False")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.reshape(-1, logits.shape[-1]).float()
    each = F.cross_entropy(wide, labels.reshape(-1), reduction="none", ignore_index=ignore_index)
    each = each.view(labels.shape[0], -1).sum(1)
    counts = (labels != ignore_index).view(labels.shape[0], -1).sum(1).float()
    # [slots, batch]: a product in a fixed order, where scattering would add in any.
    mine = adapter_ids[None, :] == torch.arange(slots, device=adapter_ids.device)[:, None]
    return torch.where(mine, each, 0.0).sum(1) / torch.where(mine, counts, 0.0).sum(1).clamp(min=1)
