"""The routing of a batch on a GPU: one launch of ours where a batch is small, PyTorch's sort where it is large."""

from __future__ import annotations

import torch

from peftkern_kernels import replay
from peftkern_kernels.route_kernel import MAX_ROWS, route_calls
from peftkern_kernels.routing import Routing, build_routing, empty_routing


def route(ids: torch.Tensor, slots: int) -> Routing:
    """The routing of ids (int32 or int64 [M]) over `slots` slots; nothing waits for the device.

    Raises:
        ValueError: ids that are not so, or no slot at all.
    """
    if ids.dim() != 1 or ids.shape[0] > MAX_ROWS or slots < 1:
        return build_routing(ids, slots)
    routing = empty_routing(ids.shape[0], slots, ids.device)
    ids = ids.contiguous()
    replay.run(("route", slots), (ids, *routing.tensors), lambda: route_calls(ids, routing), ids.device)
    return routing
