"""What state the adapters of a model are in, layer by layer and all together, with the fields of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peftkern.integrations.quantized_models import is_transformers_model
from peftkern.peft_model_base import PeftModel
from peftkern.tuners.tuner_layer import BaseTunerLayer, is_tuned
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import ModulesToSaveWrapper
from peftkern.utils.peft_types import PeftType
from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import Weight4bit

# What stands where layers (or an adapter's parameters) do not agree: the model may not do what is expected of it.
Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The adapters of one layer, of one embedding of which rows are trained, or of one module that is trained whole.

    Attributes:
        name: its name in the model that was given; in a `PeftModel`, in its `base_model`.
        module_type: such as "lora.Linear", or "ia3.Linear" (plain "Linear" in PEFT).
        enabled: whether the active adapters take part in forward.
        active_adapters, merged_adapters: names.
        requires_grad: for each adapter here, whether its parameters are trained; "irregular" where some are.
        available_adapters: names of all adapters here, sorted.
        devices: for each adapter here, the types of the devices that hold it, sorted.
        quantization_backend: "bnb 4bit" or "bnb 8bit", the format that the base weight is in now; None if dense.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a model; what the layers do not agree on is "irregular".

    Attributes:
        base_model_type: the class of the base model; "other" for a bare module that is no transformers model.
        adapter_model_type: such as "LoraModel"; "None" where adapters were injected into a bare model.
        peft_types: the method of each adapter; empty for a bare model.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: how many layers and wrapped modules there are.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as
            in `TunerLayerStatus`, of all layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Irregular


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer, in the model's order.

    Args:
        model: a `PeftModel`, or any module with adapters in it. Layers of `peftkern.nn` count where there are no
            others; beside those they are part of the base.

    Raises:
        TypeError: `model` is no module, or its adapters are virtual tokens.
        ValueError: nothing in it is adapted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, PeftModel) and model._is_prompt_learning:
        kind = PeftType(model.peft_type or "").value
        raise TypeError(f"model: expected adapters in layers, got those of {kind}, which are in none")
    base: Any = model.base_model if isinstance(model, PeftModel) else model
    found = [(n, m) for n, m in named_modules_of(base) if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    managed = [(n, m) for n, m in found if is_tuned(m) or isinstance(m, ModulesToSaveWrapper)]
    if not found:
        raise ValueError(f"model: expected one with adapters in it, found none in this {type(model).__name__}")
    return [_status_of(name, module) for name, module in managed or found]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a model; arguments and errors as for `get_layer_status`."""
    layers = get_layer_status(model)
    trainable, total = PeftModel.get_nb_trainable_parameters(model)  # type: ignore[arg-type]
    if isinstance(model, PeftModel):
        kinds = type(model.get_base_model()).__name__, type(model.base_model).__name__
        methods = {name: PeftType(config.peft_type or "").value for name, config in model.peft_config.items()}
    else:
        kinds = type(model).__name__ if is_transformers_model(model) else "other", "None"
        methods = {}
    merged = {name for layer in layers for name in layer.merged_adapters}
    # A layer may lack an adapter; one that has it and has not merged it differs from those that have.
    torn = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    active = _agreed(tuple(layer.active_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=kinds[0],
        adapter_model_type=kinds[1],
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters="irregular" if active == "irregular" else list(active),
        merged_adapters="irregular" if torn else sorted(merged),
        requires_grad=_by_name((layer.requires_grad for layer in layers), _agreed),
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices=_by_name((layer.devices for layer in layers), lambda held: sorted(set().union(*held))),
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


def _status_of(name: str, module: Any) -> TunerLayerStatus:
    parameters = [{key: list(held)} for key, held in _adapters_of(module)]
    return TunerLayerStatus(
        name=name,
        module_type=repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(getattr(module, "merged_adapters", ())),
        requires_grad=_by_name(parameters, lambda held: _agreed(p.requires_grad for ps in held for p in ps)),
        available_adapters=sorted(module._get_available_adapters()),
        devices=_by_name(parameters, lambda held: sorted({p.device.type for ps in held for p in ps})),
        quantization_backend=_backend_of(module),
    )


def _adapters_of(module: Any) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
    """(adapter, parameters) of every container of the layer or wrapper."""
    for attribute in module.adapter_layer_names:
        for name, held in getattr(module, attribute).items():
            yield name, [held] if isinstance(held, nn.Parameter) else held.parameters()


def _backend_of(module: Any) -> str | None:
    """PEFT's name for the format of the layer's base weight."""
    weight = weight_of(module.get_base_layer()) if isinstance(module, BaseTunerLayer) else None
    return None if weight is None else "bnb 4bit" if isinstance(weight, Weight4bit) else "bnb 8bit"


def _agreed(values: Iterable[Any]) -> Any:
    """The value that all of them are (True of none), else "irregular"."""
    found = set(values) or {True}
    return found.pop() if len(found) == 1 else "irregular"


def _by_name(each: Iterable[dict[str, Any]], joined: Any) -> dict[str, Any]:
    """`joined` of the values of every key, keys in the order in which they come."""
    found: dict[str, list[Any]] = {}
    for mapping in each:
        for name, value in mapping.items():
            found.setdefault(name, []).append(value)
    return {name: joined(values) for name, values in found.items()}
