"""Linear layers of transformers whose weight their module reads by itself, without calling the layer.

An adapter there computes nothing and gets no gradient, and a quantized weight is not the matrix that the module takes
it for. Known by the class that reads, so that transformers need not be imported.
"""

from __future__ import annotations

from types import MappingProxyType

from torch import nn

# (folder of transformers.models, class, its children whose weight it multiplies by or looks up itself). Read in
# transformers 5.23.
_UNCALLED = (
    *((name, "TDNNLayer", "kernel") for name in ("unispeech_sat", "wav2vec2", "wav2vec2_bert")),
    *((name, "TDNNLayer", "kernel") for name in ("wav2vec2_conformer", "wavlm")),
    ("falcon_mamba", "FalconMambaMixer", "dt_proj"),
    ("jamba", "JambaMambaMixer", "dt_proj"),
    ("layoutlmv2", "LayoutLMv2Encoder", "rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    ("layoutlmv3", "LayoutLMv3Encoder", "rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    ("longcat_flash", "LongcatFlashTopkRouter", "classifier"),
    ("mamba", "MambaMixer", "dt_proj"),
    ("mobilebert", "MobileBertLMPredictionHead", "dense"),
    ("wavlm", "WavLMAttention", "q_proj", "k_proj", "v_proj", "out_proj"),
)
# The same, of children that it calls, with x cast to the dtype of their weight, which is uint8 once it is quantized.
# T5 and others that do so keep these layers in float32 (`_keep_in_fp32_modules`).
_CAST_TO = (
    *((name, f"{cls}Indexer", "weights_proj") for name, cls in (("axk2", "AXK2"), ("deepseek_v32", "DeepseekV32"))),
    *((name, f"{cls}Indexer", "weights_proj") for name, cls in (("glm_moe_dsa", "GlmMoeDsa"), ("hy_v4", "HYV4"))),
    ("blip_2", "Blip2ForImageTextRetrieval", "itm_head", "text_projection", "vision_projection"),
    ("blip_2", "Blip2TextModelWithProjection", "text_projection"),
    ("blip_2", "Blip2VisionModelWithProjection", "vision_projection"),
    ("dots3_note", "Dots3NoteTextIndexer", "weights_proj"),
    ("glm5_next", "Glm5NextTextIndexer", "weights_proj"),
    ("granite_speech5", "GraniteSpeech5Encoder", "input_linear"),
    ("kosmos2_5", "Kosmos2_5VisionMlp", "wo"),
    ("longt5", "LongT5DenseActDense", "wo"),
    ("mistral_large4", "MistralLarge4TextIndexer", "weights_proj"),
    ("neomme", "NeoMMEMultiVectorHead", "proj"),
    ("nllb_moe", "NllbMoeDenseActDense", "fc2"),
    ("pix2struct", "Pix2StructTextDenseGatedActDense", "wo"),
    ("pix2struct", "Pix2StructVisionMlp", "wo"),
    ("seamless_m4t", "SeamlessM4TFeedForwardNetwork", "fc2"),
    ("seamless_m4t_v2", "SeamlessM4Tv2FeedForwardNetwork", "fc2"),
    ("switch_transformers", "SwitchTransformersDenseActDense", "wo"),
)


def _by_class(rows: tuple[tuple[str, ...], ...]) -> MappingProxyType[tuple[str, str], tuple[str, ...]]:
    return MappingProxyType({(f"transformers.models.{n}.modeling_{n}", cls): tuple(c) for n, cls, *c in rows})


UNCALLED = _by_class(_UNCALLED)
CAST_TO = _by_class(_CAST_TO)


def is_uncalled(model: nn.Module, key: str) -> bool:
    """Whether the module around the layer `key` reads its weight and never calls it."""
    return _is_listed(UNCALLED, model, key)


def needs_dense(model: nn.Module, key: str) -> bool:
    """Whether the module around the layer `key` reads its weight, or the weight's dtype, so that it has to be dense."""
    return _is_listed(UNCALLED, model, key) or _is_listed(CAST_TO, model, key)


def _is_listed(table: MappingProxyType[tuple[str, str], tuple[str, ...]], model: nn.Module, key: str) -> bool:
    parent, _, child = key.rpartition(".")
    kinds = type(model.get_submodule(parent)).__mro__
    return any(child in table.get((kind.__module__, kind.__qualname__), ()) for kind in kinds)
