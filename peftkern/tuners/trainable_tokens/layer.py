"""An embedding, or the output head tied to it, of which an adapter trains single rows.

    W'[indices[j]] = D[j], all other rows of W' as in W;    y = W'[i]  or, for a head,  y = x W'^T + b

W' is not made: a copy of it for each forward, and a gradient of that size, would cost more than a small model's layers.
An embedding is looked up as it is, and what has a trained id is replaced by a lookup in D; a head's product is computed
as it is, and the columns of trained ids are replaced by x D^T. Values and gradients are those of W'.

Names as in PEFT 0.21.2: `trainable_tokens_delta.<adapter>` [tokens, embedding_dim], whole rows and no differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftkern.ops._common import makes_plain_tensors
from peftkern.ops.plan import Plan
from peftkern.tuners.fusing import ExplainRow, bare_weight, why_base_alone, why_plain
from peftkern.tuners.tuner_layer import (
    BaseTunerLayer,
    check_adapters_to_merge,
    check_mergeable_base,
    refuse_adapter_names,
)
from peftkern.utils.other import ExclusiveAdapters, batch_in_force, rows_of_input


class TokenLookup:
    """Which row of D each trained id has.

    Args:
        indices: the ids, each once.
        device: where lookups happen.
    """

    __slots__ = ("ids", "indices", "order", "sorted")

    def __init__(self, indices: Sequence[int], device: torch.device) -> None:
        self.ids = frozenset(indices)
        self.indices = torch.tensor(indices, dtype=torch.int64, device=device)
        self.sorted, self.order = self.indices.sort()

    def rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row of D, whether it is trained) for each id; the row after the last one for an id that is not."""
        n = self.sorted.shape[0]
        ids = ids.to(torch.int64)
        places = torch.searchsorted(self.sorted, ids).clamp(max=n - 1)
        found = self.sorted[places] == ids
        return torch.where(found, self.order[places], n), found


class TrainableTokensLayer(nn.Module, BaseTunerLayer, ExclusiveAdapters):
    """Trained rows of an `nn.Embedding`, or of an `nn.Linear` that turns features into logits.

    Several adapters can have rows here; those that are active at once have none for the same token.

    Args:
        base_layer: the layer, whose weight is [num_embeddings, embedding_dim], dense.
        tied_adapter: a layer around the same weight, whose rows, and adapters, are this one's too.
    """

    adapter_layer_names: tuple[str, ...] = ("trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_indices", "trainable_tokens_original", "_lookups")
    what_is_trained = "trainable_token_indices"

    def __init__(self, base_layer: nn.Module, tied_adapter: TrainableTokensLayer | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In a list, so that it is no child: its parameters would get a second name.
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        self._active_adapter: list[str] = []
        base: Any = base_layer
        is_table = isinstance(base, nn.Embedding)
        self.in_features: int = base.num_embeddings if is_table else base.in_features
        self.out_features: int = base.embedding_dim if is_table else base.out_features
        if tied_adapter is not None:
            # The very containers, as in PEFT: what comes or goes there does so here.
            for name in (*self.adapter_layer_names, *self.other_param_names, "merged_adapters"):
                setattr(self, name, getattr(tied_adapter, name))
            return
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}
        # The base's rows while trained ones are merged into it.
        self.trainable_tokens_original: dict[str, torch.Tensor] = {}
        self._lookups: dict[str, TokenLookup] = {}
        self.merged_adapters: list[str] = []

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows these are, or None if they are this one's own."""
        return self._tied_adapter[0] if self._tied_adapter else None

    @torch.no_grad()
    def update_layer(self, adapter_name: str, token_indices: Sequence[int], init_weights: bool = True) -> None:
        """Adds an adapter, frozen; a tied layer has those of the other.

        Args:
            adapter_name: its name.
            token_indices: ids in [0, num_embeddings), each once; row j of its parameter is that of token_indices[j].
            init_weights: start from the base's rows; False: from normal numbers.
        """
        if self.tied_adapter is not None:
            return
        self.token_indices[adapter_name] = list(token_indices)
        weight = self.weight
        rows = weight[self._lookup(adapter_name, weight.device).indices].clone()
        rows = rows if init_weights else torch.randn_like(rows)
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows, requires_grad=False)

    def _lookup(self, name: str, device: torch.device) -> TokenLookup:
        """The adapter's, on this device. Made of the list and no buffer, whose memory `to_empty` leaves without values:
        it would be read as ids."""
        lookup = self._lookups.get(name)
        if lookup is not None and lookup.indices.device == device:
            return lookup
        if not makes_plain_tensors():
            return TokenLookup(self.token_indices[name], device)
        with torch.inference_mode(False):  # one that was made there could not be trained with later
            lookup = self._lookups[name] = TokenLookup(self.token_indices[name], device)
        return lookup

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableTokensLayer:
        super()._apply(fn, recurse)
        for name in self.token_indices:  # a compiled forward would make them anew each time
            self._lookup(name, self.weight.device)
        return self

    # -- which adapter -------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes those of the named adapters that have rows here active and trainable.

        Raises:
            ValueError: two of them have a row for one token.
        """
        names = self.held_among(adapter_names)
        self.check_together(names)
        BaseTunerLayer.set_adapter(self, names, inference_mode)

    def check_together(self, names: Sequence[str]) -> None:
        """Raises ValueError where two of these adapters have a row for one token: it could only have one of them."""
        taken: dict[int, str] = {}
        for name in dict.fromkeys(names):
            both = [index for index in self.token_indices[name] if index in taken]
            if both:
                raise ValueError(
                    f"token indices of adapters {taken[both[0]]!r} and {name!r}: both have rows for {both[:5]}: one "
                    "alone can take part"
                )
            taken |= dict.fromkeys(self.token_indices[name], name)

    def _replacing(self) -> list[str]:
        """The adapters whose rows take part now."""
        return [] if self._disable_adapters or self.merged_adapters else self.held_among(self._active_adapter)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """W' with the rows of these adapters [num_embeddings, embedding_dim], differentiable: a copy of the matrix."""
        weight = self.weight
        for name in self.held_among(active_adapters):
            index = self._lookup(name, weight.device).indices
            weight = weight.index_copy(0, index, self.trainable_tokens_delta[name].to(weight))
        return weight

    def weight_in_force(self) -> torch.Tensor:
        """What model code sees as the weight: W' of the active adapters; the base's own where none takes part."""
        return self.get_merged_weights(self._replacing())

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mixed = batch_in_force(self)
        if mixed is not None:
            rows_of, _ = rows_of_input(mixed.rows_of(), mixed.batch, x, self.what_is_trained)
            y = self.base_layer(x, *args, **kwargs)
            for name, rows in rows_of.items():
                if name in self.trainable_tokens_delta:
                    y = self._replaced(y, x, name, torch.tensor(rows, dtype=torch.int64, device=y.device))
            return y
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        refuse_adapter_names(kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in self._replacing():
            y = self._replaced(y, x, name)
        return y

    def _replaced(self, y: torch.Tensor, x: torch.Tensor, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`y`, the base's output for x, as an adapter's rows make it; for `rows` of the batch alone if given."""
        x = x.to(y.device)
        some_x = x if rows is None else x.index_select(0, rows)
        if isinstance(self.base_layer, nn.Embedding):
            some_y = y if rows is None else y.index_select(0, rows)
            made, found = self._look_up(some_x, name, y.dtype)
            made = torch.where(found.unsqueeze(-1), made, some_y)
            return made if rows is None else y.index_copy(0, rows, made)
        base: Any = self.base_layer
        index = self._lookup(name, y.device).indices
        bias = None if base.bias is None else base.bias[index]
        columns = F.linear(some_x, self.trainable_tokens_delta[name].to(base.weight.dtype), bias).to(y.dtype)
        if rows is not None:
            columns = y.index_select(-1, index).index_copy(0, rows, columns)
        # Logits are large: into the product's own output, if nobody else can have kept that.
        if bare_weight(base) is not None and not why_plain():
            return y.index_copy_(-1, index, columns)
        return y.index_copy(-1, index, columns)

    def _look_up(self, ids: torch.Tensor, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of D in `dtype`, whether the id is a trained one) for each id."""
        base: Any = self.base_layer
        delta, lookup = self.trainable_tokens_delta[name], self._lookup(name, ids.device)
        places, found = lookup.rows(ids)
        if base.padding_idx in lookup.ids:  # whose row gets no gradient
            delta = torch.where((lookup.indices == base.padding_idx).unsqueeze(-1), delta.detach(), delta)
        # An id that is not trained finds the padding of this table, for which no gradient is added up. The sums are in
        # D's dtype, and torch's own backward of an embedding makes them in a fixed order.
        table = torch.cat([delta, delta.new_zeros(1, delta.shape[1])])
        numbers = (base.max_norm, base.norm_type, base.scale_grad_by_freq)
        made = F.embedding(places, table, delta.shape[0], *numbers).to(dtype)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            made = made * (scale.to(dtype) if isinstance(scale, torch.Tensor) else scale)
        return made, found

    # -- merging -------------------------------------------------------------------------------------------------

    def to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of the named adapters (default: the active ones) that have rows here which are not merged."""
        names = self._active_adapter if adapter_names is None else adapter_names
        return [name for name in dict.fromkeys(self.held_among(names)) if name not in self.merged_adapters]

    def check_mergeable(self, names: Sequence[str], safe_merge: bool) -> None:
        """Raises for adapters whose rows cannot be written into the base weight.

        Raises:
            TypeError: the weight is no plain tensor.
            ValueError: two adapters have a row for one token, merged ones included; or with `safe_merge` a row is not
                finite in the weight's dtype.
        """
        check_mergeable_base(self)
        self.check_together([*self.merged_adapters, *names])
        for name in names:
            rows = self.trainable_tokens_delta[name].to(self.weight.dtype)
            if safe_merge and not torch.isfinite(rows).all():
                raise ValueError(f"safe_merge: adapter {name!r} has trained rows of tokens that are not finite")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes trained rows into the base weight, in place; the errors are those of `check_mergeable`."""
        if self.tied_adapter is not None:
            # With the layer whose rows these are it has been done.
            if self.to_merge(adapter_names):
                self.tied_adapter.merge(safe_merge, adapter_names)
            return
        names = self.to_merge(check_adapters_to_merge(self, adapter_names))
        self.check_mergeable(names, safe_merge)
        weight = self.weight
        for name in names:
            index = self._lookup(name, weight.device).indices
            self.trainable_tokens_original[name] = weight[index].clone()
            weight.index_copy_(0, index, self.trainable_tokens_delta[name].to(weight))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base's own rows back, exactly."""
        weight = self.weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            index = self._lookup(name, weight.device).indices
            weight.index_copy_(0, index, self.trainable_tokens_original.pop(name).to(weight))

    # -- explaining ----------------------------------------------------------------------------------------------

    def explain_row(self, name: str = "") -> ExplainRow:
        """What `peftkern.explain` says of this layer."""
        active = self.held_among(self._active_adapter)
        reason = why_base_alone(self, active)
        if not reason:
            is_table = isinstance(self.base_layer, nn.Embedding)
            how = "looked up beside the base's" if is_table else "a product of their own"
            count = sum(len(self.token_indices[each]) for each in active)
            reason = f"{count} trained rows of tokens: {how} by plain PyTorch"
        dtype = self.weight.dtype
        kind = type(self.base_layer).__name__
        return ExplainRow(name, kind, self.in_features, self.out_features, 0, dtype, False, reason)

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes."""
        return Plan("unfused", self.explain_row().reason)

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for a batch whose rows want different adapters."""
        return Plan("unfused", "trained rows of tokens: each adapter's replace the base's by plain PyTorch")
