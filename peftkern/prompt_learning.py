"""`PromptLearning`: what a `PeftModel` does otherwise where adapters are virtual tokens and no layer is changed.

The base model is `base_model` itself, without a tuner between; the adapters are `prompt_encoder`, a module for each. A
call's arguments are changed on their way to the base model: `prompted` says how, for forward and generation alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peftkern.peft_model_base import PeftModel
from peftkern.prompt_inputs import (
    batch_of,
    check_generation,
    check_grows,
    check_takes_cache,
    lengthen_mask,
    put_before,
    settle_token_types,
    shift_positions,
    tokens_in,
)
from peftkern.tuners.prefix_tuning import PrefixEncoder
from peftkern.tuners.prompt_learning.encoder import VirtualTokens
from peftkern.tuners.prompt_learning.sizes import settle_sizes
from peftkern.tuners.prompt_tuning import PromptEmbedding, PromptTuningInit
from peftkern.tuners.switching import active_without, layers_of
from peftkern.tuners.tuner_layer import check_adapter_name
from peftkern.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from peftkern.utils.module_tree import modules_of, parameters_of_model
from peftkern.utils.other import _set_adapter, check_modules_to_save, embeddings_of, wrap_modules_to_save, wrappers_of

# What PEFT's tuners have and prompts cannot: there is nothing in the base model to merge or to take out.
_OF_LAYERS = frozenset(("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"))


class PromptLearning(PeftModel):
    """A frozen base model and virtual tokens that stand before its input. The task classes are in `prompt_models`.

    Attributes:
        base_model: the model that was given.
        prompt_encoder: the module that makes the virtual tokens of each adapter, by its name.
        prompt_tokens: the numbers of the virtual tokens of each adapter, int64.
    """

    _is_prompt_learning = True
    # Whether token_type_ids are given to the model, with type 0 for virtual tokens, or left out with a warning.
    _takes_token_types = False
    prompt_encoder: nn.ModuleDict
    prompt_tokens: dict[str, torch.Tensor]

    # --- adapters ----------------------------------------------------------------------------------------------------

    def _adapt(self, model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        if layers_of(model) or wrappers_of(model) or getattr(model, "peft_config", None):
            raise ValueError(
                "model: it carries adapters in its layers already, with which prompt learning is not mixed: merge or "
                "unload them first"
            )
        self._peft_config: dict[str, PeftConfig] = {}
        self.base_model = model
        self.prompt_encoder = nn.ModuleDict()
        self.prompt_tokens = {}
        self.active_adapter = adapter_name
        for parameter in parameters_of_model(model):
            parameter.requires_grad_(False)
        self._inject(config, adapter_name, low_cpu_mem_usage)

    def _inject(self, config: Any, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Make an adapter. `low_cpu_mem_usage` has no part in it: virtual tokens are small."""
        check_adapter_name(adapter_name)
        config.check()
        words = self.word_embeddings
        settle_sizes(config, getattr(self.base_model, "config", None), getattr(words, "embedding_dim", None))
        whole = config.modules_to_save or []
        check_modules_to_save(self.base_model, whole)
        encoder = self._make_encoder(config, words)
        place = words.weight if words is not None else next(iter(parameters_of_model(self.base_model)), None)
        if place is not None and not place.is_meta:
            encoder.to(place.device)
        is_active = adapter_name == self.active_adapter
        encoder.requires_grad_(is_active and not config.inference_mode)
        encoder.train(self.training)
        self.peft_config[adapter_name] = config
        self.prompt_encoder[adapter_name] = encoder
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        self.prompt_tokens[adapter_name] = torch.arange(rows)
        if whole:
            options = {"inference_mode": config.inference_mode, "activate": is_active}
            wrap_modules_to_save(self.base_model, whole, adapter_name, **options)

    def _make_encoder(self, config: Any, words: Any) -> VirtualTokens:
        made = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        if made is PrefixEncoder:
            self._refuse_checkpointing()
            check_takes_cache(self.base_model)
        if made is not PromptEmbedding:
            return made(config)
        ids = None
        if config.prompt_tuning_init == PromptTuningInit.TEXT and not config.inference_mode:
            from peftkern.integrations.prompts import token_ids

            text, name = config.prompt_tuning_init_text, config.tokenizer_name_or_path
            ids = token_ids(text, name, config.tokenizer_kwargs)
        return PromptEmbedding(config, words, ids)

    def _widen(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Virtual tokens are in float32 from the start, whatever the base model is in."""

    def _before_load(self, adapter_name: str, is_trainable: bool) -> None:
        """Put a file's tokens, if they are not to be trained, in the place of an encoder that computed others."""
        encoder = self._encoder(adapter_name)
        if is_trainable or not encoder.is_computed:
            return
        config: Any = dataclasses.replace(self.peft_config[adapter_name], inference_mode=True)
        self.peft_config[adapter_name] = config
        plain = self._make_encoder(config, None).to(encoder.embedding.weight.device)
        self.prompt_encoder[adapter_name] = plain.requires_grad_(False)

    def _encoder(self, adapter_name: str) -> VirtualTokens:
        found = self.prompt_encoder[adapter_name]
        if not isinstance(found, VirtualTokens):
            raise TypeError(f"prompt_encoder[{adapter_name!r}]: expected a VirtualTokens, got {type(found).__name__}")
        return found

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless `inference_mode`; the others are frozen."""
        self._check_known(adapter_name)
        _set_adapter(self.base_model, adapter_name, inference_mode)
        self._activate(adapter_name, not inference_mode)

    def _activate(self, adapter_name: str, trainable: bool) -> None:
        self.active_adapter = adapter_name
        for name, encoder in self.prompt_encoder.items():
            encoder.requires_grad_(trainable and name == adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Refused, as in PEFT: `set_adapter` says which prompt is trained.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"set_requires_grad: not for prompt learning ({self._method_name}): set_adapter thaws a prompt")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, another one becomes so, with a warning."""
        self._check_known(adapter_name)
        del self.peft_config[adapter_name], self.prompt_encoder[adapter_name], self.prompt_tokens[adapter_name]
        active = active_without(adapter_name, self.active_adapters, self.peft_config)
        for wrapper in wrappers_of(self.base_model):
            wrapper.delete_adapter(adapter_name, active)
        if not active:
            self.active_adapter = []  # type: ignore[assignment] # PEFT's value for none
        elif active != self.active_adapters:
            self._activate(active[0], not self.peft_config[active[0]].inference_mode)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this context the model is the base model, without virtual tokens and modules that were trained whole."""
        was_disabled = self._adapters_disabled
        self._adapters_disabled = True
        wrappers = [] if was_disabled else wrappers_of(self.base_model)
        # Switching copies on thaws them, those too that were read for inference.
        before = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        try:
            yield
        finally:
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)
            self._adapters_disabled = was_disabled

    # --- what is in it -----------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of each adapter, by its name."""
        return self._peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self._peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, as a list of one; of none where all were deleted."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    @property
    def _method_name(self) -> str:
        return str(getattr(self.peft_type, "value", self.peft_type))

    def get_base_model(self) -> nn.Module:
        """The model that was given; there is nothing of an adapter in it but what is trained whole."""
        return self.base_model

    @property
    def word_embeddings(self) -> Any:
        """The module that the base model looks its tokens up in; None where it does not say which."""
        return embeddings_of(self.base_model)[0]

    def __getattr__(self, name: str) -> Any:
        if name in _OF_LAYERS:
            raise AttributeError(
                f"{name}: prompt learning changes no weights of the base model, which get_base_model() returns"
            )
        return super().__getattr__(name)

    # --- virtual tokens ----------------------------------------------------------------------------------------------

    def get_prompt(self, batch_size: int, task_ids: None = None, max_cache_len: int | None = None) -> Any:
        """The active adapter's virtual tokens for a batch, the same for each row.

        Args:
            batch_size: Rows.
            task_ids: PEFT's, for a method that is not built; must be None.
            max_cache_len: PEFT's, for transformers before 4.56; without effect.

        Returns:
            Vectors [batch_size, tokens, token_dim], in the dtype of the encoder. Of prefix tuning a cache that holds
            keys and values in the base model's dtype: a `DynamicCache`, of an encoder-decoder model an
            `EncoderDecoderCache`.

        Raises:
            ValueError: No adapter is active.
            NotImplementedError: `task_ids` are given.
        """
        if task_ids is not None:
            raise NotImplementedError("task_ids: multitask prompt tuning is not built")
        _, encoder = self._in_use()
        if isinstance(encoder, PrefixEncoder):
            return self._prefix(encoder, batch_size)
        tokens = encoder(self.prompt_tokens[self.active_adapter].to(encoder.embedding.weight.device)[None])
        return tokens.expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """What the file of an adapter has as `prompt_embeddings`, [rows, width], on the CPU.

        Without the dropout of an LSTM encoder, also in training.
        """
        self._check_known(adapter_name)
        return self._encoder(adapter_name).to_save()

    def _in_use(self) -> tuple[Any, VirtualTokens]:
        """The active adapter's configuration and encoder; a ValueError where none is active."""
        config = self.active_peft_config
        return config, self._encoder(self.active_adapter)

    def _prefix(self, encoder: PrefixEncoder, batch_size: int, cache: Any = None) -> Any:
        """The prefix in a cache: in `cache` if there is one, which must be empty."""
        from peftkern.integrations.prompts import prefix_cache

        key_values = encoder.key_values(self.base_model_torch_dtype)
        config, _ = self._in_use()
        if config.num_transformer_submodules == 2:
            # What PEFT's files mean: its share of a layer is twice as large, so layer i takes the keys of layer 2 i,
            # round and round, and where the number of layers is even those of every other one are never used.
            key_values = [key_values[2 * i % len(key_values)] for i in range(len(key_values))]
        kind = getattr(getattr(self.base_model, "config", None), "model_type", None)
        postprocess = TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.get(kind or "")
        if postprocess is not None:
            return postprocess(tuple(torch.stack(pair).expand(-1, batch_size, -1, -1, -1) for pair in key_values))
        return prefix_cache(self.base_model, key_values, batch_size, cache)

    # --- running -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        named = sorted(name for name in self.special_peft_forward_args if kwargs.get(name) is not None)
        if named:
            raise NotImplementedError(f"{named[0]}: not for prompt learning, where all rows of a batch have one prompt")
        yield

    @property
    def _is_prompting(self) -> bool:
        """Whether a call has virtual tokens before it."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def _has_prefix(self) -> bool:
        """Whether a call's virtual tokens are keys and values."""
        return self._is_prompting and isinstance(self._in_use()[1], PrefixEncoder)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_prompting:
            return self.base_model(*args, **kwargs)
        given = self.prompted(kwargs)
        cache = given.get("past_key_values")
        before = tokens_in(cache)
        output = self.base_model(*args, **given)
        if self._has_prefix and tokens_in(cache) == before and before:
            raise ValueError(
                f"model: {type(self.base_model).__name__} put no keys into past_key_values, so it took no prefix: "
                "prefix tuning needs a model whose attention uses a cache"
            )
        return output

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.base_model
        if not self._is_prompting:
            return base.generate(*args, **kwargs)
        from peftkern.integrations.prompts import generating

        check_generation(kwargs, args[1:2], getattr(base, "generation_config", None))
        prepared = []

        @functools.wraps(base.prepare_inputs_for_generation)
        def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
            prepared.append(True)
            return self._prepared(base.prepare_inputs_for_generation(*args, **kwargs))

        output = generating(base, prepare).generate(*args, **kwargs)
        if not prepared:
            raise NotImplementedError(
                f"generate: {type(base).__name__} did not ask for prepare_inputs_for_generation, where virtual tokens "
                "are put in (a compiled model does not: generate with the one that was compiled)"
            )
        return output

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`prompted` for a step of generation."""
        if inputs.get("use_cache") is False:
            # The last step's, made for its prefix: this step has the whole text again.
            inputs.pop("past_key_values", None)
        return self.prompted(inputs)

    def prompted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the base model's forward with the active adapter's virtual tokens in them.

        Vectors: the text becomes `inputs_embeds`, and masks, positions and labels get longer. A prefix: there is a
        cache to begin with, and masks and positions count it. Where a cache is given that holds tokens already, the
        virtual ones are among them.

        Args:
            inputs: By name; not changed.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds`, or a mask that is not [batch, tokens].
            NotImplementedError: A cache of a fixed size.
        """
        given = dict(inputs)
        if given.pop("task_ids", None) is not None:
            raise NotImplementedError("task_ids: multitask prompt tuning is not built")
        batch = batch_of(given)
        config, encoder = self._in_use()
        n = config.num_virtual_tokens
        cache = given.get("past_key_values")
        check_grows(cache)
        is_first = not tokens_in(cache)
        inserted = 0
        if isinstance(encoder, PrefixEncoder):
            if self.training:
                self._refuse_checkpointing()
            if is_first:
                given["past_key_values"] = self._prefix(encoder, batch, cache)
        elif is_first:
            inserted = n
            put_before(given, self.get_prompt(batch), self.word_embeddings)
            self._settle_labels(given, batch, n)
        lengthen_mask(given, "attention_mask", batch, n)
        shift_positions(given, "position_ids", n, inserted)
        settle_token_types(given, inserted, self._takes_token_types)
        return given

    def _settle_labels(self, given: dict[str, Any], batch: int, n: int) -> None:
        """Have labels of a text say the same of it once `n` vectors stand before it."""

    def _refuse_checkpointing(self) -> None:
        """Refuse a prefix where layers drop their cache: they compute a region again in backward."""
        if any(getattr(module, "gradient_checkpointing", False) for module in modules_of(self.base_model)):
            raise ValueError(
                "gradient checkpointing: not with prefix tuning, whose cache it would drop: call "
                "gradient_checkpointing_disable() on the model, or leave gradient_checkpointing=False in Trainer"
            )
