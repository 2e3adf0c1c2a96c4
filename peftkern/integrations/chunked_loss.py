"""Let a transformers causal language model compute its loss in blocks of tokens (`ops.linear_cross_entropy`).

The model's own forward runs, on a stand-in for the model that differs in two attributes: its lm_head answers with a
promise of logits (the hidden states, and what would turn them into logits), and its loss function takes that promise.
So whatever else the forward does (a mixture's balancing loss, `logits_to_keep`) still happens, and a forward that does
anything with its logits on the way to the loss stops with an error instead of training on another loss. Only the one
model is touched: its `forward` is replaced on the instance, and nothing in transformers is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.integrations.liger_bridge import liger_linear_cross_entropy, liger_missing
from peftkern.ops.linear_cross_entropy import chunk_rows, linear_cross_entropy, shifted

IMPLEMENTATIONS = ("auto", "liger", "torch")
# Fields of a configuration by which a model changes its logits, and the values with which it does not.
_LOGIT_FIELDS = {
    "final_logit_softcapping": (None, 0),
    "logits_soft_cap": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
    "output_multiplier_scale": (None, 1),
    "mup_width_multiplier": (None, 1),
}
# Where a forward may be kept on an instance: accelerate's hooks call the second from the first.
_SLOTS = ("_old_forward", "forward")
_MARK = "_peftkern_original"


@dataclass(frozen=True, slots=True)
class _Settings:
    implementation: str
    chunk_size: int | None
    training_only: bool


class ChunkedLoss:
    """What `use_chunked_loss` returns: `remove()` undoes it, and so does leaving a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def remove(self) -> None:
        """Give the model its own forward back; a second call does nothing.

        Raises:
            ValueError: something has wrapped the forward since (accelerate, for mixed precision).
        """
        for slot in _SLOTS:
            function = getattr(vars(self.model).get(slot), "__func__", None)
            if not hasattr(function, _MARK):
                continue
            ours, original, was_on_instance = getattr(function, _MARK)
            if function is not ours:  # functools.wraps copied the mark to something around it
                raise ValueError(
                    f"model: the forward of {type(self.model).__name__} was wrapped again; undo that first"
                )
            if was_on_instance or slot == "_old_forward":
                setattr(self.model, slot, types.MethodType(original, self.model))
            else:
                delattr(self.model, slot)

    def __enter__(self) -> ChunkedLoss:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def use_chunked_loss(
    model: nn.Module,
    *,
    implementation: str = "auto",
    chunk_size: int | None = None,
    training_only: bool = True,
) -> ChunkedLoss:
    """Make a causal language model compute its loss without holding the logits of all tokens.

    From then on a call with `labels`, while the model is in training mode, returns the loss that it would have returned
    and no logits (`logits` is None). Calls without labels, and in eval mode, are what they were. The loss is
    transformers' `ForCausalLMLoss`: labels are shifted by one, `num_items_in_batch`, `shift_labels` and `ignore_index`
    are taken from the call. It may be wrapped by a PeftModel before or after, checkpointed, trained by Trainer, copied.

    An lm_head that is a plain `nn.Linear` is read directly; any other (adapted, quantized, offloaded, with hooks) is
    called for a block of tokens at a time, and once more in backward.

    Args:
        model: a transformers model with an lm_head, or a PeftModel around one (peftkern's or PEFT's).
        implementation: "liger" (the `liger-kernel` package: CUDA and ROCm, bfloat16 and float32), "torch" (ours), or
            "auto": Liger's where it is installed and can run.
        chunk_size: tokens in a block of ours; see `peftkern.ops.linear_cross_entropy`. Liger's chooses its own.
        training_only: if false, the loss in eval mode is computed this way too: an evaluation that wants only losses.

    Returns:
        A `ChunkedLoss`, whose `remove()` undoes it.

    Raises:
        TypeError: `model` is not a module, or no model with an lm_head and transformers' loss.
        ValueError: `implementation` or `chunk_size` is none of the above; the model uses a chunked loss already; its
            forward has been replaced by something else.
        NotImplementedError: the model changes its logits after the lm_head (a soft cap, a scale) or has another loss.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, got {chunk_size!r}")
    model = _language_model(model)
    _head_name(model)
    _check_loss(model)
    slot = "_old_forward" if "_old_forward" in vars(model) else "forward"
    current = getattr(model, slot)
    if any(hasattr(getattr(vars(model).get(name), "__func__", None), _MARK) for name in _SLOTS):
        raise ValueError(f"model: {type(model).__name__} uses a chunked loss already; remove() that one first")
    if getattr(current, "__self__", None) is not model:
        raise ValueError(
            f"model: the forward of {type(model).__name__} has been replaced by {current!r}, which cannot be run on "
            "a stand-in; call use_chunked_loss first"
        )
    function = _chunked_forward(current.__func__, _Settings(implementation, chunk_size, training_only))
    setattr(function, _MARK, (function, current.__func__, slot in vars(model)))
    setattr(model, slot, types.MethodType(function, model))
    return ChunkedLoss(model)


def _language_model(model: nn.Module) -> nn.Module:
    """The transformers model in `model`; refuses what has no lm_head or loss."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    base: Any = model
    if hasattr(base, "peft_config") and hasattr(base, "get_base_model"):
        base = base.get_base_model()
    if not hasattr(base, "loss_function") or not hasattr(base, "get_output_embeddings"):
        raise TypeError(f"model: expected a transformers causal language model, got {type(base).__name__}")
    return base


def _head_name(model: Any) -> str:
    """The attribute under which the model holds its lm_head."""
    head = model.get_output_embeddings()
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None:
        found = "none" if head is None else "it elsewhere"
        raise TypeError(f"model: expected {type(model).__name__} to hold its lm_head as an attribute, found {found}")
    return name


def _check_loss(model: Any) -> None:
    """Refuse a model that computes something else from its hidden states than a linear layer's cross-entropy."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise NotImplementedError(f"model: the loss of {type(model).__name__} is {name}, expected ForCausalLMLoss")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for field, harmless in _LOGIT_FIELDS.items():
        value = getattr(config, field, None)
        if value not in harmless:
            raise NotImplementedError(
                f"config.{field}: {type(model).__name__} changes its logits by it ({value!r}), which the chunked loss "
                f"does not do; expected {' or '.join(map(repr, harmless))}"
            )


def _chunked_forward(original: Callable[..., Any], settings: _Settings) -> Callable[..., Any]:
    """`original`, a forward, with the chunked loss where labels are given. Knows no model, so that a copied model's
    forward is bound to the copy; has the signature of `original`, which Trainer reads."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings.training_only and not self.training or _labels(original, self, args, kwargs) is None:
            return original(self, *args, **kwargs)
        _check_loss(self)
        outputs = original(_StandIn(self, settings), *args, **kwargs)
        if isinstance(outputs, tuple):
            return tuple(value for value in outputs if not isinstance(value, _PromisedLogits))
        kept = {name: value for name, value in outputs.items() if not isinstance(value, _PromisedLogits)}
        return type(outputs)(**kept)

    return forward


def _labels(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The `labels` of a call, by name or by place."""
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    code = getattr(function, "__wrapped__", function)
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    names = code.__code__.co_varnames[1 : code.__code__.co_argcount]
    return dict(zip(names, args, strict=False)).get("labels")


class _StandIn:
    """The model, for the time of one forward, but for its lm_head and its loss function."""

    def __init__(self, model: Any, settings: _Settings) -> None:
        self._model, self._settings = model, settings
        setattr(self, _head_name(model), functools.partial(_PromisedLogits, model.get_output_embeddings()))

    def __getattr__(self, name: str) -> Any:  # what is not set here
        return getattr(self._model, name)

    def loss_function(
        self,
        logits: Any,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' `ForCausalLMLoss` of promised logits."""
        if not isinstance(logits, _PromisedLogits):
            raise NotImplementedError(f"chunked loss: expected the lm_head's output as logits, got {type(logits)}")
        targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        hidden = logits._hidden
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
        if rows.shape[0] != targets.shape[0]:
            raise ValueError(
                f"labels: expected one for each of {rows.shape[0]} tokens, got {targets.shape[0]} (logits_to_keep "
                "cannot be used with a loss)"
            )
        total, divisor = _sum_of_losses(logits._head, rows, targets, ignore_index, self._settings), num_items_in_batch
        if divisor is None:
            return total / (targets != ignore_index).sum()
        return total / (divisor.to(total.device) if isinstance(divisor, torch.Tensor) else divisor)


def _sum_of_losses(
    head: nn.Module, rows: torch.Tensor, targets: torch.Tensor, ignore_index: int, settings: _Settings
) -> torch.Tensor:
    weight: Any = getattr(head, "weight", None)
    bias: Any = getattr(head, "bias", None)
    if not _is_plain(head, rows):
        return _by_calling(head, rows, targets, ignore_index, settings.chunk_size or chunk_rows(_outputs(head)))
    missing = "" if settings.implementation == "torch" else liger_missing(rows)
    if settings.implementation == "liger" and missing:
        raise RuntimeError(f"implementation 'liger': {missing}")
    if settings.implementation != "torch" and not missing and not torch.compiler.is_compiling():
        return liger_linear_cross_entropy(rows, weight, targets, bias, ignore_index, "sum")
    options: dict[str, Any] = {"ignore_index": ignore_index, "chunk_size": settings.chunk_size, "reduction": "sum"}
    return linear_cross_entropy(rows, weight, targets, bias=bias, **options)


def _is_plain(head: nn.Module, rows: torch.Tensor) -> bool:
    """Whether calling `head` would do nothing but multiply by its weight."""
    hooks = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    plain = type(head) is nn.Linear and not hooks and type(head.weight) in (torch.Tensor, nn.Parameter)
    return plain and head.weight.device == rows.device


def _outputs(head: nn.Module) -> int:
    """The size of the vocabulary that an lm_head of any kind has logits for."""
    size = getattr(head, "out_features", None)
    weight = getattr(head, "weight", None)
    return size if isinstance(size, int) else 1 << 17 if weight is None else weight.shape[0]


def _by_calling(
    head: nn.Module, rows: torch.Tensor, targets: torch.Tensor, ignore_index: int, chunk_size: int
) -> torch.Tensor:
    """The sum of the losses with any module as lm_head: a block's logits live while they are used, and are computed
    again in backward."""

    def block_loss(block: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(block).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")

    total = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, rows.shape[0], chunk_size):
        block = slice(start, start + chunk_size)
        total = total + checkpoint(block_loss, rows[block], targets[block], use_reentrant=False)
    return total


class _PromisedLogits:
    """What an lm_head would have made of `hidden`. May change dtype or layout, which the loss does not care for;
    anything else that a forward does to it is refused."""

    def __init__(self, head: nn.Module, hidden: torch.Tensor) -> None:
        self._head, self._hidden = head, hidden

    def _same(self, *args: Any, **kwargs: Any) -> _PromisedLogits:
        return self

    float = contiguous = to = _same

    def _refuse(self, *args: Any) -> NoReturn:
        raise NotImplementedError(
            "chunked loss: this model's forward computes with its logits before the loss, which never exist as a whole "
            "here; remove() the chunked loss for it"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __getitem__ = _refuse
    __matmul__ = __iadd__ = __imul__ = __itruediv__ = __pow__ = __len__ = __iter__ = _refuse

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse(cls.__new__(cls))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()
