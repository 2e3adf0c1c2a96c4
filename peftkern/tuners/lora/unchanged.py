"""Whether a model's LoRA layers are as the last mixed batch found them: asked at every forward of such a batch.

`MixedAdapters.sync` and `LayerBatch.decide` walk through every adapter of every layer, which takes as long as the
products of a few rows. What they go by is compared here with what it was, in lists that a few calls run through.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from peftkern.tuners.fusing import Unhooked

_CONTAINERS = ("lora_A", "lora_B", "lora_dropout")


class Unchanged:
    """What was found of `layers`: their modules, weights and where these lie, scalings, modes and dropouts; and that no
    module had hooks or a forward of its own, which has to be so when this is made.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = [layer.__dict__ for layer in layers]
        self._children = self._look_for_children()
        self._modules = [*itertools.chain.from_iterable(self._children)]
        self._insides = [module.__dict__ for module in self._modules]
        self._unhooked = Unhooked(self._insides)
        parameters = [inside["_parameters"] for inside in self._insides]
        self._parameters = [held for held in parameters if held.get("weight") is not None]
        self._dropouts = [inside for inside in self._insides if "p" in inside]
        self._weights = self._look_for_weights()
        self._found = self._look(self._weights)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if self._look_for_children() != self._children or not self._unhooked.still():
            return False
        weights = self._look_for_weights()
        return all(map(operator.is_, self._weights, weights)) and self._look(weights) == self._found

    def _look_for_children(self) -> list[list[Any]]:
        """What each layer is made of: its adapters' modules, and its base layer."""
        found = []
        for inside in self._layers:
            held = inside["_modules"]
            found += [[*held[name]._modules.values()] for name in _CONTAINERS]
            found.append([held["base_layer"]])
        return found

    def _look_for_weights(self) -> list[Any]:
        return [held.get("weight") for held in self._parameters]

    def _look(self, weights: list[Any]) -> list[Any]:
        """What may change in modules and weights that stay."""
        return [
            [*map(torch.Tensor.data_ptr, weights)],  # other memory where the dtype or device is another
            [*map(torch.Tensor.numel, weights)],
            [*map(type, self._modules)],
            [*map(len, self._insides)],  # a forward of a module's own is one attribute more
            [(inside["p"], inside["training"]) for inside in self._dropouts],
            [
                (inside["training"], *inside["scaling"].items(), *inside["lora_bias"].values())
                for inside in self._layers
            ],
        ]
