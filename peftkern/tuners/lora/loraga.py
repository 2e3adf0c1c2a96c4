"""LoRA-GA: adapters that start along the gradient of the full weight (Wang et al. 2024, arXiv:2407.05000).

With G = U S V^T the gradient of a layer's weight W, A takes r of its 2r leading right singular vectors and B r of the
left ones with their singular values, by `direction`; B, or both, are scaled by `scale`; the base weight becomes
W - s B A, s the adapter's scaling.

    preprocess_loraga(model, config, train_step)  # train_step runs forward and backward on some batches
    model = get_peft_model(model, config)  # LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

Names, arguments, draws, numbers and files are PEFT 0.21.2's. What was found waits as `_peft_loraga_grad` on each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftkern.tuners.lora.calibration import dense_targets, in_mode, is_there, read_tensors, write_tensors
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.found_factors import GRADIENT
from peftkern.utils.adapter_error import shorten
from peftkern.utils.adapter_files import PathLike
from peftkern.utils.module_tree import parameters_of_model


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: PathLike | None = None
) -> None:
    """Find the gradients that LoRA-GA starts adapters from, before `get_peft_model`.

    Args:
        model: The base model, with dense weights. Only those of the targeted layers get gradients meanwhile, in
            training mode; the parameters' own `grad` and `requires_grad` are put back.
        lora_config: With `lora_ga_config`.
        train_step: Runs forward and backward, once or more often; gradients are averaged over a layer's calls.
        cache_file: Where gradients are kept: read if it is there, written if not.

    Raises:
        ValueError: No `lora_ga_config` or layer, a quantized weight, or a file that is of another model.

    Warns:
        UserWarning: Layers without a gradient, which start as with init_lora_weights=True.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError("lora_config.lora_ga_config: expected a LoraGAConfig, got None")
    layers = dense_targets(model, lora_config, "LoRA-GA")
    if cache_file is not None and is_there(cache_file):
        devices = {f"{name}.{GRADIENT}": layer.weight.device for name, layer in layers.items()}
        for name, gradient in read_tensors(cache_file, devices).items():
            layers[name.removesuffix(f".{GRADIENT}")].__dict__[GRADIENT] = gradient
        return
    found = _gradients(model, layers, train_step)
    for name, gradient in found.items():
        layers[name].__dict__[GRADIENT] = gradient
    without = [name for name in layers if name not in found]
    if without:
        warnings.warn(f"LoRA-GA: train_step gave no gradient to {shorten(without, 3)}", stacklevel=2)
    if cache_file is not None:
        write_tensors(cache_file, {f"{name}.{GRADIENT}": gradient for name, gradient in found.items()})


def _gradients(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """The gradient of each layer's weight, over the number of times that it was gone back through."""
    before = [(p, p.requires_grad, p.grad) for p in parameters_of_model(model)]
    counts = dict.fromkeys(layers, 0)

    def hook_of(name: str) -> Callable[..., None]:
        def count(gradient: torch.Tensor) -> None:
            counts[name] += 1

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with in_mode(model, training=True), torch.enable_grad():
            train_step()
        return {
            name: layer.weight.grad / counts[name]
            for name, layer in layers.items()
            if counts[name] and layer.weight.grad is not None
        }
    finally:
        for handle in handles:
            handle.remove()
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad
