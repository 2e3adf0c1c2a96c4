"""`BaseTuner`: puts adapters of one method into a model, and manages them there.

The interface is PEFT 0.21.2's, which `PeftModel`, Trainer and TRL call: `LoraModel(model, config, adapter_name)`
changes the model in place and keeps it as `.model`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.tuners.merged_models import settle_merged
from peftkern.tuners.merging_quantized import is_merged_into_dense, one_warning_for_all
from peftkern.tuners.mixed import BASE, MixedRows, Turn, check_names
from peftkern.tuners.switching import (
    activate,
    active_without,
    cast_adapter_dtype,
    delete_adapter,
    holders_of,
    layers_of,
    refuse_merged,
    remove,
    set_adapter,
    set_requires_grad,
)
from peftkern.tuners.targets import (
    check_target_module_exists,
    match_targets,
    warn_of_tied_targets,
    warn_of_uncalled_targets,
)
from peftkern.tuners.tied_weights import check_tied_targets, mark_untied, settle_tied_copies
from peftkern.tuners.trainable_tokens import TrainableTokensWrapper
from peftkern.tuners.trainable_tokens.places import TokenPlace, check_rows_mergeable, find_places, put_rows, rows_of_own
from peftkern.tuners.tuner_layer import BaseTunerLayer, check_adapter_name, check_adapters_to_merge, is_tuned
from peftkern.utils.adapter_error import shorten
from peftkern.utils.module_tree import modules_of, named_modules_of, parameters_of_model
from peftkern.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _get_submodules,
    check_is_module,
    check_modules_to_save,
    wrap_modules_to_save,
)

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "set_adapter",
    "set_requires_grad",
]


class BaseTuner(nn.Module, ABC):
    """A model with adapters of one method in it.

    Args:
        model: The base model; its targeted modules are replaced, its parameters frozen.
        peft_config: The adapter's configuration, or a dict of adapter names to configurations that holds it.
        adapter_name: The adapter's name; it becomes active.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be filled from a file.
        state_dict: If given, the modules adapted are those that its keys name rather than `target_modules`.

    Raises:
        TypeError: `peft_config` is no configuration of this method.
        ValueError: It matches nothing, or something that cannot be adapted; the model is then as it was.
    """

    # The first letters of the names of the method's parameters, such as "lora_".
    prefix: str
    # The class of its layers.
    tuner_layer_cls: type[BaseTunerLayer]
    # `model_type` of a transformers config -> default target_modules.
    target_module_mapping: Mapping[str, list[str] | str]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        new = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        if not isinstance(new, dict) or not isinstance(new.get(adapter_name), PeftConfig):
            raise TypeError(
                f"peft_config must be a peftkern configuration, or a dict with one under {adapter_name!r}, "
                f"got {type(peft_config).__name__}"
            )
        check_is_module("model", model)
        held = getattr(model, "peft_config", None)
        if held:
            warnings.warn(f"the model has adapters already ({sorted(held)}): {adapter_name!r} joins them", stacklevel=3)
            refuse_foreign_adapter(model, adapter_name)
            new = {**held, **new}
        self.model = model
        self.peft_config: dict[str, PeftConfig] = new
        self.active_adapter: str | list[str] = adapter_name
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        # As in PEFT, so that code which sees the bare model knows of its adapters.
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    # -- what a method says ------------------------------------------------------------------------------------

    @abstractmethod
    def check_target(self, config: Any, key: str, target: nn.Module) -> None:
        """Raises ValueError if the module named `key` cannot be adapted."""

    @abstractmethod
    def create_layer(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> BaseTunerLayer:
        """The layer that takes `target`'s place: a new one, or `target` with one more adapter."""

    def match_parameters(
        self, model: nn.Module, config: Any, state_dict: Mapping[str, torch.Tensor] | None
    ) -> Sequence[Any]:
        """The parameters to adapt besides modules, each with its name as `key`; nothing in the model is changed yet."""
        return ()

    def adapt_parameter(self, model: nn.Module, parameter: Any, adapter_name: str, config: Any) -> None:
        """Puts an adapter on one of `match_parameters`."""
        raise NotImplementedError(f"{type(self).__name__} adapts no parameters")

    def token_places(self, model: nn.Module, config: Any, keys: Sequence[str]) -> list[TokenPlace]:
        """The embeddings of which single rows train, beside the modules of these names, which are adapted; nothing in
        the model is changed yet."""
        return find_places(model, config, keys)

    def put_rows(
        self, model: nn.Module, places: Sequence[TokenPlace], adapter_name: str, config: Any, **options: Any
    ) -> None:
        """Gives an adapter its rows in `token_places`."""
        active = adapter_name in self.active_adapters
        put_rows(model, places, adapter_name, inference_mode=config.inference_mode, activate=active, **options)

    def settle_config(self, config: Any) -> None:
        """Makes fields explicit that depend on the model, once `target_modules` is; called before `check_target`."""

    # -- injecting ---------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = False,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds the adapter that `self.peft_config[adapter_name]` describes; it is trained only if it is active.

        Args:
            model: The base model.
            adapter_name: A key of `self.peft_config`.
            autocast_adapter_dtype: Widen 16-bit adapter weights to float32.
            low_cpu_mem_usage, state_dict: See the class.

        Raises:
            ValueError: See the class; nothing is changed then.
        """
        self.__dict__["_layers_changed"] = True
        config: Any = self.peft_config[adapter_name]
        config.check()
        tied = settle_tied_copies(model, config)
        parameters = self.match_parameters(model, config, state_dict)
        self._check_new_adapter_config(config)
        names = [parameter.key for parameter in parameters]
        keys = match_targets(model, config, self.target_module_mapping, self.prefix, state_dict, names)
        self.settle_config(config)
        # Known only now where target_modules is "all-linear" or the architecture's default.
        twice = [name for name in names if name.rpartition(".")[0] in keys]
        if twice:
            raise ValueError(
                f"target_parameters names {twice[0]!r}, of a module that target_modules names too: it can be adapted "
                "in one way (target_modules=[] names no module)"
            )
        for key in keys:
            if getattr(model.get_submodule(key), "stands_alone", False):
                raise ValueError(
                    f"target_modules names {key!r}, a layer of peftkern.nn: it is part of the base, with an adapter of "
                    "its own (keep it out with exclude_modules)"
                )
            if isinstance(model.get_submodule(key), TrainableTokensWrapper):
                raise ValueError(
                    f"target_modules names {key!r}, of which another adapter trains rows (trainable_token_indices): it "
                    "can be adapted in one way"
                )
            self.check_target(config, key, model.get_submodule(key))
        whole = [*(getattr(config, "modules_to_save", None) or ()), *tied]
        if whole:
            check_modules_to_save(model, whole)
        of_parameters = [name.rpartition(".")[0] for name in names]
        check_tied_targets(model, config, [*keys, *of_parameters])
        tokens = self.token_places(model, config, [*keys, *of_parameters])
        refuse_merged(model, adapter_name, before="making it anew")
        with_rows = {place.key for place in tokens}
        if not tied:
            warn_of_tied_targets(model, config, [key for key in (*keys, *of_parameters) if key not in with_rows])
        warn_of_uncalled_targets(model, keys)

        # A further adapter leaves what was there as trainable as it was. Layers of `peftkern.nn` are part of the base.
        first = len(self.peft_config) == 1 and not getattr(model, "peft_config", None)
        before = [] if first else [(p, p.requires_grad) for p in parameters_of_model(model)]
        if first:
            _warn_of_frozen(model)
        for key in keys:
            parent, target, name = _get_submodules(model, key)
            with torch.device("meta") if low_cpu_mem_usage else contextlib.nullcontext():
                layer: Any = self.create_layer(config, adapter_name, key, target)
            if layer is not target:
                setattr(parent, name, layer)
        for parameter in parameters:
            with torch.device("meta") if low_cpu_mem_usage else contextlib.nullcontext():
                self.adapt_parameter(model, parameter, adapter_name, config)
        for known, new in ((self.targeted_module_names, keys), (self.targeted_parameter_names, names)):
            known += [key for key in new if key not in known]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        if whole:
            wrap_modules_to_save(
                model,
                whole,
                adapter_name,
                inference_mode=config.inference_mode,
                activate=adapter_name in self.active_adapters,
                keep_tied=bool(tied),
            )
        self.put_rows(model, tokens, adapter_name, config)
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.settle_layers(model)

    def add_losses(self, outputs: Any) -> Any:
        """What the model returned, with what a method adds to its loss."""
        return outputs

    def settle_layers(self, model: nn.Module) -> None:
        """What a method does with its layers once they are all in the model."""

    def release_layers(self, model: nn.Module) -> None:
        """Undoes what `settle_layers` did outside of the layers, before they leave the model."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Raises ValueError if the adapters here cannot live with one of this configuration."""
        for name in self.peft_config:
            check_adapter_name(name)
        with_bias = [name for name, held in self.peft_config.items() if getattr(held, "bias", "none") != "none"]
        if len(self.peft_config) > 1 and len(with_bias) > 1:
            raise ValueError(f"only one adapter can train biases of the base model, got bias != 'none' for {with_bias}")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes all but adapters, modules trained whole, and the biases that the active configurations name."""
        kept = set()
        for module in modules_of(model):
            if is_tuned(module):
                kept |= {id(p) for container in module._containers() for p in container.parameters()}
            elif isinstance(module, ModulesToSaveWrapper):
                kept |= {id(p) for p in module.parameters()}
        for parameter in parameters_of_model(model):
            if id(parameter) not in kept:
                parameter.requires_grad = False
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias == "all":
                for key, parameter in model.named_parameters():
                    if key == "bias" or key.endswith(".bias"):
                        parameter.requires_grad = True
            elif bias != "none":
                for module in modules_of(model):
                    is_own = is_tuned(module) and isinstance(module, self.tuner_layer_cls)
                    trained = getattr(module, "bias", None) if is_own else None
                    if trained is not None:
                        trained.requires_grad = True

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Widens the weights of an adapter that have less than 32 bits to float32, if asked, as new parameters."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's door for arguments of forward and generate that are meant for adapters: `adapter_names`."""
        if kwargs.get("alora_offsets") is not None:
            raise NotImplementedError(f"alora_offsets is not built in peftkern, got {kwargs['alora_offsets']!r}")
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with self.mixed_batch(check_names(names), kwargs.get("encoder_adapter_names")):
            yield

    # -- many adapters in a batch ------------------------------------------------------------------------------

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block no other thread can give this model's layers a batch of many adapters; it waits."""
        turn: Turn = self.__dict__.get("_turn") or self.__dict__.setdefault("_turn", Turn())
        return turn.taken()

    @contextlib.contextmanager
    def mixed_batch(self, adapter_names: Sequence[str], encoder_names: Sequence[str] | None = None) -> Iterator[None]:
        """Within the block, row i of the batch takes the adapter adapter_names[i]; "__base__" is the base alone.

        One thread at a time: another one's block waits for this one's end.

        Args:
            adapter_names: a name for each row.
            encoder_names: those of the rows that an encoder sees, where they are others: before beams are made of them.

        Raises:
            ValueError: an unknown name, one of DoRA, or adapters that are merged, or disabled in some layers only.
            NotImplementedError: this method cannot; or an adapter has biases of the base model for its own.
        """
        with self.turn(), self._mixed_batch(adapter_names, encoder_names):
            yield

    def _mixed_batch(
        self, adapter_names: Sequence[str], encoder_names: Sequence[str] | None
    ) -> contextlib.AbstractContextManager[None]:
        """`mixed_batch`, in a thread whose turn it is."""
        mixed = self.mixed_adapters()
        named = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        self._check_names(named)
        for name in named:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                raise NotImplementedError(
                    f"adapter_names: {name!r} trains biases of the base model (bias={bias!r}), which all rows share"
                )
            if getattr(self.peft_config[name], "use_dora", False):
                raise ValueError(f"adapter_names: {name!r} has DoRA (use_dora=True), which cannot be mixed in a batch")
        batch = mixed.batch(adapter_names, mixed.device)
        if encoder_names is None or len(encoder_names) == len(adapter_names):
            return mixed.use(batch)
        is_pair = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = self.model.get_encoder() if is_pair else None
        return mixed.use(batch, encoder, mixed.batch(encoder_names, mixed.device))

    def mixed_adapters(self) -> MixedRows:
        """What mixed batches take: made at the first one, and anew when there is no room for an adapter."""
        mixed: MixedRows | None = self.__dict__.get("_mixed_adapters")
        if mixed is None or self.__dict__.get("_layers_changed", True):
            mixed = self.__dict__["_mixed_adapters"] = self.make_room(mixed)
            mixed.find_layers()
            self.__dict__["_layers_changed"] = False
        mixed.seat(list(self.peft_config))
        return mixed

    def make_room(self, mixed: MixedRows | None) -> MixedRows:
        """`mixed`, if it has room for all adapters that are here now; else one that has.

        Raises:
            NotImplementedError: this method cannot mix adapters.
        """
        raise NotImplementedError(f"adapter_names: {type(self).__name__} cannot mix adapters in a batch")

    # -- switching ---------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, adapters included; `adapter_names` as for `PeftModel`, not left to a model that
        ignores arguments it does not know."""
        if kwargs.get("adapter_names") is None:
            return self.add_losses(self.model(*args, **kwargs))
        with self._enable_peft_forward_hooks(*args, **kwargs):
            given = {name: value for name, value in kwargs.items() if name != "adapter_names"}
            return self.add_losses(self.model(*args, **given))

    def _layers(self) -> list[Any]:
        return layers_of(self.model, self.tuner_layer_cls)

    def _named_layers(self) -> dict[str, Any]:
        named = named_modules_of(self.model)
        return {name: m for name, m in named if isinstance(m, self.tuner_layer_cls) and is_tuned(m)}

    def enable_adapter_layers(self) -> None:
        """Lets the active adapters take part in forward again."""
        self._enable_adapter_layers(True)

    def disable_adapter_layers(self) -> None:
        """Lets forward use the base model alone, until `enable_adapter_layers`."""
        biases = {name: getattr(self.peft_config[name], "bias", "none") for name in self.active_adapters}
        if any(bias != "none" for bias in biases.values()):
            warnings.warn(
                f"biases of the base model may have been trained (bias: {biases}): without its adapters it is then not "
                "the model that it was",
                stacklevel=2,
            )
        self._enable_adapter_layers(False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for holder in holders_of(self.model):
            holder.enable_adapters(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes the named adapters active, and only those trainable (none in inference mode); merged ones are unmerged.

        Raises:
            ValueError: A name that is no adapter here.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_names(names)
        activate(self.model, names, inference_mode, self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets `requires_grad` on the weights of the named adapters."""
        self._check_names([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        for holder in holders_of(self.model):
            holder.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was the only active one, another becomes active.

        Raises:
            ValueError: No such adapter, or it is merged.
        """
        self._check_names([adapter_name])
        refuse_merged(self.model, adapter_name, before="deleting it")
        self.__dict__["_layers_changed"] = True
        del self.peft_config[adapter_name]
        active = active_without(adapter_name, self.active_adapters, self.peft_config)
        remove(self.model, adapter_name, active, self.tuner_layer_cls)
        self.active_adapter = active

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"no adapter is named {unknown}; there are: {sorted(self.peft_config)}")

    # -- merging -----------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False, **options: Any) -> None:
        """Adds adapters (default: the active ones) to the base weights; `unmerge_adapter` takes them out.

        Args:
            adapter_names: Which.
            safe_merge: Check first that every merged weight is finite; if one is not, none is changed.
            options: What else the method's layers take in `merge`; LoRA's `requantize`, for one, of which one warning
                says what it cost and which layer it cost most.

        Raises:
            TypeError, ValueError: A layer cannot be merged; see its `merge`. None has been changed then.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of adapter names, got the str {adapter_names!r}")
        self._check_names(adapter_names or [])
        self.check_mergeable(adapter_names, safe_merge)
        check_rows_mergeable(self.model, adapter_names, safe_merge)
        layers = self._named_layers()
        with one_warning_for_all(layers):
            for layer in layers.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, **options)
        self._merge_rows(adapter_names)

    def _merge_rows(self, adapter_names: list[str] | None) -> None:
        """Merges trained rows of embeddings, which have been found to be mergeable."""
        for tokens in rows_of_own(self.model):
            names = tokens.to_merge(adapter_names)
            if names:
                tokens.merge(adapter_names=names)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises for a layer that could not be merged, before any is."""

    def unmerge_adapter(self) -> None:
        """Subtracts every merged adapter from the base weights."""
        for layer in self._layers():
            layer.unmerge()
        for tokens in rows_of_own(self.model):
            tokens.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model with the adapters (default: the active ones) in its weights and every trace of them removed.

        A quantized layer with adapters becomes a dense one of the class that was quantized (`nn.Linear` or Conv1D), in
        the dtype that the rest of the model has; PEFT's stays quantized, as with LoRA's `requantize=True`.

        Args:
            progressbar: Accepted for PEFT's callers; nothing is shown.
            safe_merge, adapter_names, options: See `merge_adapter`.
        """
        self._check_names(adapter_names or [])
        self.check_mergeable(adapter_names, safe_merge)
        check_rows_mergeable(self.model, adapter_names, safe_merge)
        layers = {
            name: layer
            for name, layer in self._named_layers().items()
            if set(layer.active_adapters if adapter_names is None else adapter_names) - set(layer.merged_adapters)
        }
        with one_warning_for_all(layers):
            for layer in layers.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, **options)
        self._merge_rows(adapter_names)
        model = self._unload()
        mark_untied(model)
        return model

    def unload(self) -> nn.Module:
        """The base model without adapters; as in PEFT, what was merged before stays in its weights."""
        return self._unload()

    def _unload(self) -> nn.Module:
        self.release_layers(self.model)
        merged = [layer.get_base_layer() for layer in self._layers() if is_merged_into_dense(layer)]
        # A tied module stands in several places, so names of duplicates count. What is inside comes first: a wrapper
        # (modules_to_save) may hold layers of another adapter, which go by other names once it is gone.
        for key, module in reversed(named_modules_of(self.model, remove_duplicate=False)):
            is_own = isinstance(module, self.tuner_layer_cls) and is_tuned(module)
            if not is_own and not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            parent, _, name = key.rpartition(".")
            wrapped = isinstance(module, AuxiliaryTrainingWrapper)
            inner = module.unloaded_module() if wrapped else module.get_base_layer()
            setattr(self.model.get_submodule(parent), name, inner)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        if merged:
            settle_merged(self.model, merged)
        return self.model

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dict; `{"model_type": "custom"}` for a model without one, as in PEFT."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """What this object does not have is the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ has set `model` there is nothing to ask.
            if name == "model":
                raise
            return getattr(self.model, name)


def _warn_of_frozen(model: nn.Module) -> None:
    """Warns of layers of `peftkern.nn` that learned until now: they are part of the base."""
    alone = {name: m for name, m in named_modules_of(model) if isinstance(m, BaseTunerLayer) and m.stands_alone}
    learned = [
        name for name, m in alone.items() if any(p.requires_grad for c in m._containers() for p in c.parameters())
    ]
    if learned:
        warnings.warn(
            f"layers of peftkern.nn are part of the base model: {shorten(learned, 3)} keep their adapters, which are "
            "frozen and not saved with this one (set requires_grad on their parameters to train them too)",
            stacklevel=5,
        )


def refuse_foreign_adapter(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if the model has an adapter of that name, and from another library."""
    held = getattr(model, "peft_config", None) or {}
    if adapter_name in held and not isinstance(held[adapter_name], PeftConfig):
        raise ValueError(
            f"model: it has an adapter {adapter_name!r} that is not peftkern's. transformers puts in one of PEFT's "
            "where it is given an adapter's folder: load the base model by its own name (base_model_name_or_path)"
        )
