"""What the file of a prompt method says by itself, checked before any model is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from peftkern.tuners.prompt_learning.encoder import PROMPT_KEY
from peftkern.utils.adapter_error import AdapterFileError, shorten
from peftkern.utils.adapter_files import PathLike
from peftkern.utils.peft_types import PeftType


def check_prompt_tensors(source: PathLike, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """Check the virtual tokens of a file against its configuration; a size that this leaves open is not checked.

    So a configuration that was damaged to ask for a billion tokens is refused before memory is taken for them.

    Raises:
        AdapterFileError: They are missing, no floating-point matrix, or have other sizes than the configuration says.
    """
    if PROMPT_KEY not in tensors:
        raise AdapterFileError(source, f"expected the tensor {PROMPT_KEY}; found {shorten(list(tensors), 3)}")
    value = tensors[PROMPT_KEY]
    if not value.is_floating_point():
        raise AdapterFileError(source, f"expected floating point, got {value.dtype}", key=PROMPT_KEY)
    if value.dim() != 2 or 0 in value.shape:
        raise AdapterFileError(source, f"expected a matrix, got shape {list(value.shape)}", key=PROMPT_KEY)
    rows, width = config.num_virtual_tokens, config.token_dim
    if config.peft_type == PeftType.PREFIX_TUNING:
        width = _product(width, 2, config.num_layers)
    else:
        rows = _product(rows, config.num_transformer_submodules)
    if (rows is not None and value.shape[0] != rows) or (width is not None and value.shape[1] != width):
        expected = [size if size is not None else "any" for size in (rows, width)]
        text = f"its shape is {list(value.shape)}, adapter_config.json says {expected}"
        raise AdapterFileError(source, text, key=PROMPT_KEY)


def refuse_training_of_a_file(config: Any, is_trainable: bool) -> None:
    """Raises ValueError for a prompt that is to be read as a new adapter and trained, as PEFT does: the layers that it
    may have come out of are not in the file."""
    if is_trainable and config.is_prompt_learning:
        raise ValueError(
            "is_trainable: prompt learning adapters are read for inference. To train one further, make it anew "
            "(get_peft_model, add_adapter) and read the file into it: load_adapter(folder, its_name, is_trainable=True)"
        )


def _product(*sizes: int | None) -> int | None:
    """The product; None where a size is."""
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None
