"""A causal language model without memory, from its configuration: what its parts weigh, and what a step keeps.

The model is built on the meta device and adapted there; a step of it is then run on fake tensors, which have shapes
and lifetimes and no memory, while `LiveBytes` counts what is alive. So the figures follow the model's own code and
autograd, with what peftkern's operations save, and not a formula of one architecture.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkern.integrations.extras import require
from peftkern.utils.adapter_error import cut, shown
from peftkern.utils.checkpoint_files import CONFIG, read_json
from peftkern.utils.linear_layers import is_conv1d, is_quantizable, rows_of
from peftkern.utils.live_bytes import LiveBytes

_CAUSAL = "peftkern_causal"
_MOST_LAYERS = 1000  # several times those of the deepest models


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that a step holds beside weights, adapters, gradients and optimizer state.

    Attributes:
        layers: kept by the layers from forward to backward; with checkpointing, each one's input.
        ends: kept before the first layer and after the last (positions, the last norm).
        live: on top of both, at most, while a layer runs (again) and is differentiated.
        loss: on top of both, at most, while transformers' loss is computed from all logits and differentiated.
    """

    layers: int
    ends: int
    live: int
    loss: int


def read_config(name_or_path: str) -> Any:
    """The configuration of a model on the hub, in a folder or in a file.

    Raises:
        ValueError: nothing of that name can be read, or it is damaged; the message says what to do.
    """
    from transformers import AutoConfig

    if not os.path.exists(name_or_path) and (name_or_path.endswith(".json") or name_or_path.startswith((".", "/"))):
        raise ValueError(f"model: no such file or folder: {name_or_path}")
    local = os.path.join(name_or_path, CONFIG) if os.path.isdir(name_or_path) else name_or_path
    if os.path.lexists(local):
        read_json(local)
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except ImportError:
        raise
    except Exception as error:  # transformers raises whatever a value led it to
        reason = cut(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
        advice = "expected a hub id, a folder with a config.json, or a config.json"
        if not os.path.exists(name_or_path):
            advice += "; without a connection, give the path of a config.json (only that file is needed)"
        raise ValueError(f"model: cannot read the configuration of {name_or_path!r} ({reason}); {advice}") from error


class TracedModel:
    """A model of that configuration with LoRA on it, all on the meta device.

    Args:
        config: a transformers configuration of a causal language model.
        r: the adapters' rank.
        target: target_modules, as in `LoraConfig`.
        dtype: of what is not quantized, and of activations.
        adapter_dtype: of the adapters.
        use_dora: as in `LoraConfig`.

    Raises:
        ValueError: the configuration belongs to no causal language model, or has no such modules.
    """

    def __init__(
        self,
        config: Any,
        r: int,
        target: str | list[str],
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        use_dora: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        from peftkern.mapping import inject_adapter_in_model
        from peftkern.tuners.lora import LoraConfig

        config = copy.deepcopy(config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # what is quantized is asked for, not read
        layers = getattr(config, "num_hidden_layers", None)
        if type(layers) is int and layers > _MOST_LAYERS:  # building them would not end
            raise ValueError(f"config: num_hidden_layers: expected at most {_MOST_LAYERS}, got {shown(layers)}")
        try:
            with torch.device("meta"), _causal_attention():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_CAUSAL)
        except Exception as error:  # transformers raises whatever a value led it to
            raise ValueError(
                f"config: cannot build a causal language model of {type(config).__name__} ({cut(str(error))})"
            ) from error
        self.dtype, self.r = dtype, r
        self.head = model.get_output_embeddings()
        self.embedding = model.get_input_embeddings()
        self.linears = [m for m in model.modules() if is_quantizable(m) and m is not self.head]
        transposed = any(is_conv1d(m) for m in self.linears)
        wanted = LoraConfig(r=r, target_modules=target, fan_in_fan_out=transposed, use_dora=use_dora)
        self.model: Any = inject_adapter_in_model(wanted, model, low_cpu_mem_usage=True)
        self.adapters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.adapters.values():
            parameter.data = parameter.data.to(adapter_dtype)
        self._fake = _fake_mode()
        _give_fake_tensors(self.model, self._fake)
        self.adapters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with self._fake:
            for parameter in self.adapters.values():
                # Made beforehand: a step's own are added to them and die, so they are no part of what it holds.
                parameter.grad = torch.zeros_like(parameter)

    @property
    def quantized(self) -> list[tuple[int, int]]:
        """[N, K] of each linear layer that is quantized, by transformers' rule (`quantize_model`): not the lm_head."""
        sizes = [tuple(rows_of(m).shape) for m in self.linears]
        return [(N, K) for N, K in sizes]

    def elements_of_s(self, tokens: int) -> tuple[int, int]:
        """How many adapters make an S of their own in forward, and the elements of them all for so many tokens.

        Stacked experts have a row for each choice of a token; a parameter whose module is called as it is has no S.
        """
        from peftkern.tuners.lora import ParamWrapper
        from peftkern.tuners.lora.experts_forward import choices_of

        count = elements = 0
        for layer in (m for m in self.model.modules() if "lora_A" in m._modules):
            stacked = isinstance(layer, ParamWrapper)
            if stacked and not layer.explain_row().fused:
                continue
            count += len(layer.r)
            rows = tokens * (choices_of(layer.get_base_layer().config) if stacked else 1)
            elements += rows * sum(layer.r.values())
        return count, elements

    @property
    def edges(self) -> int:
        """Bytes of the embedding and the lm_head; once, if they are tied."""
        modules = [m for m in (self.embedding, self.head) if m is not None]
        return sum(p.nbytes for p in {p for m in modules for p in m.parameters() if not p.requires_grad})

    @property
    def rest(self) -> int:
        """Bytes of the other frozen parameters, and of buffers."""
        every = {p for p in self.model.parameters() if not p.requires_grad} | set(self.model.buffers())
        return sum(t.nbytes for t in every) - sum(rows_of(m).nbytes for m in self.linears) - self.edges

    @functools.lru_cache(maxsize=64)  # noqa: B019  a traced model is made for one table, and goes with it
    def activations(self, batch: int, seq: int, checkpointing: bool) -> Activations:
        """What a step on [batch, seq] tokens holds, measured on fake tensors.

        Layers that are all alike are traced two at a time and multiplied.

        Raises:
            NotImplementedError: the model's forward depends on values, which fake tensors have none of, or fails.
        """
        layers = _layers(self.model)
        kinds = {_kind(layer) for layer in layers}
        if len(kinds) > 1 or len(layers) < 3:
            return self._trace(batch, seq, checkpointing)
        one, two = (self._trace_first(n, batch, seq, checkpointing) for n in (1, 2))
        each = two.layers - one.layers
        return Activations(len(layers) * each, one.layers - each, two.live, two.loss)

    def _trace_first(self, count: int, batch: int, seq: int, checkpointing: bool) -> Activations:
        parent, name, layers = _layers_home(self.model)
        setattr(parent, name, nn.ModuleList(list(layers)[:count]))
        try:
            return self._trace(batch, seq, checkpointing)
        finally:
            setattr(parent, name, layers)

    def _trace(self, batch: int, seq: int, checkpointing: bool) -> Activations:
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

        self.model.train()
        for module in self.model.modules():
            if hasattr(module, "layerdrop"):  # it would draw a number for each layer, which train all the same
                module.training = False
        _set_checkpointing(self.model, checkpointing)
        excluded = [*self.model.parameters(), *self.model.buffers(), *(p.grad for p in self.adapters.values())]
        base = getattr(self.model, self.model.base_model_prefix)
        try:
            with _causal_attention(), self._fake, LiveBytes(excluded) as live:
                ids = torch.zeros(batch, seq, dtype=torch.int64)
                hidden = base(input_ids=ids, use_cache=False)[0]
                highest = live.peak
                kept = live.restart()
                shape, end = hidden.shape, _End.apply(hidden)
                hidden = None  # nobody holds it, nor its gradient, when the last layer's turn comes
                end.backward()
                highest = max(highest, live.peak)
                before = live.restart()
                # Tokens enter as they leave the last layer; the logits are held until backward is done, as by
                # `outputs = model(...)`.
                hidden = torch.empty(shape, dtype=self.dtype, requires_grad=True)
                logits = self.head(hidden)
                self.model.loss_function(
                    logits=logits, labels=ids, vocab_size=logits.shape[-1], num_items_in_batch=seq
                ).backward()
                loss = live.peak - before - hidden.nbytes  # which is in `kept`
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotImplementedError(
                f"{type(self.model).__name__}: its forward depends on the values of its tensors, so a step of it "
                "cannot be traced without memory"
            ) from error
        # An operation that refuses fake tensors, or a number of the configuration; positions that the model lacks.
        except (ArithmeticError, RuntimeError, TypeError) as error:
            raise NotImplementedError(
                f"{type(self.model).__name__}: a step on {batch} x {seq} tokens cannot be traced without "
                f"memory: {error}"
            ) from error
        return Activations(kept, 0, highest - kept, loss)


class _End(torch.autograd.Function):
    """Stands for the loss of hidden states: it keeps nothing of them, and makes their gradient in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.like = hidden.shape, hidden.dtype
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def _causal_attention() -> Iterator[None]:
    """Within the block transformers knows an attention that is its `sdpa` on full sequences: causal, without a mask.

    Whether a mask is needed is a question of values, so on fake tensors transformers makes one, of [seq, seq]; on a GPU
    and on sequences without padding it makes none.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)  # a kernel that caps its scores keeps nothing more

    ALL_ATTENTION_FUNCTIONS[_CAUSAL] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[_CAUSAL] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_CAUSAL], ALL_MASK_ATTENTION_FUNCTIONS[_CAUSAL]


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _give_fake_tensors(model: nn.Module, fake: Any) -> None:
    """Put tensors of the CPU without memory in place of meta ones, for a FakeTensorMode. (A forward may ask a meta
    tensor for values, which fails; of a fake one transformers knows not to ask.)"""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in made:
                    empty = torch.zeros((), dtype=t.dtype).expand(t.shape)
                    if t.dim() > 2:  # stacked experts, whose product wants the strides of a tensor with memory
                        with fake:
                            empty = torch.empty(t.shape, dtype=t.dtype)
                    made[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
                tensors[name] = made[id(t)]


def _layers_home(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Where the decoder layers are: the longest of the outermost lists of modules, its parent and its name there."""
    lists = [
        (path.count("."), -len(child), parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    if not lists:
        raise ValueError(f"config: {type(model).__name__} has no list of layers")
    best = min(lists, key=lambda item: item[:2])
    return best[2], best[3], best[4]


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(_layers_home(model)[2])


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What makes two layers hold the same memory: modules, shapes, and the numbers that are not a place in the row."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    skipped = {"layer_idx", "layer_id", "layer_number", "training"}
    numbers = tuple(
        (name, key, repr(value))
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if key not in skipped and (value is None or isinstance(value, int | float | str))
    )
    return (*shapes, *numbers)


def _set_checkpointing(model: Any, on: bool) -> None:
    new = hasattr(model, "activation_checkpointing_enable")  # the name since transformers 5.20; the older one warns
    prefix = "activation" if new else "gradient"
    if on:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' advice on how to run a model, which nobody here is about to run."""
    logging: Any = require("transformers.utils", "an estimate").logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
