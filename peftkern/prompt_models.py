"""The task classes of prompt learning: those of `peft_model` by name and by inheritance, with `PromptLearning` in them.

`get_peft_model` and `PeftModel.from_pretrained` make them where the configuration asks for a prompt method.
"""

from __future__ import annotations

from typing import Any

from peftkern import peft_model
from peftkern.peft_model_base import PeftModel
from peftkern.prompt_inputs import (
    batch_of,
    check_generation,
    check_grows,
    lengthen_labels,
    lengthen_mask,
    put_before,
    settle_token_types,
    shift_positions,
    tokens_in,
)
from peftkern.prompt_learning import PromptLearning
from peftkern.tuners.prefix_tuning import PrefixEncoder


class PeftModelForCausalLM(PromptLearning, peft_model.PeftModelForCausalLM):
    """A language model with virtual tokens before its text; logits of vectors' places come first."""

    def _settle_labels(self, given: dict[str, Any], batch: int, n: int) -> None:
        lengthen_labels(given, batch, n)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's own, with virtual tokens."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return self._prepared(inputs) if self._is_prompting else inputs


class PeftModelForSeq2SeqLM(PromptLearning, peft_model.PeftModelForSeq2SeqLM):
    """An encoder-decoder model with virtual tokens: vectors before the encoder's text, a prefix before the decoder's.

    `num_transformer_submodules` is 2 by default, as in PEFT, whose files so hold what nothing uses: as many vectors
    again, for the decoder; or the keys of every other layer, for which those of the rest come twice. 1 has neither.
    """

    def prompted(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """See `PromptLearning.prompted`; a prefix lengthens the decoder's mask and positions."""
        given = dict(inputs)
        config, encoder = self._in_use()
        n = config.num_virtual_tokens
        settle_token_types(given, 0, False)
        if not isinstance(encoder, PrefixEncoder):
            if given.get("encoder_outputs") is not None:
                raise ValueError("encoder_outputs: prompt learning expects the encoder's input, where its tokens stand")
            batch = batch_of(given)
            put_before(given, self.get_prompt(batch)[:, :n], self.word_embeddings)
            lengthen_mask(given, "attention_mask", batch, n)
            return given
        if self.training:
            self._refuse_checkpointing()
        cache = given.get("past_key_values")
        check_grows(cache)
        batch = _rows_of_decoder(given)
        if not tokens_in(cache):
            given["past_key_values"] = self._prefix(encoder, batch, cache)
        lengthen_mask(given, "decoder_attention_mask", batch, n)
        shift_positions(given, "decoder_position_ids", n, 0)
        return given

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Vectors are the encoder's business, which runs once; a prefix is put in at the decoder's first step."""
        base: Any = self.base_model
        if not self._is_prompting or self._has_prefix:
            return super()._generate(*args, **kwargs)
        check_generation(kwargs, args[1:2], getattr(base, "generation_config", None))
        ids = args[0] if args and args[0] is not None else kwargs.pop("inputs", None)
        kwargs |= {} if ids is None else {"input_ids": ids}
        return base.generate(None, *args[1:], **self.prompted(kwargs))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's own, with a prefix."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return self._prepared(inputs) if self._has_prefix else inputs


def _rows_of_decoder(given: dict[str, Any]) -> int:
    """The decoder's rows: while beams are searched there are more of them than the encoder's input has."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds")
    found = next((given[name] for name in names if given.get(name) is not None), None)
    if found is None:
        raise ValueError(f"forward: expected one of {', '.join(names)}, got none")
    return int(found.shape[0])


class PeftModelForSequenceClassification(PromptLearning, peft_model.PeftModelForSequenceClassification):
    """A classifier of whole texts with virtual tokens; its head (`classifier` or `score`) is trained and saved whole.

    With vectors, models that classify by a row's last token take the last place, padded or not: pad on the left there.
    """

    _takes_token_types = True


class PeftModelForTokenClassification(PromptLearning, peft_model.PeftModelForTokenClassification):
    """A classifier of tokens with virtual tokens, whose logits come first; its head is trained and saved whole."""

    _takes_token_types = True

    def _settle_labels(self, given: dict[str, Any], batch: int, n: int) -> None:
        lengthen_labels(given, batch, n)


class PeftModelForQuestionAnswering(PromptLearning, peft_model.PeftModelForQuestionAnswering):
    """A model that marks a span as the answer, with virtual tokens; its head (`qa_outputs`) is trained and saved whole.

    `start_positions` and `end_positions` are places in the text; with vectors, whose logits come first, the same token
    has place + `num_virtual_tokens` in the logits.
    """

    _takes_token_types = True

    def _settle_labels(self, given: dict[str, Any], batch: int, n: int) -> None:
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                given[name] = given[name] + n


class PeftModelForFeatureExtraction(PromptLearning, peft_model.PeftModelForFeatureExtraction):
    """A model whose hidden states are wanted, with virtual tokens; those of vectors come first."""


_OF_TASK: dict[type[PeftModel], type[PromptLearning]] = {
    peft_model.PeftModelForCausalLM: PeftModelForCausalLM,
    peft_model.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
    peft_model.PeftModelForQuestionAnswering: PeftModelForQuestionAnswering,
    peft_model.PeftModelForSeq2SeqLM: PeftModelForSeq2SeqLM,
    peft_model.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft_model.PeftModelForTokenClassification: PeftModelForTokenClassification,
}


def prompt_class(cls: type[PeftModel]) -> type[PromptLearning]:
    """The class for prompt learning that stands in for a task's class, `cls`.

    Raises:
        ValueError: `cls` is for no task: what virtual tokens stand before depends on it.
        TypeError: `cls` is somebody's own subclass of a task's class.
    """
    if issubclass(cls, PromptLearning):
        return cls
    if cls is PeftModel:
        tasks = ", ".join(task.value for task in peft_model.TaskType)
        raise ValueError(f"task_type must be one of {tasks} for prompt learning, got None")
    if cls not in _OF_TASK:
        bases = [base.__name__ for base in cls.__mro__ if base in _OF_TASK]
        raise TypeError(f"{cls.__name__}: for prompt learning derive it from peftkern.prompt_models.{bases[0]}")
    return _OF_TASK[cls]
