"""The names of fine-tuning methods and of tasks, as adapter files spell them."""

from __future__ import annotations

import enum


class PeftType(str, enum.Enum):  # noqa: UP042 - PEFT's own clients read str() of a member: not a StrEnum's
    """A fine-tuning method: the value of `peft_type` in `adapter_config.json`.

    A member here is a method in peftkern's plan; `peftkern.mapping.PEFT_TYPE_TO_CONFIG_MAPPING` says which are built.
    Members equal their strings (`PeftType.LORA == "LORA"`), so they compare with those of Hugging Face PEFT.
    """

    LORA = "LORA"
    IA3 = "IA3"
    ADALORA = "ADALORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    P_TUNING = "P_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


class TaskType(str, enum.Enum):  # noqa: UP042
    """What the adapted model is for: the value of `task_type`, which picks the `PeftModel` class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
