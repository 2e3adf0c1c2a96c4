"""What a LoRA or QLoRA step takes of a GPU's memory, part by part, before anything is downloaded.

    python -m peftkern.estimate MODEL_OR_CONFIG --r 16 --seq 4096 --vram 24

Weights, adapters, gradients and optimizer state are counted exactly, on the meta device. Activations are those of a
step run on tensors without memory (`peftkern.integrations.traced_model`), so they follow the model's own code. What the
GPU's kernels allocate within an operation, the CUDA context and the allocator's loss are not in that: they stand as
assumptions.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peftkern.ops.linear_cross_entropy import chunk_rows
from peftkern.utils.adapter_error import shown
from peftkern.utils.quantization_settings import QuantizationSettings
from peftkern.weights import BLOCKSIZES

if TYPE_CHECKING:
    from peftkern.integrations.traced_model import Activations, TracedModel

QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
OPTIMIZERS = ("adamw", "adamw8bit", "paged")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GB, MB = 1e9, 1e6
CONTEXT = int(0.6 * GB)  # CUDA's context and loaded kernels: 0.4 to 0.7 GB by driver and GPU
# What torch keeps for cuBLAS, out of its own allocator, for each thread that calls it: 32 MiB on Hopper, 8.1 elsewhere.
# The caller's thread and autograd's, which runs backward, have one each from the first step on.
CUBLAS_WORKSPACE, CUBLAS_THREADS = 32 << 20, 2
SLACK = 0.05  # of activations: what the caching allocator cannot hand out again
OPTIMIZER_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit optimizers
WHENS = ("always", "in a layer", "in the loss", "assumed")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is run with; the arguments of `estimate_memory`."""

    r: int = 16
    seq: int = 2048
    batch: int = 1
    quant: str = "nf4"
    double_quant: bool = True
    target: str = "all-linear"
    checkpointing: bool = True
    optim: str = "adamw"
    chunked_loss: bool = True
    adapter_dtype: str = "fp32"
    dtype: str = "bf16"
    blocksize: int = 64
    use_dora: bool = False

    def __post_init__(self) -> None:
        for name in ("r", "seq", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        for name, known in (("quant", QUANTIZATIONS), ("optim", OPTIMIZERS), ("adapter_dtype", (*DTYPES,))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.target, str | list | tuple | set):
            raise ValueError(f"target: expected names of modules with commas, got {self.target!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize!r}")


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table.

    Attributes:
        name: what it is.
        bytes: its size.
        when: "always"; "in a layer" or "in the loss", which are never at the same time; or "assumed".
        note: of what it is made.
    """

    name: str
    bytes: int
    when: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `estimate_memory` returns: parts to work with, a table to print. Sizes are in bytes.

    Attributes:
        model: the architecture.
        settings: what it was made for.
        parts: a `Part` for each row.
        vram: the GPU's memory, or None.
        largest_seq: the longest sequence that fits in `vram` with the other settings, and that the model has positions
            for; 0 if none fits, None without.
        max_seq: the model's `max_position_embeddings`, or None if its configuration says none.
        advice: a line for each saving that is not used.
    """

    model: str
    settings: Settings
    parts: tuple[Part, ...]
    vram: int | None = None
    largest_seq: int | None = None
    max_seq: int | None = None
    advice: tuple[str, ...] = ()

    def of(self, when: str) -> int:
        """The sum of the parts of that time."""
        return sum(part.bytes for part in self.parts if part.when == when)

    def part(self, name: str) -> int:
        """The size of the part of that name; 0 if there is none."""
        return sum(part.bytes for part in self.parts if part.name == name)

    @property
    def total(self) -> int:
        """The peak: what is always there, the larger of a layer and the loss, and what is assumed."""
        return self.of("always") + max(self.of("in a layer"), self.of("in the loss")) + self.of("assumed")

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within `vram`; None without."""
        return None if self.vram is None else self.total <= self.vram

    def __str__(self) -> str:
        s = self.settings
        quant = "" if s.quant not in ("nf4", "fp4") else " double-quantized" if s.double_quant else " single-quantized"
        method = "DoRA r" if s.use_dora else "r"
        lines = [
            f"{self.model}, {method} {s.r} on {s.target}, {s.quant}{quant}, {s.batch} x {s.seq} tokens, {s.optim}, "
            f"{'' if s.checkpointing else 'no '}checkpointing, {'chunked' if s.chunked_loss else 'whole'} loss",
            *self._assumed(),
            "",
        ]
        width = max(len(part.name) for part in self.parts)
        lesser = min(("in a layer", "in the loss"), key=self.of)
        # Without the context, which every step has: a small model's rows would all read 0.00 GB beside it.
        unit, name = (GB, "GB") if self.total - CONTEXT >= GB else (MB, "MB")
        for part in self.parts:
            size = f"({part.bytes / unit:.2f})" if part.when == lesser else f"{part.bytes / unit:.2f} "
            lines.append(f"  {part.name:<{width}}  {size:>8} {name}  {part.when:<11}  {part.note}".rstrip())
        lines += [
            f"  {'total':<{width}}  {self.total / unit:7.2f}  {name}  (a row in brackets: not at the time of the peak)",
            "",
        ]
        lines += self._verdict() + [f"- {line}" for line in self.advice]
        return "\n".join(lines)

    def _assumed(self) -> list[str]:
        """What a reader may not have asked for, and the unit."""
        lines = []
        if self.settings.quant != "none":
            lines.append(
                f"The base is counted in {self.settings.quant}; for a dense one: --quant none, or quant='none'."
            )
        if self.max_seq is not None and self.settings.seq > self.max_seq:
            lines.append(
                f"{self.settings.seq} tokens are more than the model's max_position_embeddings, {self.max_seq}."
            )
        return [*lines, "A GB is 10^9 bytes, a GiB 2^30."]

    def _verdict(self) -> list[str]:
        if self.vram is None:
            return []
        size = f"{self.vram / 2**30:g} GiB ({self.vram / GB:.1f} GB)"
        spare = (self.vram - self.total) / GB
        words = f"Fits in {size} with {spare:.2f} GB to spare." if spare >= 0 else f"Over {size} by {-spare:.2f} GB."
        longest = "No sequence fits."
        if self.largest_seq:
            of_model = ", all that the model has positions for" if self.largest_seq == self.max_seq else ""
            longest = f"The longest sequence that fits: {self.largest_seq}{of_model}."
        return [f"{words} {longest}"]


def estimate_memory(model: Any, *, vram: float | None = None, **settings: Any) -> Estimate:
    """What a training step of a causal language model with LoRA takes of a GPU's memory, without the model.

    Assumed: an attention without stored scores (FlashAttention, or torch's), sequences without padding, no dropout,
    gradients and optimizer state of the adapters only, and an embedding and lm_head left in `dtype`.

    Args:
        model: a transformers configuration, a hub id (its configuration is read), a folder or a config.json.
        vram: the GPU's memory in GiB (a "24 GB" card has 24 GiB), or None.
        settings: fields of `Settings`: r (rank), seq (tokens of a sequence), batch (sequences of a step), quant ("nf4",
            "fp4", "int8" or "none") of the linear layers that `quantize_model` takes (`nn.Linear` and Conv1D; no
            subclass, no stacked experts) but the lm_head, and double_quant (of a model that bitsandbytes quantized by
            default what its configuration says), target (target_modules: a name, several with commas, or "all-linear"),
            checkpointing, optim ("adamw", "adamw8bit", "paged" for 8 bits in memory that moves to the host),
            chunked_loss (`use_chunked_loss`), adapter_dtype and dtype ("fp32", "bf16", "fp16"), blocksize of the 4-bit
            formats, use_dora (a magnitude for each output, and an output that each adapted layer keeps for it).

    Returns:
        An `Estimate`, which prints as a table.

    Raises:
        ValueError: a setting is none of the above, or the configuration cannot be read or built, or says that the model
            is quantized by another method and no quant is given.
        NotImplementedError: a step of the model cannot be traced without memory.
    """
    from peftkern.integrations import traced_model

    if vram is not None and (isinstance(vram, bool) or not isinstance(vram, int | float) or not 0 < vram < math.inf):
        raise ValueError(f"vram: expected GiB above 0, or None, got {vram!r}")
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise TypeError(f"estimate_memory: unknown settings {', '.join(unknown)}")
    with traced_model.quiet_transformers():
        config = traced_model.read_config(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
        chosen = Settings(**(_said_by(config, settings) | settings))
        target: Any = [t.strip() for t in chosen.target.split(",")] if "," in chosen.target else chosen.target
        target = [target] if isinstance(target, str) and target != "all-linear" else target
        dtypes = DTYPES[chosen.dtype], DTYPES[chosen.adapter_dtype]
        traced = traced_model.TracedModel(config, chosen.r, target, *dtypes, chosen.use_dora)
        made = _estimate(traced, chosen, traced.activations(chosen.batch, chosen.seq, chosen.checkpointing))
        size = None if vram is None else int(vram * 2**30)
        largest = None if size is None else _largest_sequence(traced, chosen, size)
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if largest is not None and most is not None:
            largest = min(largest, most)
        return replace(made, vram=size, largest_seq=largest, max_seq=most, advice=_advice(traced, made))


def _said_by(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that the configuration of a quantized model implies; none where `given` says how to quantize."""
    said = getattr(config, "quantization_config", None)
    if said is None or "quant" in given:
        return {}
    fields = said if isinstance(said, dict) else said.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "bitsandbytes")))
    if method != "bitsandbytes":
        raise ValueError(
            f"model: quantized by {shown(method)}, whose sizes are not known here: give quant (--quant), one of "
            f"{', '.join(QUANTIZATIONS)}"
        )
    try:
        settings = QuantizationSettings.of(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: quantization_config: {error}") from error
    if settings.bits == 8:
        return {"quant": "int8"}
    return {"quant": settings.quant_type, "double_quant": settings.double_quant}


# -- the parts ----------------------------------------------------------------------------------------------------


def _estimate(traced: TracedModel, s: Settings, activations: Activations) -> Estimate:
    adapters = [p.numel() for p in traced.adapters.values()]
    count, item = sum(adapters), DTYPES[s.dtype].itemsize
    adapter_bytes = count * DTYPES[s.adapter_dtype].itemsize
    largest = max((n * k for n, k in traced.quantized), default=0)
    parts = [
        Part(*_linears(traced, s)),
        Part("embedding and lm_head", traced.edges, "always", s.dtype),
        Part("norms, buffers, other weights", traced.rest, "always", s.dtype),
        Part("adapters", adapter_bytes, "always", f"{count:,} parameters in {s.adapter_dtype}"),
        Part("gradients", adapter_bytes, "always", "of the adapters"),
        Part("optimizer state", *_optimizer(adapters, s)),
        Part("cuBLAS workspaces", CUBLAS_THREADS * CUBLAS_WORKSPACE, "always", "2 threads', on Hopper; else a quarter"),
    ]
    kept = "each layer's input" if s.checkpointing else "all that the layers save, x by reference"
    name = "checkpoints" if s.checkpointing else "saved activations"
    parts += [
        Part(name, activations.layers, "always", kept),
        Part("kept by the model's ends", activations.ends, "always", "positions, the last norm"),
        Part("one layer, run and differentiated", activations.live, "in a layer", _of_a_layer(traced, s)),
    ]
    if s.quant != "none":
        parts.append(
            Part("one dequantized weight", largest * item, "in a layer", "the largest; none on the fused path")
        )
    tokens, hidden = s.batch * s.seq, traced.head.weight.shape[1]
    vocabulary = traced.head.weight.shape[0]
    if s.chunked_loss:
        # A block in 16 bits beside its float32 form, which turns into its gradient; and what backward makes of the kept
        # gradient: itself scaled in float32, then rounded.
        rows = min(tokens, chunk_rows(vocabulary))
        block = rows * vocabulary * (4 + (item if item < 4 else 0)) + rows * hidden * item
        size = tokens * hidden * item + max(block, tokens * hidden * (4 + item))
        parts.append(Part("linear cross-entropy", size, "in the loss", f"{rows} tokens at a time"))
    else:
        note = f"{activations.loss / (tokens * vocabulary):.0f} bytes a logit: {s.dtype}, fp32, softmax, two gradients"
        parts.append(Part("logits and cross-entropy", activations.loss, "in the loss", note))
    peak = activations.layers + max(sum(p.bytes for p in parts if p.when == w) for w in WHENS[1:3])
    parts.append(Part("CUDA context", CONTEXT, "assumed", "0.4 to 0.7 GB"))
    parts.append(Part("allocator slack", int(SLACK * peak), "assumed", f"{SLACK:.0%} of activations"))
    return Estimate(type(traced.model).__name__, s, tuple(parts))


def _linears(traced: TracedModel, s: Settings) -> tuple[str, int, str, str]:
    sizes = traced.quantized
    count = sum(n * k for n, k in sizes)
    if not count:
        return "linear layers", 0, "always", "none of a class that is quantized; they stand with the other weights"
    if s.quant == "none":
        return "linear layers", count * DTYPES[s.dtype].itemsize, "always", f"{count:,} weights in {s.dtype}"
    if s.quant == "int8":
        return "8-bit linear layers", count + sum(4 * n for n, _ in sizes), "always", f"{count:,} weights"
    size = sum(_bytes_4bit(n * k, s.blocksize, s.double_quant) for n, k in sizes)
    return "4-bit linear layers", size, "always", f"{count:,} weights, {8 * size / count:.3f} bits each"


def _bytes_4bit(numel: int, blocksize: int, nested: bool) -> int:
    """Of one `Weight4bit`: codes, scales, tables."""
    blocks = math.ceil(numel / blocksize)
    codes = math.ceil(numel / 2) + 4 * 16
    return codes + (blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if nested else 4 * blocks)


def _optimizer(adapters: list[int], s: Settings) -> tuple[int, str, str]:
    """Two moments a parameter: float32, or 8 bits with a scale a block (parameters of 4096 values and more)."""
    count = sum(adapters)
    if s.optim == "adamw":
        return 8 * count, "always", "two moments in fp32"
    scale = 4 / OPTIMIZER_BLOCK
    small = sum(8 * n for n in adapters if n < 4096)
    size = small + sum(int(2 * n * (1 + scale)) for n in adapters if n >= 4096)
    if s.optim == "adamw8bit":
        return size, "always", "two moments in 8 bits"
    return 0, "always", f"{size / GB:.2f} GB that move to the host when the GPU's memory is short"


def _of_a_layer(traced: TracedModel, s: Settings) -> str:
    """What the largest of it is made of: the adapters' S, and what attention keeps."""
    config = traced.model.config
    tokens, item = s.batch * s.seq, DTYPES[s.dtype].itemsize
    layers = max(1, getattr(config, "num_hidden_layers", 1))
    adapted, elements = traced.elements_of_s(tokens)
    notes = [f"S of {adapted / layers:.0f} adapters {elements / layers * item / GB:.3f}"]
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        kept = tokens * ((2 * heads + 2 * shared) * dim * item + 4 * heads)
        notes.append(f"attention's q, k, v, output {kept / GB:.3f}")
    return "of it " + ", ".join(notes)


# -- what would fit -----------------------------------------------------------------------------------------------


def _polynomial(points: tuple[int, int, int], values: list[int]) -> Callable[[int], int]:
    """The parabola through three values; activations are linear in the sequence, or quadratic where scores are kept."""
    (x0, x1, x2), (y0, y1, y2) = points, values
    first = (y1 - y0) / (x1 - x0)
    second = ((y2 - y1) / (x2 - x1) - first) / (x2 - x0)
    return lambda x: round(y0 + first * (x - x0) + second * (x - x0) * (x - x1))


def _largest_sequence(traced: TracedModel, s: Settings, size: int) -> int:
    """The longest sequence within `size` bytes, by bisection over parabolas through three traced lengths.

    Which operation makes the peak may change with the length, so it is done again with lengths around the answer.
    """
    longest = _bisect(traced, s, size, (512, 1024, 2048))
    if longest < 64:
        return longest
    return _bisect(traced, s, size, (longest - longest // 16, longest, longest + longest // 16))


def _bisect(traced: TracedModel, s: Settings, size: int, points: tuple[int, int, int]) -> int:
    from peftkern.integrations.traced_model import Activations

    traces = [traced.activations(s.batch, seq, s.checkpointing) for seq in points]
    fields = ("layers", "ends", "live", "loss")
    curves = {name: _polynomial(points, [getattr(t, name) for t in traces]) for name in fields}

    def fits(seq: int) -> bool:
        at = Activations(**{name: curve(seq) for name, curve in curves.items()})
        return _estimate(traced, replace(s, seq=seq), at).total <= size

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _advice(traced: TracedModel, made: Estimate) -> tuple[str, ...]:
    """A line for each saving that is not used and would lower the peak, the largest first."""
    s = made.settings
    ways: list[tuple[str, dict[str, Any]]] = []
    if s.quant in ("none", "int8"):
        ways.append(("4-bit linear layers (--quant nf4)", {"quant": "nf4"}))
    elif not s.double_quant:
        ways.append(("quantized scales (--double-quant)", {"double_quant": True}))
    if not s.checkpointing:
        ways.append(
            ("gradient checkpointing (without --no-checkpointing), for one more forward", {"checkpointing": True})
        )
    if not s.chunked_loss:
        ways.append(("a chunked loss (--chunked-loss; peftkern.use_chunked_loss)", {"chunked_loss": True}))
    if s.optim == "adamw":
        ways.append(("AdamW in 8 bits (--optim adamw8bit)", {"optim": "adamw8bit"}))
    if s.batch > 1:
        ways.append((f"{s.batch} steps of gradient accumulation over batches of one", {"batch": 1}))
    lines = []
    for words, change in ways:
        other = replace(s, **change)
        activations = traced.activations(other.batch, other.seq, other.checkpointing)
        lines.append((made.total - _estimate(traced, other, activations).total, words))
    shown = sorted((item for item in lines if item[0] >= 0.005 * GB), reverse=True)
    return tuple(f"{words} would save {saved / GB:.2f} GB" for saved, words in shown)


# -- the command --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m peftkern.estimate",
        description="What a LoRA or QLoRA step takes of a GPU's memory, part by part.",
    )
    add = functools.partial(parser.add_argument, metavar="N")
    parser.add_argument("model", help="a hub id (only its configuration is read), a folder, or a config.json")
    add("--r", type=int, default=default.r, help="rank of the adapters")
    parser.add_argument("--use-dora", action="store_true", help="DoRA: a magnitude for each output")
    add("--seq", type=int, default=default.seq, help="tokens in a sequence")
    add("--batch", type=int, default=default.batch, help="sequences in a step")
    add("--vram", type=float, help="memory of the GPU in GiB")
    said = "by default what the configuration says of a quantized model"
    parser.add_argument("--quant", choices=QUANTIZATIONS, default=argparse.SUPPRESS, help=f"{said}, else nf4")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=said)
    add("--blocksize", type=int, default=default.blocksize, help="weights that share a scale")
    parser.add_argument("--target", default=default.target, metavar="NAMES", help="modules to adapt, with commas")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--optim", choices=OPTIMIZERS, default=default.optim)
    parser.add_argument("--chunked-loss", action=argparse.BooleanOptionalAction, default=default.chunked_loss)
    parser.add_argument("--adapter-dtype", choices=DTYPES, default=default.adapter_dtype)
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of what is not quantized")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, 1 if the step does not fit in --vram, 2 if there is no answer."""
    options = vars(_parser().parse_args(arguments))
    try:
        made = estimate_memory(options.pop("model"), **options)
    except (ValueError, NotImplementedError, ImportError) as error:
        print(f"peftkern.estimate: {error}", file=sys.stderr)
        return 2
    print(made)
    return 1 if made.fits is False else 0


if __name__ == "__main__":
    sys.exit(main())
