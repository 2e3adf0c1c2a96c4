"""Modules that share the input embedding's weight: which they are, and what `ensure_weight_tying` asks for them.

As in PEFT 0.21.2 weights are tied if the model's configuration says so (`tie_word_embeddings`); which modules have them
is told by the parameter itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from peftkern.tuners.targets import lies_under
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import AuxiliaryTrainingWrapper, embeddings_of


class TiedWeights(NamedTuple):
    """The name of the input embedding, and those of the modules that have its weight."""

    source: str
    others: list[str]


def modules_outside(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by each of their names, without what lies in adapted layers and wrappers."""
    named = named_modules_of(model, remove_duplicate=False)
    inside = {key for key, module in named if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    return {key: module for key, module in named if key and not lies_under(key, inside)}


def input_embedding_name(model: nn.Module) -> str | None:
    """The name of the module that the model says is its input embedding."""
    embedding = embeddings_of(model)[0]
    return next((key for key, module in named_modules_of(model) if module is embedding), None)


def find_tied(model: nn.Module) -> TiedWeights | None:
    """What is tied to the input embedding, if the model says that it ties its weights and something is."""
    config = getattr(model, "config", None)
    said = config.get if isinstance(config, dict) else lambda name, default: getattr(config, name, default)
    source, modules = input_embedding_name(model), modules_outside(model)
    if source is None or source not in modules or not said("tie_word_embeddings", False):
        return None
    weight = _base_of(modules[source])._parameters.get("weight")
    if weight is None:
        return None
    others = [key for key, module in modules.items() if _base_of(module)._parameters.get("weight") is weight]
    others.remove(source)
    return TiedWeights(source, others) if others else None


def settle_tied_copies(model: nn.Module, config: Any) -> list[str]:
    """Names of modules to train whole besides `modules_to_save`, because they are tied to one of those.

    With `ensure_weight_tying`, and an entry that names the input embedding or what is tied to it, the configuration's
    list is changed to name the embedding, as PEFT's is; the copies of all of these are to share their weight.
    """
    if not getattr(config, "ensure_weight_tying", False):
        return []
    tied, whole = find_tied(model), list(config.modules_to_save or ())
    if tied is None:
        warnings.warn(
            "ensure_weight_tying=True: the model's embeddings are not tied (tie_word_embeddings), so nothing is tied",
            stacklevel=5,
        )
        return []
    if not any(key.endswith(tuple(whole)) for key in (tied.source, *tied.others)):
        return []
    kept = [name for name in whole if not any(f".{key}".endswith(f".{name}") for key in tied.others)]
    config.modules_to_save = kept if tied.source in kept else [*kept, tied.source]
    return tied.others


def check_tied_targets(model: nn.Module, config: Any, adapted: Iterable[str]) -> None:
    """Raises NotImplementedError for adapters on tied modules that `ensure_weight_tying` asks to be tied."""
    tied = find_tied(model) if getattr(config, "ensure_weight_tying", False) else None
    taken = [] if tied is None else [key for key in adapted if key in (tied.source, *tied.others)]
    if taken:
        raise NotImplementedError(
            "ensure_weight_tying=True is built for trainable_token_indices and modules_to_save, not for adapters of "
            f"what is tied, got target_modules that name {taken}"
        )


def mark_untied(model: Any) -> None:
    """Says in a transformers model's config that its embeddings are no longer tied, if they are not.

    Otherwise saving and loading would tie them again and lose the head that was trained.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = embeddings_of(model)
    if None not in ends and ends[0].weight is not ends[1].weight:
        config.tie_word_embeddings = False
        message = "input and output embeddings differ after merging: tie_word_embeddings is now False"
        warnings.warn(message, stacklevel=3)


def _base_of(module: Any) -> nn.Module:
    """The model's own module, out of what was put around it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _base_of(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
