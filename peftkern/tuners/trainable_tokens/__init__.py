"""Single rows of embeddings that train: a method by itself, and beside LoRA (`trainable_token_indices`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkern.tuners.trainable_tokens.layer import TrainableTokensLayer
from peftkern.tuners.trainable_tokens.wrapper import TrainableTokensWrapper

if TYPE_CHECKING:
    from peftkern.tuners.trainable_tokens.config import TrainableTokensConfig
    from peftkern.tuners.trainable_tokens.model import TrainableTokensModel

# Every method's model knows the layers above, and this method's is one of them: imported when first asked for.
_LATER = {"TrainableTokensConfig": "config", "TrainableTokensModel": "model"}

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel", "TrainableTokensWrapper"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"peftkern.tuners.trainable_tokens.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
