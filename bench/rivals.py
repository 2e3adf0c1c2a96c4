"""The implementations that are measured, and where they come from.

Packages that need only torch and triton, or that need more than a benchmark should install, are read from the folder
`.rivals/` of the checkout, where their wheels are unpacked (bench/README.md says how); it is no part of peftkern. What
cannot be imported is not measured, and the reason is recorded.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.adapters import Adapted, LoraFunction, Rival, by_hand
from bench.environment import ROOT, version_of
from peftkern import __version__ as peftkern_version
from peftkern import fuse_mlps, share_inputs
from peftkern.ops.plan import DECODE_TOKENS

FOLDER = ROOT / ".rivals"
PEFTKERN_PATHS = ("triton", "cublas", "torch", "decode")


def frozen() -> Rival:
    """The layer without an adapter: what every other one is compared with."""
    return Rival(
        "frozen", "frozen", lambda linear, R, alpha, dropout: Adapted(linear, None, None), version=version_of("torch")
    )


# -- peftkern -----------------------------------------------------------------------------------------------------


def _peftkern_layer(adapter_dtype: torch.dtype | None) -> Callable[[nn.Linear, int, float, float], Adapted]:
    def wrap(linear: nn.Linear, R: int, alpha: float, dropout: float) -> Adapted:
        from peftkern.nn import LoraLinear

        dtype = adapter_dtype or linear.weight.dtype
        layer = LoraLinear.from_linear(linear, r=R, lora_alpha=alpha, lora_dropout=dropout, adapter_dtype=dtype)
        return Adapted(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    return wrap


def forced_path(path: str) -> LoraFunction:
    """`lora_linear` on one path, whatever the plan would choose: how the plan's table is measured."""
    from peftkern.ops._common import draw_seed
    from peftkern.ops.lora_linear import _LoraLinear

    def function(
        x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        seed = draw_seed(x.device) if p else None
        return _LoraLinear.apply(x, weight, A, B, None, seed, scaling, p, path, None)

    return function


def _as_in_a_model(layer: nn.Module) -> None:
    """What `get_peft_model` does with the layers of a decoder."""
    share_inputs(layer)
    fuse_mlps(layer)


def peftkern_rivals() -> list[Rival]:
    """The layer as users have it (adapters in the weight's dtype, and fp32 masters), in a decoder as `get_peft_model`
    has it, and without what that adds; then each path by itself."""
    version = peftkern_version
    wide, finish = _peftkern_layer(torch.float32), _as_in_a_model
    return [
        Rival("peftkern", "peftkern", _peftkern_layer(None), version=version, finish=finish),
        Rival("peftkern fp32 adapters", "peftkern", wide, True, version=version, sixteen_bit_only=True, finish=finish),
        Rival(
            "peftkern, MLP as it is",
            "peftkern",
            _peftkern_layer(None),
            version=version,
            layers_only=True,
            finish=share_inputs,
        ),
        Rival("peftkern, nothing shared", "peftkern", _peftkern_layer(None), version=version, layers_only=True),
        *(
            Rival(
                f"peftkern: {path}",
                "peftkern",
                by_hand(forced_path(path)),
                version=version,
                most_tokens=DECODE_TOKENS if path == "decode" else 0,
                path=path,
            )
            for path in PEFTKERN_PATHS
        ),
        Rival("peftkern compiled", "compiled", _peftkern_layer(None), compiled=True, version=version),
    ]


# -- Hugging Face PEFT --------------------------------------------------------------------------------------------


def _peft_layer(adapter_dtype: torch.dtype | None) -> Callable[[nn.Linear, int, float, float], Adapted]:
    def wrap(linear: nn.Linear, R: int, alpha: float, dropout: float) -> Adapted:
        import peft

        config = peft.LoraConfig(r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules=["linear"])
        holder = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}))
        layer: Any = holder["linear"]
        # get_peft_model keeps fp32 adapters beside 16-bit weights (autocast_adapter_dtype=True); injecting does not.
        layer.lora_A.to(adapter_dtype or linear.weight.dtype)
        layer.lora_B.to(adapter_dtype or linear.weight.dtype)
        return Adapted(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    return wrap


def peft_rivals() -> list[Rival]:
    """PEFT's two dtype modes, and the second through torch.compile."""
    version = version_of("peft")
    common: dict[str, Any] = {"version": version, "unavailable": "" if version else "peft is not installed"}
    fp32 = Rival("peft fp32 adapters", "peft", _peft_layer(torch.float32), True, True, sixteen_bit_only=True, **common)
    same = Rival("peft", "peft", _peft_layer(None), **common)
    return [fp32, same, Rival("peft compiled", "compiled", _peft_layer(None), compiled=True, **common)]


# -- others, from .rivals/ ----------------------------------------------------------------------------------------


def unpacked(distribution: str) -> tuple[Path, str]:
    """Folder and version of an unpacked wheel `.rivals/<distribution>-<version>`.

    Raises:
        ImportError: it is not there.
    """
    found = sorted(FOLDER.glob(f"{distribution}-*/"))
    if not found:
        raise ImportError(f"no unpacked wheel .rivals/{distribution}-*")
    return found[-1], found[-1].name.removeprefix(f"{distribution}-")


def import_from(folder: Path, module: str) -> ModuleType:
    """Import `module` from `folder` without running the `__init__` files of its packages, which want much more."""
    packages = module.split(".")[:-1]
    for i in range(1, len(packages) + 1):
        name = ".".join(packages[:i])
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(folder.joinpath(*packages[:i]))]
            sys.modules[name] = package
    return importlib.import_module(module)


def definitions(path: Path, names: set[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """The functions and classes `names` of a source file, defined in `namespace`, without the rest of the file.

    Raises:
        ImportError: a name is not in the file.
    """
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    chosen: list[ast.stmt] = [node for node in tree.body if isinstance(node, kinds) and node.name in names]
    if len(chosen) != len(names):
        raise ImportError(f"{path.name} does not define all of {', '.join(sorted(names))}")
    exec(compile(ast.Module(chosen, []), str(path), "exec"), namespace)
    return namespace


def _chalk(entry: bool) -> tuple[LoraFunction, str]:
    """freesolo-chalk: what its installer puts into PEFT on this GPU (`entry`), or its fused kernel with the base."""
    folder, version = unpacked("freesolo_chalk")
    chalk = import_from(folder, "chalk.ops.lora")
    if not hasattr(chalk, "fused_lora"):
        raise ImportError("chalk.ops.lora found no triton")

    @functools.cache
    def delta() -> Callable[..., torch.Tensor]:
        found = chalk.load_lora()
        if found is None:
            raise RuntimeError("chalk's own self-test failed on this GPU")
        return found

    def function(
        x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        base = F.linear(x, weight)
        if not entry:
            return chalk.fused_lora(x, A, B, scaling, base)
        return base + delta()(x.reshape(-1, x.shape[-1]), A, B, scaling).view_as(base)

    return function, version


def _nemo() -> tuple[LoraFunction, str]:
    """NeMo Automodel's TritonLinearLoRA: its autograd function around its kernels, dropout before the adapter."""
    folder, version = unpacked("nemo_automodel")
    kernel = import_from(folder, "nemo_automodel.components._peft.lora_kernel")
    wrappers = {name: getattr(kernel, name) for name in dir(kernel) if name.endswith("_wrapper")}
    namespace = {"torch": torch, "F": F, **wrappers}
    # Of the module that holds them the rest needs transformers, mixture-of-experts layers and more.
    source = folder / "nemo_automodel" / "components" / "_peft" / "lora.py"
    found = definitions(source, {"LoRATritonFunction", "apply_memory_efficient_lora"}, namespace)
    apply = found["apply_memory_efficient_lora"]

    def function(
        x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        return apply(F.dropout(x, p) if p else x, A, B, scaling, True, F.linear(x, weight))

    return function, version


def _three_dimensional(apply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run what takes only [batch, tokens, features] on [tokens, features]."""
    return apply(x) if x.dim() == 3 else apply(x.unsqueeze(0)).squeeze(0)


def _axolotl() -> tuple[LoraFunction, str]:
    folder, version = unpacked("axolotl")
    lora = import_from(folder, "axolotl.kernels.lora")

    def function(
        x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        def apply(x: torch.Tensor) -> torch.Tensor:
            dropped = F.dropout(x, p) if p else None
            return lora.LoRA_O.apply(x, dropped, weight, None, None, A, B, scaling, None, None)

        return _three_dimensional(apply, x)

    return function, version


def _unsloth() -> tuple[LoraFunction, str]:
    folder, version = unpacked("unsloth")
    lora = import_from(folder, "unsloth.kernels.fast_lora")

    def function(
        x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        return _three_dimensional(lambda x: lora.LoRA_W.apply(x, weight, None, A, B, scaling, p or None, None), x)

    return function, version


def other_rivals() -> list[Rival]:
    """Whatever is in `.rivals/` and imports; the rest with its reason."""
    loaders: dict[str, tuple[Callable[[], tuple[LoraFunction, str]], bool]] = {
        "chalk": (lambda: _chalk(entry=True), False),
        "chalk fused kernel": (lambda: _chalk(entry=False), False),
        "nemo automodel": (_nemo, True),
        "unsloth": (_unsloth, True),
        "axolotl": (_axolotl, True),
    }
    rivals = []
    for name, (load, takes_dropout) in loaders.items():
        function, version, why_not = None, None, ""
        try:
            function, version = load()
        except Exception as error:  # another project's import may fail in any way: it is recorded, and not measured
            why_not = f"{type(error).__name__}: {error}".splitlines()[0]
        wrap = by_hand(function) if function is not None else frozen().wrap
        rivals.append(
            Rival(
                name, "others", wrap, version=version, unavailable=why_not, needs_gpu=True, takes_dropout=takes_dropout
            )
        )
    return rivals


def everyone(groups: tuple[str, ...]) -> dict[str, list[Rival]]:
    """The rivals of each wanted group; a group is imported only if it is wanted."""
    peftkern, peft = peftkern_rivals(), peft_rivals()
    found = {
        "peftkern": [r for r in peftkern if r.group == "peftkern"] + [r for r in peft if r.group == "peft"],
        "compiled": [r for r in [*peftkern, *peft] if r.group == "compiled"],
    }
    if "others" in groups:
        found["others"] = other_rivals()
    return {group: found[group] for group in groups}
