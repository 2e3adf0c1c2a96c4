"""Projections that a model calls one after another with the same x (q, k and v; gate and up), computed together.

`SharedInput` ties such layers. When the first of them is called, `lora_linear_shared` makes the outputs of all; each of
the others, called with that very x, takes its own. The model's code stays as it is, and a layer that is called with
anything else, or that would now compute from anything else than it did, runs by itself: so a group changes what is
computed when, and never what is computed. `share_inputs` ties the layers of a model, `share_input` those it is given.

In eager mode the group keeps the outputs for the length of a forward. Under torch.compile it keeps nothing, since
Python that is traced cannot see whether a tensor was changed, nor leave anything behind in a checkpointed region: there
the outputs wait with what traces the graph (`ops._lora_linear_traced`), and the layers of one graph go together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftkern.backend import current_backend
from peftkern.ops import lora_linear_shared, multi_lora_linear_shared
from peftkern.ops._common import adapters_fit, autocast_dtype, needs_operator, storage, stream_of
from peftkern.ops._lora_linear_traced import fitting_dtypes, traced_first, traced_next
from peftkern.ops.lora_linear_shared import is_looked_at, launched_apart, run_eagerly, shared_plan_for
from peftkern.ops.lora_linear_shared import run as lora_linear_shared_on
from peftkern.ops.multi_lora_linear_shared import shared_plan_for as shared_plan_for_many
from peftkern.ops.plan import APART, DECODE_PATHS, JOINED_ELEMENTS, MOST_PROJECTIONS, Plan, plan_shared
from peftkern.tuners.fusing import compute_dtype, has_global_hooks
from peftkern.tuners.lora.layer import Linear
from peftkern.utils.module_tree import modules_of, named_modules_of
from peftkern.utils.other import batch_in_force

# Children of one module that its forward gives the same tensor, in the order of their calls.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# `model_type`s of transformers' decoders where all modules with such children do so (tests run each of them).
MODEL_TYPES = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral")
    + ("olmo", "olmo2", "phi", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2")
)
# Outputs, the key of each but the first, and what keys name by its address only, to be kept alive.
_Found = tuple[tuple[torch.Tensor, ...], list[Any], Sequence[Any]]
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
        self._decided: _Decided | None = None

    def forward(self, layer: Any, x: torch.Tensor, mixed: Any = None) -> torch.Tensor | None:
        """The output of `layer`, one of the group, for x; None where it has to compute it by itself.

        Args:
            layer: one of the group.
            x: its input.
            mixed: the batch of many adapters (`LayerBatch`) that its forward serves, if it serves one.
        """
        if torch.compiler.is_compiling():
            return None if mixed is not None or not isinstance(x, torch.Tensor) else self._traced(layer, x)
        if not isinstance(x, torch.Tensor) or self.leaves(x):
            return None
        if x.is_inference() and self._hooked():
            return None
        if layer is self.layers[0]:
            return self._all(x, mixed is not None)
        left = self._left
        if left is None or left.x is not x or left.version != _version(x) or left.modes != _modes(x):
            return None
        y, key = left.outputs.pop(layer, (None, None))
        if not left.outputs:
            self._left, self._misses = None, 0
        if y is None:
            return None
        return y if key == (_key(layer, layer._operands()) if mixed is None else _key_of_many(layer, mixed)) else None

    def leaves(self, x: torch.Tensor) -> bool:
        """Whether each layer is to compute its output of x by itself: none wait, and x has few elements."""
        return self._left is None and _is_few(x)

    def _hooked(self) -> bool:
        """Whether anything runs between the layers' calls that could change x in place, beside the model's own code."""
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        return has_global_hooks() or any(layer.__dict__[kind] for layer in self.layers for kind in hooks)

    def _all(self, x: torch.Tensor, many: bool) -> torch.Tensor | None:
        """The first layer's output; those of the others are left for them to take."""
        if self._left is not None:
            self._left = None
            self._misses += 1
        if self._misses >= MOST_MISSES or _is_few(x):
            return None
        found = self._outputs_of_many(x) if many else self._outputs(x)
        if found is None:
            return None
        ys, keys, held = found
        self._left = _Left(x, {layer: pair for layer, *pair in zip(self.layers[1:], ys[1:], keys, strict=True)}, held)
        return ys[0]

    def _outputs(self, x: torch.Tensor) -> _Found | None:
        """Each layer's output with its one adapter; None if they do not go together."""
        each: list[Any] = [layer._operands() for layer in self.layers]
        if None in each:
            return None
        keys = [_key(*pair) for pair in zip(self.layers[1:], each[1:], strict=True)]
        if None in keys:
            return None
        weights, As, Bs, scalings, biases, ps = zip(*each, strict=True)
        situation = None if needs_operator(x, *As, *Bs) else self._situation(x, each)
        decided = self._decided
        if decided is not None and decided.situation == situation:
            return run_eagerly(x, weights, As, Bs, scalings, biases, ps[0], None, decided.path), keys, weights
        ys = self._outputs_in_general(x, each, situation)
        return None if ys is None else (ys, keys, weights)

    def _outputs_in_general(
        self, x: torch.Tensor, each: Sequence[Any], situation: list[Any] | None
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs, whatever is to be decided, converted or refused first; see `_Decided` for `situation`."""
        weights, As, Bs, scalings, biases, ps = zip(*each, strict=True)
        dtype = self._dtype(x, weights)
        if len(set(ps)) > 1 or dtype is None:
            return None
        given = (x, *As, *Bs, *biases)
        As, Bs, biases = (tuple(fitting_dtypes(t, dtype, weights[0])) for t in (As, Bs, biases))
        rows = x if x.dtype is dtype else x.to(dtype)
        path = shared_plan_for(rows, weights, As, Bs, biases, current_backend()).path
        if path == APART:
            return None
        fit = all(adapters_fit(rows, *operands) for operands in zip(weights, As, Bs, biases, strict=True))
        if fit and autocast_dtype(rows) in (None, rows.dtype):
            learned = any(isinstance(t, torch.Tensor) and t.requires_grad for t in (*weights, *biases))
            as_given = all(map(operator.is_, given, (rows, *As, *Bs, *biases)))
            looked_at = is_looked_at(x, weights, As, Bs, biases)
            if situation is not None and as_given and not learned and not looked_at:
                self._decided = _Decided(situation, path)
            ys = lora_linear_shared_on(rows, weights, As, Bs, scalings, biases, ps[0], None, path)
        else:  # autocast to another dtype, or something to be refused
            ys = lora_linear_shared(rows, weights, As, Bs, scalings, biases, dropout_p=ps[0])
        if ys[0].dtype is not x.dtype and not isinstance(weights[0], torch.Tensor):  # as the layer by itself
            ys = tuple(y.to(x.dtype) for y in ys)
        return ys

    def _situation(self, x: torch.Tensor, each: Sequence[Any]) -> list[Any]:
        """All that `_outputs_in_general` decides by."""
        found = [x.dtype, x.shape, x.stride(), x.device, current_backend(), autocast_dtype(x)]
        for layer, (weight, A, B, _, bias, p) in zip(self.layers, each, strict=True):
            found += layer._modules["base_layer"].__dict__.get("compute_dtype"), p, A.shape, A.dtype, A.data_ptr()
            found += B.shape, B.dtype, B.data_ptr(), A.stride(), B.stride()
            found += weight.shape, weight.device, storage(weight)
            if isinstance(weight, torch.Tensor):
                found.append(weight.requires_grad)
            if bias is not None:
                found += bias.shape, bias.stride(), bias.dtype, bias.device, bias.requires_grad
        return found

    def _traced(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """`forward` under torch.compile, which this leaves no state of: see `ops._lora_linear_traced`."""
        is_first = layer is self.layers[0]
        # What an A was made of is not seen there, so that its output would not be known again.
        if not all(one.factors_are_kept for one in self.layers):
            return None
        # A layer that is compiled by itself would have the others computed for nothing.
        if self._misses >= MOST_MISSES or any(each._compiled_call_impl is not None for each in self.layers):
            return None
        each: list[Any] = [one._operands() for one in (self.layers if is_first else (layer,))]
        if any(operands is None for operands in each):
            return None
        dtype = self._dtype(x, [operands[0] for operands in each])
        if dtype is None or (dtype is not x.dtype and autocast_dtype(x) not in (None, dtype)):
            return None  # in the last case each rounds x twice
        return traced_first(x, each, dtype) if is_first else traced_next(x, each[0], dtype)

    def _outputs_of_many(self, x: torch.Tensor) -> _Found | None:
        """Each layer's output for a batch whose rows want different adapters; None if they do not go together."""
        batches = [batch_in_force(layer) for layer in self.layers]
        for layer, mixed in zip(self.layers, batches, strict=True):
            if mixed is None or mixed.batch is not batches[0].batch:
                return None
            if layer.training is not mixed.training:
                mixed.decide(layer)
            if mixed.empty or mixed.biased or not mixed.fused or mixed.dropout_p != batches[0].dropout_p:
                return None
        weights = [layer._weight_by_rows() for layer in self.layers]
        dtype = self._dtype(x, weights)
        if dtype is None:
            return None
        for mixed in batches:
            mixed.settle()
        keys = [_key_of_many(*pair) for pair in zip(self.layers[1:], batches[1:], strict=True)]
        if None in keys:
            return None
        pools, biases = [mixed.pool for mixed in batches], [layer.base_layer.bias for layer in self.layers]
        if shared_plan_for_many(x, weights, pools, biases, current_backend()).path == APART:
            return None
        p = batches[0].dropout_p
        ys = multi_lora_linear_shared(x.to(dtype), weights, pools, batches[0].batch, biases, dropout_p=p)
        if not isinstance(weights[0], torch.Tensor):  # as the layer by itself; a dense one has autocast's dtype
            ys = tuple(y.to(x.dtype) for y in ys)
        return ys, keys, ()

    def _dtype(self, x: torch.Tensor, weights: Sequence[Any]) -> torch.dtype | None:
        """What to compute in: x's dtype, or that of quantized layers; None if they do not agree."""
        quantized = {not isinstance(weight, torch.Tensor) for weight in weights}
        dtypes = {compute_dtype(layer.base_layer, x.dtype) for layer in self.layers} if True in quantized else {x.dtype}
        return dtypes.pop() if len(dtypes) == len(quantized) == 1 else None

    def plan(self, alone: Plan, tokens: int) -> Plan:
        """The plan of a layer of the group for `tokens` rows, given that by itself: the same path, with others."""
        names = ", ".join(self.names)
        if self._misses >= MOST_MISSES:
            return Plan(alone.path, f"{alone.reason}; by itself: {names} were seen to have other inputs")
        if any(layer.use_dora[name] for layer in self.layers for name in layer._active_here()):
            return Plan(alone.path, f"{alone.reason}; by itself: a layer of {names} has DoRA")
        decodes, unlike = alone.path in DECODE_PATHS, ""
        if decodes:
            each: list[Any] = [layer._operands() for layer in self.layers]
            if not any(operands is None for operands in each):
                weights, As, Bs, _, biases, _ = zip(*each, strict=True)
                unlike = launched_apart(weights, As, Bs, biases)
        plans = [layer.plan_alone(tokens) for layer in self.layers]
        shared = plan_shared(plans, tokens * self.layers[0].in_features, unlike)
        if shared.path in (APART, "unfused"):
            told = unlike or (decodes and len(self.layers) > MOST_PROJECTIONS)
            return Plan(alone.path, shared.reason) if told else alone
        what = "two launches" if decodes else "one shrink, dX and dA pass"
        return Plan(alone.path, f"{alone.reason}; {what} for {names}")

    def __getstate__(self) -> dict[str, Any]:
        """Without outputs that are left: they belong to a forward of the original."""
        return {"layers": self.layers, "names": self.names, "_misses": self._misses, "_left": None, "_decided": None}


class _Decided(NamedTuple):
    """What was decided where nothing was to be converted, for the next x and operands of which all is the same that
    decisions go by."""

    situation: list[Any]
    path: str


class _Left:
    """Outputs that wait for their layers' calls: (output, key) by layer, for x in this state, under these modes."""

    __slots__ = ("held", "modes", "outputs", "version", "x")

    def __init__(self, x: torch.Tensor, outputs: dict[Any, Any], held: Sequence[Any]) -> None:
        self.x, self.outputs, self.held = x, outputs, held
        self.version, self.modes = _version(x), _modes(x)


def _is_few(x: torch.Tensor) -> bool:
    """Whether the plan would keep the layers apart for this x; told here at a lower price."""
    return x.is_cpu and x.numel() <= JOINED_ELEMENTS


def _version(x: torch.Tensor) -> int | None:
    """Changes whenever x is changed in place; None of an inference tensor, which does not tell."""
    return None if x.is_inference() else x._version


def _modes(x: torch.Tensor) -> tuple[Any, ...]:
    return torch.is_grad_enabled(), autocast_dtype(x), stream_of(x)


def _key(layer: Any, operands: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """All that `layer`, with these operands, computes from, beside x, by identity and version; None where that cannot
    be told."""
    if operands is None:
        return None
    weight, A, B, scaling, bias, p = operands
    parts = (*layer._told_by(A, B), bias)
    if isinstance(weight, torch.Tensor):
        return _states((weight, *parts), scaling, p)
    # It is put together anew if one of its tensors is another, or lies elsewhere: only their versions are left to tell.
    return _states(parts, scaling, p, id(weight), told=weight.tensors())


def _key_of_many(layer: Any, mixed: Any) -> tuple[Any, ...] | None:
    """The same of a layer that serves a batch of many adapters."""
    pool, weight = mixed.pool, layer._weight_by_rows()
    stored = (weight,) if isinstance(weight, torch.Tensor) else weight.tensors()
    entries = (t for entry in pool.entries if entry is not None for t in (entry.lora_A, entry.lora_B))
    tensors = (*stored, pool.pool_a, pool.pool_b, layer.base_layer.bias, *entries)
    return _states(tensors, mixed, mixed.dropout_p, pool.layout, pool.scalings)


def _states(
    tensors: Sequence[torch.Tensor | None], *others: Any, told: Sequence[torch.Tensor | None] = ()
) -> tuple[Any, ...] | None:
    found = [*others]
    try:
        for t in tensors:
            if t is not None:
                found += t.data_ptr(), t._version, t.requires_grad
        found += [t._version for t in told if t is not None]
    except RuntimeError:  # an inference tensor has no version
        return None
    return tuple(found)


def share_input(*layers: Any) -> None:
    """Tell LoRA layers that they are always called one after another, in this order, with the very same, unchanged x.

    They are then computed together: one pass over x for all shrinks, one dX and one pass for dA; two launches for up to
    four of them where there are at most 16 tokens. With dropout they drop
    the same elements of x. Results are as before otherwise, whatever the layers are called with; backward serves all
    outputs at once, so that a second backward through another of them needs `retain_graph=True`. Each runs by itself
    where `explain` says so, and in a compiled model in inference mode or where a batch's rows want different adapters.
    Compile a block or a model, or a single layer by its own `compile()`: a graph that has the first of them and not the
    others computes those for nothing.

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
    `get_peft_model` has done so already for transformers' decoders that are known to (`MODEL_TYPES`), also inside of
    other models; for a model of your own call it if its forward gives these children the same tensor.

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
    for prefix, parent in named_modules_of(model):
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
    """`share_inputs` for a model that is known to call its layers so, or holds such a one, as a model that sees and
    reads holds the one that reads; but for layers that were untied."""
    untied = [m for m in modules_of(model) if m.__dict__.get("_shared_input", m) is None]
    done: tuple[str, ...] = ()
    for name, module in named_modules_of(model):
        if not name.startswith(done) and getattr(getattr(module, "config", None), "model_type", None) in MODEL_TYPES:
            share_inputs(module)
            done = (*done, f"{name}." if name else "")
    for layer in untied:
        layer.__dict__["_shared_input"] = None


def _tie(layers: Any, names: tuple[str, ...]) -> None:
    group = SharedInput(tuple(layers), names)
    for layer in layers:
        layer.__dict__["_shared_input"] = group
