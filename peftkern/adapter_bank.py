"""`AdapterBank`: many LoRA adapters over one frozen model, a batch whose rows each want their own, adapters that come
and go while it serves."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.mapping_func import get_peft_model
from peftkern.ops._common import check_float_dtype
from peftkern.peft_model_base import PeftModel
from peftkern.tuners.lora import LoraConfig, LoraModel
from peftkern.tuners.lora.attention import MultiheadAttention
from peftkern.tuners.lora.config import highest_rank
from peftkern.tuners.lora.conv import is_convolution
from peftkern.tuners.lora.experts import ParamWrapper
from peftkern.tuners.lora.layer import Linear, LoraLayer
from peftkern.tuners.lora.mixed import MixedAdapters
from peftkern.tuners.mixed import BASE
from peftkern.tuners.switching import holders_of
from peftkern.tuners.trainable_tokens import TrainableTokensLayer
from peftkern.tuners.trainable_tokens.places import rows_of_own
from peftkern.tuners.tuner_layer import is_tuned
from peftkern.utils.adapter_error import AdapterFileError, shorten, shown
from peftkern.utils.adapter_files import PathLike, blamed_on_config, reading, write_adapter
from peftkern.utils.constants import PREFIX
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.module_tree import modules_of, named_modules_of
from peftkern.utils.other import ModulesToSaveWrapper, check_is_module
from peftkern.utils.peft_types import PeftType
from peftkern.utils.progress import with_bar
from peftkern.utils.save_and_load import (
    check_lora_tensors,
    config_to_save,
    get_peft_model_state_dict,
    load_config,
    load_peft_weights,
    plan_load,
    set_peft_model_state_dict,
    weights_file,
)

# Names of adapters that are there for a moment: while the bank is made, and while one takes another's place.
_PLACE, _INCOMING = "bank_place", "bank_incoming"


class BankFullError(ValueError):
    """No slot is left for another adapter: remove one, or make the bank with more slots."""


class UnknownAdapterError(ValueError):
    """The bank has no adapter of that name."""


class AdapterBank:
    """Named LoRA adapters in the linear layers of one model, each layer's in one pool on the device.

        bank = AdapterBank.from_pretrained(model, {"law": "adapters/law", "code": "adapters/code"})
        with bank.batch(["law", "code", "__base__"]):      # an adapter for each row of the batch
            logits = model(input_ids).logits               # or model.generate(...)

    Rows are told by name, or by slot in a tensor (`ids`, `bank.ids(names)`), which a captured CUDA graph or a compiled
    model reads anew each time. `add`, `remove` and `replace` write the pool in place, rows first, then the table, so
    neither has to be made again. Each adapter's parameters stay parameters (`bank.parameters(name)`): they can be
    trained together, and each gets the gradients that its rows give it alone. An adapter that is named by no row gets
    none; with ids that are only on a device it gets zeros (set those to None, or give names).

    What no pool holds (`lora_bias`, adapted embeddings and convolutions, `modules_to_save`, `trainable_token_indices`)
    is added for rows that the host must know: with ids on a device it cannot be captured, and a graph from before such
    an adapter came leaves it out.

    Within `batch`, whoever calls the model gets the mixed batch, `bank.model` and the module that was given alike.
    With gradient checkpointing, run backward before the next forward, or inside the block: layers that are computed
    again take the last batch, and an error says so where it is not theirs.

    Args:
        model: the base model, changed in place (a layer is put around each targeted one), or one that
            `get_peft_model` made with LoRA, whose adapters become the first of the bank.
        slots: adapters that there is room for.
        max_rank: the largest rank that there is room for.
        target_modules: which layers, as in `LoraConfig`; None for the architecture's default. Adapters may target any
            of these; those that `add` makes itself target the linear ones.
        dtype: of the adapters; None for float32 beside a 16-bit base, else the base's.

    Attributes:
        model: the `PeftModel` around the base model.

    Raises:
        TypeError, ValueError: see `LoraConfig`; a model with adapters that are no LoRA, or do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        max_rank: int = 16,
        target_modules: list[str] | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        check_is_module("model", model)
        check_float_dtype("dtype", dtype)
        if isinstance(model, PeftModel):
            if model.peft_type != PeftType.LORA:
                raise TypeError(f"model: expected LoRA adapters, got {type(model.base_model).__name__}")
            model.base_model.refuse_parts_of_weights("model: a bank cannot mix what is part of a weight")
            if len(model.peft_config) > slots:
                raise BankFullError(f"slots: expected at least {len(model.peft_config)} for the adapters that are here")
            with_dora = [name for name, held in model.peft_config.items() if getattr(held, "use_dora", False)]
            if with_dora:
                raise ValueError(f"model: {with_dora} have DoRA (use_dora=True), which cannot be mixed in a batch")
        self._dtype = dtype
        with restored_on_error(model):  # pools may be more than the device has room for
            self.model = model if isinstance(model, PeftModel) else _with_layers_alone(model, target_modules)
            tuner: Any = self.model.base_model
            self._mixed = MixedAdapters(tuner.model, slots, max_rank, LoraLayer)
            self._mixed.is_fixed = True  # graphs that were captured, and the bank's own methods, go by these pools
            for layer in self._linear_layers():
                here = next(iter(layer.lora_A.values()), None)
                if here is None:
                    device, kind = layer._base_device_and_dtype()
                    self._mixed.make_pool(layer, self._dtype_beside(kind), device or torch.device("cpu"))
            self._tuner.__dict__["_mixed_adapters"] = self._mixed
            self._seat()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        adapters: Mapping[str, PathLike],
        slots: int | None = None,
        max_rank: int | None = None,
        *,
        trainable: bool = False,
        progress: bool = True,
        **hub: Any,
    ) -> AdapterBank:
        """A bank with saved adapters, PEFT's or ours, read in parallel and all checked before `model` is changed.

        Args:
            model: the base model.
            adapters: a name for each folder or Hub repository.
            slots, max_rank: room; None for what these adapters need.
            trainable: whether their parameters require gradients; if not, the model is put in evaluation mode.
            progress: show a bar (on a terminal).
            hub: `revision`, `token` and the like.

        Raises:
            BankFullError: (a ValueError) more adapters than `slots`.
            AdapterFileError: (a ValueError) a file is missing or damaged, or does not fit `model`; by name.
            ValueError: no adapters, or one that is no LoRA.
        """
        check_is_module("model", model)
        _check_trainable(trainable)
        if not isinstance(adapters, Mapping) or not adapters:
            got = repr(adapters) if adapters else "none"
            raise ValueError(f"adapters: expected a dict of names to folders, got {got}")
        slots = len(adapters) if slots is None else slots
        if isinstance(slots, int) and 1 <= slots < len(adapters):
            raise BankFullError(f"slots: expected at least {len(adapters)} for {sorted(adapters)}, got {slots}")
        read = _read_all(adapters, progress, hub)
        highest = max(highest_rank(config) for config, _ in read.values())
        targets = sorted(set().union(*(_targets_of(tensors) for _, tensors in read.values())))
        with restored_on_error(model):
            bank = cls(model, slots, highest if max_rank is None else max_rank, target_modules=targets)
            for name, (config, tensors) in read.items():
                with blamed_on_config(adapters[name], hub):
                    bank._make(name, config, tensors, trainable, weights_file(adapters[name], **hub))
            bank._seat()
        if not trainable:
            bank.model.eval()
        return bank

    # --- what is in it -----------------------------------------------------------------------------------------------

    @property
    def _tuner(self) -> LoraModel:
        tuner: Any = self.model.base_model
        return tuner

    @property
    def slots(self) -> int:
        """Adapters that there is room for."""
        return self._mixed.slots

    @property
    def max_rank(self) -> int:
        """The largest rank that there is room for."""
        return self._mixed.max_rank

    @property
    def names(self) -> list[str]:
        """The adapters that are here, in the order of their slots."""
        return [name for name in self._mixed.names if name is not None and name in self.model.peft_config]

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def ids(self, names: Sequence[str], device: torch.device | str | None = None) -> torch.Tensor:
        """The slots of these adapters, -1 for "__base__": int64 [len(names)], on the model's device.

        Raises:
            UnknownAdapterError: (a ValueError) no adapter has one of the names.
        """
        if isinstance(names, str):
            raise TypeError(f"names: expected a list of names, got {names!r}")
        slots = [-1 if name == BASE else self._slot(name) for name in names]
        return torch.tensor(slots, dtype=torch.int64, device=self._mixed.device if device is None else device)

    def _slot(self, name: str) -> int:
        if name not in self._mixed.names or name not in self.model.peft_config:
            raise UnknownAdapterError(f"adapter {name!r} is not in the bank, which has {sorted(self.names)}")
        return self._mixed.names.index(name)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of one adapter, by their names in `bank.model`."""
        self._slot(name)
        mine = {id(p) for holder in holders_of(self._tuner.model) for p in _parameters_of(holder, name)}
        return ((key, p) for key, p in self.model.named_parameters() if id(p) in mine)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter, for an optimizer."""
        return (p for _, p in self.named_parameters(name))

    def state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of the tensors of one adapter, by the names that they have in a file."""
        self._slot(name)
        return get_peft_model_state_dict(self.model, adapter_name=name)

    def load_state_dict(self, name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Give an adapter the values of a `state_dict` of the same shapes, in place.

        Raises:
            AdapterFileError: (a ValueError) names or shapes do not fit; nothing is written then.
        """
        self._slot(name)
        plan = plan_load(self.model, state_dict, name)
        if plan.missing or plan.unexpected:
            text = f"missing {shorten(plan.missing) or 'none'}; unknown {shorten(plan.unexpected) or 'none'}"
            raise AdapterFileError("state_dict", f"its names are not those of adapter {name!r}: {text}")
        set_peft_model_state_dict(self.model, state_dict, name)

    # --- adapters that come and go -----------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        config: LoraConfig | PathLike | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        trainable: bool = True,
    ) -> int:
        """Put another adapter into a free slot.

        Args:
            name: its name.
            config: a `LoraConfig`, or a folder (or Hub repository) to load; None for the bank's layers at `max_rank`.
            state_dict: its values, by the names of a file; None for a new adapter, or for the folder's.
            trainable: whether its parameters require gradients. Its dropout acts if the model is in training mode.

        Returns:
            The slot.

        Raises:
            BankFullError: (a ValueError) no slot is free.
            AdapterFileError, ValueError: the name is taken, or the adapter does not fit: a rank above `max_rank`, a
                layer that the bank does not cover. The bank is then as it was.
        """
        _check_trainable(trainable)
        if name in self.model.peft_config or name in (BASE, _INCOMING):
            raise ValueError(f"name: {name!r} is taken")
        if len(self) == self.slots:
            raise BankFullError(f"adapter {name!r}: all {self.slots} slots of the bank are taken: {sorted(self.names)}")
        given, tensors, source = self._given(name, config, state_dict)
        with _blamed(config), restored_on_error(self.model):
            self._make(name, given, tensors, trainable, source)
        self._seat()
        return self._slot(name)

    def remove(self, name: str) -> None:
        """Empty an adapter's slot: rows that still carry its id take the base alone.

        Raises:
            UnknownAdapterError: (a ValueError) no such adapter.
        """
        self._slot(name)
        self._delete(name)
        self._seat()

    def _delete(self, name: str) -> None:
        """Take an adapter out; no other becomes active in its place, and what is left learns or not as it did."""
        active = self.model.active_adapters
        with self._learning_as_before():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another adapter that becomes active: it does not stay so
                self.model.delete_adapter(name)
            if name in active:
                self._tuner.set_adapter([other for other in active if other != name])

    @contextlib.contextmanager
    def _learning_as_before(self) -> Iterator[None]:
        """Whatever adapter becomes active in the block, no parameter starts or stops to require gradients."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        yield
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)

    def replace(
        self,
        name: str,
        config: LoraConfig | PathLike | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        trainable: bool = True,
    ) -> int:
        """Put another adapter in the place and under the name of one that is here; arguments as for `add`.

        Its slot stays the same, so ids and captured graphs do. Its parameters are other ones: an optimizer of the old
        ones has to be made anew.
        """
        _check_trainable(trainable)
        slot, active, first = self._slot(name), list(self.model.active_adapters), self.model.active_adapter
        given, tensors, source = self._given(name, config, state_dict)
        with _blamed(config), restored_on_error(self.model):  # all checks, while the old one is still there
            self._make(_INCOMING, given, tensors, trainable, source, name)
        self._delete(name)
        for module in modules_of(self._tuner.model):
            if isinstance(module, LoraLayer | ModulesToSaveWrapper | TrainableTokensLayer):
                for attribute in (*module.adapter_layer_names, *module.other_param_names):
                    held = getattr(module, attribute)
                    if _INCOMING in held:
                        held[name] = held.pop(_INCOMING)
        self.model.peft_config[name] = self.model.peft_config.pop(_INCOMING)
        if name in active:
            with self._learning_as_before():
                self._tuner.set_adapter(active)
        self.model.active_adapter = first
        self._seat()
        return slot

    def save(self, name: str, folder: PathLike) -> None:
        """Write one adapter to `folder` in PEFT's format.

        Raises:
            UnknownAdapterError: (a ValueError) no such adapter.
        """
        self._slot(name)
        write_adapter(
            folder, config_to_save(self.model.peft_config[name], self.model.get_base_model()), self.state_dict(name)
        )

    # --- batches -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self, adapters: Sequence[str] | torch.Tensor) -> Iterator[None]:
        """Within the block, row i of the model's batch takes the adapter adapters[i].

        Args:
            adapters: a name for each row, "__base__" for the base alone; or slots, int32 or int64 [rows], one for each
                sequence of the batch or for each of its tokens, where what is no slot is the base alone. They are read
                once, by the first layer: after writing other ids into the tensor begin another block. A captured graph
                reads them at each replay, so the tensor must live as long (those of names end with the block); with
                the block inside of what is captured its layers share one reading.

        Raises:
            UnknownAdapterError: (a ValueError) a name that is not here.
            TypeError: neither names nor a tensor.
            ValueError: adapters are merged, or disabled in some layers; or, in the model's forward, a batch of another
                size.
        """
        if not isinstance(adapters, torch.Tensor):
            if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
                raise TypeError(f"adapters: expected a list of names or a tensor of slots, got {adapters!r}")
            for name in dict.fromkeys(adapters):
                if name != BASE:
                    self._slot(name)
        mixed = self._mixed
        with self._tuner.turn(), mixed.use(mixed.batch(adapters, mixed.device)):
            yield

    # --- inside ------------------------------------------------------------------------------------------------------

    def _layers(self) -> list[Any]:
        return self._tuner._layers()

    def _linear_layers(self) -> list[Any]:
        return [layer for layer in self._layers() if isinstance(layer, Linear)]

    def _dtype_beside(self, kind: torch.dtype | None) -> torch.dtype:
        """The dtype of adapters beside a base of this one."""
        return self._dtype or (torch.float32 if kind is None or kind.itemsize < 4 else kind)

    def _covered(self) -> list[str]:
        modules = named_modules_of(self._tuner.model)
        return [name for name, module in modules if isinstance(module, Linear) and is_tuned(module)]

    def _seat(self) -> None:
        """Give every adapter its slot, and the pools what is new in them."""
        self._tuner.__dict__["_layers_changed"] = False  # the bank's layers are always the same
        self._mixed.find_layers()
        self._mixed.seat(list(self.model.peft_config))
        self._mixed.sync()

    def _given(
        self, name: str, config: LoraConfig | PathLike | None, state_dict: Mapping[str, torch.Tensor] | None
    ) -> tuple[LoraConfig, Mapping[str, torch.Tensor] | None, PathLike]:
        """What `add` was given as a configuration, tensors, and where the tensors are from."""
        if config is None:
            return LoraConfig(r=self.max_rank, target_modules=self._covered()), state_dict, "state_dict"
        if isinstance(config, PeftConfig):
            return config, state_dict, "state_dict"
        loaded, tensors = _read(name, config, {})
        return loaded, state_dict or tensors, weights_file(config)

    def _make(
        self,
        name: str,
        config: LoraConfig,
        state_dict: Mapping[str, torch.Tensor] | None,
        trainable: bool,
        source: PathLike,
        called: str | None = None,
    ) -> None:
        """Put an adapter into the layers, without a slot; after an error the caller restores the model.

        Messages speak of it as `called`, where that is to be its name later."""
        called = called or name
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"adapter {called!r}: expected a LoRA configuration, got {type(config).__name__}")
        _refuse_parameters(called, config)
        highest = highest_rank(config)
        if highest > self.max_rank:
            raise ValueError(f"adapter {called!r}: its rank is {highest}, the bank has room for {self.max_rank}")
        if config.use_dora:
            raise ValueError(f"adapter {called!r}: use_dora=True: DoRA cannot be mixed in a batch")
        if config.bias != "none":
            raise ValueError(f"adapter {called!r}: bias={config.bias!r} trains biases that all adapters share")
        self._mixed.sync()  # the model may have moved since, and its adapters out of their pools
        known, active = set(map(id, self._layers())), list(self.model.active_adapters)
        self.model._add_adapter(name, config, low_cpu_mem_usage=False, widen=False)
        for key, layer in named_modules_of(self._tuner.model):
            if isinstance(layer, LoraLayer) and is_tuned(layer) and id(layer) not in known:
                raise ValueError(f"adapter {called!r}: the bank does not cover {key!r}, which it targets")
        for layer, pool in self._mixed.pools.items():
            _cast(layer, name, pool.pool_a.dtype)
        for tokens in rows_of_own(self._tuner.model):
            if name in tokens.trainable_tokens_delta:
                own = tokens.trainable_tokens_delta[name]
                own.data = own.to(self._dtype_beside(own.dtype))
        for layer in self._layers():
            if name in layer.lora_A and not layer.is_pooled:
                _cast(layer, name, self._dtype_beside(layer.lora_A[name].weight.dtype))
            if name in layer.lora_dropout:  # a module is made in training mode, whatever the model is in
                layer.lora_dropout[name].train(layer.training)
        if state_dict is not None:
            result = set_peft_model_state_dict(self.model, state_dict, name, source=source)
            if result.missing_keys or result.unexpected_keys:
                text = f"missing {shorten(result.missing_keys)}; unknown {shorten(result.unexpected_keys)}"
                warnings.warn(f"{os.fspath(source)}: {text}", stacklevel=4)
        self._tuner.active_adapter = active
        self.model.set_requires_grad(name, trainable)


def _with_layers_alone(model: nn.Module, target_modules: list[str] | str | None) -> PeftModel:
    """A `PeftModel` whose layers are in place, without an adapter in them."""
    # A convolution's groups have to divide even the rank of what only keeps a place.
    convolutions: dict[str, Any] = {name: m for name, m in named_modules_of(model) if is_convolution(m)}
    ranks = {f"^{re.escape(name)}": m.groups for name, m in convolutions.items() if m.groups > 1}
    config = LoraConfig(r=1, target_modules=target_modules, rank_pattern=ranks)
    with restored_on_error(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank_pattern")  # of those that nobody targets
        made = get_peft_model(model, config, adapter_name=_PLACE)
        read = [name for name, module in named_modules_of(model) if isinstance(module, MultiheadAttention)]
        if read:
            raise ValueError(
                f"target_modules={shown(target_modules, 300)} means nn.MultiheadAttention in this model "
                f"({shorten(read, 2)}), whose adapters are part of weights that all rows share: name other layers"
            )
        stacked = [name for name, module in named_modules_of(model) if isinstance(module, ParamWrapper)]
        if stacked:
            raise ValueError(
                f"target_modules={shown(target_modules, 300)} means parameters in this model ({shorten(stacked, 2)}), "
                "whose adapters are part of a weight that all rows share: name linear layers"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.delete_adapter(_PLACE)
    # In the mode of what they are put around: an adapter's dropout must not act in a model that only serves.
    made.training = made.base_model.training = model.training
    for layer in made.base_model._layers():
        layer.training = layer.base_layer.training
    return made


def _cast(layer: Any, name: str, dtype: torch.dtype) -> None:
    """An adapter's parameters in the dtype of their layer's pool."""
    for container in (layer.lora_A, layer.lora_B):
        if name in container:
            container[name].to(dtype)


def _parameters_of(module: Any, name: str) -> Iterator[Any]:
    """The parameters of an adapter in an adapted layer, or in a module that is trained whole."""
    for attribute in module.adapter_layer_names:
        container = getattr(module, attribute)
        if name in container:
            held = container[name]
            yield from [held] if isinstance(held, torch.Tensor) else held.parameters()


def _refuse_parameters(name: str, config: LoraConfig) -> None:
    """Raises ValueError for an adapter on parameters."""
    if config.target_parameters:
        raise ValueError(
            f"adapter {name!r}: target_parameters={shown(sorted(config.target_parameters), 300)}: an adapter on a "
            "parameter is part of a weight, which all rows share"
        )


def _check_trainable(trainable: Any) -> None:
    """Raises TypeError before anything is changed; torch would say so once the adapter is in its place."""
    if not isinstance(trainable, bool):
        raise TypeError(f"trainable: expected True or False, got {trainable!r}")


def _blamed(config: PeftConfig | PathLike | None) -> contextlib.AbstractContextManager[None]:
    """Where the configuration is a folder's, errors about it name the file."""
    if config is None or isinstance(config, PeftConfig):
        return contextlib.nullcontext()
    return blamed_on_config(config, {})


def _read(name: str, folder: PathLike, hub: dict[str, Any]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a saved adapter, checked as far as that goes without a model."""
    with reading(folder, hub.get("subfolder")):
        try:
            config: Any = load_config(folder, **hub)
        except NotImplementedError as error:
            raise NotImplementedError(f"adapter {name!r}: {error}") from error  # which names the file
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"adapter {name!r}: {os.fspath(folder)} holds a {config.peft_type} adapter, expected LoRA")
        _refuse_parameters(name, config)
        tensors = load_peft_weights(folder, **hub)
        check_lora_tensors(weights_file(folder, **hub), tensors, config)
    return config, tensors


def _read_all(
    adapters: Mapping[str, PathLike], progress: bool, hub: dict[str, Any]
) -> dict[str, tuple[LoraConfig, dict[str, torch.Tensor]]]:
    """Every adapter's configuration and tensors, read side by side, in the order of `adapters`."""
    with ThreadPoolExecutor(max_workers=min(8, len(adapters))) as pool:
        jobs = {name: pool.submit(_read, name, folder, hub) for name, folder in adapters.items()}
        return {name: jobs[name].result() for name in with_bar(jobs, "adapters", progress)}


def _targets_of(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the modules of the base model that a file's tensors adapt."""
    found = set()
    for key in tensors:
        module, marker, _ = key.removeprefix(PREFIX).partition(".lora_")
        if marker:
            found.add(module)
    return found
