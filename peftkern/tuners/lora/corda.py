"""CorDA: adapters from a decomposition of the weight that knows what a layer is given (Yang et al. 2024,
arXiv:2406.05223).

With C = sum of x^T x of a layer's inputs x, W C = U S V^T, and s the adapter's scaling:

    B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T C^-1,  base weight W - s B A

U_r, S_r, V_r the r largest components ("ipm": adapt to a task) or the r smallest ("kpm": keep what the inputs need).

    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches])
    model = get_peft_model(model, config)  # LoraConfig(init_lora_weights="corda", corda_config=CordaConfig())

Names, arguments, numbers and files are PEFT 0.21.2's. What was found waits as `eigens` on each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkern.tuners.lora.calibration import dense_targets, in_mode, is_there, read_tensors, write_tensors
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.model import rank_and_alpha
from peftkern.utils.adapter_error import shorten
from peftkern.utils.linear_layers import rows_of
from peftkern.utils.progress import with_bar

# Added to C's diagonal, of its mean, so that it can be inverted; doubled until it can.
_FIRST_DAMPING = 0.01
_LARGEST_INVERSION_ERROR = 0.05
_NAMES = ("S_WC", "U_WC", "V_WC")


@dataclass
class CordaEigens:
    """What a layer's adapter is made of: S_WC [r], U_WC [N, r] and V_WC = C^-1 V_r [K, r]."""

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find what CorDA starts adapters from, before `get_peft_model`: `eigens` on each layer that gets one.

    Args:
        model: The base model, with dense weights.
        lora_config: With `corda_config`, whose files are read if they are there, and written if not.
        run_model: Runs the hooked model on sample data; not needed where a file has what it would find.
        hooked_model: Whose layers' inputs are looked at, by the same names; None: the model's own.

    Raises:
        ValueError: No `corda_config`, layer or `run_model`, a quantized weight, a rank above a weight's sizes, inputs
            that are not finite, a layer that is never called, or a file that is of another model.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ValueError("lora_config.corda_config: expected a CordaConfig, got None")
    layers = dense_targets(model, lora_config, "CorDA")
    ranks = {name: rank_and_alpha(lora_config, name)[0] for name in layers}
    for name, layer in layers.items():
        if ranks[name] > min(layer.weight.shape):
            raise ValueError(f"CorDA: r is {ranks[name]} at {name}, whose weight is {list(layer.weight.shape)}")
    devices = {f"{name}.eigens.{part}": layer.weight.device for name, layer in layers.items() for part in _NAMES}
    if settings.cache_file is not None and is_there(settings.cache_file):
        kept = read_tensors(settings.cache_file, devices)
        for name, layer in layers.items():
            layer.eigens = CordaEigens(*(kept[f"{name}.eigens.{part}"] for part in _NAMES))
        return
    if settings.corda_method is None:
        raise ValueError("corda_config.corda_method: expected 'ipm' or 'kpm' without a cache_file, got None")
    covariances, counts = _covariances(model, layers, lora_config, run_model, hooked_model)
    for name in with_bar(layers, "CorDA", settings.verbose):
        layers[name].eigens = _eigens(layers[name], covariances[name], ranks[name], settings.corda_method)
        if not settings.prune_temporary_fields:
            fields = {"covariance_matrix": covariances[name], "sample_count": counts.get(name), "rank": ranks[name]}
            layers[name].__dict__.update(fields, corda_method=settings.corda_method)
    if settings.cache_file is not None:
        made = {name: getattr(layers[name.rsplit(".", 2)[0]].eigens, name.rsplit(".", 1)[1]) for name in devices}
        write_tensors(settings.cache_file, made)


def _covariances(
    model: nn.Module,
    layers: dict[str, Any],
    config: LoraConfig,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """C of each layer, over the number of its calls; and these numbers, if the model was run."""
    settings: Any = config.corda_config
    if is_there(settings.covariance_file):
        return read_tensors(settings.covariance_file, {name: m.weight.device for name, m in layers.items()}), {}
    if run_model is None:
        raise ValueError("run_model: needed where corda_config has no cache_file or covariance_file yet, got None")
    hooked_model = model if hooked_model is None else hooked_model
    hooked = layers if hooked_model is model else dense_targets(hooked_model, config, "CorDA")
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if not settings.use_float16_for_covariance:
            x = x.float()
        x = x / x.max().abs()
        covariance = x.t() @ x
        if not bool(covariance.isfinite().all()):
            raise ValueError(f"CorDA: the input of {name} is zero, or has NaN or infinity")
        sums[name] = sums[name] + covariance if name in sums else covariance
        counts[name] = counts.get(name, 0) + 1

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: add(name, args[0])

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in hooked.items()]
    try:
        with in_mode(hooked_model, training=False):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    uncalled = [name for name in layers if name not in sums]
    if uncalled:
        raise ValueError(f"run_model: it does not call {shorten(uncalled, 3)}")
    found = {name: sums[name] / counts[name] for name in layers}
    if settings.covariance_file is not None:
        write_tensors(settings.covariance_file, found)
    return found, counts


def _eigens(layer: Any, covariance: torch.Tensor, r: int, method: str) -> CordaEigens:
    C = covariance.to(layer.weight.device, torch.float32)
    eye = torch.eye(len(C), device=C.device)
    damping = _FIRST_DAMPING
    while True:
        damped = C + eye * C.diagonal().mean() * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < _LARGEST_INVERSION_ERROR:
            break
        damping *= 2
    U, S, Vh = torch.linalg.svd(rows_of(layer).float() @ damped, full_matrices=False)
    part = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    return CordaEigens(S[part].clone(), U[:, part].clone(), (Vh[part] @ inverse).t().clone())
