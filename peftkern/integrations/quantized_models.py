"""Quantized models of transformers: build one without memory for its weights, mark one as transformers marks its own.

Imported lazily. bitsandbytes need not be installed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from peftkern.integrations.extras import require
from peftkern.utils.adapter_error import shown
from peftkern.utils.checkpoint_files import CONFIG, read_json
from peftkern.utils.quantized_files import QuantizedFileError
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit

_GENERATION = "generation_config.json"


def bitsandbytes_config(fields: dict[str, Any]) -> Any:
    """transformers' `BitsAndBytesConfig` with these fields."""
    from transformers import BitsAndBytesConfig

    known = {name: value for name, value in fields.items() if name != "quant_method" and not name.startswith("_")}
    return BitsAndBytesConfig(**known)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model, or anything else that is configured and saved as one."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained") and hasattr(model.config, "to_dict")


def mark_quantized(model: Any, config: Any) -> None:
    """Set what `from_pretrained` sets on a model that bitsandbytes quantized, so that Trainer, TRL, accelerate and
    `save_pretrained` treat it as one.

    Args:
        model: A transformers model that holds our `Linear4bit` or `Linear8bit`.
        config: A `BitsAndBytesConfig`.
    """
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    setattr(model, "is_loaded_in_4bit" if config.load_in_4bit else "is_loaded_in_8bit", True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    # transformers' own imports bitsandbytes for a 4-bit model, and Trainer calls it in every step.
    model.num_parameters = types.MethodType(num_parameters, model)


def num_parameters(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """How many parameters there are, a quantized weight counted as the matrix that it stands for."""
    quantized = {id(m.weight): m for m in self.modules() if isinstance(m, Linear4bit | Linear8bit)}
    left_out = set()
    if exclude_embeddings:
        left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
    total = 0
    for parameter in self.parameters():
        if id(parameter) in left_out or (only_trainable and not parameter.requires_grad):
            continue
        layer: Any = quantized.get(id(parameter))
        total += parameter.numel() if layer is None else layer.in_features * layer.out_features
    return total


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives tensors of the meta device: weights that are about to be loaded take no memory and no time,
    while everything that a model computes in its making (rotary tables, masks) is real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and "out" not in kwargs:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_weights(
    source: str,
    model_class: Any,
    dtype: torch.dtype | None,
    hub_kwargs: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """The model that `config.json` of `source` describes; its weights are on the meta device, small ones may be real.

    Args:
        source: A folder or the id of a repository.
        model_class: A model or auto class of transformers; None for the one that `architectures` names.
        dtype: Of the weights; the configuration's if None.
        hub_kwargs: For the Hub.
        options: `attn_implementation`, `trust_remote_code`.

    Raises:
        ImportError: transformers is not installed.
        QuantizedFileError: transformers makes no model of `config.json`; or no class is given, and it names none that
            transformers has.
    """
    transformers: Any = require("transformers", "load_quantized")
    trust = bool(options.get("trust_remote_code", False))
    path = os.path.join(source, hub_kwargs.get("subfolder") or "", CONFIG)
    with _blamed_on(path):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust, **hub_kwargs)
    if model_class is None:
        names = getattr(config, "architectures", None) or []
        known = [getattr(transformers, str(n), None) for n in names] if isinstance(names, list) else []
        model_class = next((c for c in known if c is not None), None)
        if model_class is None:
            reason = f"transformers does not have {shown(names)}; pass model_class, AutoModelForCausalLM for one"
            raise QuantizedFileError(path, reason, "architectures")
    with _blamed_on(path):
        return _make_without_weights(source, model_class, config, dtype, options | {"trust_remote_code": trust})


@contextlib.contextmanager
def _blamed_on(path: str) -> Iterator[None]:
    """Turn what transformers raises, whatever a value led it to, into an error that names the file."""
    try:
        yield
    except (OSError, ImportError, MemoryError):  # the Hub's; a package that the model's class needs
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantizedFileError(path, f"transformers cannot use it: {reason}") from error


def _make_without_weights(
    source: str, model_class: Any, config: Any, dtype: torch.dtype | None, options: dict[str, Any]
) -> Any:
    more: dict[str, Any] = {}
    if options.get("attn_implementation") is not None:
        more["attn_implementation"] = options["attn_implementation"]
    more["dtype"] = (config.dtype or torch.get_default_dtype()) if dtype is None else dtype
    with _EmptyOnMeta():
        if hasattr(model_class, "from_config"):
            model = model_class.from_config(config, trust_remote_code=options["trust_remote_code"], **more)
        else:
            model = model_class._from_config(config, **more)
    model.config.name_or_path = model.name_or_path = source
    return model


def name_in_model(model: Any) -> Callable[[str], str]:
    """A function that gives a tensor of a checkpoint the name that it has in `model`, by transformers' own table: older
    files, and what `save_pretrained` writes for them, know some modules by other names. Other names stay."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # a transformers without such a table
        return str
    # What is left out makes other tensors of them: see `conversions`.
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    def renamed(key: str) -> str:
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    return renamed


@dataclass
class Conversion:
    """Tensors of a checkpoint that become other tensors in a model, by transformers' own operations: the experts of a
    mixture, for one, which are matrices of their own in the file and stacked in the model.

    Attributes:
        name: The (first) name in the model.
        converter: transformers' `WeightConverter`.
        keys: Its pattern -> the names in the checkpoint that match, in the order of their numbers.
    """

    name: str
    converter: Any
    keys: dict[str, list[str]] = field(default_factory=dict)

    def tensors(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by their names in the model; `read` gives that of a name in the checkpoint.

        Raises:
            ValueError: A number is missing among the names, or the tensors do not fit together.
        """
        for pattern, keys in self.keys.items():
            numbers = [re.findall(r"\d+", key) for key in keys]
            # Of the numbers in the names, the layer's and the expert's, one counts.
            counts = [column for column in zip(*numbers, strict=False) if len(set(column)) > 1]
            if len(keys) > 1 and counts != [tuple(map(str, range(len(keys))))]:
                raise ValueError(f"expected the numbers 0 to {len(keys) - 1} in the names that go into {self.name!r}")
            for key in keys:
                self.converter.add_tensor(self.name, key, pattern, functools.partial(read, key))
        try:
            made = self.converter.convert(self.name, model=model, config=model.config)
        except (RuntimeError, ValueError) as error:  # of torch.stack, torch.cat and transformers
            raise ValueError(f"what goes into {self.name!r} does not fit together: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def conversions(model: Any, keys: Iterable[str], has_place: Callable[[str], bool]) -> list[Conversion]:
    """How tensors of a checkpoint become others in `model`, by transformers' own table; no two have a key in common.

    Args:
        model: A transformers model.
        keys: Names in the checkpoint, of dense tensors.
        has_place: Whether the model has a tensor of this name; where not, a conversion is left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # a transformers without such a table
        return []
    converters = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightConverter)]
    renamed = name_in_model(model)
    found: dict[str, Conversion] = {}
    for key in sorted(keys, key=_by_numbers) if converters else ():
        known = renamed(key)
        for converter in converters:
            name, pattern = converter.rename_source_key(known)
            if pattern is not None:
                if has_place(name):
                    group = found.setdefault(name, Conversion(name, copy.deepcopy(converter)))
                    group.keys.setdefault(pattern, []).append(key)
                break
    return list(found.values())


def _by_numbers(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10, whatever stands in a name."""
    return [(len(part), part) if re.fullmatch("[0-9]+", part) else (-1, part) for part in key.split(".")]


def load_generation_config(model: Any, source: str, hub_kwargs: dict[str, Any]) -> None:
    """Give `model` the generation settings saved with it, where there are any.

    Raises:
        QuantizedFileError: The file is damaged.
    """
    from transformers import GenerationConfig

    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        return
    path = os.path.join(source, hub_kwargs.get("subfolder") or "", _GENERATION)
    if os.path.lexists(path):
        read_json(path)
    try:
        with _blamed_on(path):
            model.generation_config = GenerationConfig.from_pretrained(source, **hub_kwargs)
    except OSError:  # a model without the file keeps what its configuration implies
        if os.path.lexists(path):
            raise
