"""Projections that a model calls one after another with the same x (q, k and v; gate and up), computed together.

`SharedInput` ties such layers. When the first of them is called, `lora_linear_shared` makes the outputs of all; each of
the others, called with that very x, takes its own. The model's code stays as it is, and a layer that is called with
anything else, or that would now compute from anything else than it did, runs by itself: so a group changes what is
computed when, and never what is computed. `share_inputs` ties the layers of a model, `share_input` those it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.backend import current_backend
from peftkern.ops import lora_linear_shared
from peftkern.ops._common import autocast_dtype
from peftkern.ops.lora_linear_shared import shared_plan_for
from peftkern.ops.plan import ONE_BY_ONE, Plan, plan_shared
from peftkern.tuners.fusing import compute_dtype
from peftkern.tuners.lora.layer import Linear

# Children of one module that its forward gives the same tensor, in the order of their calls.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# `model_type`s of transformers' decoders where all modules with such children do so (tests run each of them).
MODEL_TYPES = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral")
    + ("olmo", "olmo2", "phi", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2")
)
# Times in a row that outputs were left lying before a group gives up: its layers do not share their input after all.
MOST_MISSES = 3


class SharedInput:
    """Layers that are called one after another with the same x.

    Args:
        layers: two or more, each a `Linear` of `peftkern.tuners.lora`, in the order of their calls.
        names: a name of each.
    """

    def __init__(self, layers: tuple[Any, ...], names: tuple[str, ...]) -> None:
        self.layers, self.names = layers, names
        self._misses = 0
        self._left: _Left | None = None

    def forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `layer`, one of the group, for x; None where it has to compute it by itself."""
        # Changes in place of an inference tensor cannot be told.
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or x.is_inference():
            return None
        if layer is self.layers[0]:
            return self._all(x)
        left = self._left
        if left is None or left.x is not x or left.version != x._version or left.modes != _modes(x):
            return None
        y, key = left.outputs.pop(layer, (None, None))
        if not left.outputs:
            self._left, self._misses = None, 0
        return y if y is not None and key == _key(layer._operands()) else None

    def _all(self, x: torch.Tensor) -> torch.Tensor | None:
        """The first layer's output; those of the others are left for them to take."""
        if self._left is not None:
            self._left = None
            self._misses += 1
        if self._misses >= MOST_MISSES:
            return None
        found = self._operands(x)
        if found is None:
            return None
        each, operands, dtype, p = found
        if shared_plan_for(x, operands[0], operands[1], current_backend()).path == ONE_BY_ONE:
            return None
        ys = lora_linear_shared(x.to(dtype), *operands, dropout_p=p)
        y, *others = ys if dtype == x.dtype else [y.to(x.dtype) for y in ys]
        keys = [_key(own) for own in each[1:]]
        if None in keys:
            return y
        outputs = {layer: pair for layer, *pair in zip(self.layers[1:], others, keys, strict=True)}
        self._left = _Left(x, outputs)
        return y

    def _operands(self, x: torch.Tensor) -> tuple[list[Any], tuple[Any, ...], torch.dtype, float] | None:
        """Each layer's operands, (weights, As, Bs, scalings, biases), the dtype to compute in, and the dropout; None if
        they do not go together."""
        each: list[Any] = [layer._operands() for layer in self.layers]
        if any(operands is None for operands in each):
            return None
        weights, *adapters, biases, ps = zip(*each, strict=True)
        As, Bs, scalings = adapters
        quantized = [not isinstance(weight, torch.Tensor) for weight in weights]
        dtypes = {compute_dtype(layer.base_layer, x.dtype) for layer in self.layers} if any(quantized) else {x.dtype}
        if len(set(ps)) > 1 or len(dtypes) > 1 or len(set(quantized)) > 1:
            return None
        (dtype,) = dtypes
        if quantized[0]:  # as the layer by itself does
            fits = (dtype, torch.float32)
            As, Bs, biases = (
                tuple(t if t is None or t.dtype in fits else t.to(dtype) for t in given) for given in (As, Bs, biases)
            )
        return each, (weights, As, Bs, scalings, biases), dtype, ps[0]

    def plan(self, alone: Plan, tokens: int) -> Plan:
        """The plan of a layer of the group for `tokens` rows, given that by itself: the same path, with others."""
        names = ", ".join(self.names)
        if self._misses >= MOST_MISSES:
            return Plan(alone.path, f"{alone.reason}; by itself: {names} were seen to have other inputs")
        if plan_shared([layer.plan_alone(tokens) for layer in self.layers]).path in (ONE_BY_ONE, "unfused"):
            return alone
        return Plan(alone.path, f"{alone.reason}; one shrink, dX and dA pass for {names} in eager mode")

    def __getstate__(self) -> dict[str, Any]:
        """Without outputs that are left: they belong to a forward of the original."""
        return {"layers": self.layers, "names": self.names, "_misses": self._misses, "_left": None}


class _Left:
    """Outputs that wait for their layers' calls: (output, key) by layer, for x in this state, under these modes."""

    __slots__ = ("modes", "outputs", "version", "x")

    def __init__(self, x: torch.Tensor, outputs: dict[Any, Any]) -> None:
        self.x, self.outputs = x, outputs
        self.version, self.modes = x._version, _modes(x)


def _modes(x: torch.Tensor) -> tuple[Any, ...]:
    return torch.is_grad_enabled(), autocast_dtype(x)


def _key(operands: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """All that a layer computes from, beside x, by identity and version; None where that cannot be told."""
    if operands is None:
        return None
    weight, A, B, scaling, bias, p = operands
    stored = [weight] if isinstance(weight, torch.Tensor) else [t for t in weight.tensors() if t is not None]
    tensors = [t for t in (*stored, A, B, bias) if t is not None]
    if any(t.is_inference() for t in tensors):
        return None
    return scaling, p, *((t.data_ptr(), t._version, t.requires_grad) for t in tensors)


def share_input(*layers: Any) -> None:
    """Tell LoRA layers that they are always called one after another, in this order, with the very same tensor.

    They are then computed together: one pass over x for all shrinks, one dX and one pass for dA. With dropout they drop
    the same elements of x. Results are as before otherwise, whatever the layers are called with; backward serves all
    outputs at once, so that a second backward through another of them needs `retain_graph=True`. Each runs by itself
    under torch.compile, in `torch.inference_mode()`, and where `explain` says so.

    Args:
        layers: two or more `peftkern.nn.LoraLinear`, or LoRA layers of a model, of the same in_features.

    Raises:
        TypeError: one of them is no LoRA layer on a linear layer.
        ValueError: fewer than two, one twice, or in_features that differ.
    """
    for layer in layers:
        if not isinstance(layer, Linear):
            raise TypeError(f"layers: expected LoRA layers on linear layers, got {type(layer).__name__}")
    if len(set(layers)) < max(2, len(layers)):
        raise ValueError(f"layers: expected two or more, each once, got {len(layers)} ({len(set(layers))} different)")
    sizes = {layer.in_features for layer in layers}
    if len(sizes) > 1:
        raise ValueError(f"layers: expected the same in_features, got {[layer.in_features for layer in layers]}")
    _tie(layers, tuple(f"layer {i}" for i in range(len(layers))))


def share_inputs(model: nn.Module, enabled: bool = True) -> list[tuple[str, ...]]:
    """Tie the LoRA layers of a model that are called with the same tensor, as told by their names; see `share_input`.

    Those are q_proj, k_proj and v_proj, and gate_proj and up_proj, where they are children of one module.
    `get_peft_model` has done so already for transformers' decoders that are known to (`MODEL_TYPES`); for a model of
    your own call it if its forward gives these children the same tensor.

    Args:
        model: any module that has LoRA layers.
        enabled: False unties them, for good: adapters that are added later do not tie them again.

    Returns:
        The names of each group's layers.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    groups = []
    for prefix, parent in model.named_modules():
        for names in PROJECTIONS:
            found = [(name, parent._modules.get(name)) for name in names]
            present = [(name, layer) for name, layer in found if isinstance(layer, Linear)]
            if len(present) < 2:
                continue
            if enabled:
                _tie([layer for _, layer in present], tuple(name for name, _ in present))
            else:
                for _, layer in present:
                    layer.__dict__["_shared_input"] = None
            groups.append(tuple(f"{prefix}.{name}" if prefix else name for name, _ in present))
    return groups


def share_known_inputs(model: nn.Module) -> None:
    """`share_inputs` for a model that is known to call its layers so, but for layers that were untied."""
    if getattr(getattr(model, "config", None), "model_type", None) not in MODEL_TYPES:
        return
    untied = [m for m in model.modules() if m.__dict__.get("_shared_input", m) is None]
    share_inputs(model)
    for layer in untied:
        layer.__dict__["_shared_input"] = None


def _tie(layers: Any, names: tuple[str, ...]) -> None:
    group = SharedInput(tuple(layers), names)
    for layer in layers:
        layer.__dict__["_shared_input"] = group
