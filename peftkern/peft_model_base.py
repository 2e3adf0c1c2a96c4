"""`PeftModel`: a base model with named adapters, under PEFT 0.21's names. `peftkern.peft_model` is its address."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from peftkern.config import PeftConfig, check_is_config
from peftkern.integrations.peft_bridge import bridge_wrappers, bridged_class
from peftkern.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peftkern.peft_model_saving import SavesAdapters
from peftkern.tuners.lora.config import warn_of_drawn_residual
from peftkern.tuners.mixed import check_names
from peftkern.tuners.prompt_learning.files import refuse_training_of_a_file
from peftkern.tuners.switching import layers_of
from peftkern.tuners.tuner_layer import check_adapter_name
from peftkern.tuners.tuners_utils import refuse_foreign_adapter
from peftkern.utils.adapter_error import shorten
from peftkern.utils.adapter_files import (
    PathLike,
    blamed_on_config,
    reading,
    weights_file,
)
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.other import check_is_module, is_checkpointed
from peftkern.utils.peft_types import PeftType
from peftkern.utils.save_and_load import (
    load_config,
    read_adapter,
    set_peft_model_state_dict,
)


class PeftModel(SavesAdapters, nn.Module):
    """A base model whose layers carry adapters.

    `base_model` is the tuner (`LoraModel`), `base_model.model` the model that was given, changed in place. What is
    not found here is looked up there: `merge_and_unload`, `unload`, `merge_adapter`, `unmerge_adapter`, `config`.

    While transformers or peft is loaded, an instance's class is also a subclass of the `peft` class of that name, if
    peft is installed (see `peftkern.integrations.peft_bridge`).

    Args:
        model: The base model.
        peft_config: The first adapter's configuration.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep adapters of float16 and bfloat16 layers in float32.
        low_cpu_mem_usage: Make the adapter's parameters on the meta device, to be loaded into.
    """

    # Trainer's question of a quantized base: is there an adapter on it?
    _hf_peft_config_loaded = True
    _is_prompt_learning = False
    # The tuner around the base model; of prompt learning the base model itself.
    base_model: Any
    # Names that the task adds to modules_to_save.
    _heads: tuple[str, ...] = ()

    def __new__(cls, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> PeftModel:
        if getattr(peft_config, "is_prompt_learning", False):
            from peftkern.prompt_models import prompt_class  # its classes inherit from this one

            cls = prompt_class(cls)
        return super().__new__(bridged_class(cls))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not super(): next in line may be peft's class, which would set itself up
        check_is_module("model", model)
        check_is_config("peft_config", peft_config)
        check_adapter_name(adapter_name)
        _warn_of_adapter_name(adapter_name, peft_config)
        self._add_heads(peft_config)
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._adapters_disabled = False
        with restored_on_error(model):
            self._adapt(model, peft_config, adapter_name, low_cpu_mem_usage)
            self._widen(adapter_name, autocast_adapter_dtype)
            bridge_wrappers(self)
            self.active_adapter = adapter_name
            if is_checkpointed(model):
                self._prepare_model_for_gradient_checkpointing(model)
        # Some models imitate tensor parallelism when this is above 1, slicing weights that adapters replace.
        if getattr(getattr(model, "config", None), "pretraining_tp", 1) != 1:
            model.config.pretraining_tp = 1

    def _adapt(self, model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Put the first adapter on the base model."""
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[_method(config)]
        self.base_model = tuner(model, {adapter_name: config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)

    def _inject(self, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Put another adapter beside the first."""
        self.peft_config[adapter_name] = config
        self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)

    def _widen(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Have an adapter's parameters in float32 at least, if that is wanted."""
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    # --- what is in it -----------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of each adapter, by its name."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """The active adapter's configuration; a ValueError where none is active."""
        name = next((n for n in (self.active_adapter, *self.active_adapters) if n in list(self.peft_config)), None)
        if name is None:
            raise ValueError(
                f"no adapter is active: set_adapter makes one of {sorted(self.peft_config)} the active one"
            )
        return self.peft_config[name]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter is active and adapters are not disabled."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, where it says one."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names in any adapter's `modules_to_save`; None if there are none."""
        lists = [getattr(config, "modules_to_save", None) or () for config in self.peft_config.values()]
        return {name for names in lists for name in names} or None

    def get_base_model(self) -> nn.Module:
        """The model that was given, with the adapters in it."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":  # not set yet: looking it up there would never end
                raise
            return getattr(self.base_model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trainable and of all parameters; a packed 4-bit weight counts its elements, not its bytes."""
        trainable = every = 0
        for parameter in self.parameters():
            count = parameter.numel() or getattr(parameter, "ds_numel", 0)
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            every += count
            trainable += count if parameter.requires_grad else 0
        return trainable, every

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters and their ratio in per cent, in one line."""
        trainable, every = self.get_nb_trainable_parameters()
        share = 100 * trainable / every
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[Any]:
        """See `peftkern.get_layer_status`."""
        from peftkern.status import get_layer_status  # it knows this class

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """See `peftkern.get_model_status`."""
        from peftkern.status import get_model_status

        return get_model_status(self)

    # --- running -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, adapters included.

        `adapter_names`, a name for each row of the batch ("__base__" for the base alone), has each row take the adapter
        of that name, in training too: give those that learn `set_requires_grad`, and see `peftkern.per_adapter_loss`.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self._call(*args, **self._model_kwargs(kwargs))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.add_losses(self.get_base_model()(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, adapters included; `adapter_names` has a name for each prompt."""
        if "generation_config" in self.__dict__:  # set on this wrapper by the user
            self.get_base_model().generation_config = self.__dict__["generation_config"]
        names = kwargs.pop("adapter_names", None)
        meant: dict[str, Any] = {}
        if names is not None:
            names = check_names(names)
            copies = self._copies_of_a_prompt(args, kwargs)
            meant["adapter_names"] = [name for name in names for _ in range(copies)]
            meant["encoder_adapter_names"] = names  # an encoder sees each prompt once
        with self._enable_peft_forward_hooks(*args, **kwargs, **meant):
            return self._generate(*args, **self._model_kwargs(kwargs))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)

    def _copies_of_a_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many rows generation makes of each prompt: beams, or several answers."""
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")  # generate(inputs, generation_config)
        configs = [config, getattr(self.get_base_model(), "generation_config", None)]
        counts = []
        for name in ("num_beams", "num_return_sequences"):
            given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            counts.append(next((count for count in given if count is not None), 1))
        return max(counts)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give the tuner what is meant for it (`adapter_names`), for the time of one call."""
        if not hasattr(type(self.base_model), "_enable_peft_forward_hooks"):
            named = [name for name in self.special_peft_forward_args if kwargs.get(name) is not None]
            if named:
                raise NotImplementedError(f"{named[0]}: {type(self.base_model).__name__} does not take it")
            yield
            return
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _model_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name not in self.special_peft_forward_args}

    def _named_forward(self, kwargs: dict[str, Any], **named: Any) -> Any:
        """Forward for the task classes: those of the named arguments that were given, by name."""
        given = {name: value for name, value in named.items() if value is not None}
        return PeftModel.forward(self, **given, **kwargs)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the embeddings' output require grad: otherwise no gradient passes a checkpointed frozen block."""
        self._prepare_model_for_gradient_checkpointing(model)

    def _prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        # `prepare_model_for_kbit_training` has done it for these.
        if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        return model

    # --- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new, untrained adapter; it does not become active.

        Raises:
            TypeError: `peft_config` is no configuration of peftkern's.
            ValueError: The name is taken, or the method is not that of the first adapter. The model is unchanged.
        """
        with restored_on_error(self):
            self._add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool, widen: bool) -> None:
        """`add_adapter`, where the caller restores the model after an error."""
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: an adapter {adapter_name!r} exists already")
        check_is_config("peft_config", peft_config)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(f"peft_config: the model has {self.peft_type} adapters, got {peft_config.peft_type}")
        check_adapter_name(adapter_name)
        _warn_of_adapter_name(adapter_name, peft_config)
        self._add_heads(peft_config)
        self._inject(peft_config, adapter_name, low_cpu_mem_usage)
        self._widen(adapter_name, widen)
        bridge_wrappers(self)

    def _add_heads(self, config: PeftConfig) -> None:
        """Have the task's new head trained and saved whole."""
        if self._heads and hasattr(config, "modules_to_save"):
            names = list(config.modules_to_save or ())
            config.modules_to_save = names + [head for head in self._heads if head not in names]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless `inference_mode`; the others are frozen.

        Several at a time: `model.base_model.set_adapter([...])`, as in PEFT.
        """
        self._check_known(adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _check_known(self, adapter_name: str) -> None:
        if not isinstance(adapter_name, str):
            raise TypeError(f"adapter_name: expected the name of one adapter, got {type(adapter_name).__name__}")
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name: no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters, active or not."""
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, another one becomes so, with a warning."""
        self._check_known(adapter_name)
        self.base_model.delete_adapter(adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this context the model is the base model."""
        disabled = {layer.disable_adapters for layer in layers_of(self)}
        if len(disabled) == 2:
            warnings.warn("Some layers' adapters were disabled, others not: all are enabled afterwards.", stacklevel=3)
        was_disabled = self._adapters_disabled
        self.base_model.disable_adapter_layers()
        self._adapters_disabled = True
        try:
            yield
        finally:
            if disabled != {True}:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on `model`, which is changed in place; if anything is wrong, it is left as it was.

        Args:
            model: The base model.
            model_id: The adapter's folder, or its repository on the Hub.
            adapter_name: The name that the adapter gets here.
            is_trainable: Train it further; otherwise it is frozen and the model put in evaluation mode.
            config: Use this configuration rather than the saved one.
            autocast_adapter_dtype: As for the class.
            ephemeral_gpu_offload: Not built; must be False.
            low_cpu_mem_usage: Do not initialize what is about to be loaded.
            key_mapping: As for `load_peft_weights`.
            kwargs: As for `load_adapter`.

        Returns:
            The class that the configuration's `task_type` names, or `cls`.

        Raises:
            AdapterFileError: (a ValueError) A file is missing or damaged, or does not fit `model`.
            ValueError: `model` has an adapter of that name already, of another library.

        Warns:
            UserWarning: NaN or Inf, unknown names, or layers without tensors in the file; each by name.
        """
        from peftkern.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING  # the task classes inherit from this one

        hub, _, options = PeftConfig._split_kwargs(kwargs)
        check_is_module("model", model)
        check_adapter_name(adapter_name)
        refuse_foreign_adapter(model, adapter_name)
        blame: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        with reading(model_id, hub.get("subfolder")):
            if config is None:
                config, blame = load_config(model_id, **hub), blamed_on_config(model_id, hub)
            else:
                check_is_config("config", config)
            tensors, options = read_adapter(model_id, config, key_mapping, ephemeral_gpu_offload, hub, options)
        refuse_training_of_a_file(config, is_trainable)
        config.inference_mode = not is_trainable
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cls)
        with restored_on_error(model):
            with blame:
                warn_of_drawn_residual(config)
                made = wrapper(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            result = made._load_tensors(tensors, adapter_name, model_id, hub, options, low_cpu_mem_usage)
        if result.missing_keys:
            message = f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}."
            warnings.warn(message, stacklevel=2)
        if not is_trainable:
            made.eval()
        return made

    def load_adapter(
        self,
        model_id: PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter beside the others, or, if `adapter_name` is here already, its values into that one.

        A new adapter does not become active. If anything is wrong, the model is left as it was.

        Args:
            model_id, is_trainable, autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping: As
                for `from_pretrained`.
            adapter_name: The adapter's name here.
            torch_device: Where the file is read to before it is copied into the model.
            kwargs: For the Hub: `subfolder`, `revision`, `token`, `cache_dir` and the like; `ignore_mismatched_sizes`.
                What places a base model (`torch_dtype`, `device_map`, `offload_folder`, ...) is taken with a warning.

        Returns:
            `missing_keys`, the adapter's names that the file lacks (whole layers only), and `unexpected_keys`.

        Raises:
            AdapterFileError: (a ValueError) A file is missing or damaged, or does not fit the model.
        """
        hub, _, options = PeftConfig._split_kwargs(kwargs)
        options["torch_device"] = torch_device
        check_adapter_name(adapter_name)
        known = adapter_name in self.peft_config
        with reading(model_id, hub.get("subfolder")):
            config = self.peft_config[adapter_name] if known else load_config(model_id, **hub)
            if not known:
                refuse_training_of_a_file(config, is_trainable)
            # What the file's own configuration says of its tensors' ranks counts, also for an adapter that is here.
            saved = load_config(model_id, **hub) if known and config.peft_type == PeftType.ADALORA else config
            tensors, options = read_adapter(model_id, saved, key_mapping, ephemeral_gpu_offload, hub, options)
        with restored_on_error(self):
            if saved is not config:
                tensors = self.base_model.take_pattern(tensors, adapter_name, saved)
            if not known:
                config.inference_mode = not is_trainable
                with blamed_on_config(model_id, hub):
                    warn_of_drawn_residual(config)
                    self._add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            self._before_load(adapter_name, is_trainable)
            result = self._load_tensors(tensors, adapter_name, model_id, hub, options, low_cpu_mem_usage)
            self._widen(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    def _before_load(self, adapter_name: str, is_trainable: bool) -> None:
        """Called before a file's values go into an adapter."""

    def _load_tensors(
        self,
        tensors: Mapping[str, torch.Tensor],
        adapter_name: str,
        model_id: PathLike,
        hub: dict[str, Any],
        options: dict[str, Any],
        low_cpu_mem_usage: bool,
    ) -> _IncompatibleKeys:
        """Load the tensors of a file; warn of names that the model has no place for."""
        file = weights_file(model_id, **hub)
        result = set_peft_model_state_dict(
            self, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, source=file, **options
        )
        if result.unexpected_keys:
            warnings.warn(f"{file}: unknown names, not loaded: {shorten(result.unexpected_keys)}.", stacklevel=3)
        return result


def _method(config: PeftConfig) -> PeftType:
    """The method of a configuration, which must be one that is built."""
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        built = ", ".join(PEFT_TYPE_TO_TUNER_MAPPING)
        raise ValueError(f"peft_config: expected peft_type {built}, got {config.peft_type!r} ({type(config).__name__})")
    return PeftType(config.peft_type or "")


def _warn_of_adapter_name(adapter_name: str, config: PeftConfig) -> None:
    """Warn of a name that PEFT may confuse with the method's."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[_method(config)]
    if adapter_name in prefix:
        warnings.warn(
            f"Adapter name {adapter_name!r} is contained in the prefix {prefix!r} of its parameters' names: PEFT may "
            "take one for the other when it loads this adapter.",
            stacklevel=4,
        )
