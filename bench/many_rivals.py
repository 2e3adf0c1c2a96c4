"""The low-rank pair of servers: vLLM's Triton kernels and SGLang's `triton_v2`, from `.rivals/` (see bench/README.md).

Both are imported file by file. What those files import from the rest of the server is replaced by the few lines that
the kernels' launchers ask of it, with the defaults of the server: no tuned configuration folder, no second stream.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from bench.many_cases import Batch
from bench.rivals import definitions, import_from, unpacked

LORA = "sglang.kernels.ops.lora"
# Adds the adapters' part to y [M, N] in place.
Pair = Callable[[], Any]


@dataclass(frozen=True)
class Made:
    """One implementation on a batch.

    Attributes:
        pair: the two kernels and what goes with them, their routing made before.
        routing: makes that routing anew, or None where the next one is all that can be timed.
        both: routing and pair. graph: whether `routing` and `both` can be captured in a CUDA graph.
    """

    pair: Pair
    routing: Pair | None = None
    both: Pair | None = None
    graph: bool = True


@dataclass(frozen=True)
class Server:
    """One rival: `make(batch, y)` puts it on a batch; `why_not` says why it cannot be had."""

    name: str
    version: str | None
    make: Callable[[Batch, torch.Tensor], Made] | None
    why_not: str = ""


def stub(name: str, **attributes: Any) -> ModuleType:
    """A module of that name in place of the real one, an attribute of its package."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            stub(parent, __path__=[])
        setattr(sys.modules[parent], last, module)
    return module


# -- vLLM ---------------------------------------------------------------------------------------------------------


def _refuse(*_: Any, **__: Any) -> None:
    raise AttributeError("no custom operators here: the plain functions are called")


def _vllm() -> Server:
    import triton
    import triton.language as tl

    folder, version = unpacked("vllm")
    stub("vllm", __path__=[str(folder / "vllm")])
    stub(
        "vllm.envs",
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    )
    logger = logging.getLogger("vllm")
    quiet = SimpleNamespace(warning_once=logger.debug, info_once=logger.debug)
    stub("vllm.logger", init_logger=lambda name: quiet)

    def capability() -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        has_device_capability=lambda wanted: capability() >= wanted,
        is_device_capability=lambda wanted: capability() == wanted,
    )
    stub("vllm.platforms", current_platform=platform)
    stub("vllm.triton_utils", triton=triton, tl=tl)
    stub("vllm.utils", __path__=[])
    stub("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    stub(
        "vllm.utils.torch_utils",
        direct_register_custom_op=_refuse,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )
    ops = "vllm.lora.ops.triton_ops"
    shrink = import_from(folder, f"{ops}.lora_shrink_op").lora_shrink
    expand = import_from(folder, f"{ops}.lora_expand_op").lora_expand
    Meta = import_from(folder, f"{ops}.lora_kernel_metadata").LoRAKernelMeta

    def make(batch: Batch, y: torch.Tensor) -> Made:
        case, pool = batch.case, batch.pool
        meta = Meta.make(case.slots, case.M, batch.device)
        s = torch.empty(1, case.M, pool.max_rank, dtype=torch.float32, device=batch.device)
        A, B = [pool.A], [pool.scaled_B]

        def routing() -> None:
            meta.prepare_tensors(batch.ids)

        def pair() -> None:
            arguments = meta.meta_args(case.M, True)  # a grid of the adapters that are there
            shrink(batch.x, A, s, *arguments, 1.0)
            expand(s, B, y, *arguments, add_inputs=True)

        routing()
        # It counts the adapters on the host, so it waits for the device and no graph can hold it.
        return Made(pair, routing, graph=False)

    return Server("vllm", version, make)


# -- SGLang -------------------------------------------------------------------------------------------------------


class _Struct:
    """Of msgspec.Struct what a route asks: keyword arguments, defaults of the class."""

    def __init_subclass__(cls, **_: Any) -> None: ...

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            if name not in type(self).__annotations__:
                raise TypeError(f"{type(self).__name__} has no field {name}")
        vars(self).update(fields)


class _Rows:
    """A table of plans as its loader would return it: `rows` with every field, `spec.model_dump()` for a plan."""

    fields = ("phase", "kinds", "max_tokens", "max_rank")
    bands = ("min_in_features", "max_in_features", "min_out_features", "max_out_features")

    def __init__(self, path: Path, plans: dict[str, Any], phase: type[Enum]) -> None:
        enums = {"a_family": plans["AFamily"], "b_family": plans["BFamily"], "overlap": plans["Overlap"]}
        self.rows = []
        for raw in json.loads(path.read_text())["rows"]:
            row = SimpleNamespace(**{name: raw.get(name) for name in (*self.fields, *self.bands)})
            row.phase = None if row.phase is None else phase(row.phase)
            row.kinds = None if row.kinds is None else [plans["DenseLoraKind"](kind) for kind in row.kinds]
            spec = {name: enums[name](v) if name in enums else v for name, v in raw.get("spec", {}).items()}
            a_family = spec.get("a_family", plans["AFamily"].GROUPED)
            row.spec = SimpleNamespace(a_family=a_family, model_dump=lambda spec=spec: dict(spec))
            self.rows.append(row)


def _sglang() -> Server:
    folder, version = unpacked("sglang")
    dense = folder / "sglang" / "srt" / "lora" / "dense"
    if importlib.util.find_spec("msgspec") is None:
        stub("msgspec", Struct=_Struct)
    for package in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.kernels", "sglang.kernels.ops", LORA):
        stub(package, __path__=[str(folder.joinpath(*package.split(".")))])

    def no_alignment(*_: Any, **__: Any) -> None:
        raise NotImplementedError("batches of more than 512 tokens need a compiled kernel of the server")

    stub(f"{LORA}.moe.virtual_experts", _align_block_size_jit=no_alignment)
    utils = stub("sglang.srt.lora.utils", Enum=Enum)
    definitions(dense.parent / "utils.py", {"Phase", "architecture_for_capability"}, vars(utils))
    plan = stub("sglang.srt.lora.dense.plan", dataclass=dataclass, field=field, Enum=Enum, Phase=utils.Phase)
    stub("sglang.srt.lora.dense", __path__=[str(dense)], plan=plan)
    names = {"AFamily", "BFamily", "DenseLoraKind", "Overlap", "DensePlan", "DensePlanTable"}
    definitions(dense / "plan.py", names | {"_a_tiles", "_b_tiles", "_decode_default", "_prefill_default"}, vars(plan))

    def load_plans(architecture: str) -> _Rows | None:
        path = dense / "configs" / f"{architecture}.plans.json"
        return _Rows(path, vars(plan), utils.Phase) if path.exists() else None

    plan.load_plans = load_plans  # type: ignore[attr-defined]
    runners = import_from(folder, "sglang.srt.lora.dense.runner")
    Workspace = import_from(folder, "sglang.srt.lora.workspace").LoraWorkspace

    def make(batch: Batch, y: torch.Tensor) -> Made:
        case, pool = batch.case, batch.pool
        runner = runners.DenseLoraRunner(Workspace(), max_loras=case.slots, device=batch.device)
        runner.begin_batch(
            token_slots=batch.ids,
            lora_ranks=pool.rank,
            scalings=pool.scaling,
            num_tokens=case.M,
            phase=utils.Phase.DECODE,
            graph_mode=True,
        )
        kind = plan.DenseLoraKind.LINEAR
        chosen = runner.plan_for(kind, pool.max_rank, case.K, case.N, num_tokens=case.M)

        def pair() -> None:
            bridge = runner.run_a(batch.x, pool.A, stack=1, plan=chosen)
            runner.run_b(bridge, pool.B, y, offsets=(0, case.N), plan=chosen)

        def both() -> None:
            runner.reset_routes()
            pair()

        def routing() -> None:
            runner.reset_routes()
            runner.route(chosen.block_size)

        if not chosen.needs_aligned_route:  # each row finds its adapter by itself
            return Made(pair, None, pair)
        return Made(pair, routing, both)

    return Server("sglang triton_v2", version, make)


def servers() -> list[Server]:
    """vLLM and SGLang, each with the reason where it cannot be had."""
    found = []
    for name, load in (("vllm", _vllm), ("sglang triton_v2", _sglang)):
        try:
            found.append(load())
        except Exception as error:  # another project's import may fail in any way: it is recorded, and not measured
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            found.append(Server(name, None, None, reason))
    return found
