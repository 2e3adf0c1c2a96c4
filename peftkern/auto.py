"""`AutoPeftModel` and its task classes: base model and adapter from one name."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from peftkern.config import PeftConfig, check_is_config
from peftkern.peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peftkern.utils.adapter_error import AdapterFileError
from peftkern.utils.adapter_files import PathLike, config_file
from peftkern.utils.save_and_load import load_config

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]


class AutoPeftModel:
    """Load the base model that an adapter's configuration names, and the adapter on it.

    This class takes the base model's class from `auto_mapping` (adapters saved without a task); the task classes take
    transformers' auto class of their task. Not to be instantiated.
    """

    # The name of transformers' auto class; None: by auto_mapping.
    _auto_class: ClassVar[str | None] = None
    _peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not instantiated: call {type(self).__name__}.from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base model and adapter.

        Args:
            pretrained_model_name_or_path: The adapter's folder or Hub repository.
            adapter_name, is_trainable, config: As for `PeftModel.from_pretrained`.
            revision: The adapter's revision on the Hub; that of the base model stands in the configuration.
            import_allowlist: The packages that `auto_mapping`, which comes from the file, may import from; by default
                transformers, diffusers, lerobot and megatron-core.
            kwargs: The Hub's arguments go to both loads, the others (`dtype`, `device_map`, `quantization_config`, ...)
                to the base model's `from_pretrained`.

        Returns:
            The model, of the class for the task.

        Raises:
            AdapterFileError: The configuration is damaged, or names no base model.
            ValueError: It is of another task, or of a class that is not on the list.
        """
        from peftkern.integrations.base_models import base_model_class, fit_embeddings_to_tokenizer, load_base_model

        hub, _, options = PeftConfig._split_kwargs(kwargs)
        adapter_hub = hub | ({} if revision is None else {"revision": revision})
        if config is not None:
            check_is_config("config", config)
        saved = config if config is not None else load_config(pretrained_model_name_or_path, **adapter_hub)
        base = saved.base_model_name_or_path
        if base is None:
            file = config_file(pretrained_model_name_or_path, **adapter_hub)
            reason = "expected the base model's name or path, got null"
            raise AdapterFileError(file, reason, key="base_model_name_or_path")
        if saved.task_type is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[saved.task_type]
            if cls._peft_class is not expected:
                name = expected.__name__.removeprefix("PeftModel")
                raise ValueError(
                    f"{cls.__name__}: the adapter's task_type is {str(saved.task_type)!r}, for AutoPeftModel{name}"
                )
        target = base_model_class(cls._auto_class, saved.auto_mapping, import_allowlist)
        model: nn.Module = load_base_model(target, base, saved.revision, hub | options)
        fit_embeddings_to_tokenizer(model, pretrained_model_name_or_path, adapter_hub, options)
        return cls._peft_class.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **adapter_hub
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For adapters of task CAUSAL_LM."""

    _auto_class, _peft_class = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For adapters of task SEQ_2_SEQ_LM."""

    _auto_class, _peft_class = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For adapters of task SEQ_CLS."""

    _auto_class, _peft_class = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For adapters of task TOKEN_CLS."""

    _auto_class, _peft_class = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For adapters of task QUESTION_ANS."""

    _auto_class, _peft_class = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For adapters of task FEATURE_EXTRACTION."""

    _auto_class, _peft_class = "AutoModel", PeftModelForFeatureExtraction
