"""`get_peft_model`: the usual door in."""

from __future__ import annotations

import warnings

from torch import nn

from peftkern.config import PeftConfig, check_is_config
from peftkern.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peftkern.tuners.switching import layers_of
from peftkern.utils.other import check_is_module


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on `model`, which is changed in place.

    Args:
        model: Any module; a task class needs a transformers model.
        peft_config: What to adapt and how. `base_model_name_or_path` and `revision` are set on it.
        adapter_name: The adapter's name.
        mixed: Adapters of several methods at once; not built, must be False.
        autocast_adapter_dtype: Keep adapters of float16 and bfloat16 layers in float32.
        revision: The base model's revision, to be saved in the configuration.
        low_cpu_mem_usage: Make the adapter's parameters on the meta device, to be loaded into.

    Returns:
        The class that `peft_config.task_type` names, or `PeftModel`.

    Raises:
        TypeError: `peft_config` is no configuration of peftkern's, or `model` no module.
        ValueError: `model` is a `PeftModel` already (a second wrapping gives its adapters names that load nowhere), or
            carries an adapter of that name; or the configuration does not fit it.

    Warns:
        UserWarning: `model` carries adapters already, or the configuration named another base model or revision.
    """
    if mixed:
        raise NotImplementedError("mixed: adapters of several methods on one model are not built")
    check_is_config("peft_config", peft_config)
    check_is_module("model", model)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model: expected a base model, got a {type(model).__name__} with the adapters "
            f"{sorted(model.peft_config)}: call its add_adapter(name, config) for another one, or unload() for the "
            "base model to start anew"
        )
    if isinstance((getattr(model, "peft_config", None) or {}).get(adapter_name), PeftConfig):
        raise ValueError(
            f"adapter_name: an adapter {adapter_name!r} exists already in this model: choose another name, or call "
            "unload() on its PeftModel to start anew"
        )
    # A transformers model that was made from a configuration has the name "", which is nothing to load from.
    name = model.__dict__.get("name_or_path") or None
    previous, peft_config.base_model_name_or_path = peft_config.base_model_name_or_path, name
    if layers_of(model):
        warnings.warn(
            "The model carries adapters already: this adds to them. To start anew, call `unload()` first.",
            stacklevel=2,
        )
    if previous is not None and previous != name:
        warnings.warn(
            f"peft_config.base_model_name_or_path was {previous!r} and is {name!r} now, after the model given.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(f"peft_config.revision was {peft_config.revision!r} and is {revision!r} now.", stacklevel=2)
        peft_config.revision = revision
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return wrapper(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
