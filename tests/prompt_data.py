"""Models with virtual tokens made by peftkern and by PEFT from the same seed, for the tests of prompt learning."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from tiny_models import VOCAB, tiny_llama

TOKENS = 5

# name -> the configuration's class and fields
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 24}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 24}),
}
# Those whose encoder has layers that are not in the file.
COMPUTED = ("mlp", "lstm", "projected")
PREFIXES = ("prefix", "projected")


def config(library: Any, method: str, task: str | None = "CAUSAL_LM", **fields: Any) -> Any:
    """The configuration of a method, with `TOKENS` virtual tokens."""
    name, own = METHODS[method]
    return getattr(library, name)(**({"task_type": task, "num_virtual_tokens": TOKENS} | own | fields))


def prompted(library: Any, method: str, model: Any = tiny_llama, task: str | None = "CAUSAL_LM", **fields: Any) -> Any:
    """`model()` with an adapter of `method`, made from seed 0."""
    base = model()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, config(library, method, task, **fields)).eval()


def padded_mask(side: str = "right", batch: int = 2, length: int = 12) -> torch.Tensor:
    """A mask whose second row has four tokens of padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -4:] = 0
    return mask if side == "right" else mask.flip(1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is in `.grad` of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call` without its warnings: PEFT's of position ids, transformers' of generation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def bert(cls: str = "BertForSequenceClassification", labels: int = 3) -> nn.Module:
    """A two-layer BERT without dropout."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    rest = {"vocab_size": VOCAB, "num_labels": labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _made(cls, transformers.BertConfig(**sizes, **rest, max_position_embeddings=64))


def t5(layers: int = 2) -> nn.Module:
    """A T5 without dropout."""
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": layers, "num_heads": 4}
    rest = {"vocab_size": VOCAB, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    return _made("T5ForConditionalGeneration", transformers.T5Config(**sizes, **rest))


def bart() -> nn.Module:
    """A BART without dropout."""
    import transformers

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SIZES.items()}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    rest = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "forced_eos_token_id": None}
    return _made("BartForConditionalGeneration", transformers.BartConfig(**sides, **off, **rest))


BART_SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def causal(name: str) -> nn.Module:
    """A small language model of another architecture than Llama."""
    import transformers

    off = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2} | off
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared = plain | {"intermediate_size": 48, "num_key_value_heads": 2}
    narrow = plain | {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt),
        "multi-query": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", gpt),
        "falcon": ("FalconForCausalLM", "FalconConfig", plain),
        "sliding": ("MistralForCausalLM", "MistralConfig", shared | {"sliding_window": 8}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", shared | {"head_dim": 8, "sliding_window": 8}),
        "wide heads": ("Qwen3ForCausalLM", "Qwen3Config", shared | {"head_dim": 16}),
        "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "narrow words": ("OPTForCausalLM", "OPTConfig", narrow),
    }
    cls, config_name, fields = kinds[name]
    return _made(cls, getattr(transformers, config_name)(vocab_size=VOCAB, pad_token_id=0, **fields))


def _made(cls: str, made: Any) -> nn.Module:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, cls)(made).eval()
