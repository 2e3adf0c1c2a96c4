"""Makes Triton's interpreter refuse what a GPU reports as an illegal address, or lets pass and reads another's memory.

The interpreter loads from whatever address a kernel computes. Here each launch knows the memory of its arguments, from
a tensor's first element to its last (of a view, not of the storage behind it), and every lane of a load or store whose
mask is true must lie in one of them. Lanes that are masked off may point anywhere, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

Region = tuple[int, int, str]  # first byte, the byte past the last, the argument's name
_launches: list[tuple[str, list[Region]]] = []  # those that run now, the innermost last


def region(name: str, t: torch.Tensor) -> Region:
    """The bytes from the tensor's first element to its last; none if it is empty."""
    start = t.data_ptr()
    if t.numel() == 0:
        return start, start, name
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size(), name


def _tensors(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values:
        if isinstance(value, tuple):
            yield from _tensors((name, part) for part in value)
            continue
        while not isinstance(value, torch.Tensor) and hasattr(value, "base"):  # a descriptor, or another dtype's view
            value = value.base
        if isinstance(value, torch.Tensor):
            yield name, value


def outside(addresses: np.ndarray, size: int, regions: list[Region]) -> np.ndarray:
    """Those of the addresses at which `size` bytes do not lie in one region."""
    if addresses.size == 0:
        return addresses
    least, most = int(addresses.min()), int(addresses.max()) + size
    if any(start <= least and most <= stop for start, stop, _ in regions):
        return addresses[:0]
    inside = np.zeros(addresses.shape, bool)
    for start, stop, _ in regions:
        inside |= (addresses >= start) & (addresses + np.uint64(size) <= stop)
    return addresses[~inside]


def _check(what: str, pointers: Any, mask: Any) -> None:
    if not _launches:
        return
    kernel, regions = _launches[-1]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, active = np.broadcast_arrays(pointers.data.astype(np.uint64), np.asarray(mask.data, bool))
    wild = outside(addresses[active], size, regions)
    if wild.size == 0:
        return
    address = int(wild[0])

    def distance(of: Region) -> int:
        return max(of[0] - address, address + size - of[1])

    start, stop, name = min(regions, key=distance, default=(0, 0, "nothing"))
    where = f"{start - address} bytes before" if address < start else f"{address + size - stop} bytes past"
    lanes = f"in {wild.size} of {mask.data.size} lanes"
    raise IndexError(f"{kernel}: {what} outside the arguments, {where} {name}, {lanes}")


def check_bounds() -> None:
    """Wrap the interpreter's launches, loads and stores; calling it twice changes nothing."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(builder, "_peftkern_bounded", False):
        return
    load, store = builder.create_masked_load, builder.create_masked_store
    arguments, launch = executor._init_args_hst, executor.__call__

    def init_arguments(self, args_dev, kwargs):
        found, named = arguments(self, args_dev, kwargs)
        values = [*zip(self.arg_names, found, strict=False), *named.items()]
        _launches[-1] = (self.fn.__name__, [region(name, t) for name, t in _tensors(values)])
        return found, named

    def call(self, *args_dev, **kwargs):
        _launches.append((self.fn.__name__, []))
        try:
            return launch(self, *args_dev, **kwargs)
        finally:
            _launches.pop()

    def masked_load(self, ptrs, mask, *rest, **options):
        _check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def masked_store(self, ptrs, value, mask, *rest, **options):
        _check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    executor._init_args_hst, executor.__call__ = init_arguments, call
    builder._peftkern_bounded = True
