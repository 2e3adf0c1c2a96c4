"""What the operations share: checks of arguments, autocast, dropout seeds, and which door to dispatch through."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from peftkern.ops.plan import Plan
from peftkern.weights import Weight, Weight4bit, Weight8bit

P = ParamSpec("P")
T = TypeVar("T")
PLAIN_PATHS = ("torch", "torch_fp32")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AUTOCAST_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_unsafe_view = torch.ops.aten._unsafe_view.default  # at hand: looking it up takes as long as the call
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
_QUANTIZED_TYPES = frozenset((Weight4bit, Weight8bit))


def two_dtypes(operation: str, x: torch.Tensor, weight: Weight) -> TypeError:
    """The error for an x and a weight of two dtypes; which of them is the wrong one only the caller knows."""
    return TypeError(
        f"{operation}: expected x and weight in one dtype, got x in {x.dtype} and weight in {weight.dtype}: cast x, or "
        "run under torch.autocast"
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast, if it is on for x's device, gives a matmul's operands."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # the quick answer; below is what torch.compile can trace
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # which makes a string
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None  # "meta", for one
    if not torch.is_autocast_enabled(kind) or x.dtype not in AUTOCAST_FLOATS:
        return None  # float64 stays what it is, and what is no float is refused as it is without autocast
    return torch.get_autocast_dtype(kind)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """`function` as if autocast were off, for what runs once operands have the dtypes that they should have.

    Autocast around backward may be another than around forward, or none. It would then cast some operands and not
    others: what is computed in place keeps its dtype.
    """

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch._C._DisableAutocast():  # a fifth of what torch.autocast(..., enabled=False) costs, for all devices
            return function(*args, **kwargs)

    return within


def number(name: str, value: Any) -> float:
    """`value` as a float; a tensor of one element will do if nobody waits for its gradient. NaN will not."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name}: no gradient flows to it, so expected a number, got a tensor that requires grad")
    if value is None or isinstance(value, str | bytes) or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    if converted != converted:
        raise ValueError(f"{name}: expected a number, got NaN")
    return converted


def draw_seed(device: torch.device) -> torch.Tensor:
    """A dropout seed from torch's generator of `device`: drawn outside the operator, so that checkpointing, which
    restores the generator, and torch.compile, which records the draw, repeat it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_in_force(dropout_p: float, training: bool) -> float:
    """`dropout_p` where dropout applies, else 0."""
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number in [0, 1), got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p!r}")
    return dropout_p if training else 0.0


def dropout_seed(seed: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """`seed` if it can be one, a new one if there is none."""
    if seed is None:
        return draw_seed(device)
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed: expected an int64 tensor of one element on {device}, got {type(seed).__name__}")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed: expected an int64 tensor of one element on {device}, "
            f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed


def needs_operator(*tensors: torch.Tensor) -> bool:
    """Whether something here looks at operators: a compiler, a dispatch mode, or a tensor subclass."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    kinds = {type(t) for t in tensors}
    return not kinds.issubset(_PLAIN_TYPES)


def check_float_dtype(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is one of `FLOATS`, or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value in FLOATS):
        raise TypeError(f"{name}: expected float32, float16, bfloat16, float64 or None, got {value!r}")


def calls_are_changed() -> bool:
    """Whether a compiler, autocast or a dispatch mode changes what a call does here."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._is_any_autocast_enabled() or _get_current_dispatch_mode() is not None


def makes_plain_tensors() -> bool:
    """Whether what a call makes here is a tensor that means the same later: no compiler, mode or transform is on."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return _get_current_dispatch_mode() is None


def stream_of(t: torch.Tensor) -> int | None:
    """The CUDA stream on which t's device computes now; None where there is none. What is kept from one call for
    another holds on its own stream only: work on another does not wait for it."""
    if not t.is_cuda or torch.compiler.is_compiling():
        return None
    return torch._C._cuda_getCurrentRawStream(t.device.index)  # torch.cuda.current_stream makes an object


def apply_directly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, without what torch does on the way for functorch's transforms (a few us).

    Raises:
        RuntimeError: one of them is in force.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "peftkern.ops: transforms of torch.func (functorch) do not reach into an operation. Call the layers of "
            "peftkern.nn or of a PeftModel, on weights that are not quantized: under a transform they run as plain "
            "PyTorch"
        )
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


_awaited: dict[int, weakref.ref[torch.Tensor]] = {}  # by id: whose y was asked for when it was computed again


def apply_in_two(function: type[torch.autograd.Function], owner: torch.Tensor, *arguments: Any) -> Any:
    """`apply_directly(function, *arguments, later)`, for one whose forward may leave to `later` what makes y.

    Within a backward pass a forward runs to be computed again, by checkpointing, which stops it where the last tensor
    that was kept is there (torch.utils.checkpoint's early stop, raised while `function` keeps its tensors). For the
    last operation of a checkpointed region, an MLP's largest product often, y is then never asked for. So there
    `later` is a list: forward makes what it keeps, returns y without values, and appends what fills it. Else it is
    None, also for a layer, told by a tensor that it owns, that was seen to go on.
    """
    if torch._C._current_graph_task_id() == -1 or _is_awaited(owner):
        return apply_directly(function, *arguments, None)
    later: list[Callable[[], object]] = []
    y = apply_directly(function, *arguments, later)
    with torch.no_grad(), torch._C._DisableAutocast():
        for fill in later:
            fill()
    number = id(owner)
    _awaited[number] = weakref.ref(owner, lambda _: _awaited.pop(number, None))
    return y


def _is_awaited(owner: torch.Tensor) -> bool:
    known = _awaited.get(id(owner))
    return known is not None and known() is owner


def ask(plan: Any, *arguments: Any) -> Plan:
    """A plan, from its cache unless torch.compile is tracing: sizes may be symbols then, which no cache can hold."""
    return plan.__wrapped__(*arguments) if torch.compiler.is_compiling() else plan(*arguments)


def unflattened(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """y [M, N] as [*shape, N]: its memory, but no view to autograd, as `nn.Linear`'s output is none. torch refuses to
    change a view in place that was made inside an autograd function, and models do that (OLMo's clip_qkv)."""
    if y.requires_grad:
        return _unsafe_view(y, (*shape, y.shape[1]))
    return y.view(*shape, y.shape[1]).data  # a third of that one's time


def is_plain(path: str) -> bool:
    """Whether a path, also one that begins with "dequantize:", is plain PyTorch."""
    return path.rpartition(":")[2] in PLAIN_PATHS


def fake_gradients(
    dy: torch.Tensor, full: Sequence[tuple[Sequence[int], torch.dtype | None]], needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """What an operator's backward returns, for its fake: tensors of these shapes and dtypes, empty where not needed."""
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for need, (shape, dtype) in zip(needs, full, strict=True)
    )


def none_if_empty(t: torch.Tensor) -> torch.Tensor | None:
    """Operators return tensors only: an empty one stands for None."""
    return None if t.numel() == 0 else t


def adapters_for(dtype: torch.dtype, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B rounded to `dtype`; themselves if they have it."""
    return in_dtype(lora_A, dtype), in_dtype(lora_B, dtype)


def in_dtype(t: Any, dtype: torch.dtype) -> Any:
    """A tensor in `dtype`: itself if it has it. None of None."""
    return t if t is None or t.dtype is dtype else t.to(dtype)


def refuse_double_backward(operation: str) -> None:
    """Raise where gradients of gradients are asked for: what was saved (S) has no history to differentiate."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: double backward (create_graph=True) is not supported by a fused operation. Layers with "
            "adapters can do it under peftkern.use_backend('unfused') around forward"
        )


def kept_s(s: torch.Tensor | None, path: str) -> torch.Tensor | None:
    """S [M, R] as it is kept for backward: as [1, M, R] where plain PyTorch made it.

    Kernels scale S otherwise and draw another dropout mask, and a forward that checkpointing computes again may take
    another path: `use_backend` holds for one thread, and on a GPU backward runs in another. torch.utils.checkpoint
    compares shapes, and so refuses what would be wrong gradients.
    """
    return s if s is None or not is_plain(path) else s.unsqueeze(0)


def taken_s(s: torch.Tensor | None) -> torch.Tensor | None:
    """What `kept_s` was given."""
    return s if s is None or s.dim() == 2 else s.squeeze(0)


def adapters_fit(
    x: torch.Tensor, weight: Weight, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor | None
) -> bool:
    """Whether the common case holds (plain tensors, one dtype or fp32 adapters, shapes that agree): a few
    comparisons, where `check_adapters` finds the words for what is wrong and allows the rarer cases."""
    if type(x) not in _PLAIN_TYPES or type(lora_A) not in _PLAIN_TYPES or type(lora_B) not in _PLAIN_TYPES:
        return False
    dtype, adapter_dtype = x.dtype, lora_A.dtype
    if type(weight) in _PLAIN_TYPES:
        if dtype is not weight.dtype or weight.dim() != 2:  # type: ignore[union-attr]
            return False
    elif type(weight) not in _QUANTIZED_TYPES:
        return False
    if dtype not in FLOATS:
        return False
    if adapter_dtype is not lora_B.dtype or (adapter_dtype is not dtype and adapter_dtype is not torch.float32):
        return False
    if lora_A.dim() != 2 or x.dim() == 0:
        return False
    if not (x.is_cpu and weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu):  # quicker than comparing devices
        device = x.device
        if device != weight.device or device != lora_A.device or device != lora_B.device:
            return False
    (N, K), (R, K_of_A) = weight.shape, lora_A.shape
    if N == 0 or K == 0 or R == 0 or K_of_A != K or x.shape[-1] != K or lora_B.shape != (N, R):
        return False
    if bias is None:
        return True
    return type(bias) in _PLAIN_TYPES and bias.dtype is dtype and bias.shape == (N,) and bias.device == x.device


def _check_matrix(
    operation: str, name: str, t: torch.Tensor, shape: tuple[int | None, int | None], meaning: str
) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{operation}: {name}: expected a tensor {meaning}, got {type(t).__name__}")
    if t.dim() != 2 or any(want is not None and want != got for want, got in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{operation}: {name}: expected shape [{wanted}] {meaning}, got {list(t.shape)}")


def check_adapters(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    mixed: bool,
) -> None:
    """Refuse what `lora_linear` cannot mean; `mixed` allows a weight and bias in another float dtype (autocast)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{operation}: x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{operation}: x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    _check_matrix(operation, "weight", weight, (None, None), "[out_features, in_features]")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{operation}: x: expected shape [..., {K}] to fit weight {[N, K]}, got {list(x.shape)}")
    _check_matrix(operation, "lora_A", lora_A, (None, K), "[r, in_features]")
    R = lora_A.shape[0]
    _check_matrix(operation, "lora_B", lora_B, (N, R), "[out_features, r]")
    if 0 in (N, K, R):
        raise ValueError(f"{operation}: out_features, in_features and r: expected at least 1, got {N}, {K}, {R}")
    if weight.dtype != x.dtype and not (mixed and weight.dtype in FLOATS):
        raise two_dtypes(operation, x, weight)
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        # Under autocast adapters may have any float dtype; without it, x's or fp32 masters.
        if t.dtype != x.dtype and t.dtype != torch.float32 and not (mixed and t.dtype in FLOATS):
            raise TypeError(f"{operation}: {name}: expected x's dtype {x.dtype} or torch.float32, got {t.dtype}")
    tensors = [("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)]
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"{operation}: bias: expected a tensor [out_features] or None, got {type(bias).__name__}")
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ValueError(f"{operation}: bias: expected shape [{N}], got {list(bias.shape)}")
        if bias.dtype != x.dtype and not (bias.dtype in FLOATS and (mixed or bias.dtype == torch.float32)):
            raise TypeError(f"{operation}: bias: expected x's dtype {x.dtype} or torch.float32, got {bias.dtype}")
        tensors.append(("bias", bias))
    for name, t in tensors:
        if t.device != x.device:
            raise ValueError(f"{operation}: {name}: expected device {x.device} as x, got {t.device}")


Later = list[Callable[[], object]] | None  # what `apply_in_two` gives an autograd function
Ranks = Sequence[slice]  # the columns of S, of several projections side by side, that are each one's


def rank_columns(lora_As: Sequence[torch.Tensor]) -> tuple[slice, ...]:
    """The columns of S [M, R], or rows of A [R, K], that are each projection's where they follow one another."""
    stops = list(itertools.accumulate(lora_A.shape[0] for lora_A in lora_As))
    return tuple(slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False))


def stored_apart(weights: Sequence[Any], biases: Sequence[torch.Tensor | None], addresses: bool = True) -> str:
    """Why weights and biases of several projections cannot be one launch's, in words; "" for nothing."""
    if len({storage(weight, addresses) for weight in weights}) > 1:
        return "their weights are stored differently"
    if len({None if bias is None else bias.stride(0) for bias in biases}) > 1:
        return "some have a bias and some have not, or they lie differently"
    return ""


def storage(weight: Any, addresses: bool = True) -> Any:
    """How a weight is stored, but for its size: what one launch over several has to know once. Of its address only if
    asked for `addresses`."""
    if isinstance(weight, torch.Tensor):
        return weight.dtype, weight.stride()
    if isinstance(weight, Weight4bit):
        return weight.blocksize, weight.absmax.dtype, not addresses or weight.packed.data_ptr() % 4 == 0
    return type(weight)
