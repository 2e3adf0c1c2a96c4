"""`TrainableTokensWrapper`: what stands in the place of an embedding of which adapters train single rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftkern.tuners.trainable_tokens.layer import TrainableTokensLayer
from peftkern.utils.other import AuxiliaryTrainingWrapper


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A `TrainableTokensLayer`, `token_adapter`, which holds the adapters; and for model code the module inside it.

    The layer's name is one level below the module's own, as in PEFT, so that files have PEFT's names.

    Args:
        module_to_save: the embedding, or a head tied to it.
        tied_adapter: the layer of which this one has the rows.
    """

    def __init__(self, module_to_save: nn.Module, tied_adapter: TrainableTokensLayer | None = None) -> None:
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module_to_save, tied_adapter)

    @property
    def original_module(self) -> nn.Module:
        """The module that is wrapped."""
        return self.token_adapter.base_layer

    @property
    def disable_adapters(self) -> bool:
        """Whether the module is used as it is, whatever adapter is active."""
        return self.token_adapter.disable_adapters

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters that have rows here."""
        return self.token_adapter.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have rows here."""
        return self.token_adapter.active_adapters

    @property
    def _adapters(self) -> set[str]:
        return self._get_available_adapters()

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have rows here."""
        return self.token_adapter._get_available_adapters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("token_adapter")
            if layer is None:
                raise
        # Some models read an embedding's weight rather than call it.
        return layer.weight_in_force() if name == "weight" else getattr(layer.base_layer, name)

    def enable_adapters(self, enabled: bool) -> None:
        """Uses the trained rows (True) or the base's (False)."""
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """See `TrainableTokensLayer.set_adapter`."""
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets `requires_grad` on the rows of the named adapters."""
        self.token_adapter.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Removes the rows of an adapter; if it was active, those of a new active adapter become so."""
        if adapter_name in self.active_adapters:
            self.token_adapter.set_adapter(new_active_adapters or [])
        self.token_adapter.delete_adapter(adapter_name)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `state_dict` (of this wrapper) holds for `adapter_name`, under the names of a file."""
        load_map = self.adapter_state_dict_load_map(adapter_name)
        return {saved: state_dict[held] for saved, held in load_map.items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in a file -> names in this wrapper, for the rows of `adapter_name`; those of a tied layer are saved
        where they are its own."""
        layer = self.token_adapter
        if layer.tied_adapter is not None or adapter_name not in layer.trainable_tokens_delta:
            return {}
        return {"token_adapter.trainable_tokens_delta": f"token_adapter.trainable_tokens_delta.{adapter_name}"}

    def unloaded_module(self) -> nn.Module:
        """What stands in the wrapper's place once adapters are unloaded: the module, with what was merged into it."""
        return self.original_module
