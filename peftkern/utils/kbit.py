"""`prepare_model_for_kbit_training`: freeze a quantized model and make it ready for adapters, with PEFT's meaning; and
`cast_mixed_precision_params`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from peftkern.utils.other import check_is_module
from peftkern.utils.quantization_settings import output_embeddings
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of

_HALVES = (torch.float16, torch.bfloat16)
# Methods whose models PEFT does not widen, by `model.quantization_method`.
_NOT_WIDENED = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast_embeddings: bool = False,
) -> Any:
    """Freeze `model`, widen its 16-bit parameters to float32, and switch on gradient checkpointing if it is quantized.

    Embeddings and lm_head, which are most of what is not quantized (2.1 GB of an 8B Llama, 4.2 widened), keep their
    16 bits by default; PEFT widens them too. Numbers are PEFT's all the same, but for the rounding of lm_head's input
    to 16 bits: outside of autocast, what an embedding gives is widened after the look-up, and lm_head is given its
    input in its own dtype; under autocast, nothing needs to be done, since it rounds a widened lm_head to 16 bits.

    Args:
        model: A transformers model.
        use_gradient_checkpointing: Switch it on (for a quantized model only, as in PEFT), and let gradients through to
            the inputs of the first layer, as reentrant checkpointing needs.
        gradient_checkpointing_kwargs: What `torch.utils.checkpoint.checkpoint` takes, `use_reentrant` for one; None
            for transformers' choice, which is no reentrance. (PEFT leaves that to torch, which is to refuse it.)
        auto_clear_cache: Give the memory of the old 16-bit copies back to the GPU.
        upcast_embeddings: True for PEFT's behaviour: embeddings and lm_head in float32 too.

    Returns:
        `model`.

    Warns:
        UserWarning: What was saved by not widening, and how to have it otherwise.
    """
    check_is_module("model", model)
    kept = set() if upcast_embeddings else {id(p) for m in _embeddings(model) for p in m.parameters(recurse=False)}
    quantized = {id(m.weight) for m in model.modules() if _holds_quantized(m)}
    method = str(getattr(getattr(model, "quantization_method", None), "value", None) or "")
    model.requires_grad_(False)
    saved = 0
    if method not in _NOT_WIDENED:
        for parameter in model.parameters():
            if parameter.dtype not in _HALVES or id(parameter) in quantized or _is_4bit(parameter):
                continue
            if id(parameter) in kept:
                saved += parameter.nbytes
            else:
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if saved:
            _bridge_dtypes(model)
            warnings.warn(
                "prepare_model_for_kbit_training: embeddings and lm_head stay in 16 bits, which saves "
                f"{saved / 2**20:,.1f} MiB; upcast_embeddings=True widens them to float32, as PEFT does.",
                stacklevel=2,
            )
    flags = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if use_gradient_checkpointing and (quantized or flags or method in _NOT_WIDENED):
        _switch_on_checkpointing(model, gradient_checkpointing_kwargs)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen in `model` to `dtype`, and what is trained to float32, in place.

    Quantized weights, and whatever else is no floating-point parameter, stay as they are (PEFT casts their bytes).

    Args:
        model: any module.
        dtype: torch.float16 or torch.bfloat16, as in the autocast that is to be trained under.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _HALVES:
        raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype!r}")
    check_is_module("model", model)
    quantized = {id(m.weight) for m in model.modules() if _holds_quantized(m)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in quantized and not _is_4bit(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _holds_quantized(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit | Linear8bit) or weight_of(module) is not None


def _is_4bit(parameter: nn.Parameter) -> bool:
    """Whether it is bitsandbytes' packed parameter, in whatever module."""
    return type(parameter).__name__ == "Params4bit"


def _embeddings(model: Any) -> list[nn.Module]:
    """Every embedding and the output embeddings."""
    head = output_embeddings(model)
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found if head is None else [*found, head]


def _bridge_dtypes(model: Any) -> None:
    """Casts around the 16-bit embeddings and lm_head, for the rest of the model computes in float32."""
    head = output_embeddings(model)
    for module in _embeddings(model):
        if module is head:
            if to_own_dtype not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(to_own_dtype)
        elif _widened not in module._forward_hooks.values():
            module.register_forward_hook(_widened)


def _under_autocast(t: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(t.device.type)


def _widened(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Hook: an embedding's output in float32."""
    is_half = isinstance(output, torch.Tensor) and output.dtype in _HALVES
    return output.to(torch.float32) if is_half and not _under_autocast(output) else output


def to_own_dtype(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook: a linear layer's input in its weight's dtype; as it is under autocast or where that weight is quantized."""
    x, *rest = inputs if inputs else (None,)
    weight = getattr(module, "weight", None)
    if not isinstance(x, torch.Tensor) or weight is None or not x.is_floating_point() or _under_autocast(x):
        return inputs
    if _holds_quantized(module.get_base_layer() if hasattr(module, "get_base_layer") else module):
        return inputs  # it takes any dtype; that of its weight is the dtype of the bytes
    return (x.to(weight.dtype), *rest)


def _switch_on_checkpointing(model: Any, kwargs: dict[str, Any] | None) -> None:
    # Without reentrance checkpointing finds the adapters' parameters by itself.
    if (kwargs or {}).get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name of the same
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Hook: let gradients through to here, where no parameter before this asks for them."""
    output.requires_grad_(True)
