"""The implementations that are measured over a 4-bit weight: peftkern's and its paths, bitsandbytes, PEFT on it.

All of them share the bytes of one `Weight4bit`; bitsandbytes' layer is made from the tensors that a checkpoint would
hold. A layer without an adapter is there too, for bitsandbytes and for peftkern.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.adapters import Adapted, LoraFunction, Rival, by_hand
from bench.environment import version_of
from peftkern import __version__ as peftkern_version
from peftkern.ops.plan import DECODE_TOKENS
from peftkern.utils.quantized_files import write_quantized
from peftkern.utils.quantized_modules import Linear4bit
from peftkern.weights import Weight4bit

PATHS = ("fused_4bit", "decode_4bit", "dequantize:triton", "dequantize:cublas", "dequantize:decode")
Wrap = Callable[[nn.Linear, int, float, float], Adapted]


@functools.cache
def bitsandbytes() -> tuple[Any, str]:
    """(the module, why it cannot be used or "")."""
    try:
        return importlib.import_module("bitsandbytes"), ""
    except Exception as error:  # it loads a library of its own, which may fail in any way: it is recorded
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def bitsandbytes_parameter(weight: Weight4bit) -> nn.Parameter:
    """The weight as bitsandbytes holds it, by reference; `quant_state` is its attribute."""
    module, _ = bitsandbytes()
    tensors = write_quantized(weight, "")
    packed = tensors.pop("weight")
    return module.nn.Params4bit.from_prequantized(packed, tensors, device=weight.device)


def bitsandbytes_layer(weight: Weight4bit) -> nn.Module:
    """bitsandbytes' Linear4bit over the weight."""
    module, _ = bitsandbytes()
    N, K = weight.shape
    options = {"compute_dtype": weight.dtype, "compress_statistics": weight.nested, "quant_type": weight.quant_type}
    layer = module.nn.Linear4bit(K, N, bias=False, device="meta", **options)
    layer.weight = bitsandbytes_parameter(weight)
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state
    return layer


class DequantizedByBitsandbytes(nn.Module):
    """A frozen linear layer as bitsandbytes computes it where its fused kernel does not serve."""

    def __init__(self, weight: Weight4bit) -> None:
        super().__init__()
        self.weight = bitsandbytes_parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _DequantizeAndMultiply.apply(x, self.weight)


class _DequantizeAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.packed = weight
        return nn.functional.linear(x, _dequantized(weight))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy @ _dequantized(ctx.packed), None


def _dequantized(weight: Any) -> torch.Tensor:
    module, _ = bitsandbytes()
    return module.functional.dequantize_4bit(weight.data, weight.quant_state)


def _without_adapter(make: Callable[[], nn.Module]) -> Wrap:
    return lambda linear, R, alpha, dropout: Adapted(make(), None, None)


# -- peftkern -----------------------------------------------------------------------------------------------------


def _peftkern_layer(base: Callable[[nn.Linear], nn.Module], adapter_dtype: torch.dtype) -> Wrap:
    def wrap(linear: nn.Linear, R: int, alpha: float, dropout: float) -> Adapted:
        from peftkern.nn import LoraLinear

        options: dict[str, Any] = {"lora_alpha": alpha, "lora_dropout": dropout, "adapter_dtype": adapter_dtype}
        layer: Any = LoraLinear.from_linear(base(linear), r=R, **options)
        return Adapted(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    return wrap


def forced_path(weight: Weight4bit, path: str) -> LoraFunction:
    """`lora_linear` over `weight` on one path, whatever the plan would choose: how its crossover is measured."""
    from peftkern.ops._common import draw_seed
    from peftkern.ops.lora_linear_quantized import _LoraLinearQuantized

    def function(
        x: torch.Tensor, dense: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
    ) -> torch.Tensor:
        seed = draw_seed(x.device) if p else None
        return _LoraLinearQuantized.apply(x, A, B, None, seed, (weight, scaling, p, path), None)

    return function


def peftkern_rivals(weight: Weight4bit, dtype: torch.dtype) -> list[Rival]:
    """The layer over the dense weight, which holds no second copy; over the 4-bit one; that on each path."""
    common: dict[str, Any] = {"version": peftkern_version}

    def base(linear: nn.Linear) -> nn.Module:
        return Linear4bit.from_weight(weight)

    layers = [
        Rival("peftkern dense", "peftkern", _peftkern_layer(lambda linear: linear, dtype), **common),
        Rival("peftkern", "peftkern", _peftkern_layer(base, dtype), **common),
        Rival(
            "peftkern fp32 adapters",
            "peftkern",
            _peftkern_layer(base, torch.float32),
            fp32_adapters=True,
            sixteen_bit_only=True,
            **common,
        ),
    ]
    layers.append(
        Rival("peftkern frozen", "frozen", _without_adapter(lambda: Linear4bit.from_weight(weight)), **common)
    )
    for path in PATHS:
        most = DECODE_TOKENS if "decode" in path else 0
        wrap = by_hand(forced_path(weight, path))
        held: dict[str, Any] = {"most_tokens": most, "path": path}
        held["needs_gpu"] = os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
        layers.append(Rival(f"peftkern: {path}", "peftkern", wrap, **held, **common))
    return layers


# -- bitsandbytes, and PEFT on it ---------------------------------------------------------------------------------


def _peft_layer(weight: Weight4bit, adapter_dtype: torch.dtype) -> Wrap:
    def wrap(linear: nn.Linear, R: int, alpha: float, dropout: float) -> Adapted:
        import peft

        config = peft.LoraConfig(r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules=["linear"])
        holder: Any = nn.ModuleDict({"linear": bitsandbytes_layer(weight)})
        holder.is_loaded_in_4bit = True  # what a model loaded by transformers says, and PEFT looks for
        layer: Any = peft.inject_adapter_in_model(config, holder)["linear"]
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
        return Adapted(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    return wrap


def other_rivals(weight: Weight4bit, dtype: torch.dtype) -> list[Rival]:
    """bitsandbytes' layer as it comes (fused where it chooses so, in forward), held to dequantizing, and under PEFT."""
    _, why_not = bitsandbytes()
    common: dict[str, Any] = {"version": version_of("bitsandbytes"), "unavailable": why_not}
    found = [
        Rival("bitsandbytes", "bitsandbytes", _without_adapter(lambda: bitsandbytes_layer(weight)), **common),
        Rival(
            "bitsandbytes dequantize + matmul",
            "bitsandbytes",
            _without_adapter(lambda: DequantizedByBitsandbytes(weight)),
            **common,
        ),
    ]
    version = version_of("peft")
    common = {"version": version, "unavailable": why_not or ("" if version else "peft is not installed")}
    fp32: dict[str, Any] = {"fp32_adapters": True, "autocast": True, "sixteen_bit_only": True}
    found += [
        Rival("peft on bitsandbytes fp32 adapters", "peft", _peft_layer(weight, torch.float32), **fp32, **common),
        Rival("peft on bitsandbytes", "peft", _peft_layer(weight, dtype), **common),
    ]
    return found
