"""Names that adapter files and model architectures fix: file names, shorthand, and each architecture's targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
# How names in files begin, those of the base model following; of modules too in a PeftModel.
PREFIX = "base_model.model."

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
# The attribute names under which transformers' sequence classifiers keep their head.
SEQ_CLS_HEAD_NAMES = ("score", "classifier")
# From this many targets on, `target_modules` is shortened to the suffixes that tell the targets from the rest.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
# In these architectures a fused kernel reads the weights of out_proj and conv1d and never calls the modules, so
# that an adapter there would have no effect.
MAMBA_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_UNCALLED_MODULES = ("out_proj", "conv1d")

# `model_type`s of transformers configs that share one default; the same choice as PEFT's.
_LORA_TARGETS: list[tuple[list[str], list[str]]] = [
    (["bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"], ["q_proj", "v_proj"]),
    (["gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], ["q_proj", "v_proj"]),
    (["bert", "roberta", "xlm-roberta", "electra", "layoutlm"], ["query", "value"]),
    (["bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"], ["query_key_value"]),
    (["t5", "mt5"], ["q", "v"]),
    (["gpt2", "gpt_bigcode"], ["c_attn"]),
    (["blip-2"], ["q", "v", "q_proj", "v_proj"]),
    (["btlm"], ["c_proj", "c_attn"]),
    (["codegen"], ["qkv_proj"]),
    (["deberta"], ["in_proj"]),
    (["deberta-v2"], ["query_proj", "value_proj"]),
    (["mpt"], ["Wqkv"]),
    (["nemotron_h"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
    (["phi"], ["q_proj", "v_proj", "fc1", "fc2"]),
    (["rwkv"], ["key", "value", "receptance", "output"]),
    (["rwkv7"], ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]),
]

# `model_type` -> the default `target_modules`: a list of suffixes, or a regular expression.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    **{name: list(targets) for names, targets in _LORA_TARGETS for name in names},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# Mixtures of experts whose experts and router transformers 4 had as linear layers, and 5 has stacked in parameters:
# `model_type` -> what each layer is part of now. As PEFT 0.21.2 with transformers 5.23 has it.
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN_MOE = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_QWEN_MOE_TYPES = """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open
"""
EXPERTS_THAT_WERE_LAYERS: dict[str, dict[str, str]] = {
    **{name: _MIXTRAL for name in ("minimax", "minimax_m2", "mixtral")},
    **{name: _QWEN_MOE for name in _QWEN_MOE_TYPES.split()},
}

# Of AdaLoRA: `model_type`s that share a default, and its `target_modules`.
_ADALORA_TARGETS: list[tuple[list[str], list[str]]] = [
    (["gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], ["q_proj", "v_proj"]),
    (["bart", "opt"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    (["gpt2", "gpt_bigcode"], ["c_attn"]),
    (["bloom", "gpt_neox"], ["query_key_value"]),
    (["t5"], ["q", "k", "v", "o", "wi", "wo"]),
    (["mt5"], ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    (["bert"], ["query", "value"]),
    (["roberta"], ["query", "key", "value", "dense"]),
    (["deberta"], ["in_proj"]),
    (["deberta-v2"], ["query_proj", "key_proj", "value_proj", "dense"]),
    (["nemotron_h"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
]
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    **{name: list(targets) for names, targets in _ADALORA_TARGETS for name in names},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# Of IA3: `model_type`s that share a default, its `target_modules`, and those of them that are feed-forward.
_IA3_TARGETS: list[tuple[list[str], list[str], list[str]]] = [
    (["llama", "mistral"], ["k_proj", "v_proj"], ["down_proj"]),
    (["llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], ["q_proj", "v_proj"], ["down_proj"]),
    (["mixtral"], ["k_proj", "v_proj"], ["w2"]),
    (["opt"], ["q_proj", "k_proj"], ["fc2"]),
    (["bart", "phi"], ["q_proj", "v_proj"], ["fc2"]),
    (["gptj"], ["q_proj", "v_proj"], ["fc_out"]),
    (["gpt_neo"], ["q_proj", "v_proj"], ["c_proj"]),
    (["bert", "roberta"], ["key", "value"], ["output.dense"]),
    (["deberta"], ["in_proj"], ["output.dense"]),
    (["deberta-v2"], ["key_proj", "value_proj"], ["output.dense"]),
    (["bloom"], ["query_key_value"], ["mlp.dense_4h_to_h"]),
    (["gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"], ["query_key_value"], ["dense_4h_to_h"]),
    (["gpt2", "gpt_bigcode"], ["c_attn"], ["mlp.c_proj"]),
    (["t5"], ["k", "v"], ["wo"]),
    (["mt5"], ["k", "v", "wi_1"], []),  # whose gated layer scales the output of wi_1, not the input of wo
]
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    name: [*outputs, *inputs] for names, outputs, inputs in _IA3_TARGETS for name in names
}
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING: dict[str, list[str]] = {
    name: list(inputs) for names, _, inputs in _IA3_TARGETS for name in names
}

# PEFT's table of functions by `model_type`: what a model that takes no transformers cache wants in its place, made of a
# tuple of [2, batch, heads, tokens, head_dim] for each layer. Every model of transformers from 5.14 on takes a cache.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[[tuple[Any, ...]], Any]] = {}
