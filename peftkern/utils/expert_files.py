"""Adapter files from before transformers stacked a mixture's experts: a LoRA for each expert's linear layers.

    gate_up_proj of expert e:  A = [A_gate; A_up] [2 r, in],  B = [[B_gate, 0], [0, B_up]] [2 out, 2 r]
    down_proj of expert e:     A and B as they are

then the experts as `ParamWrapper` holds them: A [R * E, in] one after the other, B [out, R * E] with the experts
innermost. The adapters' product is the same as before; what PEFT 0.21.2 makes of such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftkern.tuners.lora.experts import ParamWrapper
from peftkern.utils.adapter_error import AdapterFileError
from peftkern.utils.adapter_files import PathLike
from peftkern.utils.constants import EXPERTS_THAT_WERE_LAYERS
from peftkern.utils.module_tree import named_modules_of

# The module around the experts, and its name in files of transformers 4 where that was another one (Mixtral).
_NOW, _BEFORE = ".mlp.", ".block_sparse_moe."


def stack_experts(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str, source: PathLike
) -> Mapping[str, torch.Tensor]:
    """`state_dict` with the tensors of single experts' layers put together, where `model` has them in one parameter.

    Args:
        model: The model that the tensors are for, its adapter in place.
        state_dict: Names in a file -> tensors; returned as it is where nothing is to be done.
        adapter_name: The adapter.
        source: The file's name, for messages.

    Raises:
        AdapterFileError: Some of the tensors that a parameter needs are there and others are not, or they do not fit
            together.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    table = EXPERTS_THAT_WERE_LAYERS.get(model_type) if isinstance(model_type, str) else None
    if table is None:
        return state_dict
    found = dict(state_dict)
    for name, wrapper in named_modules_of(model):
        if not isinstance(wrapper, ParamWrapper) or adapter_name not in wrapper.scaling:
            continue
        module = name.replace(".base_layer", "")
        key, old_module = f"{module}.{wrapper.parameter_name}", module.replace(_NOW, _BEFORE)
        layers = [layer for layer, now in table.items() if key.endswith(f".{now}")]
        if layers == ["gate"]:  # the router, a layer of the same sizes
            for factor in "AB" if old_module != module else "":
                if f"{old_module}.lora_{factor}.weight" in found:
                    found[f"{name}.lora_{factor}.weight"] = found.pop(f"{old_module}.lora_{factor}.weight")
            continue
        for container in dict.fromkeys((module, old_module)) if layers else ():
            stacked = _stacked(found, container, wrapper.num_experts, layers, source)
            found.update({f"{name}.lora_{factor}.weight": tensor for factor, tensor in stacked.items()})
    return found


def _stacked(
    found: dict[str, Any], container: str, num_experts: int, layers: list[str], source: PathLike
) -> dict[str, torch.Tensor]:
    """A and B of all experts, whose tensors are taken out of `found`; nothing if it has none of them."""
    names = [f"{container}.{expert}.{layer}.lora_" for expert in range(num_experts) for layer in layers]
    keys = [f"{name}{factor}.weight" for name in names for factor in "AB"]
    missing = [key for key in keys if key not in found]
    if len(missing) == len(keys):
        return {}
    if missing:
        raise AdapterFileError(source, "the tensor is missing, while those of other experts are there", key=missing[0])
    As = [found.pop(f"{name}A.weight") for name in names]
    Bs = [found.pop(f"{name}B.weight") for name in names]
    each = len(layers)
    try:
        blocks = torch.stack([torch.block_diag(*Bs[i : i + each]) for i in range(0, len(Bs), each)])  # [E, out, R]
        return {"A": torch.cat(As), "B": blocks.permute(1, 2, 0).reshape(blocks.shape[1], -1)}
    except RuntimeError as error:
        raise AdapterFileError(source, f"the experts' tensors do not fit together: {error}", key=keys[0]) from error
