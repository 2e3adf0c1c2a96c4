"""`PromptTuningConfig`: PEFT 0.21.2's fields, names and defaults."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from peftkern.config import PromptLearningConfig, _expect
from peftkern.utils.peft_types import PeftType


class PromptTuningInit(str, enum.Enum):  # noqa: UP042 - like PeftType: clients read str() of a member
    """What virtual tokens start from: a text, tokens of the vocabulary drawn at random, or normal numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: vectors that stand before the text's word embeddings are learned, the model is frozen.

    Source: Lester et al. 2021, arXiv:2104.08691.

    Args:
        prompt_tuning_init: A `PromptTuningInit` or its string.
        prompt_tuning_init_text: For TEXT: the text; it is repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: For TEXT: the tokenizer that transformers' AutoTokenizer loads.
        tokenizer_kwargs: For TEXT: further arguments of its `from_pretrained`; not `trust_remote_code`.

    The other fields are those of `PromptLearningConfig`.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)

    def check(self) -> None:
        super().check()
        if self.prompt_tuning_init not in list(PromptTuningInit):
            known = ", ".join(kind.value for kind in PromptTuningInit)
            raise ValueError(f"prompt_tuning_init must be one of {known}, got {self.prompt_tuning_init!r}")
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if getattr(self, name) is not None:
                _expect(name, getattr(self, name), (str,), "a str or None")
        if self.tokenizer_kwargs is not None:
            _expect("tokenizer_kwargs", self.tokenizer_kwargs, (dict,), "a dict or None")
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            if not self.tokenizer_name_or_path:
                got = self.tokenizer_name_or_path
                raise ValueError(f"tokenizer_name_or_path must be given for prompt_tuning_init TEXT, got {got!r}")
            if not self.prompt_tuning_init_text:
                got = self.prompt_tuning_init_text
                raise ValueError(f"prompt_tuning_init_text must be given for prompt_tuning_init TEXT, got {got!r}")
        elif self.tokenizer_kwargs:
            kind = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
            raise ValueError(f"tokenizer_kwargs must be None unless prompt_tuning_init is TEXT, which is {kind!r}")
