"""`AdapterBatch`: which adapter each row of a batch wants, and what is worked out from it once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.adapter_pool import Layout
from peftkern.backend import device_info
from peftkern.ops._adapter_groups import Group, InOrder, in_order, make_groups
from peftkern.ops._common import stream_of
from peftkern_kernels.routing import Routing, build_routing, empty_routing


class AdapterBatch:
    """The slots of a batch's rows, and the tables and lists that layers need of them, each made once.

    Args:
        ids: int32 or int64 [n], a slot for each row of the batch (a sequence, or a token); others mean the base alone.
        slots: adapters that there is room for.
        host: the same as a sequence of ints, where the caller knows them, from names (ids on the CPU are read anyway).

    Attributes:
        named: whether `host` was given: then torch.compile takes what occurs as a constant.

    What is made while a CUDA graph is captured is the graph's: not computed before its replays, and made by each of
    them anew. So a batch that is captured but was not made in the same capture keeps nothing of it, nor gives it what
    was made before: tables that a replay would find as they once were, or no longer find.

    Raises:
        TypeError, ValueError: `ids` is no such tensor.
    """

    def __init__(self, ids: torch.Tensor, slots: int, host: Sequence[int] | None = None) -> None:
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"adapter_ids: expected a tensor, got {type(ids).__name__}")
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"adapter_ids: expected int32 or int64 [rows], got {ids.dtype} {list(ids.shape)}")
        self.named = host is not None
        if host is None and ids.is_cpu and not torch.compiler.is_compiling() and type(ids) is torch.Tensor:
            host = ids.tolist()
        self.ids, self.slots = ids, slots
        self.host = None if host is None else tuple(host)
        # The slots that occur, where the host knows them.
        self.present = None if host is None else tuple(sorted({i for i in host if 0 <= i < slots}))
        self._groups: dict[Any, list[Group]] = {}
        self._in_order: dict[Any, InOrder] = {}
        self._routings: dict[tuple[int, int | None], Routing] = {}  # by rows, and stream
        self._places: torch.Tensor | None = None
        self._row_places: dict[Any, torch.Tensor] = {}
        # How `multi_lora_linear` repeats a layer's last forward, by the layer's pool.
        self.repeated: dict[Any, Any] = {}
        self._captured = is_capturing(ids)
        self._stream = stream_of(ids)

    def is_again(self, host: Sequence[int], slots: int, device: torch.device | str) -> bool:
        """Whether a batch of these slots would be this one, and could take here what has been made for it."""
        ids = self.ids
        if self.host != tuple(host) or self.slots != slots or ids.device != torch.device(device):
            return False
        if ids.is_inference() is not torch.is_inference_mode_enabled():  # autograd cannot keep an inference tensor
            return False
        return not self._captured and not is_capturing(ids) and stream_of(ids) == self._stream

    def __len__(self) -> int:
        return self.ids.shape[0]

    def check_rows(self, x: torch.Tensor, operation: str = "multi_lora_linear") -> int:
        """How many rows of x [..., K] there are, if they can be told apart by these ids.

        Raises:
            ValueError: x has neither a row for each id nor a first dimension of that size.
        """
        n = self.ids.shape[0]
        M = x.numel() // x.shape[-1]
        if n == M or (x.dim() >= 2 and x.shape[0] == n):
            return M
        got = f"got {n} ids for x {list(x.shape)}"
        # A layer that is given the batch's tokens in their order has a `FlatBatch`. In another one they may be in any.
        if self.named and x.dim() == 2 and n and M % n == 0:
            raise ValueError(
                f"adapter_names: expected an input whose first dimension is the batch, {got}: the model flattens its "
                "tokens before this layer and may order them anew, so that it cannot be told whose each row is (layers "
                "that are known to keep the order, as OPT's fc1 and fc2, are served). Keep such layers out of "
                "target_modules, run each adapter's rows by themselves, or, if the order is kept, tell each token's "
                "slot (AdapterBank.batch)"
            )
        self.refuse_names(x)
        raise ValueError(
            f"{operation}: adapter_ids: expected an id for each of x's {M} rows, or for each entry of its first "
            f"dimension, {got}"
        )

    def refuse_names(self, x: torch.Tensor) -> None:
        """Say that this batch does not fit a layer's input, in the words of a caller who gave names, if he did.

        Raises:
            ValueError: he did.
        """
        if self.named:
            raise ValueError(
                f"adapter_names: expected one name for each of the batch's {x.shape[0]} rows, got {self.ids.shape[0]} "
                f"(a layer's input is {list(x.shape)})"
            )

    def entries(self, x: torch.Tensor, features: int = 1) -> torch.Tensor | None:
        """x, of which the last `features` dimensions are one row's, with one first dimension for the ids, a view where
        it can be; None where x has neither that nor a row for each id. For an x that `check_rows` let pass."""
        n = self.ids.shape[0]
        if x.shape[0] == n:
            return x
        row = x.shape[x.dim() - features :]
        each = self.rows_of_an_id(x, x.dim() - features)
        if each:
            return x.reshape(n, each, *row)
        return x.reshape(n, *row) if x.shape[: x.dim() - features].numel() == n else None

    def rows_of_an_id(self, x: torch.Tensor, axes: int = 1) -> int:
        """How many rows of an x with so many axes of rows each id stands for, if these lie in one axis; 0 elsewhere."""
        return 0

    def groups(self, M: int, layout: Layout) -> list[Group]:
        """The products that the plain path computes for M rows; ids that are not on the host are read."""
        key = (M, layout)
        found = self._groups.get(key)
        if found is None:
            host = self.ids.tolist() if self.host is None else self.host
            each = M // len(host) if host else 0
            found = self._groups[key] = make_groups(host, each, layout, self.ids.device)
        return found

    def in_order(self, M: int, layout: Layout) -> InOrder:
        """`groups` for the rows put into their order, where that can be."""
        key = (M, layout, stream_of(self.ids))
        found = self._in_order.get(key)
        if found is None:
            found = self._in_order[key] = in_order(self.groups(M, layout), M)
        return found

    def row_ids(self, M: int) -> torch.Tensor:
        """An id for each of M rows."""
        n = self.ids.shape[0]
        return self.ids if n == M else self.ids.repeat_interleave(M // max(n, 1), output_size=M)

    def places(self) -> torch.Tensor:
        """For each id the place of its slot among `present`, -1 for none; the ids themselves if none are `named`."""
        if self._places is None:
            if self.host is None or self.present is None or not self.named:
                self._places = self.ids
            else:
                place = {slot: i for i, slot in enumerate(self.present)}
                places = [place.get(slot, -1) for slot in self.host]
                self._places = torch.tensor(places, dtype=torch.int64, device=self.ids.device)
        return self._places

    def places_of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`places` for each row of x [..., K], in x's shape but for the last axis, on x's device."""
        key = (x.shape[:-1], x.device, stream_of(x))
        passing = torch.compiler.is_compiling() or self._elsewhere()
        found = None if passing else self._row_places.get(key)
        if found is None:
            places, n = self.places().to(x.device), self.ids.shape[0]
            M = x.numel() // x.shape[-1]
            rows = places if n == M else places.repeat_interleave(M // max(n, 1), output_size=M)
            found = rows.view(x.shape[:-1])
            if not passing:
                self._row_places[key] = found
        return found

    def refuse_other(self, ids: torch.Tensor, operation: str) -> None:
        """Notice that a checkpointed forward was computed again, and kept `ids`, under another batch than this.

        Raises:
            RuntimeError: it was.
        """
        if ids.data_ptr() != self.ids.data_ptr() and not torch.equal(ids, self.ids):
            raise RuntimeError(
                f"{operation}: a checkpointed forward was computed again under another batch's adapters: run "
                "backward before the next batch, or within its block"
            )

    def routing(self, M: int) -> Routing:
        """The kernels' tables for M rows."""
        if self._elsewhere():
            return route(self.row_ids(M), self.slots)
        key = (M, stream_of(self.ids))
        found = self._routings.get(key)
        if found is None:
            found = self._routings[key] = route(self.row_ids(M), self.slots)
        return found

    def _elsewhere(self) -> bool:
        """Whether this is inside a capture and the batch was made outside of one, or the other way round."""
        return is_capturing(self.ids) is not self._captured


class _BatchView(AdapterBatch):
    """A batch as a layer sees it that does not see it as it is. What is worked out for the batch is shared.

    Args:
        batch: the batch that other layers see.
    """

    def __init__(self, batch: AdapterBatch) -> None:
        self.__dict__.update(batch.__dict__)


class FlatBatch(_BatchView):
    """A batch as a layer sees it whose input is the plain flattening of the batch's tokens.

    x [n * T, K] is then [n, T, K] with its first two dimensions taken together: row m is a token of entry m // T. That
    x has n entries at all, and not a number that n divides, must have been seen where they still had a dimension.
    """

    def check_rows(self, x: torch.Tensor, operation: str = "multi_lora_linear") -> int:
        return x.shape[0] if self.rows_of_an_id(x, x.dim() - 1) else super().check_rows(x, operation)

    def rows_of_an_id(self, x: torch.Tensor, axes: int = 1) -> int:
        n = self.ids.shape[0]
        return x.shape[0] // n if axes == 1 and n and x.shape[0] % n == 0 else 0


class ScatteredBatch(_BatchView):
    """A batch as a layer sees it that is given some of its tokens, in an order that is not known: an expert.

    Such a layer may by chance get as many rows as there are ids, which `AdapterBatch` would take for the batch's.
    """

    def check_rows(self, x: torch.Tensor, operation: str = "multi_lora_linear") -> int:
        if x.dim() > 2:
            return super().check_rows(x, operation)
        what = "adapter_names" if self.named else f"{operation}: adapter_ids"
        raise ValueError(
            f"{what}: an expert is given the tokens that were routed to it (here {list(x.shape)}), so that it cannot "
            "be told whose each row is: keep experts out of target_modules, or run each adapter's rows by themselves"
        )


class TokensFirstBatch(_BatchView):
    """A batch as a layer sees it whose input is [tokens, batch, K].

    With as many tokens as there are ids, `AdapterBatch` would take a token for an entry of the batch.
    """

    def check_rows(self, x: torch.Tensor, operation: str = "multi_lora_linear") -> int:
        what = "adapter_names" if self.named else f"{operation}: adapter_ids"
        raise ValueError(
            f"{what}: expected an input whose first dimension is the batch; the model puts tokens first before this "
            f"layer (here {list(x.shape)}): run each adapter's rows by themselves"
        )


def is_capturing(t: torch.Tensor) -> bool:
    """Whether what is computed of `t` now is recorded in a CUDA graph and not computed."""
    return t.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def route(ids: torch.Tensor, slots: int) -> Routing:
    """The kernels' tables for `ids` [M] over `slots` adapters, made on the device without waiting for it.

    One operator under torch.compile, which need not look inside.
    """
    if torch.compiler.is_compiling():
        return Routing(*_operator(ids, slots))
    return _route(ids, slots)


def _route(ids: torch.Tensor, slots: int) -> Routing:
    if device_info(ids.device).triton:
        return build_routing(ids, slots)
    from peftkern.ops import _route_triton

    return _route_triton.route(ids, slots)


@torch.library.custom_op("peftkern::adapter_route", mutates_args=())
def _operator(ids: torch.Tensor, slots: int) -> list[torch.Tensor]:
    # An operator's results must not share memory with its arguments.
    return [t.clone() if t.data_ptr() == ids.data_ptr() else t for t in _route(ids, slots).tensors]


@_operator.register_fake
def _(ids: torch.Tensor, slots: int) -> list[torch.Tensor]:
    return list(empty_routing(ids.shape[0], slots, ids.device).tensors)
