"""A whole layer over many adapters, forward (and backward): peftkern and what else computes the same, or nearly so.

Beside it stand the same layer with one adapter for all tokens, the frozen layer, PEFT's loop over `adapter_names` and
PyTorch's grouped matrix product, whose tokens come sorted by adapter and cost it no gather.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.environment import version_of
from bench.many_cases import Batch
from peftkern import __version__ as peftkern_version
from peftkern.backend import device_info
from peftkern.ops import lora_linear
from peftkern.ops._multi_lora_linear_triton import backward_calls, forward_calls
from peftkern.ops._route_triton import route
from peftkern_kernels.launch import run_all

PATHS = ("cublas", "triton")
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One implementation.

    Attributes:
        make: puts it on a batch: (what is timed, what it computed, to be checked; None where it computes less).
        train: whether it has a backward pass.
    """

    name: str
    version: str | None
    make: Callable[[Batch], tuple[Callable[[], Any], Callable[[], Results] | None]]
    train: bool = True


def _frozen(batch: Batch) -> tuple[Callable[[], Any], None]:
    """The layer without adapters; backward is dX alone."""

    def call() -> Any:
        y = batch.x @ batch.weight.t()
        return (y, batch.dy @ batch.weight) if batch.case.part == "train" else y

    return call, None


def _one_adapter(batch: Batch) -> tuple[Callable[[], Any], None]:
    """`lora_linear` with the first slot's adapter for all tokens: what many adapters are to cost no more than."""
    a, b = batch.pool.A[0].clone(), batch.pool.B[0].clone()
    if batch.case.part != "train":
        return lambda: lora_linear(batch.x, batch.weight, a, b, 1.0), None
    x = batch.x.detach().requires_grad_()
    inputs = [x, a.requires_grad_(), b.requires_grad_()]

    def call() -> Any:
        return torch.autograd.grad(lora_linear(x, batch.weight, a, b, 1.0), inputs, batch.dy)

    return call, None


def _peftkern(path: str, routed: bool = True) -> Callable[[Batch], tuple[Callable[[], Any], Callable[[], Results]]]:
    """The launches of `multi_lora_linear` on a path; `routed`: the routing, made once for all layers, is left out."""

    def make(batch: Batch) -> tuple[Callable[[], Any], Callable[[], Results]]:
        case, adapters = batch.case, batch.pool.adapters
        device, arch, train = batch.device, device_info(batch.device).arch, case.part == "train"
        made = route(batch.ids, case.slots)

        def call() -> Any:
            routing = made if routed else route(batch.ids, case.slots)
            y, s, calls = forward_calls(batch.x, batch.weight, adapters, routing, None, None, path, arch, train)
            run_all(calls, device)
            if not train:
                return (y,)
            needs = (True, True, True)
            dx, da, db, calls = backward_calls(
                batch.dy, batch.x, batch.weight, adapters, s, routing, None, path, arch, needs
            )
            run_all(calls, device)
            return y, dx, da, db

        def results() -> Results:
            y, *gradients = call()
            if not gradients:
                return {"y": y}
            dx, da, db = gradients
            offsets = [(int(adapters.row_offset[s]), batch.pool.ranks[s]) for s in batch.present]
            N = case.N
            return {
                "y": y,
                "dX": dx,
                "dA": torch.cat([da[o : o + r].reshape(-1) for o, r in offsets]),
                "dB": torch.cat([db[o * N : (o + r) * N] for o, r in offsets]),
            }

        return call, results

    return make


def _grouped_mm(batch: Batch) -> tuple[Callable[[], Any], Callable[[], Results]]:
    """Two of PyTorch's grouped products onto the base's; tokens sorted, adapters stacked, both beforehand."""
    grouped: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    order = torch.argsort(batch.host_ids, stable=True).to(batch.device)
    back = torch.argsort(order)
    counts = torch.bincount(batch.host_ids, minlength=batch.case.slots)
    offs = counts.cumsum(0).int().to(batch.device)
    scale = batch.pool.scaling.to(batch.case.dtype)[batch.ids[order].long()][:, None]
    x, dy = batch.x[order].contiguous(), batch.dy[order].contiguous()
    A, B = batch.pool.A.detach().clone(), batch.pool.B.detach().clone()
    train = batch.case.part == "train"
    inputs = [t.requires_grad_(train) for t in (x, A, B)]

    def forward() -> torch.Tensor:
        s = grouped(inputs[0], inputs[1].transpose(1, 2), offs=offs) * scale
        return F.linear(inputs[0], batch.weight) + grouped(s, inputs[2].transpose(1, 2), offs=offs)

    def call() -> Any:
        y = forward()
        return (y, *torch.autograd.grad(y, inputs, dy)) if train else y

    def results() -> Results:
        if not train:
            return {"y": call()[back]}
        y, dx, da, db = call()
        present = batch.present
        return {"y": y.detach()[back], "dX": dx[back], "dA": da[present].reshape(-1), "dB": db[present].reshape(-1)}

    return call, results


def _peft(batch: Batch) -> tuple[Callable[[], Any], Callable[[], Results]]:
    """PEFT's layer given a name for each sequence; it has no training of several at once."""
    import peft

    case, pool = batch.case, batch.pool
    linear = nn.Linear(case.K, case.N, bias=False, device=batch.device, dtype=case.dtype)
    linear.weight.requires_grad_(False).copy_(batch.weight)
    holder: Any = nn.ModuleDict({"linear": linear})
    for slot in range(case.slots):
        r, alpha = pool.ranks[slot], pool.ranks[slot] * pool.scaling[slot].item()
        config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=["linear"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are several adapters
            holder = peft.inject_adapter_in_model(config, holder, adapter_name=f"a{slot}")
    layer = holder["linear"].eval()
    for slot in range(case.slots):
        layer.lora_A[f"a{slot}"].to(case.dtype).weight.data.copy_(pool.A[slot])
        layer.lora_B[f"a{slot}"].to(case.dtype).weight.data.copy_(pool.B[slot])
    sequences = batch.x.view(case.slots, case.M // case.slots, case.K)
    names = [f"a{slot}" for slot in batch.host_ids[:: case.M // case.slots].tolist()]

    def call() -> torch.Tensor:
        with torch.no_grad():
            return layer(sequences, adapter_names=names)

    return call, lambda: {"y": call().view(case.M, case.N)}


def layers() -> list[Layer]:
    """Everyone, the frozen layer first."""
    torch_version, ours = version_of("torch"), peftkern_version
    return [
        Layer("frozen", torch_version, _frozen),
        *(Layer(f"peftkern: {path}", ours, _peftkern(path)) for path in PATHS),
        Layer("peftkern: cublas + routing", ours, _peftkern("cublas", routed=False)),
        Layer("peftkern one adapter", ours, _one_adapter),
        Layer("torch grouped_mm", torch_version, _grouped_mm),
        Layer("peft adapter_names", version_of("peft"), _peft, train=False),
    ]
