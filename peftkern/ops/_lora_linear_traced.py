"""Layers that a traced model calls one after another with the same x, computed by one `peftkern::lora_linear_shared`.

The first layer's call is `peftkern::lora_linear_first`, those of the others are `peftkern::lora_linear_next`. Each
means the `lora_linear` of its own layer, whatever was called before it. Both are composite operators: Dynamo takes them
as they are, and what traces its graph next (AOTAutograd, which decomposes what is above autograd) runs their Python.
There the first makes the outputs of all and leaves them with the tracer, and each of the others takes its own if x and
all that it computes from are still the very same tensors, unchanged, under the same modes. Otherwise, and where nothing
was left, it computes its own. So nothing is remembered by layers or between graphs: a tracer (the mode that makes
tensors functional) lives as long as one graph is being traced, and neither a graph break, nor a recompilation, nor a
change in place can lead to an output of anything else. What remains of a group whose graph has its first layer only is
that the others were computed for nothing.

A cache of compiled graphs is keyed by these calls and holds what they became, which therefore has to follow from their
arguments alone: plans are made before, and are arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peftkern.backend import backend_in_force
from peftkern.ops._common import autocast_dtype, draw_seed, in_dtype
from peftkern.ops._lora_linear_shared_operator import call_operator, flatten_all, unflatten_all
from peftkern.ops.lora_linear import _operator as dense_operator
from peftkern.ops.lora_linear import plan_for as plan_for_dense
from peftkern.ops.lora_linear_quantized import _operator as quantized_operator
from peftkern.ops.lora_linear_quantized import flatten
from peftkern.ops.lora_linear_quantized import plan_for as plan_for_quantized
from peftkern.ops.lora_linear_shared import _check as check_operands
from peftkern.ops.lora_linear_shared import shared_plan_for
from peftkern.ops.plan import APART

_LIBRARY = torch.library.Library("peftkern", "FRAGMENT")
_OPTIONS = "float dropout_p, ScalarType dtype, ScalarType out_dtype"
_LIBRARY.define(
    "lora_linear_first(Tensor x, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] tensors, SymInt[] numbers, "
    f"Tensor?[] biases, float[] scalings, str path_alone, str path, {_OPTIONS}) -> Tensor"
)
_LIBRARY.define(
    "lora_linear_next(Tensor x, Tensor lora_A, Tensor lora_B, Tensor[] tensors, SymInt[] numbers, "
    f"Tensor? bias, float scaling, str path, {_OPTIONS}) -> Tensor"
)
_NAME = "_peftkern_left"  # of the attribute of a tracer
# Tensors, so that their memory is not another's meanwhile; their states, None if not known; numbers.
_Key = tuple[list[Any], list[Any] | None, tuple[Any, ...]]


def traced_first(x: torch.Tensor, each: Sequence[Sequence[Any]], dtype: torch.dtype) -> torch.Tensor | None:
    """`lora_linear` of the first of layers with the same x, which makes the outputs of all; None if they do not go
    together.

    Args:
        x: [..., K].
        each: (weight, lora_A, lora_B, scaling, bias, dropout) of each layer.
        dtype: what to compute in, but for autocast.

    Raises:
        TypeError, ValueError: as `lora_linear_shared`.
    """
    weights, lora_As, lora_Bs, scalings, biases, ps = zip(*each, strict=True)
    learned = [t for t in (*weights, *biases) if isinstance(t, torch.Tensor)]
    if len(set(ps)) > 1 or any(t.requires_grad for t in learned):
        return None
    prepared = [_prepared(x, operands, dtype) for operands in each]
    rows, _, out_dtype = prepared[0]
    fit_weights, fit_As, fit_Bs, fit_biases = zip(*(fitting for _, fitting, _ in prepared), strict=True)
    backend = backend_in_force()
    path = shared_plan_for(rows, fit_weights, fit_As, fit_Bs, fit_biases, backend).path
    if path == APART:
        return None
    return torch.ops.peftkern.lora_linear_first(
        x,
        list(lora_As),
        list(lora_Bs),
        *flatten_all(weights),
        list(biases),
        [float(scaling) for scaling in scalings],
        _path_alone(rows, weights[0], lora_As[0], backend),
        path,
        ps[0],
        rows.dtype,
        out_dtype,
    )


def traced_next(x: torch.Tensor, operands: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """`lora_linear` of a later layer, with arguments as for `traced_first`: by then it may have been computed."""
    weight, lora_A, lora_B, scaling, bias, p = operands
    rows, _, out_dtype = _prepared(x, operands, dtype)
    path = _path_alone(rows, weight, lora_A, backend_in_force())
    parts = (lora_A, lora_B, *flatten_all([weight]), bias, float(scaling), path, p, rows.dtype, out_dtype)
    return torch.ops.peftkern.lora_linear_next(x, *parts)


def _prepared(
    x: torch.Tensor, operands: Sequence[Any], dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[Any, ...], torch.dtype]:
    """(x as it is computed with, (weight, A, B, bias) likewise, the dtype of y), all of it checked."""
    weight, lora_A, lora_B, _, bias, _ = operands
    cast = autocast_dtype(x)
    rows = x.to(dtype if cast is None else cast)
    fitting = (weight, *fitting_dtypes((lora_A, lora_B, bias), dtype, weight))
    check_operands(rows, *fitting, mixed=cast is not None)
    return rows, fitting, rows.dtype if isinstance(weight, torch.Tensor) else x.dtype


def _path_alone(rows: torch.Tensor, weight: Any, lora_A: torch.Tensor, backend: str) -> str:
    if isinstance(weight, torch.Tensor):
        return plan_for_dense(rows, weight, lora_A.shape[0], backend).path
    return plan_for_quantized(rows, weight, lora_A.shape[0], backend).path


@dataclasses.dataclass(slots=True)
class _Left:
    """Outputs that wait for their layers' calls.

    Attributes:
        x: what they are of.
        state: its state, and the modes.
        outputs: (all that an output was computed from beside x: tensors, their states and numbers; the output).
    """

    x: torch.Tensor
    state: tuple[Any, ...]
    outputs: list[tuple[_Key, torch.Tensor]]


def _first(
    x: torch.Tensor,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    biases: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    path_alone: str,
    path: str,
    dropout_p: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The first layer's `lora_linear` in `dtype`; on `path` with the others, on `path_alone` where nothing traces."""
    weights = unflatten_all(tensors, numbers)
    options = (dropout_p, dtype, out_dtype)
    tracer, state = _tracer(), _traced_state(x)
    if tracer is None or state is None:
        return _alone(x, weights[0], lora_As[0], lora_Bs[0], biases[0], scalings[0], path_alone, *options)
    As, Bs, used_biases = (fitting_dtypes(given, dtype, weights[0]) for given in (lora_As, lora_Bs, biases))
    used_biases = [in_dtype(b, dtype) for b in used_biases]
    seed = draw_seed(x.device) if dropout_p else None
    found = call_operator(x.to(dtype), weights, As, Bs, scalings, used_biases, dropout_p, seed, path)
    ys = [y.to(out_dtype) for y in found]
    each = zip(weights, lora_As, lora_Bs, biases, scalings, strict=True)
    keys = [_key(*operands, *options) for operands in each]
    tracer.__dict__[_NAME] = _Left(x, state, list(zip(keys[1:], ys[1:], strict=True)))
    return ys[0]


def _next(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    bias: torch.Tensor | None,
    scaling: float,
    path: str,
    dropout_p: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """A later layer's `lora_linear` in `dtype`; on `path` if it was not computed with the first one's."""
    (weight,) = unflatten_all(tensors, numbers)
    options = (dropout_p, dtype, out_dtype)
    tracer = _tracer()
    left = None if tracer is None else tracer.__dict__.get(_NAME)
    if left is not None and left.x is x and left.state == _traced_state(x):
        _, states, given = _key(weight, lora_A, lora_B, bias, scaling, *options)
        for i, ((_, other_states, other_given), y) in enumerate(left.outputs):
            if states is not None and states == other_states and given == other_given:
                del left.outputs[i]
                return y
    return _alone(x, weight, lora_A, lora_B, bias, scaling, path, *options)


def _alone(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    path: str,
    dropout_p: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`lora_linear` of one layer on `path`."""
    seed = draw_seed(x.device) if dropout_p else None
    rows = x.to(dtype)
    if isinstance(weight, torch.Tensor):
        y, _, _ = dense_operator(rows, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)
        return y.to(out_dtype)
    lora_A, lora_B, bias = fitting_dtypes((lora_A, lora_B, bias), dtype, weight)
    tensors, numbers = flatten(weight)
    y, _, _ = quantized_operator(rows, tensors, lora_A, lora_B, bias, seed, numbers, scaling, dropout_p, path)
    return y.to(out_dtype)


def fitting_dtypes(given: Sequence[Any], dtype: torch.dtype, weight: Any) -> list[Any]:
    """What a quantized layer's products take of these: fp32, or `dtype`. Of a dense one themselves."""
    if isinstance(weight, torch.Tensor):
        return list(given)
    return [t if t is None or t.dtype in (dtype, torch.float32) else t.to(dtype) for t in given]


def _tracer() -> Any:
    """What traces here, None where nothing does."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode  # here: whoever traces has imported it

    found = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FunctionalTensorMode)]
    return found[-1] if found else None


def _traced_state(x: torch.Tensor) -> tuple[Any, ...] | None:
    """The state of x and the modes that it is traced under; None where it is not being traced to a graph."""
    state = _state_of(x)
    return None if state is None else (state, torch.is_grad_enabled(), *_get_current_dispatch_mode_stack())


def _state_of(t: torch.Tensor) -> tuple[Any, ...] | None:
    """Where a tensor of AOTAutograd's tracing lies and how often it was changed, also through its views and `.data`.

    None of any other tensor: of one with values, and of Dynamo's, which are there for shapes and dtypes alone.
    """
    from torch._subclasses.functional_tensor import FunctionalTensor

    counters = [getattr(torch, f"_functionalize_{what}_counter", None) for what in ("mutation", "storage_changed")]
    if type(t) is not FunctionalTensor or t.is_inference() or None in counters:  # torch's own: they may go
        return None
    changes = [counter(t.elem) for counter in counters]  # type: ignore[misc]
    where = (t.untyped_storage()._cdata, t.storage_offset(), t.dtype, t.shape, t.stride())
    return (*where, t._version, *changes, t.requires_grad)


def _key(weight: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor | None, *numbers: Any) -> _Key:
    stored = (weight,) if isinstance(weight, torch.Tensor) else weight.tensors()
    tensors = [t for t in (*stored, lora_A, lora_B, bias) if t is not None]
    states = [_state_of(t) for t in tensors]
    return tensors, None if None in states else states, (*numbers, bias is None)


_LIBRARY.impl("lora_linear_first", _first, "CompositeImplicitAutograd")
_LIBRARY.impl("lora_linear_next", _next, "CompositeImplicitAutograd")
