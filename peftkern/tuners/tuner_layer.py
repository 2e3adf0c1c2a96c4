"""`BaseTunerLayer`: what every adapted layer has in common, whatever its method.

Attribute names as in PEFT 0.21.2, which Trainer, TRL and diffusers look for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from peftkern.utils.other import _set_layer_requires_grad
from peftkern.utils.quantized_modules import weight_of


class BaseTunerLayer:
    """Mixin of an `nn.Module` that wraps a layer of the base model as `self.base_layer` and adds adapters to it.

    Several named adapters can live on a layer. The active ones take part in forward; merged ones are inside the base
    weight.
    """

    # Names of the containers (ModuleDict, ParameterDict) that hold adapter weights, keyed by adapter name.
    adapter_layer_names: tuple[str, ...] = ()
    # Names of other dicts keyed by adapter name.
    other_param_names: tuple[str, ...] = ()
    # The containers whose weights are never trained, for adapters that have such; a layer that may have makes its own.
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    # The batch of many adapters that forward serves now, and the last one, for checkpointing: see `tuners.mixed`.
    _mixed: Any = None
    _mixed_before: Any = None

    # Of `peftkern.nn`: in a model that is adapted such a layer is part of the base, with the adapter that it has.
    stands_alone: bool = False

    # Whether an adapter whose modules are called one by one casts its input to its own dtype first:
    # `helpers.disable_input_dtype_casting` has hooks see to it.
    cast_input_dtype_enabled: bool = True

    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    # Each layer's __init__ makes its own.
    merged_adapters: list[str]

    def get_base_layer(self) -> Any:
        """The wrapped layer (an `nn.Module`); the innermost one when a tuner layer wraps another."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    def _cast_input_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x in `dtype`, unless casting is left to hooks."""
        return x.to(dtype) if self.cast_input_dtype_enabled else x

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight: model code asks adapted layers for it."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.get_base_layer().bias

    @property
    def merged(self) -> bool:
        """Whether any adapter is inside the base weight."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether forward uses the base layer alone; `enable_adapters` changes it."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter or adapters; `set_adapter` changes them."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight; each method says how."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def unmerge(self) -> None:
        """Takes merged adapters out of the base weight; each method says how."""
        raise NotImplementedError(f"{type(self).__name__} cannot be unmerged")

    def _containers(self) -> list[Any]:
        """The ModuleDicts and ParameterDicts that hold adapter weights by adapter name."""
        return [getattr(self, name) for name in self.adapter_layer_names]

    def _get_available_adapters(self) -> set[str]:
        """Names of all adapters on this layer."""
        return {name for container in self._containers() for name in container}

    def enable_adapters(self, enabled: bool) -> None:
        """Uses the active adapters in forward, trainable (True), or the base layer alone, adapters frozen (False)."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for container in self._containers():
                _set_layer_requires_grad(container, False)
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes the named adapters active, and exactly those trainable (none in inference mode)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for attribute, container in zip(self.adapter_layer_names, self._containers(), strict=True):
            for name, layer in container.items():
                learns = name in names and not inference_mode
                _set_layer_requires_grad(layer, learns and not self._stays_frozen(name, attribute))
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets `requires_grad` on the weights of the named adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for attribute, container in zip(self.adapter_layer_names, self._containers(), strict=True):
            for name, layer in container.items():
                if name in names:
                    _set_layer_requires_grad(layer, requires_grad and not self._stays_frozen(name, attribute))

    def _stays_frozen(self, adapter_name: str, attribute: str) -> bool:
        """Whether what an adapter has in the container `attribute` is never trained."""
        return attribute in self.frozen_peft_weight_names.get(adapter_name, ())

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was the only active one, the first by name that is left becomes active.

        Raises:
            ValueError: The adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        for attribute in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        left = sorted(self._get_available_adapters())
        if not active and left:
            warnings.warn(f"the active adapter {adapter_name!r} was deleted; {left[0]!r} is active now", stacklevel=2)
            active = left[:1]
        self.set_adapter(active)

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Where new adapters go, and in which dtype; None for what the base layer does not tell.

        A weight that accelerate offloads lies on the meta device between calls; its hook knows where it computes. A
        quantized weight has an integer dtype; `compute_dtype` then says in what it computes.
        """
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return None, None
        device, dtype = weight.device, getattr(base, "compute_dtype", None) or weight.dtype
        where = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
        if device.type == "meta" and where is not None:
            device = torch.device(where)
        return device, dtype if dtype.is_floating_point else None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, keep_dtype: bool = False
    ) -> None:
        """Moves an adapter to the base weight's device and, unless `keep_dtype`, dtype.

        One on the meta device waits there for its values, which will be of the dtype that it has.
        """
        base_device, dtype = self._base_device_and_dtype()
        device = device if device is not None else base_device
        if device is None:
            return
        dtype = None if keep_dtype else dtype
        for container in self._containers():
            if adapter_name not in container:
                continue
            layer = container[adapter_name]
            where = None if any(p.is_meta for p in parameters_of(layer)) else device
            if isinstance(layer, torch.Tensor):
                moved = layer.detach().to(device=where, dtype=dtype)
                container[adapter_name] = nn.Parameter(moved, requires_grad=layer.requires_grad)
            else:
                layer.to(device=where, dtype=dtype)

    def _fill_adapter(self, adapter_name: str, config: Any) -> None:
        """Gives what an adapter still has on the meta device, as no file had it, the values of a new adapter; nothing
        else is changed."""
        old = [(c, c[adapter_name]) for c in self._containers() if adapter_name in c]
        if not any(p.is_meta for _, held in old for p in parameters_of(held)):
            return
        flags = [(p, p.requires_grad) for c in self._containers() for p in c.parameters()]
        self._make_anew(adapter_name, config)
        for container, before in old:
            for p, q in zip(parameters_of(before), parameters_of(container[adapter_name]), strict=True):
                q.data = q.data.to(p.dtype) if p.is_meta else p.data
                q.requires_grad = p.requires_grad
        for p, requires_grad in flags:
            p.requires_grad = requires_grad

    def _make_anew(self, adapter_name: str, config: Any) -> None:
        """`update_layer` of an adapter that is here, with what it was made with."""
        raise NotImplementedError(type(self).__name__)


def of_base_layer(name: str) -> Any:
    """A property of an adapted layer that is its base layer's, for model code that asks for more than the weight."""
    return property(lambda layer: getattr(layer.get_base_layer(), name), doc=f"The base layer's `{name}`.")


def parameters_of(held: Any) -> list[torch.Tensor]:
    """The parameters of what a container has for an adapter: a module, or a parameter itself."""
    return [held] if isinstance(held, torch.Tensor) else list(held.parameters())


def is_tuned(module: Any) -> TypeGuard[BaseTunerLayer]:
    """Whether `module` is a layer whose adapters a model manages: no layer of `peftkern.nn`."""
    return isinstance(module, BaseTunerLayer) and not module.stands_alone


def check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that cannot be a level of a state-dict key or an entry of a ModuleDict."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name must be a non-empty str without a dot, and no name of a ModuleDict's method, got {name!r}"
        )


def refuse_adapter_names(kwargs: dict[str, Any]) -> None:
    """Raises for PEFT's per-row adapters, rather than letting every row take the active one."""
    if kwargs.pop("adapter_names", None) is not None:
        raise NotImplementedError(
            "adapter_names (an adapter for each row of a batch) goes to the model, PeftModel's forward or generate, or "
            "to AdapterBank.batch: a layer by itself does not take it"
        )


def check_adapters_to_merge(layer: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """Those of `adapter_names` (default: the active ones) that are not merged yet, with a warning about those that are.

    Raises:
        TypeError: `adapter_names` is a str.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list of adapter names, got the str {adapter_names!r}")
    names = layer.active_adapters if adapter_names is None else adapter_names
    if not layer.merged:
        return list(names)
    new = [name for name in names if name not in layer.merged_adapters]
    if new:
        warnings.warn(f"merging {new} beside the adapters already merged: {layer.merged_adapters}", stacklevel=3)
    else:
        warnings.warn("all adapters to merge are already merged: nothing to do", stacklevel=3)
    return new


def check_mergeable_base(layer: BaseTunerLayer) -> None:
    """Raises for a layer whose base weight cannot be changed in place, or would not stay changed.

    Raises:
        TypeError: The weight is sharded, parametrized, computed again by a hook or otherwise neither a plain
            floating-point tensor of more than eight bits, which cannot be added to, nor quantized.
        ValueError: It is on the meta device.
    """
    base: Any = layer.get_base_layer()
    weight: Any = getattr(layer, "weight", None)
    kind = type(base).__name__
    if "parametrizations" in base._modules:
        raise TypeError(f"cannot merge into a {kind} whose weight is parametrized: remove the parametrization first")
    # torch.nn.utils.weight_norm, spectral_norm and prune: what is merged would be lost at the next call.
    makers = [hook for hook in base._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils.")]
    if makers and "weight" not in base._parameters:
        names = ", ".join(type(hook).__name__ for hook in makers)
        raise TypeError(f"cannot merge into a {kind} whose weight {names} makes anew at each call: remove that first")
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if weight_of(base) is None and not plain:
        found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, torch.Tensor) else repr(weight)
        raise TypeError(f"cannot merge into a {kind} whose weight is {found}: it must be a plain floating-point tensor")
    if weight.device.type == "meta":
        raise ValueError(f"cannot merge into a {kind} whose weight is on the meta device: load it on a device first")
