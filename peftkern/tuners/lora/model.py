"""`LoraModel`: LoRA adapters in a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from peftkern.tuners.lora.attention import AttentionOutput, MultiheadAttention, check_attention
from peftkern.tuners.lora.config import changes_base, highest_rank, leaves_residual
from peftkern.tuners.lora.conv import check_convolution, conv_layer, is_convolution
from peftkern.tuners.lora.embedding import Embedding
from peftkern.tuners.lora.experts import ParamWrapper
from peftkern.tuners.lora.gated_mlp import fuse_known_mlps, release_mlps
from peftkern.tuners.lora.layer import Linear, LoraLayer
from peftkern.tuners.lora.merging import check_mergeable, checked_merge
from peftkern.tuners.lora.mixed import MixedAdapters
from peftkern.tuners.lora.mutated_init import subtract_initial
from peftkern.tuners.lora.parameter_targets import ParameterTarget, match_parameters, settle_expert_targets, wrap
from peftkern.tuners.lora.shared_input import share_known_inputs
from peftkern.tuners.lora.weighted import Combination, add_weighted
from peftkern.tuners.mixed import MixedRows
from peftkern.tuners.targets import check_is_called, fit_fan_in_fan_out, get_pattern_key, is_linear
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.tuners.tuners_utils import BaseTuner
from peftkern.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peftkern.utils.quantized_modules import weight_of


def rank_and_alpha(config: Any, key: str) -> tuple[int, int | float]:
    """The rank and `lora_alpha` that `config` gives the module named `key`: its patterns', or its own."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)
    return r, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha)


def _warn_of_residual(inits: dict[str, Any], what: str) -> None:
    """Warns that without these adapters the base model is not the one that they were put on."""
    if inits:
        warnings.warn(
            f"adapters {what} whose initialization took a part of the base weights ({inits}): without them the base "
            "model is not the one that it was, as in PEFT",
            stacklevel=3,
        )


class LoraModel(BaseTuner):
    """A model with LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in its linear layers, embeddings and convolutions.

    Changes `model` in place: a `Linear`, `Embedding`, `Conv1d`, `Conv2d`, `Conv3d` or `MultiheadAttention` of
    `peftkern.tuners.lora` is put around each targeted module, a `ParamWrapper` around the module of each targeted
    parameter.
    The arguments and errors are those of `BaseTuner`; the configuration is a `LoraConfig`.
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def check_target(self, config: Any, key: str, target: nn.Module) -> None:
        layer: Any = target
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if isinstance(layer, BaseTunerLayer) and getattr(layer, "peft_type", None) != config.peft_type:
            raise ValueError(f"target_modules names {key!r}, which another method adapted ({type(target).__name__})")
        if isinstance(base, nn.MultiheadAttention):
            check_attention(base, config, key)
        elif is_convolution(base):
            check_convolution(base, config, rank_and_alpha(config, key)[0], key)
        elif not isinstance(base, nn.Embedding) and not is_linear(base):
            raise ValueError(
                f"target_modules names {key!r}, a {type(base).__name__}: LoRA adapts nn.Linear, nn.Embedding, "
                "nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention and transformers' Conv1D (name the layers "
                "inside it, or keep it out with exclude_modules)"
            )
        if isinstance(base, nn.Embedding) and config.lora_bias:
            raise ValueError(f"lora_bias=True does not go with the embedding {key!r}: its adapter has no bias")
        check_is_called(config, self.model, key)

    def create_layer(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> BaseTunerLayer:
        r, lora_alpha = rank_and_alpha(config, key)
        if isinstance(target, LoraLayer):
            target.update_layer(adapter_name, r, lora_alpha, config)
            return target
        if isinstance(target, nn.Embedding):
            return Embedding(target, adapter_name, config, r=r, lora_alpha=lora_alpha)
        if isinstance(target, nn.MultiheadAttention):
            return MultiheadAttention(target, adapter_name, config, r=r, lora_alpha=lora_alpha)
        if is_convolution(target):
            return conv_layer(target)(target, adapter_name, config, r=r, lora_alpha=lora_alpha)
        fit_fan_in_fan_out(config, target)
        return Linear(target, adapter_name, config, r=r, lora_alpha=lora_alpha)

    def match_parameters(
        self, model: nn.Module, config: Any, state_dict: Mapping[str, torch.Tensor] | None
    ) -> list[ParameterTarget]:
        if state_dict is None:
            settle_expert_targets(model, config)
        elif config.target_parameters:
            raise ValueError(
                "state_dict: its names do not tell which parameter of a module is adapted, so it does not go with "
                f"target_parameters={config.target_parameters!r}"
            )
        return match_parameters(model, config)

    def adapt_parameter(self, model: nn.Module, parameter: Any, adapter_name: str, config: Any) -> None:
        wrap(model, parameter, adapter_name, config, *rank_and_alpha(config, parameter.key))

    def settle_layers(self, model: nn.Module) -> None:
        share_known_inputs(model)
        fuse_known_mlps(model)

    def release_layers(self, model: nn.Module) -> None:
        release_mlps(model)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self._layers():
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if name in layer.scaling and name not in layer.merged_adapters]
            if names:
                check_mergeable(layer, names)
                if safe_merge:
                    checked_merge(layer, names)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        self._check_same_parameters(config)
        mixed = self.__dict__.get("_mixed_adapters")
        highest = highest_rank(config)
        if isinstance(mixed, MixedAdapters) and mixed.is_fixed and highest > mixed.max_rank:
            name = next(name for name, held in self.peft_config.items() if held is config)
            raise ValueError(f"adapter {name!r}: its rank is {highest}, the bank has room for {mixed.max_rank}")
        if isinstance(mixed, MixedAdapters) and mixed.is_fixed and config.use_dora:
            raise ValueError("use_dora=True: the model is an AdapterBank's, and DoRA cannot be mixed in a batch")
        if isinstance(mixed, MixedAdapters) and mixed.is_fixed and changes_base(config.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r}: the model is an AdapterBank's, whose adapters share "
                "the base weights that it would change (PeftModel.save_pretrained writes adapters that leave them: "
                "path_initial_model_for_weight_conversion)"
            )
        if isinstance(mixed, MixedAdapters) and mixed.is_fixed and config.target_parameters:
            raise ValueError(
                f"target_parameters={sorted(config.target_parameters)}: the model is an AdapterBank's, and an adapter "
                "on a parameter is part of a weight, which all rows share"
            )

    def _check_same_parameters(self, config: Any) -> None:
        """Raises ValueError for another set of target_parameters than other adapters have: which parameter a wrapper's
        weights belong to is told by its place among the wrappers, so files would be read wrongly."""
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            held = set(getattr(other, "target_parameters", None) or ())
            if other is not config and wanted and held and held != wanted:
                raise ValueError(
                    f"target_parameters: all adapters that have any must have the same, got {sorted(wanted)} beside "
                    f"{sorted(held)} of {name!r}"
                )

    def refuse_parts_of_weights(self, what: str) -> None:
        """Raises NotImplementedError, for `what` cannot be done with adapters that are part of a weight, if there are
        any: on a parameter, or on `nn.MultiheadAttention`."""
        for kinds, where in (
            ((ParamWrapper,), "parameters (target_parameters)"),
            ((MultiheadAttention, AttentionOutput), "nn.MultiheadAttention"),
        ):
            names = sorted({name for layer in self._layers() if isinstance(layer, kinds) for name in layer.scaling})
            if names:
                raise NotImplementedError(f"{what}: adapters {names} are on {where}")

    def make_room(self, mixed: MixedRows | None) -> MixedRows:
        self.refuse_parts_of_weights("adapter_names cannot mix what is part of a weight")
        slots = len(self.peft_config)
        highest = max((r for layer in self._layers() for r in layer.r.values()), default=1)
        if isinstance(mixed, MixedAdapters) and mixed.slots >= slots and mixed.max_rank >= highest:
            return mixed
        if isinstance(mixed, MixedAdapters) and mixed.is_fixed:
            raise ValueError(
                f"adapter_names: the bank has room for {mixed.slots} adapters of rank {mixed.max_rank}, here are "
                f"{slots} of up to {highest}: add adapters by the bank's add, which refuses what does not fit"
            )
        return MixedAdapters(self.model, slots, highest, LoraLayer)

    # -- what PiSSA and its like leave in the base --------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        told = self._residual_of([adapter_name])
        super().delete_adapter(adapter_name)
        _warn_of_residual(told, "deleted")

    def unload(self) -> nn.Module:
        merged = {name for layer in self._layers() for name in layer.merged_adapters}
        _warn_of_residual(self._residual_of(set(self.peft_config) - merged), "unloaded")
        return super().unload()

    def disable_adapter_layers(self) -> None:
        _warn_of_residual(self._residual_of(self.active_adapters), "disabled")
        super().disable_adapter_layers()

    def _residual_of(self, names: Iterable[str]) -> dict[str, Any]:
        """The initializations of those of the adapters that the base weights lack a part without, by name."""
        configs: dict[str, Any] = {name: self.peft_config[name] for name in names if name in self.peft_config}
        inits = {name: config.init_lora_weights for name, config in configs.items()}
        return {name: init for name, init in sorted(inits.items()) if leaves_residual(init)}

    # -- combining adapters ---------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Adds an adapter that combines others, frozen until it is active; they stay as they are.

        As in PEFT it has the first one's configuration with the targets of all, and scaling 1. What each combination
        computes, and how dare's masks follow from torch's seed: peftkern/tuners/lora/weighted.py.

        Args:
            adapters: Names of adapters here; a single one is combined by "linear".
            weights: A number for each, of either sign.
            adapter_name: The new adapter's name.
            combination_type: "svd", "cat" (exact, its rank is the ranks' sum), "linear", "ties", "dare_linear",
                "dare_ties", "magnitude_prune" (of A and of B: rough, and of adapters of one rank), or one of the last
                four with "_svd" (of B A).
            svd_rank: The new rank where "svd" decides; None for the largest of the adapters'.
            svd_clamp: Quantile of the elements of A and B to which both are clamped, in [0, 1]; None for no clamping.
            svd_full_matrices: Taken for PEFT's callers. What full matrices have more is cut off, so it is not computed.
            svd_driver: cuSOLVER's method, "gesvd", "gesvdj" or "gesvda", of layers on CUDA devices.
            density: The share of elements that pruning keeps, in [0, 1], for all but "svd", "linear" and "cat".
            majority_sign_method: How ties finds the sign of most: "total" or "frequency".

        Raises:
            TypeError: `adapters` is a str, a weight is no number, or a layer's A or B is no plain tensor.
            ValueError: An unknown name, one that is taken (PEFT returns without a word), other than one weight each, a
                value that is not allowed, ranks that differ, adapters with `target_parameters` or `lora_bias` or that
                are not finite, more than one with `modules_to_save` of a module, or targets of which some are names and
                some expressions. The model is as it was then.

        Warns:
            UserWarning: Of what is left out, as in PEFT: magnitudes of DoRA, modules trained whole, layers that the
                first one's configuration does not reach.
        """
        how = Combination(combination_type, svd_clamp, svd_driver, density, majority_sign_method)
        add_weighted(self, adapters, weights, adapter_name, how, svd_rank)

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, torch.Tensor], adapter_name: str, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """A trained adapter's tensors less those that it started from, as a LoRA of rank 2r: see `mutated_init`.

        `PeftModel.save_pretrained` reads the latter from a file; here they are those of an adapter of the model.

        Args:
            output_state_dict: The trained adapter's, as from `get_peft_model_state_dict`.
            adapter_name: An adapter with the values from before training.
            kwargs: May have "state_dict", the `PeftModel`'s, where it was gathered already.

        Raises:
            ValueError: No such adapter, or one of other ranks or layers.

        Warns:
            UserWarning: A base weight is quantized: the rounding of the residual stays behind.
        """
        self._check_names([adapter_name])
        gathered = (kwargs or {}).get("state_dict")
        initial: dict[str, torch.Tensor] = {}
        quantized = []
        for key, layer in self._named_layers().items():
            quantized += [key] if weight_of(layer.get_base_layer()) is not None else []
            for attribute in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                held = getattr(layer, attribute)
                if adapter_name not in held:
                    continue
                # A ParameterDict holds the factor itself, a ModuleDict a module that has it.
                end = "" if isinstance(held, nn.ParameterDict) else ".weight"
                own = held[adapter_name].weight if end else held[adapter_name]
                name = f"base_model.model.{key}.{attribute}"
                initial[name + end] = (own if gathered is None else gathered[f"{name}.{adapter_name}{end}"]).detach()
        if quantized:
            warnings.warn(
                f"{len(quantized)} base weights are quantized ({quantized[0]}, ...): a quantized residual and an "
                "adapter are not the quantized weight and the converted one",
                stacklevel=2,
            )
        return subtract_initial(output_state_dict, initial)
