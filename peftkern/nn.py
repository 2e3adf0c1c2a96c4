"""LoRA, DoRA and IA3 layers by themselves, for a training loop that has no use for configurations.

They are the layers that `get_peft_model` puts into a model, with one adapter named "default": `merge`, `unmerge`,
`state_dict` keys and `explain` are the same. `save_adapter(network, folder)` writes all those of a network in PEFT's
files, `load_adapter` reads them into such a network again. In a model that `get_peft_model` adapts they are part of the
base: their adapter stays active and is frozen, and switching, merging and saving leave it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.layer_files import ADAPTER, load_adapter, save_adapter
from peftkern.ops._common import check_float_dtype
from peftkern.tuners.ia3 import IA3Config
from peftkern.tuners.ia3.layer import Linear as IA3LinearLayer
from peftkern.tuners.lora.config import LoraConfig, starts_plain
from peftkern.tuners.lora.dora import add_magnitude
from peftkern.tuners.lora.embedding import Embedding
from peftkern.tuners.lora.layer import Linear
from peftkern.tuners.lora.shared_input import share_input
from peftkern.tuners.targets import is_linear
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.linear_layers import is_quantizable
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit
from peftkern.weights import QUANT_TYPES

__all__ = ["IA3Linear", "LoraEmbedding", "LoraLinear", "load_adapter", "save_adapter", "share_input"]


def _finish(layer: BaseTunerLayer, adapter_dtype: torch.dtype | None) -> None:
    """Freezes the base and gives the adapter its dtype: float32 beside a 16-bit base unless another is asked for."""
    layer.get_base_layer().requires_grad_(False)
    containers: list[Any] = layer._containers()
    for container in containers:
        for name, held in list(container.items()):
            dtype = next(held.parameters()).dtype if isinstance(held, nn.Module) else held.dtype
            wanted = adapter_dtype or (torch.float32 if dtype.itemsize < 4 else dtype)
            if isinstance(held, nn.Module):
                held.to(wanted)
            else:
                container[name] = nn.Parameter(held.detach().to(wanted))
    for name in getattr(layer, "lora_magnitude_vector", ()):
        add_magnitude(layer, name)  # anew, not rounded to the base's dtype


def _check(adapter_dtype: Any, dtype: Any = None, **sizes: Any) -> None:
    """Raises TypeError or ValueError for a size or dtype that no layer can have, before anything is made or frozen."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")
    check_float_dtype("dtype", dtype)
    check_float_dtype("adapter_dtype", adapter_dtype)


def _check_initialization(config: LoraConfig) -> None:
    """Raises ValueError for one that changes or reads the base weight, of which the layer's file would not tell."""
    init = config.init_lora_weights
    if not starts_plain(init):
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian' for a layer by itself, got {init!r}")


def _check_linear(linear: Any) -> None:
    """Raises TypeError for what `from_linear` cannot put an adapter on."""
    if isinstance(linear, BaseTunerLayer):
        kind = type(linear).__name__
        raise TypeError(f"linear: this {kind} has an adapter already; for a new one give its get_base_layer()")
    if not is_linear(linear):
        raise TypeError(f"linear must be an nn.Linear, a Conv1D or a quantized one, got {type(linear).__name__}")


def _quantized(linear: nn.Module, quantization: str | None) -> nn.Module:
    """`linear` with its weight in 4 or 8 bits, or itself if `quantization` is None."""
    if quantization is None:
        return linear
    if quantization not in (*QUANT_TYPES, "int8"):
        raise ValueError(f"quantization: expected one of {', '.join(QUANT_TYPES)}, int8 or None, got {quantization!r}")
    if not is_quantizable(linear):
        raise TypeError(
            f"quantization={quantization!r}: expected an nn.Linear or a Conv1D to quantize, got {type(linear).__name__}"
        )
    if quantization == "int8":
        return Linear8bit.from_linear(linear)
    return Linear4bit.from_linear(linear, quantization)


class LoraLinear(Linear):
    """A frozen linear layer and a trained low-rank adapter: `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        in_features, out_features: Sizes of the layer.
        r: Rank of the adapter, at least 1.
        lora_alpha: Numerator of the scaling, `lora_alpha / r`.
        lora_dropout: Probability that an element of x is dropped on its way to the adapter in training, in [0, 1).
        bias: Whether the frozen layer has a bias.
        use_rslora: Scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: True, False or "gaussian": see `LoraConfig`.
        device, dtype: Of the frozen layer; the adapter lies on the same device.
        adapter_dtype: Of the adapter; None: float32 beside a 16-bit or quantized layer, otherwise the layer's.
        quantization: "nf4", "fp4" or "int8" to store the frozen layer in 4 or 8 bits (blocks of 64 with double
            quantization); None to leave it as it is. A layer's own settings: give `from_linear` a `Linear4bit`.
        use_dora: Train a magnitude for each output too: see `LoraConfig`.

    Raises:
        ValueError, TypeError: A number outside its range, or a layer that is not linear.
    """

    stands_alone = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: int | float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        quantization: str | None = None,
        use_dora: bool = False,
    ) -> None:
        _check(adapter_dtype, dtype, in_features=in_features, out_features=out_features)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
        )
        linear = _quantized(nn.Linear(in_features, out_features, bias, device, dtype), quantization)
        self._wrap(linear, config, adapter_dtype)

    def _wrap(self, linear: nn.Module, config: LoraConfig, adapter_dtype: torch.dtype | None) -> None:
        _check_initialization(config)
        super().__init__(linear, ADAPTER, config)
        _finish(self, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: int | float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        quantization: str | None = None,
        use_dora: bool = False,
    ) -> LoraLinear:
        """Adds an adapter to a linear layer: an `nn.Linear`, transformers' Conv1D, or a quantized one of peftkern or
        bitsandbytes. It is kept by reference, and frozen; with `quantization` a copy in fewer bits is kept instead.

        The other arguments are the class's.
        """
        _check_linear(linear)
        _check(adapter_dtype)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
        )
        layer = cls.__new__(cls)
        layer._wrap(_quantized(linear, quantization), config, adapter_dtype)
        return layer


class LoraEmbedding(Embedding):
    """A frozen embedding and a trained low-rank adapter: `y = W[i] + scaling * (A[:, i])^T B^T`.

    Args:
        num_embeddings, embedding_dim: Sizes of the embedding.
        r, lora_alpha, use_rslora, use_dora: As in `LoraLinear`.
        init_lora_weights: True: A zero and B normal. False: both normal.
        padding_idx: As in `nn.Embedding`: an id whose row is not trained.
        device, dtype, adapter_dtype: As in `LoraLinear`.
    """

    stands_alone = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        lora_alpha: int | float = 8,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> None:
        _check(adapter_dtype, dtype, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and padding_idx not in range(-num_embeddings, num_embeddings):
            raise ValueError(f"padding_idx: expected None or an id of the {num_embeddings}, got {padding_idx!r}")
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
        )
        made: dict[str, Any] = {"padding_idx": padding_idx, "device": device, "dtype": dtype}
        self._wrap(nn.Embedding(num_embeddings, embedding_dim, **made), config, adapter_dtype)

    def _wrap(self, embedding: nn.Embedding, config: LoraConfig, adapter_dtype: torch.dtype | None) -> None:
        _check_initialization(config)
        super().__init__(embedding, ADAPTER, config)
        _finish(self, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: int | float = 8,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> LoraEmbedding:
        """Adds an adapter to an `nn.Embedding`; it is kept by reference, and frozen.

        The other arguments are the class's.
        """
        if isinstance(embedding, BaseTunerLayer):
            kind = type(embedding).__name__
            raise TypeError(f"embedding: this {kind} has an adapter already; for a new one give its get_base_layer()")
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        _check(adapter_dtype)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
        )
        layer = cls.__new__(cls)
        layer._wrap(embedding, config, adapter_dtype)
        return layer


class IA3Linear(IA3LinearLayer):
    """A frozen linear layer and a learned vector: `y = (x W^T + b) * l`, or `y = (x * l) W^T + b` if feed-forward.

    Args:
        in_features, out_features: Sizes of the layer.
        is_feedforward: Scale the input rather than the output.
        bias: Whether the frozen layer has a bias.
        init_ia3_weights: Start from ones, which change nothing; False: from normal numbers.
        device, dtype, adapter_dtype, quantization: As in `LoraLinear`.

    Raises:
        ValueError, TypeError: A number outside its range, or a layer that is not linear.
    """

    stands_alone = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        is_feedforward: bool = False,
        bias: bool = True,
        init_ia3_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        quantization: str | None = None,
    ) -> None:
        _check(adapter_dtype, dtype, in_features=in_features, out_features=out_features)
        linear = _quantized(nn.Linear(in_features, out_features, bias, device, dtype), quantization)
        self._wrap(linear, is_feedforward, init_ia3_weights, adapter_dtype)

    def _wrap(
        self, linear: nn.Module, is_feedforward: bool, init_ia3_weights: bool, adapter_dtype: torch.dtype | None
    ) -> None:
        super().__init__(linear, ADAPTER, IA3Config(init_ia3_weights=init_ia3_weights), is_feedforward)
        _finish(self, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        is_feedforward: bool = False,
        init_ia3_weights: bool = True,
        adapter_dtype: torch.dtype | None = None,
        quantization: str | None = None,
    ) -> IA3Linear:
        """Adds a vector to a linear layer: an `nn.Linear`, transformers' Conv1D, or a quantized one of peftkern or
        bitsandbytes. It is kept by reference, and frozen; with `quantization` a copy in fewer bits is kept instead.

        The other arguments are the class's.
        """
        _check_linear(linear)
        _check(adapter_dtype)
        layer = cls.__new__(cls)
        layer._wrap(_quantized(linear, quantization), is_feedforward, init_ia3_weights, adapter_dtype)
        return layer
