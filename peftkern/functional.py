"""Adapters in a model that is no `PeftModel`: the functions of PEFT's `peft.functional`.

`inject_adapter_in_model` puts an adapter into a module, `set_adapter`, `set_requires_grad` and `delete_adapter` manage
those that are there, and the state-dict functions read and write their tensors.
"""

from __future__ import annotations

from peftkern.mapping import inject_adapter_in_model
from peftkern.tuners.tuners_utils import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peftkern.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
