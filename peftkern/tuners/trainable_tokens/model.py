"""`TrainableTokensModel`: trained rows of embeddings as a method by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from peftkern.tuners.mixed import MixedRows
from peftkern.tuners.tied_weights import input_embedding_name
from peftkern.tuners.trainable_tokens.layer import TrainableTokensLayer
from peftkern.tuners.trainable_tokens.places import TokenPlace, places_of
from peftkern.tuners.tuners_utils import BaseTuner


class TrainableTokensModel(BaseTuner):
    """A model of which single rows of embeddings train.

    Changes `model` in place: a `TrainableTokensLayer` is put around each targeted embedding, and around what is tied to
    it. The arguments and errors are those of `BaseTuner`; the configuration is a `TrainableTokensConfig`.
    """

    prefix: str = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer
    target_module_mapping: Mapping[str, list[str] | str] = MappingProxyType({})

    def match_parameters(
        self, model: nn.Module, config: Any, state_dict: Mapping[str, torch.Tensor] | None
    ) -> Sequence[Any]:
        if config.target_modules is None:
            config.target_modules = input_embedding_name(model) or "embed_tokens"
        return ()

    def token_places(self, model: nn.Module, config: Any, keys: Sequence[str]) -> list[TokenPlace]:
        return places_of(model, keys, config.token_indices, "token_indices")

    def check_target(self, config: Any, key: str, target: nn.Module) -> None:
        """`token_places` looks at the targets and at what is tied to them."""

    def create_layer(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> Any:
        """`put_rows` does, which begins with those that others are tied to."""
        return target

    def put_rows(
        self, model: nn.Module, places: Sequence[TokenPlace], adapter_name: str, config: Any, **options: Any
    ) -> None:
        super().put_rows(model, places, adapter_name, config, wrapped=False, init_weights=config.init_weights)

    def make_room(self, mixed: MixedRows | None) -> MixedRows:
        slots = len(self.peft_config)
        if mixed is not None and mixed.slots >= slots:
            return mixed
        return MixedRows(self.model, slots, TrainableTokensLayer)
