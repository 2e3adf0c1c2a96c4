"""An adapter's state dict out of a model and into one, in PEFT's names; every check comes before the first write."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from peftkern.config import PeftConfig
from peftkern.tuners.adalora import files as adalora_files
from peftkern.tuners.prompt_learning.encoder import PROMPT_KEY
from peftkern.tuners.prompt_learning.files import check_prompt_tensors
from peftkern.tuners.tuner_layer import is_tuned
from peftkern.utils.adapter_error import AdapterFileError, shorten, shown
from peftkern.utils.adapter_files import PathLike, read_weights, weights_file
from peftkern.utils.adapter_keys import (
    MAGNITUDE,
    adapter_key_map,
    base_bias_keys,
    embedding_is_targeted,
    embedding_key_map,
    prompt_encoder_of,
    tied_rows_key_map,
)
from peftkern.utils.constants import PREFIX
from peftkern.utils.expert_files import stack_experts
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.module_tree import modules_of
from peftkern.utils.peft_types import PeftType

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# What a layer has once beside its pair: DoRA's magnitudes, AdaLoRA's singular values.
_BESIDE_PAIRS = (MAGNITUDE, "lora_E")
# A rank that no tensor of a file has is believed up to here, or up to the file's largest dimension.
_PLAUSIBLE_RANK = 4096
# What says how a base model is loaded. Code for PEFT gives it beside the adapter too, where PEFT places an offloaded
# base anew by it (adapters here join that one as it is), or does not use it (torch_dtype).
_OF_THE_BASE = frozenset(("torch_dtype", "dtype", "device_map", "max_memory", "trust_remote_code", "use_safetensors"))
_OF_THE_BASE |= {"offload_folder", "offload_dir", "offload_index"}
_PAIR_KEY = re.compile(r"(?P<module>.*)\.(?P<name>lora_(?:embedding_)?[AB])(?P<rest>\.weight|)")


# --- out of a model --------------------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, by the names that they have in `adapter_model.safetensors`.

    Args:
        model: A `PeftModel`, or a model with `peft_config` that adapters were injected into; not the DDP or FSDP1
            wrapper.
        state_dict: The state dict of `model` to select from; by default `model.state_dict()`. FSDP's gathered state
            dict goes here: on the ranks where it is empty, so is the result.
        adapter_name: Whose tensors.
        unwrap_compiled: Look inside the wrapper that `torch.compile` made.
        save_embedding_layers: Include the input and output embeddings. "auto": if the adapter targets them or the
            vocabulary was resized.

    Returns:
        Names without the adapter's name -> tensors; they share memory with the model. A DTensor is gathered, which
        every rank of its mesh must take part in.

    Raises:
        ValueError: No adapter of that name.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = _config_of(model, adapter_name)
    state = model.state_dict() if state_dict is None else state_dict
    wanted = adapter_key_map(model, adapter_name) | tied_rows_key_map(model, adapter_name)
    base = {key: key for key in base_bias_keys(model, config)}
    base |= _embeddings_to_save(model, config, save_embedding_layers, adapter_name)
    # The adapter's copy of a module (modules_to_save) has the name of the base model's.
    wanted |= {saved: held for saved, held in base.items() if saved not in wanted}
    tensors = {saved: _full(state[held]) for saved, held in wanted.items() if held in state}
    encoder = prompt_encoder_of(model, adapter_name)
    if encoder is not None and encoder.is_computed:  # what comes out of its layers, not what goes in
        tensors[PROMPT_KEY] = encoder.to_save()
    return adalora_files.pruned(tensors, config, adapter_name) if config.peft_type == PeftType.ADALORA else tensors


def config_to_save(config: PeftConfig, base: nn.Module) -> dict[str, Any]:
    """The content of `adapter_config.json` for an adapter of the model `base`."""
    content = config.to_json_dict() | {"inference_mode": True}
    if content["base_model_name_or_path"] is None:
        content["base_model_name_or_path"] = base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        content["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return content


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor; a copy of one that is part of a pool, whose memory other adapters share: it would change
    when another takes the place, and torch.save would write the whole pool."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if type(tensor) is torch.Tensor and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def _embeddings_to_save(
    model: nn.Module, config: Any, choice: bool | Literal["auto"], adapter_name: str
) -> dict[str, str]:
    """The embeddings' weights that are saved along, under PEFT's rules for `save_embedding_layers`: file -> model."""
    if choice not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers: expected True, False or 'auto', got {choice!r}")
    targeted = embedding_is_targeted(model, config)
    if choice == "auto":
        # Who trains single rows does not want the matrix in the file.
        trains_rows = config.peft_type == PeftType.TRAINABLE_TOKENS
        choice = targeted and not trains_rows and getattr(config, "trainable_token_indices", None) is None
        if choice:
            warnings.warn("save_embedding_layers: set to True, target_modules name an embedding.", stacklevel=3)
        elif _vocabulary_was_resized(model, config):
            warnings.warn("save_embedding_layers: set to True, the vocabulary was resized.", stacklevel=3)
            choice = True
    if choice and not hasattr(model, "get_input_embeddings"):
        warnings.warn("save_embedding_layers: the model has no get_input_embeddings, none saved.", stacklevel=3)
    return embedding_key_map(model, targeted, adapter_name) if choice else {}


def _vocabulary_was_resized(model: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that in the base model's own `config.json`, where that can be read."""
    model_config = getattr(model, "config", None)
    vocab_size, base = getattr(model_config, "vocab_size", None), config.base_model_name_or_path
    if not vocab_size or not base:
        return False
    exists: bool | None = os.path.exists(os.path.join(base, "config.json"))
    if not exists:
        from peftkern.utils.hub import file_exists_on_hub

        exists = file_exists_on_hub(base, "config.json")
    if exists is None:
        text = f"Could not find a config file in {base} - will assume that the vocabulary was not modified."
        warnings.warn(text, stacklevel=4)
    return bool(exists) and vocab_size != type(model_config).from_pretrained(base).vocab_size


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    """The configuration of an adapter of `model`."""
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: no adapter {adapter_name!r}; there are {sorted(configs)}")
    return configs[adapter_name]


# --- into a model ----------------------------------------------------------------------------------------------------


class LoadPlan(NamedTuple):
    """What loading a state dict would do; nothing is written yet."""

    tensors: dict[str, torch.Tensor]  # by the name in model.state_dict()
    missing: list[str]  # names in model.state_dict() of this adapter's tensors that the file lacks
    unexpected: list[str]  # names in the file that the model has no place for
    keys: dict[str, str]  # names in model.state_dict() -> names in the file
    held: dict[str, torch.Tensor]  # model.state_dict()


def plan_load(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    *,
    source: PathLike = "state_dict",
    ignore_mismatched_sizes: bool = False,
) -> LoadPlan:
    """Match `state_dict` against the adapter that `model` holds.

    Raises:
        TypeError: `state_dict` is no mapping of strings.
        AdapterFileError: A value is no dense tensor with values; a shape or kind of dtype differs; an adapted layer has
            one factor of its pair only; no tensor of the adapter is in the file; or names are missing *and* others
            unknown, so that some were changed.

    Warns:
        UserWarning: Shapes that differ, with `ignore_mismatched_sizes`; biases of the base model that the adapter's
            `bias` does not name.
    """
    config = _config_of(model, adapter_name)
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        got = f"{type(state_dict).__name__} of {shorten(list(state_dict), 1)}" if state_dict else shown(state_dict)
        raise TypeError(f"state_dict: expected a dict of names to tensors, got {got}")
    adapter = adapter_key_map(model, adapter_name)
    embeddings = embedding_key_map(model, False, adapter_name) | embedding_key_map(model, True, adapter_name)
    places = {held: held for held in embeddings.values()} | embeddings  # PEFT's name for one with copies is the first
    places |= {key: key for key in base_bias_keys(model, config)} | adapter | tied_rows_key_map(model, adapter_name)
    wrapped = any(key.startswith(PREFIX) for key in places)
    if not wrapped:  # adapters injected into a bare model: the file's names still carry the prefix
        state_dict = {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
    state_dict = stack_experts(model, state_dict, adapter_name, source)
    encoder = prompt_encoder_of(model, adapter_name)
    if encoder is not None:
        encoder.check_can_load()
    held = model.state_dict()
    tensors, mismatched = {}, []
    for key, value in state_dict.items():
        if key not in places:
            continue
        target = held[places[key]]
        if not isinstance(value, torch.Tensor):
            raise AdapterFileError(source, f"expected a tensor, got {type(value).__name__}", key=key)
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            held_as = "on the meta device" if value.is_meta else "nested" if value.is_nested else value.layout
            raise AdapterFileError(source, f"expected a dense tensor with values, got one that is {held_as}", key=key)
        if value.is_floating_point() != target.is_floating_point() or value.is_complex():
            raise AdapterFileError(source, f"its dtype is {value.dtype}, expected one like {target.dtype}", key=key)
        if value.shape != target.shape:
            text = f"its shape is {list(value.shape)}, the model expects {list(target.shape)}"
            if not ignore_mismatched_sizes:
                raise AdapterFileError(source, text, key=key)
            mismatched.append(f"{key}: {text}")
        else:
            tensors[places[key]] = value
    if mismatched:
        warnings.warn(f"{source}: not loaded (ignore_mismatched_sizes): {'; '.join(mismatched)}", stacklevel=2)
    missing = [key for key in adapter if key not in state_dict]
    unexpected = [key for key in state_dict if key not in places]
    biases = [key for key in unexpected if key.endswith("bias") and key in held]
    if biases:
        own = getattr(config, "bias", "none")
        text = f"biases of the base model, in which this adapter (bias={own!r}) has no part, not loaded"
        warnings.warn(f"{source}: {text}: {shorten(biases, 3)}.", stacklevel=3)
    _refuse_holes(source, adapter, missing, unexpected)
    keys = {held: saved for saved, held in places.items()}
    return LoadPlan(tensors, [adapter[key] for key in missing], unexpected, keys, held)


def _refuse_holes(source: PathLike, adapter: dict[str, str], missing: list[str], unexpected: list[str]) -> None:
    """Raise unless whole layers are absent and nothing else (PEFT's own way to save part of a model)."""
    if not missing:
        return
    if len(missing) == len(adapter):
        reason = f"no tensor of this adapter is in it: expected {shorten(missing, 3)}; found {shorten(unexpected, 3)}"
        raise AdapterFileError(source, reason)
    absent = set(missing)
    for key in missing:
        layer = key.removesuffix(".bias")
        if layer != key and layer.endswith(".lora_B") and f"{layer}.weight" in absent:
            continue  # lora_bias, of a layer that is absent
        module, _, own = key.rpartition(".")
        if own in _BESIDE_PAIRS:
            if any(f"{module}.{name}" in absent for name in ("lora_A.weight", "lora_embedding_A", "lora_A")):
                continue  # whose partners are looked at by themselves
            raise AdapterFileError(source, "the tensor is missing, while lora_A and lora_B are there", key=key)
        match = _PAIR_KEY.fullmatch(key)
        if match is None:
            raise AdapterFileError(source, f"the tensor is missing; unknown names: {shorten(unexpected)}", key=key)
        for own in _BESIDE_PAIRS:
            beside = f"{match['module']}.{own}"
            if beside in adapter and beside not in absent:
                raise AdapterFileError(source, f"the tensor is missing, while {own} is there", key=key)
        other = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}[match["name"]]
        if f"{match['module']}.{other}{match['rest']}" not in absent:
            raise AdapterFileError(source, f"the tensor is missing, while its partner {other} is there", key=key)
    if unexpected:
        raise AdapterFileError(
            source, f"names are missing: {shorten(missing)}; and others unknown: {shorten(unexpected)}", key=missing[0]
        )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    source: PathLike = "state_dict",
) -> _IncompatibleKeys:
    """Load the tensors of an adapter's file into the adapter `adapter_name` of `model`, which must be there already.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        peft_model_state_dict: As `get_peft_model_state_dict` returns it.
        adapter_name: Where to; need not be the name under which it was saved.
        ignore_mismatched_sizes: Leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: Parameters of the adapter are on the meta device: take the given tensors in their place, in
            the dtypes that those have.
        source: The file's name, for messages.

    Returns:
        `missing_keys`, this adapter's names in the model that were not given (whole layers only), and
        `unexpected_keys`.

    Raises:
        ValueError: As `plan_load`; nothing was written.

    Warns:
        UserWarning: Values that are Inf in the adapter's dtype and were not in theirs, by name; and as `plan_load`.
    """
    config = _config_of(model, adapter_name)
    is_cut = config.peft_type == PeftType.ADALORA and config.rank_pattern and isinstance(peft_model_state_dict, Mapping)
    with restored_on_error(model) if is_cut else contextlib.nullcontext():
        if is_cut:
            adalora_files.fit_to_pattern(model, peft_model_state_dict, adapter_name, config, source)
        plan = plan_load(
            model, peft_model_state_dict, adapter_name, source=source, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
    tensors = plan.tensors
    if low_cpu_mem_usage:
        # In the dtypes that were settled when they were made. What has values (copies of modules, biases, embeddings,
        # which may be tied) is written to as ever.
        empty = {key: held for key, held in plan.held.items() if held.is_meta and key in tensors}
        taken = {key: tensors[key].to(held.dtype) for key, held in empty.items()}
        model.load_state_dict(taken, strict=False, assign=True)
        for module in modules_of(model):
            if is_tuned(module):
                module._move_adapter_to_device_of_base_layer(adapter_name, keep_dtype=True)
                module._fill_adapter(adapter_name, config)
        tensors = {key: value for key, value in tensors.items() if key not in taken}
    model.load_state_dict(tensors, strict=False)
    _warn_of_overflow(plan, model.state_dict() if low_cpu_mem_usage else plan.held, source)
    return _IncompatibleKeys(plan.missing, plan.unexpected)


def _warn_of_overflow(plan: LoadPlan, held: Mapping[str, torch.Tensor], source: PathLike) -> None:
    """Warn, as of a file's own NaN and Inf, of values that became Inf in the dtype in which the model's state dict,
    `held`, has them now."""
    bad = {}
    for key, value in plan.tensors.items():
        now = held[key]
        if value.dtype == now.dtype or not value.is_floating_point() or now.is_meta:
            continue
        narrower = torch.finfo(value.dtype).max > torch.finfo(now.dtype).max
        if narrower and bool((value.isfinite().to(now.device) & now.isinf()).any()):
            bad[plan.keys[key]] = now.dtype
    if bad:
        dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in bad.values()}))
        warnings.warn(
            f"{source}: too large for the adapter's {dtypes}, loaded as Inf: {shorten(list(bad))}.", stacklevel=3
        )


# --- files -----------------------------------------------------------------------------------------------------------


def load_config(model_id: PathLike, **hub_kwargs: Any) -> PeftConfig:
    """Read the configuration of the adapter at `model_id` as the class that its `peft_type` names.

    Raises:
        AdapterFileError: The file is missing or damaged, `peft_type` is missing or unknown, or a field is wrong.
        NotImplementedError: It asks for what is not built here, by the field's name.
    """
    return cast(PeftConfig, PeftConfig.from_pretrained(model_id, **hub_kwargs))


def load_peft_weights(
    model_id: PathLike,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Read the tensors of the adapter at `model_id`, a folder or a Hub repository.

    Args:
        model_id: The folder or the repository's id.
        device: Where the tensors are put; the CPU by default.
        key_mapping: Regular expression -> replacement, applied to names without `base_model.model.`; the first that
            matches a name is used.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token` and the like.

    Raises:
        AdapterFileError: As `read_weights`, or two names became one by `key_mapping`.
        ValueError: As `read_weights`.
    """
    tensors = read_weights(model_id, device="cpu" if device is None else device, **hf_hub_download_kwargs)
    if not key_mapping:
        return tensors
    mapped: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        prefix = PREFIX if key.startswith(PREFIX) else ""
        name = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        if prefix + name in mapped:
            file = weights_file(model_id, **hf_hub_download_kwargs)
            raise AdapterFileError(file, f"key_mapping gives two tensors the name {prefix + name!r}", key=key)
        mapped[prefix + name] = value
    return mapped


def check_lora_tensors(source: PathLike, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """Check what a LoRA file says by itself, before any model is touched: pairs, dimensions, ranks, dtypes, magnitudes.

    Raises:
        AdapterFileError: A factor is not a floating-point matrix, lacks its partner, or has a rank that neither `r` nor
            `rank_pattern` gives; or one of those, which a layer that the file lacks would be given, is implausible; or
            DoRA's magnitudes are not there where `use_dora` says so, and only there, a vector beside each pair.
    """
    ranks = {config.r, *config.rank_pattern.values()}
    found: dict[tuple[str, str, str], torch.Tensor] = {}
    for key, value in tensors.items():
        match = _PAIR_KEY.fullmatch(key)
        if match is None:
            continue
        if not value.is_floating_point():
            raise AdapterFileError(source, f"expected floating point, got {value.dtype}", key=key)
        if value.dim() < 2 or 0 in value.shape:
            text = f"expected a matrix, got shape {list(value.shape)}: was a sharded model saved without gathering?"
            raise AdapterFileError(source, text, key=key)
        is_A = match["name"].endswith("A")
        rank = value.shape[0 if is_A else 1]
        # The factors of a stack of matrices (target_parameters) hold the rank rows of each, however many there are.
        stacked = bool(config.target_parameters) and any(rank % r == 0 for r in ranks)
        # B of a convolution with groups has the part of the rank that one of them has.
        stacked |= value.dim() > 2 and not is_A and any(r % rank == 0 for r in ranks)
        if rank not in ranks and not stacked:
            text = f"its rank is {rank} (shape {list(value.shape)}), adapter_config.json says {sorted(ranks)}"
            raise AdapterFileError(source, text, key=key)
        found[match["module"], match["name"], match["rest"]] = value
    largest = max([_PLAUSIBLE_RANK, *(size for value in found.values() for size in value.shape)])
    if max(ranks) > largest:
        text = f"adapter_config.json asks for rank {max(ranks)}, but nothing in it is larger than {largest}"
        raise AdapterFileError(source, text)
    for module, name, rest in found:
        for first, second in _PAIRS:
            other = {first: second, second: first}.get(name)
            if other is None:
                continue
            key = f"{module}.{name}{rest}"
            if (module, other, rest) not in found:
                raise AdapterFileError(source, f"its partner {other} is missing", key=key)
            a, b = found[module, first, rest], found[module, second, rest]
            if a.shape[0] != b.shape[1] and (a.dim() == 2 or a.shape[0] % b.shape[1]):
                text = f"shapes {list(a.shape)} and {list(b.shape)} of {first} and {second} differ in rank"
                raise AdapterFileError(source, text, key=key)
    _check_magnitudes(source, tensors, found, config)


def _check_magnitudes(source: PathLike, tensors: Mapping[str, torch.Tensor], factors: Any, config: Any) -> None:
    """DoRA's part of `check_lora_tensors`; `factors` by (module, name, rest) have been found to be pairs."""
    rows = {module: value.shape[0] for (module, name, _), value in factors.items() if name.endswith("B")}
    for key, value in tensors.items():
        module = key.removesuffix(f".{MAGNITUDE}")
        if module == key:
            continue
        if not config.use_dora:
            raise AdapterFileError(source, "a magnitude of DoRA, but adapter_config.json has no use_dora", key=key)
        if module not in rows:
            raise AdapterFileError(source, "its lora_A and lora_B are missing", key=key)
        if not value.is_floating_point():
            raise AdapterFileError(source, f"expected floating point, got {value.dtype}", key=key)
        if value.shape not in ((rows[module],), (1, rows[module], *(1,) * (value.dim() - 2))):
            text = f"its shape is {list(value.shape)}, expected [{rows[module]}], a number for each row of lora_B"
            raise AdapterFileError(source, text, key=key)
    for module in rows if config.use_dora else ():
        if f"{module}.{MAGNITUDE}" not in tensors:
            text = "the tensor is missing, which use_dora of adapter_config.json asks for"
            raise AdapterFileError(source, text, key=f"{module}.{MAGNITUDE}")


def read_adapter(
    model_id: PathLike,
    config: PeftConfig,
    key_mapping: Mapping[str, str] | None,
    ephemeral_gpu_offload: bool,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and check the weight file; return it and the options for `set_peft_model_state_dict`."""
    if ephemeral_gpu_offload:
        raise NotImplementedError("ephemeral_gpu_offload is not built")
    device = options.pop("torch_device", None)
    of_the_base = sorted(_OF_THE_BASE.intersection(options))
    if of_the_base:
        warnings.warn(
            f"{', '.join(of_the_base)}: no effect here. The base model stays on its devices and in its dtype, and the "
            "adapter joins it there: in float32 at least, unless autocast_adapter_dtype=False.",
            stacklevel=3,
        )
    options = {name: value for name, value in options.items() if name not in _OF_THE_BASE}
    unknown = sorted(set(options) - {"ignore_mismatched_sizes"})
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    tensors = load_peft_weights(model_id, device=device, key_mapping=key_mapping, **hub)
    if config.peft_type == PeftType.LORA:
        check_lora_tensors(weights_file(model_id, **hub), tensors, config)
    elif config.is_prompt_learning:
        check_prompt_tensors(weights_file(model_id, **hub), tensors, config)
    elif config.peft_type == PeftType.ADALORA:
        adalora_files.check_tensors(weights_file(model_id, **hub), tensors, config)
    return tensors, options
