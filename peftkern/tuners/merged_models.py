"""A model some of whose quantized layers became others because adapters were merged into them.

Each such layer is right by itself. What is left is the model around it: activations have a dtype of their own, which a
quantized layer takes whatever it is and a dense one does not; and a transformers model is still marked as quantized, so
that it would refuse to be cast, and be saved as a checkpoint of 4-bit weights that it does not have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkern.utils.kbit import to_own_dtype
from peftkern.utils.linear_layers import is_conv1d
from peftkern.utils.quantization_settings import exact_skips
from peftkern.utils.quantized_modules import weight_of


def settle_merged(model: nn.Module, merged: list[nn.Module]) -> None:
    """Fit `merged` layers, which stand in the place of quantized ones, into `model`, in place.

    Dense ones get the dtype that everything else in the model has; where there are several (norms in float32 after
    `prepare_model_for_kbit_training`), they keep theirs and cast their input to it. A transformers model that holds no
    quantized layer any more loses the marks of one; if some are left, its configuration names those that are not.

    Args:
        model: what the adapters were taken out of.
        merged: modules of it, dense or quantized anew.
    """
    dense = [module for module in merged if weight_of(module) is None]
    _fit_dtypes(model, dense)
    _correct_marks(model)


def _fit_dtypes(model: nn.Module, dense: list[nn.Module]) -> None:
    new = {id(module) for module in dense}
    others = [module for module in model.modules() if id(module) not in new and weight_of(module) is None]
    parameters = [parameter for module in others for parameter in module.parameters(recurse=False)]
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    for module in dense:
        if len(dtypes) == 1:
            module.to(next(iter(dtypes)))
        elif dtypes:
            module.register_forward_pre_hook(to_own_dtype)


def _correct_marks(model: Any) -> None:
    """The marks that transformers' `from_pretrained` or `quantize_model` set, as the layers are now."""
    config = getattr(model, "config", None)
    said: Any = getattr(config, "quantization_config", None)
    if said is None:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = [name for name, module in modules.items() if weight_of(module) is not None]
    if quantized:
        dense = [name for name, module in modules.items() if type(module) is nn.Linear or is_conv1d(module)]
        skips = exact_skips(dense, quantized)
        if isinstance(said, dict):
            said["llm_int8_skip_modules"] = skips
        else:
            said.llm_int8_skip_modules = skips
        return
    del config.quantization_config
    # The last is ours, and counts quantized weights (`mark_quantized`).
    for name in ("hf_quantizer", "quantization_method", "num_parameters"):
        vars(model).pop(name, None)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            setattr(model, name, False)
    for module in modules.values():
        held = getattr(module, "config", None)
        if hasattr(held, "_is_quantized"):
            del held._is_quantized
