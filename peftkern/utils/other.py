"""Modules that are trained whole beside the adapters, and small helpers on module trees.

Names and state-dict keys as in PEFT 0.21.2: `<name>.original_module.*` and `<name>.modules_to_save.<adapter>.*`.
"""

from __future__ import annotations

import copy
import importlib
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.utils.constants import SEQ_CLS_HEAD_NAMES
from peftkern.utils.module_tree import modules_of, named_modules_of

# PEFT has these in this module too; here they live apart, and are imported when first asked for.
_LATER = {"fsdp_auto_wrap_policy": "fsdp"}
_LATER |= {
    f"TRANSFORMERS_MODELS_TO_{kind}_MODULES_MAPPING": "constants"
    for kind in ("ADALORA_TARGET", "LORA_TARGET", "IA3_TARGET", "IA3_FEEDFORWARD")
}
_LATER |= dict.fromkeys(("cast_mixed_precision_params", "prepare_model_for_kbit_training"), "kbit")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"peftkern.utils.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_is_module(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}")


def is_checkpointed(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on; as in PEFT, a model that does not say may switch it on later."""
    name = "is_activation_checkpointing"  # transformers' name since 5.20; reading the older one there warns
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", True))


def infer_device() -> str:
    """The type of the accelerator that is here (the first of cuda, mps, mlu, xpu and npu that is), else "cpu"."""
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if module.is_available():
            return kind
    for kind in ("mlu", "xpu", "npu"):  # some come with a package that adds them to torch
        found = getattr(torch, kind, None)
        if found is not None and found.is_available():
            return kind
    return "cpu"


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module named `key`, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """`weight` transposed when it is stored [in_features, out_features]."""
    return weight.T if fan_in_fan_out else weight


def embeddings_of(model: Any) -> tuple[Any, Any]:
    """A model's input and output embeddings, None where it has none or cannot tell.

    Every transformers model has the methods, and those of images, of speech or of two towers raise.
    """
    found: list[Any] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)() if hasattr(model, getter) else None)
        except NotImplementedError:
            found.append(None)
    return found[0], found[1]


def _set_layer_requires_grad(layer: nn.Module | torch.Tensor, requires_grad: bool) -> None:
    """Sets `requires_grad` on a parameter or on all parameters of a module; those that are no leaves keep theirs."""
    for parameter in [layer] if isinstance(layer, torch.Tensor) else layer.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(requires_grad)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freezes every parameter with a level of its name equal to `adapter_name`."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad = False


def batch_in_force(layer: Any) -> Any:
    """The batch of many adapters that a layer's forward is to serve, or None (see `tuners.mixed`).

    That of the block which the call is in; or the last one, where backward computes a checkpointed forward again. A
    forward outside of any block forgets the last one.

    Raises:
        RuntimeError: the block is another thread's, whose rows the input's are not.
    """
    mixed = layer._mixed
    if mixed is not None and _is_of_another_thread(mixed):
        raise RuntimeError(
            "adapter_names: a batch of another thread is in force, in a forward or generate with adapter_names or in "
            "AdapterBank.batch. Name the adapters in this thread's call too, which then waits for its turn, or keep "
            "other calls apart with a lock"
        )
    if mixed is None and layer._mixed_before is not None and not torch.compiler.is_compiling():
        if torch._C._current_graph_task_id() != -1:  # this thread runs a backward pass
            return layer._mixed_before
        layer._mixed_before = None
    return mixed


def _is_of_another_thread(mixed: Any) -> bool:
    """Whether a batch is not this thread's. Backward, which has threads of its own, is taken to be the batch's."""
    if torch.compiler.is_compiling() or mixed.thread in (None, threading.get_ident()):
        return False
    return torch._C._current_graph_task_id() == -1


def rows_of_input(
    rows_of: dict[str, list[int]], batch: Any, x: torch.Tensor, what: str
) -> tuple[dict[str, list[int]], int]:
    """(the rows of x that each adapter takes, how many rows x has), of an input whose rows are copied by index.

    Args:
        rows_of: the entries of the batch that each adapter takes.
        batch: the batch.
        x: a layer's input.
        what: the field of the configuration that the layer is there for, for messages.

    Raises:
        ValueError: the input's first dimension is not the batch.
    """
    n = len(batch)
    if isinstance(x, torch.Tensor) and x.dim() == 2 and x.is_floating_point():
        batch.check_rows(x, "adapter_names")
    each = batch.rows_of_an_id(x, x.dim() - 1) if isinstance(x, torch.Tensor) else 0
    if each:
        n *= each  # rows are tokens
        rows_of = {name: [row * each + i for row in rows for i in range(each)] for name, rows in rows_of.items()}
    if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.shape[0] != n:
        if isinstance(x, torch.Tensor) and x.dim() > 0:
            batch.refuse_names(x)
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"adapter_names: {what}: expected an input of {n} rows, got {shape}")
    return rows_of, n


class ExclusiveAdapters:
    """Mixin of what holds adapters that are other values of the same weights, so that not any two can be active."""

    # The field of the configuration that names what is trained here, for messages.
    what_is_trained: str

    def held_among(self, adapter_names: str | Sequence[str]) -> list[str]:
        """Those of `adapter_names` that are here."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        held: set[str] = self._get_available_adapters()  # type: ignore[attr-defined]
        return [name for name in names if name in held]

    def check_together(self, names: Sequence[str]) -> None:
        """Raises ValueError where these adapters of this holder cannot take part at once: here, if they are several."""
        if len(names) > 1:
            raise ValueError(f"{self.what_is_trained} takes one active adapter at a time, got {list(names)}")


class AuxiliaryTrainingWrapper(nn.Module):
    """Base of what wraps a module to train it in another way than by an adapter inside it."""

    def unloaded_module(self) -> nn.Module:
        """What stands in the wrapper's place once adapters are unloaded."""
        raise NotImplementedError


class ModulesToSaveWrapper(ExclusiveAdapters, AuxiliaryTrainingWrapper):
    """Keeps a frozen module and, for each adapter that asked for it, a copy that is trained and saved whole.

    Args:
        module_to_save: The module to copy.
        adapter_name: The adapter that the first copy belongs to.
        copied: See `update`.

    Raises:
        TypeError: `module_to_save` is a container without a forward, or is itself an adapted layer.
    """

    # For code that walks adapters: the containers keyed by adapter name.
    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    # The batch whose rows want different copies, and the last one, for checkpointing: see `tuners.mixed`.
    _mixed: Any = None
    _mixed_before: Any = None
    other_param_names: tuple[str, ...] = ()
    what_is_trained = "modules_to_save"

    def __init__(self, module_to_save: nn.Module, adapter_name: str, copied: dict[int, Any] | None = None) -> None:
        super().__init__()
        _check_can_copy(module_to_save)
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter: list[str] = [adapter_name]
        self._disable_adapters = False
        self.update(adapter_name, copied)

    def update(self, adapter_name: str, copied: dict[int, Any] | None = None) -> None:
        """Adds a copy for `adapter_name` if there is none; the original is frozen.

        `copied`, the memo of `copy.deepcopy`, has what of other modules was copied already: weights that these share
        with this one are shared by the copies too.
        """
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module, copied)
        self.original_module.requires_grad_(False)

    @property
    def disable_adapters(self) -> bool:
        """Whether the original is used whatever adapter is active."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> list[str]:
        """The active adapter, as a list of none or one."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter, as a list of none or one."""
        return self._active_adapter

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have a copy here."""
        return self._adapters

    def active_module(self) -> nn.Module:
        """The copy of the active adapter, or the original when none is active or adapters are disabled."""
        if self._disable_adapters or not self._active_adapter or self._active_adapter[0] not in self.modules_to_save:
            return self.original_module
        return self.modules_to_save[self._active_adapter[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixed = batch_in_force(self)
        if mixed is not None:
            return self._forward_mixed(mixed.rows_of(), mixed.batch, *args, **kwargs)
        return self.active_module()(*args, **kwargs)

    def _forward_mixed(self, rows_of: dict[str, Any], batch: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The rows of each adapter through its copy, all others through the original.

        Raises:
            ValueError: the input's first dimension is not the batch.
            TypeError: the module returns something else than a tensor.
        """
        rows_of, n = rows_of_input(rows_of, batch, x, self.what_is_trained)
        groups = {name: rows for name, rows in rows_of.items() if name in self.modules_to_save}
        taken = {row for rows in groups.values() for row in rows}
        calls = [(self.modules_to_save[name], rows) for name, rows in groups.items()]
        others = [row for row in range(n) if row not in taken]
        calls += [(self.original_module, others)] if others or not calls else []
        parts = []
        for module, rows in calls:
            part = module(x[torch.tensor(rows, dtype=torch.int64, device=x.device)], *args, **kwargs)
            if not isinstance(part, torch.Tensor):
                kind = type(module).__name__
                raise TypeError(f"adapter_names: {kind} of modules_to_save returns {type(part).__name__}, not a tensor")
            parts.append(part)
        order = [row for _, rows in calls for row in rows]
        back = sorted(range(n), key=order.__getitem__)
        return torch.cat(parts)[torch.tensor(back, dtype=torch.int64, device=x.device)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "modules_to_save" not in self.__dict__["_modules"]:
                raise
        # Model code asks the wrapped module for its weight, its config and so on.
        return getattr(self.active_module(), name)

    def enable_adapters(self, enabled: bool) -> None:
        """Uses the copies (True) or the original (False), with gradients accordingly."""
        self._disable_adapters = not enabled
        for name, module in self.modules_to_save.items():
            _set_layer_requires_grad(module, enabled and name in self._active_adapter)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes the copy of one adapter active and trainable (frozen in inference mode); an empty list: the original.

        Raises:
            ValueError: More than one adapter, or one that has no copy here.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_together(names)
        if names and names[0] not in self.modules_to_save:
            have = sorted(self._adapters)
            raise ValueError(f"adapter {names[0]!r} has no modules_to_save here; those that do: {have}")
        for name, module in self.modules_to_save.items():
            _set_layer_requires_grad(module, name in names and not inference_mode)
        self._active_adapter = names

    def set_active_among(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """`set_adapter` with the one of `adapter_names` that has a copy here, if any.

        Raises:
            ValueError: Several of them have one.
        """
        self.set_adapter(self.held_among(adapter_names), inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets `requires_grad` on the copies of the named adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name, module in self.modules_to_save.items():
            if name in names:
                _set_layer_requires_grad(module, requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Removes the copy of `adapter_name`, and makes that of the new active adapter active if there is one."""
        if adapter_name not in self.modules_to_save:
            return
        del self.modules_to_save[adapter_name]
        if adapter_name in self._active_adapter:
            self.set_active_among(new_active_adapters or [])

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `state_dict` (of this wrapper) holds for `adapter_name`, under the names of the wrapped module."""
        load_map = self.adapter_state_dict_load_map(adapter_name)
        return {saved: state_dict[held] for saved, held in load_map.items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in the wrapped module -> names in this wrapper, for the copy of `adapter_name`."""
        if adapter_name not in self.modules_to_save:
            return {}
        held = self.modules_to_save[adapter_name].state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in held}

    def unloaded_module(self) -> nn.Module:
        """What stands in the wrapper's place once adapters are unloaded: the active copy, else the original.

        Whether adapters are disabled is not asked, as it is not by `merge_and_unload` of adapted layers.
        """
        held = self.modules_to_save
        return next((held[name] for name in self._active_adapter if name in held), self.original_module)


def wrappers_of(model: nn.Module) -> list[ModulesToSaveWrapper]:
    """The wrappers of what is trained whole in `model`."""
    return [module for module in modules_of(model) if isinstance(module, ModulesToSaveWrapper)]


def _set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Activates, in every wrapper of `model`, the copy of the named adapter (the original where it has none).

    Raises:
        ValueError: Several of the named adapters have a copy of one module, or a row for one token; nothing is changed
            then.
    """
    for holder in modules_of(model):
        if isinstance(holder, ExclusiveAdapters):
            holder.check_together(holder.held_among(adapter_name))
    for wrapper in wrappers_of(model):
        wrapper.set_active_among(adapter_name, inference_mode)


def _check_can_copy(module: nn.Module) -> None:
    """Raises for a module that cannot be copied and trained in its own place."""
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    if isinstance(module, (*containers, AuxiliaryTrainingWrapper)) or hasattr(module, "base_layer"):
        raise TypeError(f"modules_to_save cannot wrap a module of type {type(module).__name__}")
    if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters()):
        raise ValueError("modules_to_save cannot copy a module whose weights accelerate offloaded: load it on a device")
    for name, p in module.named_parameters():
        if not (p.is_floating_point() or p.is_complex()):
            held = f"a {type(module).__name__} whose parameter {name!r} is quantized ({p.dtype})"
            raise TypeError(f"modules_to_save cannot train {held}: keep it out of quantization, or of modules_to_save")


def check_modules_to_save(model: nn.Module, names: Iterable[str]) -> None:
    """Raises for a module that `wrap_modules_to_save` would fail at, before anything is changed."""
    endings = tuple(names)
    for key, module in named_modules_of(model):
        if (
            key.endswith(endings)
            and not isinstance(module, ModulesToSaveWrapper)
            and not _is_inside_adapter(model, key)
        ):
            _check_can_copy(module)


def wrap_modules_to_save(
    model: nn.Module,
    names: Iterable[str],
    adapter_name: str,
    *,
    inference_mode: bool,
    activate: bool,
    keep_tied: bool = False,
) -> list[str]:
    """Puts a `ModulesToSaveWrapper` around every module of `model` whose name ends with one of `names`.

    As in PEFT, an ending need not start at a dot. A name that matches nothing is warned about; "classifier" and
    "score" are two conventions for one head, so one of them is enough.

    Args:
        model: The base model, adapted or not.
        names: Endings of module names.
        adapter_name: The adapter that trains the copies.
        inference_mode: Whether the copies are frozen.
        activate: Whether the copies are used at once.
        keep_tied: Whether copies of modules that share a weight share it too.

    Returns:
        The full names of the wrapped modules.
    """
    names = list(names)
    found: dict[str, set[str]] = {name: set() for name in names}
    copied: dict[int, Any] | None = {} if keep_tied else None
    # A tied module is listed under each of its names, so that each place is wrapped.
    for key, module in named_modules_of(model, remove_duplicate=False):
        matched = [name for name in names if key.endswith(name)]
        if not matched or _is_inside_adapter(model, key):
            continue
        for name in matched:
            found[name].add(key)
        parent, _, name = _get_submodules(model, key)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name, copied)
        else:
            module = ModulesToSaveWrapper(module, adapter_name, copied)
            module.set_adapter([])
            setattr(parent, name, module)
        if activate:
            module.set_adapter(adapter_name, inference_mode)
    missing = [name for name in names if not found[name]]
    if any(found.get(name) for name in SEQ_CLS_HEAD_NAMES):
        missing = [name for name in missing if name not in SEQ_CLS_HEAD_NAMES]
    if missing:
        warnings.warn(f"modules_to_save: no module's name ends with {missing}; nothing is trained for it", stacklevel=2)
    return sorted(set().union(*found.values()))


def _is_inside_adapter(model: nn.Module, key: str) -> bool:
    """Whether `key` lies inside a wrapper or an adapted layer, whose insides are not the user's modules."""
    parent = key.rpartition(".")[0]
    while parent:
        ancestor = model.get_submodule(parent)
        if isinstance(ancestor, AuxiliaryTrainingWrapper) or hasattr(ancestor, "base_layer"):
            return True
        parent = parent.rpartition(".")[0]
    return False
