"""`TrainableTokensConfig`: PEFT 0.21.2's fields, names and defaults; and what ids of tokens have to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftkern.config import PeftConfig, _check_regex, _expect, _expect_names
from peftkern.utils.peft_types import PeftType


def check_token_ids(name: str, ids: Sequence[Any]) -> None:
    """Raises ValueError or TypeError unless `ids` are some ids of tokens, each once."""
    if not ids:
        raise ValueError(f"{name} must hold at least one id, got {ids!r}")
    for index in ids:
        _expect(f"an id of {name}", index, (int,), "an int of at least 0")
        if index < 0:
            raise ValueError(f"an id of {name} must be an int of at least 0, got {index!r}")
    twice = [index for index, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{name} must hold each id once, got {twice[:5]} more than once")


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Trained rows of an embedding: `y = D[j]` for the ids i = token_indices[j], else `y = W[i]`, with W frozen.

    `LoraConfig.trainable_token_indices` has the same beside LoRA.

    Args:
        token_indices: Ids of the tokens whose rows train; rows are saved in this order.
        target_modules: The embeddings: names or dotted suffixes of names; or a regular expression that a whole name
            must match. None: the model's input embedding; of a model that does not tell which that is, "embed_tokens".
            What is tied to the input embedding takes the same rows.
        init_weights: Start from the base's rows, which change nothing; False: from normal numbers.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    method: ClassVar[PeftType | None] = PeftType.TRAINABLE_TOKENS

    def check(self) -> None:
        super().check()
        _expect("token_indices", self.token_indices, (list, tuple), "a list of ids")
        check_token_ids("token_indices", self.token_indices)
        if isinstance(self.target_modules, str):
            _check_regex("target_modules", self.target_modules)
        elif self.target_modules is not None:
            _expect_names("target_modules", self.target_modules)
        _expect("init_weights", self.init_weights, (bool,), "True or False")
