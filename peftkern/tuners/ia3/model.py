"""`IA3Model`: IA3 adapters in a model."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from peftkern.tuners.ia3.conv import Conv2d, Conv3d
from peftkern.tuners.ia3.layer import IA3Layer, Linear
from peftkern.tuners.ia3.merging import checked_merge
from peftkern.tuners.ia3.mixed import MixedVectors
from peftkern.tuners.mixed import MixedRows
from peftkern.tuners.targets import check_is_called, ends_with_name, fit_fan_in_fan_out, is_linear
from peftkern.tuners.tuner_layer import BaseTunerLayer, check_mergeable_base
from peftkern.tuners.tuners_utils import BaseTuner
from peftkern.tuners.weighted import check_sources, joined_targets
from peftkern.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peftkern.utils.module_tree import named_modules_of


def is_feedforward(config: Any, key: str) -> bool:
    """Whether `config.feedforward_modules` names the module `key`: a regular expression for all of it, or endings."""
    named = config.feedforward_modules
    if isinstance(named, str):
        return re.fullmatch(named, key) is not None
    return any(key.endswith(name) for name in named)


class IA3Model(BaseTuner):
    """A model with IA3 adapters (Liu et al. 2022, arXiv:2205.05638) around its linear layers and convolutions.

    Changes `model` in place: a `Linear`, `Conv2d` or `Conv3d` of `peftkern.tuners.ia3` is put around each targeted
    module. The arguments and errors are those of `BaseTuner`; the configuration is an `IA3Config`. Several active
    adapters multiply. In a batch whose rows name theirs (`adapter_names`) each takes one: see `tuners/ia3/mixed.py`.
    """

    prefix: str = "ia3_"
    tuner_layer_cls = IA3Layer
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    def settle_config(self, config: Any) -> None:
        """Fills in the architecture's `feedforward_modules`, and names those that `target_modules` spells otherwise by
        its spelling, so that the saved configuration can be read again."""
        named, targets = config.feedforward_modules, config.target_modules
        if named is None:
            model_type = self.get_model_config(self.model).get("model_type")
            named = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type or "")
            if named is None:
                raise ValueError(
                    f"feedforward_modules must be given ([] for none): no default is known for model_type "
                    f"{model_type!r}"
                )
            named = set(named)
        config.feedforward_modules = named
        if isinstance(named, set) and isinstance(targets, set) and not named <= targets:
            config.feedforward_modules = {target for target in targets if target.endswith(tuple(named))}
            keys = [key for key, _ in named_modules_of(self.model) if ends_with_name(key, targets)]
            if any(is_feedforward(config, key) != key.endswith(tuple(named)) for key in keys):
                # Longer names than the targets' (which `match_targets` may have shortened): an expression may be any.
                config.feedforward_modules = f".*(?:{'|'.join(map(re.escape, sorted(named)))})"

    def check_target(self, config: Any, key: str, target: nn.Module) -> None:
        layer: Any = target
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, IA3Layer):
            raise ValueError(f"target_modules names {key!r}, which another method adapted ({type(target).__name__})")
        base = layer.get_base_layer() if isinstance(layer, IA3Layer) else layer
        if not isinstance(base, (nn.Conv2d, nn.Conv3d)) and not is_linear(base):
            raise ValueError(
                f"target_modules names {key!r}, a {type(base).__name__}: IA3 adapts nn.Linear, nn.Conv2d, nn.Conv3d "
                "and transformers' Conv1D (name the layers inside it, or keep it out with exclude_modules)"
            )
        if isinstance(layer, IA3Layer) and layer.is_feedforward != is_feedforward(config, key):
            side = {True: "input", False: "output"}
            raise ValueError(
                f"feedforward_modules={config.feedforward_modules!r} would scale the {side[not layer.is_feedforward]} "
                f"of {key!r}, whose adapters ({', '.join(layer.ia3_l)}) scale its {side[layer.is_feedforward]}"
            )
        check_is_called(config, self.model, key)

    def create_layer(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> BaseTunerLayer:
        if isinstance(target, IA3Layer):
            target.update_layer(adapter_name, config)
            return target
        made = Conv2d if isinstance(target, nn.Conv2d) else Conv3d if isinstance(target, nn.Conv3d) else Linear
        if made is Linear:
            fit_fan_in_fan_out(config, target)
        return made(target, adapter_name, config, is_feedforward=is_feedforward(config, key))

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self._layers():
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if name in layer.ia3_l and name not in layer.merged_adapters]
            if names:
                check_mergeable_base(layer)
                if safe_merge:
                    checked_merge(layer, names)

    def make_room(self, mixed: MixedRows | None) -> MixedRows:
        slots = len(self.peft_config)
        if mixed is not None and mixed.slots >= slots:
            return mixed
        return MixedVectors(self.model, slots, IA3Layer)

    # -- adding adapters up --------------------------------------------------------------------------------------

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter that is the weighted sum of others: `l = sum of weights[i] * l_i`, frozen until it is active.

        As in PEFT, its configuration is the first one's with the targets of all, and where an adapter has no vector
        in a layer nothing is added for it.

        Args:
            adapters: Names of adapters here.
            weights: A number for each.
            adapter_name: The new adapter's name.

        Raises:
            TypeError: `adapters` is a str, or a weight is no number.
            ValueError: An unknown name, one that is taken, other than one finite weight each, more than one with
                `modules_to_save` of the same module, or targets of which some are names and some expressions.
        """
        weights = check_sources(self, adapters, weights, adapter_name)
        first: Any = self.peft_config[adapters[0]]
        fields = ("target_modules", "feedforward_modules")
        new_targets: dict[str, Any] = {field: joined_targets(self, adapters, field) for field in fields}
        self.peft_config[adapter_name] = dataclasses.replace(first, **new_targets)
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters)
        with torch.no_grad():
            for layer in self._layers():
                if adapter_name not in layer.ia3_l:
                    continue
                total = torch.zeros_like(layer.ia3_l[adapter_name], dtype=torch.float32)
                for name, weight in zip(adapters, weights, strict=True):
                    if name in layer.ia3_l:
                        total += layer.ia3_l[name] * weight
                layer.ia3_l[adapter_name].copy_(total)
