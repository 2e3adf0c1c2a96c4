"""Quantized whole models, in bitsandbytes' formats and files, without bitsandbytes: quantize, save, load."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.adapter_error import shorten, shown
from peftkern.utils.adapter_files import PathLike, all_finite, readable_to
from peftkern.utils.checkpoint_files import Checkpoint, read_model_config, replacing_checkpoint
from peftkern.utils.linear_layers import is_conv1d, is_quantizable, rows_of
from peftkern.utils.other import check_is_module
from peftkern.utils.progress import with_bar
from peftkern.utils.quantization_settings import (
    QuantizationSettings,
    check_patterns,
    default_skips,
    exact_skips,
    is_skipped,
)
from peftkern.utils.quantized_files import (
    QuantizedFileError,
    check_stores,
    keys_of,
    quantized_keys,
    quantized_prefixes,
    read_quantized,
)
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from peftkern.utils.read_layers import needs_dense
from peftkern.weights import DENSE_DTYPES, Weight4bit

_HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir")
_FEW = 8  # layers that need no progress bar


# --- quantizing ------------------------------------------------------------------------------------------------------


def quantize_model(
    model: nn.Module,
    quantization_config: Any,
    *,
    skip_modules: list[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the linear layers of `model` by `Linear4bit` or `Linear8bit`, in place.

    One layer at a time: a dense weight is freed as soon as it is quantized, so that there are never two copies of the
    model. Which layers those are is transformers' rule (5.23): modules whose class is exactly `nn.Linear`, and its
    Conv1D (GPT-2), whose weight is turned to [out_features, in_features] first. Dense stay, as there and with a warning
    here: subclasses of `nn.Linear` (Falcon's layers, `nn.MultiheadAttention`'s out_proj) and the experts of a mixture
    that are stacked in parameters of three dimensions (Mixtral, Qwen3-MoE). Dense stay without one: embeddings, norms,
    convolutions, routers that are no linear layers, and what `skip_modules` names. Otherwise than there, and with a
    warning, layers stay dense whose weight the model reads by itself (`utils/read_layers.py`).

    Args:
        model: Any module; a transformers model is also marked as quantized, as `from_pretrained` does, so that Trainer
            and `save_pretrained` know. Load it in 16 bits on the CPU to quantize it on a smaller GPU.
        quantization_config: transformers' `BitsAndBytesConfig`, or a dict of its fields; `load_in_4bit` or
            `load_in_8bit` decides. The block size is 64. `llm_int8_threshold` has no effect: activations are not
            rounded to 8 bits, so that there are no outliers to treat otherwise.
        skip_modules: Layers to leave alone, by transformers' rule for `llm_int8_skip_modules` (the beginning of a
            dotted name, a regular expression for it, or its ending). None for the configuration's; if that has none,
            for output embeddings, tied weights and a head at the end. Tied weights are left alone in any case.
        device: Where each layer is quantized, and the model is in the end; None for where it is.
        progress: Show a bar, if tqdm is installed and there are more than a few layers.

    Returns:
        `model`.

    Raises:
        TypeError: `quantization_config` is no such thing, or `model` no module.
        ValueError: A field of it is wrong, the model carries adapters or is quantized already, it has no layer to
            quantize, a layer has hooks (accelerate's, weight_norm's), a weight is on the meta device, empty or of
            another dtype than float32, float16 and bfloat16, its codes do not fit `bnb_4bit_quant_storage`, or it is
            not finite; only in the last case layers before it have been replaced.
    """
    check_is_module("model", model)
    settings = QuantizationSettings.of(quantization_config)
    device = None if device is None else torch.device(device)  # what is none fails here, before anything is changed
    if skip_modules is not None:
        skips = check_patterns("skip_modules", skip_modules)
    else:
        skips = default_skips(model) if settings.skip_modules is None else settings.skip_modules
    skips = skips + [p for p in (getattr(model, "_keep_in_fp32_modules", None) or []) if isinstance(p, str)]
    _check_dense(model)
    names = _layers_to_quantize(model, skips)
    _check_layers(model, [group[0] for group in names], settings)
    for group in with_bar(names, "Quantizing", progress and len(names) > _FEW, unit="layer", disable=False):
        _quantize_layer(model, group, settings, device)
    if device is not None:
        model.to(device)
    _note_left_dense(model, skips)
    _mark(model, settings)
    return model


def _check_dense(model: nn.Module) -> None:
    """Raise for a model that carries adapters or quantized weights."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or hasattr(module, "base_layer"):
            raise ValueError(f"model: {name} carries an adapter: quantize first, then add adapters")
        if weight_of(module) is not None:
            raise ValueError(f"model: {name} is quantized already")


def _layers_to_quantize(model: nn.Module, skips: list[str]) -> list[list[str]]:
    """The names of each layer to quantize: several where one module stands in several places."""
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        alone = name and is_quantizable(module) and len(users.get(id(module.weight), ())) < 2
        if alone and not needs_dense(model, name):
            groups.setdefault(id(module), []).append(name)
    chosen = [group for group in groups.values() if not any(is_skipped(name, skips) for name in group)]
    if not chosen:
        raise ValueError(
            f"model: no nn.Linear or Conv1D to quantize in {type(model).__name__}, with {skips} left alone"
        )
    return chosen


def _check_layers(model: nn.Module, names: list[str], settings: QuantizationSettings) -> None:
    """Raise for what a layer shows before its numbers are read, so that nothing has been replaced by then."""
    for name in names:
        layer = model.get_submodule(name)
        weight: Any = layer.weight
        if weight.is_meta:
            raise ValueError(f"model: {name}.weight is on the meta device (offloaded?): load it on a device first")
        if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
            raise ValueError(f"model: {name} has hooks, which a new layer would not have: remove them first")
        if weight.dtype not in DENSE_DTYPES or not weight.numel():
            raise ValueError(
                f"model: {name}.weight: expected float32, float16 or bfloat16 and at least one element, "
                f"got {weight.dtype} {list(weight.shape)}"
            )
        if settings.bits == 4:
            try:
                check_stores(-(-weight.numel() // 2), settings.quant_storage)
            except ValueError as error:
                raise ValueError(f"model: {name}: {error}") from error


def _quantize_layer(
    model: nn.Module, names: list[str], settings: QuantizationSettings, device: torch.device | str | None
) -> None:
    linear: Any = model.get_submodule(names[0])
    made: Linear4bit | Linear8bit
    try:
        if settings.bits == 4:
            made = Linear4bit.from_linear(
                linear,
                settings.quant_type,
                double_quant=settings.double_quant,
                compute_dtype=settings.compute_dtype,
                quant_storage=settings.quant_storage,
                device=device,
            )
        else:
            made = Linear8bit.from_linear(linear, device=device)
    except ValueError as error:
        raise ValueError(f"model: {names[0]}: {error}") from error
    made.train(linear.training)
    made.requires_grad_(False)
    for name in names:
        model.set_submodule(name, made)


def _note_left_dense(model: nn.Module, skips: list[str]) -> None:
    """Warn of large weights of a kind that is not quantized."""
    stacked = [name for name, p in model.named_parameters() if p.dim() > 2 and "expert" in name]
    left: dict[str, list[str]] = {"stacked experts": stacked}
    for name, module in model.named_modules():
        if is_quantizable(module) and needs_dense(model, name) and not is_skipped(name, skips):
            left.setdefault("layers whose weight the model reads by itself", []).append(name)
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if linear and not is_quantizable(module) and not is_skipped(name, skips):
            of = "nn.Linear" if isinstance(module, nn.Linear) else "Conv1D"
            left.setdefault(f"{type(module).__name__} layers (a subclass of {of})", []).append(name)
    for kind, names in left.items():
        if names:
            warnings.warn(f"quantize_model: {kind} stay dense: {shorten(names, 3)}", stacklevel=3)


def _mark(model: nn.Module, settings: QuantizationSettings) -> None:
    """Mark a transformers model; its configuration names exactly the layers that stayed dense."""
    from peftkern.integrations.quantized_models import bitsandbytes_config, is_transformers_model, mark_quantized

    if not is_transformers_model(model):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    dense = [name for name, module in modules.items() if type(module) is nn.Linear or is_conv1d(module)]
    quantized = [name for name, module in modules.items() if isinstance(module, Linear4bit | Linear8bit)]
    fields = settings.fields | {"llm_int8_skip_modules": exact_skips(dense, quantized)}
    mark_quantized(model, bitsandbytes_config(fields))


# --- saving ----------------------------------------------------------------------------------------------------------


def save_quantized(model: Any, folder: PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Save a quantized transformers model in the layout that transformers reads with bitsandbytes, and we without.

    Written are `config.json` with its `quantization_config`, `model.safetensors` (several and an index above
    `max_shard_size`) and the generation settings; all in a folder beside, then moved, so that a kill leaves the old
    checkpoint, the new one, or none (see `replacing_checkpoint`). Other files in `folder` are left.

    Args:
        model: From `quantize_model`, `load_quantized`, or `from_pretrained` with bitsandbytes.
        folder: Where to; made if missing.
        max_shard_size: Bytes in a file, or text like "5GB".

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: It is not quantized, or carries adapters.
        OSError: It cannot be written; the old checkpoint is then as it was.
    """
    from peftkern.integrations.quantized_models import is_transformers_model

    if not is_transformers_model(model):
        raise TypeError(
            f"model: expected a transformers model, got {type(model).__name__}; of another module save state_dict()"
        )
    if any(isinstance(module, BaseTunerLayer) or hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("model: it carries adapters: save those by their save_pretrained, and the base after unload()")
    # Asking each for its weight also undoes bitsandbytes' repacking for the CPU, which it saves wrongly.
    if not [module for module in model.modules() if weight_of(module) is not None]:
        raise ValueError(
            "model: no layer of it is quantized: call peftkern.quantize_model first, or its save_pretrained"
        )
    if getattr(model.config, "quantization_config", None) is None:
        raise ValueError("model: its config has no quantization_config: quantize it by peftkern.quantize_model")
    with replacing_checkpoint(folder) as staging:
        # Under the model's own names: transformers 5.23 cannot go back to those of an older checkpoint where quantized
        # tensors were read from one.
        try:
            model.save_pretrained(staging, max_shard_size=max_shard_size, save_original_format=False)
        except (OSError, SafetensorError) as error:  # a full disk, mostly, which neither says
            raise OSError(f"{os.fspath(folder)}: {error}") from error


# --- loading ---------------------------------------------------------------------------------------------------------


def load_quantized(
    path_or_id: PathLike,
    model_class: Any = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Any:
    """Load a transformers model whose checkpoint bitsandbytes quantized, without bitsandbytes.

    The model is built without memory for its weights; each is read once, straight to `device`.

    Args:
        path_or_id: A folder, or the id of a repository on the Hub.
        model_class: A model class or auto class of transformers; None for the one that `config.json` names.
        device: Where the model is put.
        dtype: Of what is not quantized; the configuration's if None.
        attn_implementation, trust_remote_code: As for `from_pretrained`.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir`.

    Returns:
        The model in eval mode, marked as quantized (see `quantize_model`).

    Raises:
        QuantizedFileError: The checkpoint is dense or quantized by another method, a file of it is missing or damaged,
            or a tensor is missing, has the wrong shape or dtype, or does not fit the format; it names file and key.
        TypeError: An option is unknown, `model_class` is no class, or `dtype` none of floats.
        ValueError: `device` is none that tensors can be read to.

    Warns:
        UserWarning: Tensors that the model has no place for; tensors that hold NaN or Inf; each by name.
    """
    from peftkern.integrations import quantized_models as hf

    unknown = sorted(set(hub_kwargs) - set(_HUB_OPTIONS))
    if unknown:
        raise TypeError(f"load_quantized: unknown option {unknown[0]!r}; the Hub's are {', '.join(_HUB_OPTIONS)}")
    hub_kwargs = {name: value for name, value in hub_kwargs.items() if value is not None}
    # What is wrong with these is not to be blamed on the checkpoint's files.
    if model_class is not None and not isinstance(model_class, type):
        raise TypeError(f"model_class: expected a class of transformers, got {model_class!r}")
    kind = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if kind is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise TypeError(f"dtype: expected a dtype of floats or None, got {dtype!r}")
    device = readable_to(device)
    source = os.fspath(path_or_id)
    settings = _settings_of(source, hub_kwargs)
    checkpoint = Checkpoint(source, device, **hub_kwargs)
    groups = quantized_prefixes(checkpoint)
    if not groups:
        raise QuantizedFileError(source, f"no quantized weight is in it; {_DENSE_ADVICE}")
    _check_plausible(source, len(checkpoint), hub_kwargs)
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    model = hf.build_without_weights(source, model_class, dtype, hub_kwargs, options)
    places = _Places(model, hf.name_in_model(model))
    taken: set[str] = set()
    for prefix, keys in groups.items():
        _load_quantized_layer(model, checkpoint, prefix, keys, places.module(prefix), settings)
        taken.update(keys)
    loaded, unexpected = _load_dense(model, checkpoint, [key for key in checkpoint if key not in taken], places)
    _check_complete(model, source, loaded, unexpected)
    model.to(device)
    hf.mark_quantized(model, hf.bitsandbytes_config(settings.fields))
    hf.load_generation_config(model, source, hub_kwargs)
    return model.eval()


_DENSE_ADVICE = "load a dense checkpoint by transformers' from_pretrained, and give it to peftkern.quantize_model"


# How configurations call the number of layers.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


_WIDTHS = ("hidden_size", "head_dim", "n_embd", "d_model")
_WIDEST = 2**20


def _check_plausible(source: str, tensors: int, hub_kwargs: dict[str, Any]) -> None:
    """Raise if `config.json` claims more layers than the checkpoint has tensors, which would take for ever to build, or
    widths for which the tables that a model computes in its making (of rotary embeddings) would take all memory."""
    path, config = read_model_config(source, **hub_kwargs)
    for fields in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in _LAYERS:
            count = fields.get(name)
            if type(count) is int and count > tensors:
                reason = f"expected at most the number of tensors in the checkpoint, {tensors}, got {shown(count)}"
                raise QuantizedFileError(path, reason, name)
        for name in _WIDTHS:
            width = fields.get(name)
            if type(width) is int and width > _WIDEST:
                raise QuantizedFileError(path, f"expected at most {_WIDEST}, got {shown(width)}", name)


def _settings_of(source: str, hub_kwargs: dict[str, Any]) -> QuantizationSettings:
    """The `quantization_config` of the checkpoint's `config.json`."""
    path, config = read_model_config(source, **hub_kwargs)
    said = config.get("quantization_config")
    if said is None:
        raise QuantizedFileError(path, f"the checkpoint is not quantized; {_DENSE_ADVICE}", "quantization_config")
    if not isinstance(said, dict):
        raise QuantizedFileError(path, f"expected an object, got {type(said).__name__}", "quantization_config")
    # Old files do not name the method.
    method = said.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        reason = f"the checkpoint was quantized by {method!r}, expected 'bitsandbytes'"
        raise QuantizedFileError(path, reason, "quantization_config")
    try:
        return QuantizationSettings.of(said)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: quantization_config: {error}") from error
    except (TypeError, ValueError) as error:
        raise QuantizedFileError(path, str(error), "quantization_config") from error


class _Places:
    """Where names of a checkpoint belong in a model: under the same name, or with the prefix that a base model has in
    a model with a head ("model.") put before or taken off, or where `renamed` says, likewise."""

    def __init__(self, model: Any, renamed: Callable[[str], str]) -> None:
        self._renamed = renamed
        self._base = f"{getattr(model, 'base_model_prefix', '')}."
        self._modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self.tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        persistent = set(model.state_dict())
        self.tensors |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in persistent}

    def module(self, prefix: str) -> str | None:
        names = (key.removesuffix("weight").removesuffix(".") for key in self._choices(prefix + "weight"))
        return next((name for name in names if name in self._modules), None)

    def tensor(self, key: str) -> str | None:
        return next((name for name in self._choices(key) if name in self.tensors), None)

    def _choices(self, key: str) -> Iterator[str]:
        for name in dict.fromkeys((key, self._renamed(key))):
            yield from (name, self._base + name, name.removeprefix(self._base))


def _load_quantized_layer(
    model: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    keys: list[str],
    name: str | None,
    settings: QuantizationSettings,
) -> None:
    key = prefix + "weight"
    file = checkpoint.file_of(key)
    layer: Any = None if name is None else model.get_submodule(name)
    if layer is None or not is_quantizable(layer):
        found = f"has no {prefix.removesuffix('.')!r}" if layer is None else f"has a {type(layer).__name__} there"
        raise QuantizedFileError(
            file, f"a quantized weight for a linear layer, but {type(model).__name__} {found}", key
        )
    weight = read_quantized(checkpoint, prefix, file=file, dtype=layer.weight.dtype)
    foreign = sorted(set(keys) - set(keys_of(weight, prefix)))
    if foreign:
        kind = "4-bit" if isinstance(weight, Weight4bit) else "8-bit"
        raise QuantizedFileError(file, f"it belongs to no {kind} weight, as {key!r} is", foreign[0])
    expected = tuple(rows_of(layer).shape)
    if tuple(weight.shape) != expected:
        reason = f"its shape is {list(weight.shape)}, {type(model).__name__} expects {list(expected)}"
        raise QuantizedFileError(file, reason, key)
    made: Linear4bit | Linear8bit
    if isinstance(weight, Weight4bit):
        storage = checkpoint[key].dtype
        made = Linear4bit.from_weight(weight, layer.bias, compute_dtype=settings.compute_dtype, quant_storage=storage)
    else:
        made = Linear8bit.from_weight(weight, layer.bias)
    made.source_cls = type(layer)
    made.requires_grad_(False)
    model.set_submodule(str(name), made)


def _load_dense(model: Any, checkpoint: Checkpoint, keys: list[str], places: _Places) -> tuple[set[str], list[str]]:
    """Put the other tensors into the model; return the names that got one, and the keys that have no place."""
    from peftkern.integrations.quantized_models import conversions

    in_fp32 = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if model.dtype == torch.float16:  # transformers keeps these wide for float16's range alone
        in_fp32 |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    loaded, unexpected, not_finite = set(), [], []

    def put(called: str, read: Callable[[], torch.Tensor], key: str) -> None:
        """Put what `read` gives, which comes from `key`, where the model has what is `called` so."""
        name = places.tensor(called)
        if name is None:
            unexpected.append(key)
            return
        value = read()
        _put_dense(model, name, places.tensors[name], value, in_fp32, (checkpoint.file_of(key), key))
        loaded.add(name)
        if value.is_floating_point() and not all_finite(value):
            not_finite.append(called)

    converted: set[str] = set()
    for group in conversions(model, keys, lambda name: places.tensor(name) is not None):
        members = [key for of_pattern in group.keys.values() for key in of_pattern]
        try:
            made = group.tensors(model, checkpoint.__getitem__)
        except QuantizedFileError:
            raise
        except ValueError as error:
            raise QuantizedFileError(checkpoint.file_of(members[0]), str(error), members[0]) from error
        for name in list(made):
            put(name, functools.partial(made.pop, name), members[0])
        converted.update(members)
    for key in keys:
        if key not in converted:
            put(key, functools.partial(checkpoint.__getitem__, key), key)
    if not_finite:
        warnings.warn(f"{checkpoint.file_of(not_finite[0])}: NaN or Inf in {shorten(not_finite)}.", stacklevel=3)
    return loaded, unexpected


def _put_dense(
    model: Any, name: str, target: torch.Tensor, value: torch.Tensor, in_fp32: set[str], source: tuple[str, str]
) -> None:
    """Put `value`, read from the file and under the key of `source`, in the place of the tensor `target`."""
    if value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
        reason = f"it is {value.dtype} {list(value.shape)}, expected {target.dtype} {list(target.shape)}"
        raise QuantizedFileError(source[0], reason, source[1])
    wide = value.is_floating_point() and not in_fp32.isdisjoint(name.split("."))
    value = value.to(torch.float32 if wide else target.dtype).contiguous()
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(target, nn.Parameter):
        trains = target.requires_grad and value.is_floating_point()
        module._parameters[attribute] = nn.Parameter(value, requires_grad=trains)
    else:
        module._buffers[attribute] = value


def _check_complete(model: Any, source: str, loaded: set[str], unexpected: list[str]) -> None:
    """Tie what is tied, and raise if a weight has not come."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    unexpected = [key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)]
    quantized = {name for name, module in model.named_modules() if weight_of(module) is not None}
    of_layers = {key for name in quantized for key in quantized_keys(f"{name}.")}
    expected = [name for name in model.state_dict() if name not in of_layers]
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if hasattr(model, "tie_weights"):
        _untie_from_missing(model, tied, loaded)
        model.tie_weights()
    come = loaded | {target for target, source_name in tied.items() if source_name in loaded}
    missing = [name for name in expected if name not in come]
    if missing:
        found = f"; it has no place for {shorten(unexpected, 3)}" if unexpected else ""
        raise QuantizedFileError(source, f"{len(missing)} tensors are missing: {shorten(missing)}{found}", missing[0])
    if unexpected:
        warnings.warn(f"{source}: no place in the model for {shorten(unexpected)}; left out", stacklevel=3)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__}: buffers {shorten(left)} are made by torch.empty and in no file")


def _untie_from_missing(model: Any, tied: dict[str, str], loaded: set[str]) -> None:
    """Where a file has a tied weight under its other name, give it to the one that the rest is tied to."""
    for target, source_name in tied.items():
        if source_name not in loaded and target in loaded:
            holder, _, attribute = source_name.rpartition(".")
            model.get_submodule(holder)._parameters[attribute] = model.get_parameter(target)
            loaded.add(source_name)
