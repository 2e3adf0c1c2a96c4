"""QLoRA: LoRA over a base in 4 bits, for a model that would not fit on the card otherwise.

    python examples/qlora.py                                                    # one CPU core, four to five minutes
    python examples/qlora.py --model meta-llama/Llama-3.1-8B --device cuda      # a 24 GB card
    python examples/qlora.py --model FOLDER --device cuda --vram 16 --seq 4096  # as on a 16 GB card
    python examples/qlora.py --random-8b --device cuda                          # no download: speed and memory only

The default is small and offline: the byte-level Llama in examples/base is stored in NF4 and adapted to the sources of
Python's standard library. `--model` takes any causal language model, dense (it is quantized on the way in) or already
quantized in bitsandbytes' layout; bitsandbytes itself is used where it is installed, and not needed. Before anything
is loaded, `peftkern.estimate` says what a step will take; a step that would not fit is not begun. The exit code is 1 if
the adapter, loaded again, gives other outputs, or if the held-out text is not predicted better than before; 2 if the
step does not fit.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from _language import bits_per_byte, random_batch, tokens_of
from _progress import progress
from _text import python_sources
from _training import agreement, device_name, logits, peak_memory, plot_loss, report_checks, train
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import peftkern
from peftkern.estimate import CONTEXT, Estimate
from peftkern.utils.live_bytes import LiveBytes

BASE = Path(__file__).parent / "base"
LLAMA_8B = {  # the shapes of Llama 3 8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
EVALUATED = 1024  # tokens in a held-out window at most: evaluation makes the logits of all of them
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # as `peftkern.estimate` calls them


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    if torch.device(args.device).type == "cuda":
        args.device, args.vram = gpu_and_its_memory(args)
    config = LlamaConfig(**LLAMA_8B) if args.random_8b else args.model
    estimate = peftkern.estimate_memory(
        config,
        r=args.r,
        seq=args.seq,
        batch=args.batch,
        quant=args.quant,
        optim=args.optim,
        dtype=DTYPES[args.dtype],
        vram=args.vram,
    )
    print(f"a training step, estimated before anything is loaded:\n\n{estimate}\n")
    if estimate.fits is False:
        print(f"not begun: it does not fit. Try --seq {estimate.largest_seq}" if estimate.largest_seq else "not begun")
        return 2

    model = load_base(args)
    train_ids, held_out_ids, held_out_bytes = text_of(args, model.config.vocab_size)

    def held_out_bits() -> float | None:
        if args.random_8b:
            return None
        seq = min(args.seq, EVALUATED)
        return bits_per_byte(model, held_out_ids, held_out_bytes, seq, args.batch, args.windows)

    model = adapted(model, args)
    bits_before = held_out_bits()  # B is zero yet, so this is the base in 4 bits
    model.print_trainable_parameters()
    explanation = peftkern.explain(model, tokens=args.batch * args.seq)
    print(f"paths: {explanation.summary()}")
    optimizer, optimizer_name = optimizer_of(model, args)
    print(f"optimizer: {optimizer_name}")
    chunked = peftkern.use_chunked_loss(model)
    losses, tokens_a_second = train(model, train_ids, args, optimizer=optimizer, loss_of=language_model_loss)
    measured, how = measured_peak(model, optimizer, train_ids, args)
    chunked.remove()
    bits_after = held_out_bits()

    model.save_pretrained(args.output / "adapter")
    trainable, total = model.get_nb_trainable_parameters()
    checks = compare(model, held_out_ids[: min(args.seq, EVALUATED)][None], args)
    result = {
        "model": "random weights in the shapes of Llama 3 8B" if args.random_8b else str(args.model),
        "device": device_name(args.device),
        "dtype": args.dtype,
        "quant": args.quant,
        "optimizer": optimizer_name,
        "steps": args.steps,
        "seq": args.seq,
        "batch": args.batch,
        "r": args.r,
        "vram": args.vram,
        "bits_per_byte_before": bits_before,
        "bits_per_byte_after": bits_after,
        "tokens_a_second": tokens_a_second,
        "estimated_bytes": comparable(estimate, args.device),
        "measured_bytes": measured,
        "measured_as": how,
        "process_megabytes": peak_memory("cpu"),
        "trainable_parameters": trainable,
        "all_parameters": total,
        "paths": dict(explanation.paths),
        "checks": checks,
        "losses": losses,
    }
    report(result, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    learned = bits_before is None or bits_after < bits_before
    return 0 if learned and all(check["ok"] for check in checks.values()) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="a causal language model: a folder or a Hub id")
    parser.add_argument("--random-8b", action="store_true", help="Llama 3 8B's shapes, random weights, no download")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=[*DTYPES], help="(default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "fp4"])
    parser.add_argument("--loader", default="auto", choices=["auto", "peftkern", "bitsandbytes"], help="what quantizes")
    parser.add_argument("--optim", choices=["adamw", "adamw8bit", "paged"], help="(default: paged 8 bits on a GPU)")
    parser.add_argument("--vram", type=float, help="GiB that may be used (default: what the GPU has)")
    parser.add_argument("--steps", type=int, help="(default: 200 for the small base, 20 for random weights, else 300)")
    parser.add_argument("--seq", type=int, help="tokens in a sequence (default: 256 for the small base, else 2048)")
    parser.add_argument("--batch", type=int, help="sequences in a step (default: 8 for the small base, else 1)")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of the adapters' input")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: 5e-3 for the small base, else 2e-4)")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/qlora"), help="for the adapter and the plot")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    args.small = args.model == str(BASE) and not args.random_8b
    on_gpu = torch.device(args.device).type == "cuda"
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if args.loader == "auto":
        args.loader = "bitsandbytes" if on_gpu and bitsandbytes else "peftkern"
    defaults = {
        "dtype": "bfloat16" if on_gpu else "float32",
        "optim": "paged" if on_gpu and bitsandbytes else "adamw",
        "steps": 200 if args.small else 20 if args.random_8b else 300,
        "seq": 256 if args.small else 2048,
        "batch": 8 if args.small else 1,
        "lr": 5e-3 if args.small else 2e-4,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not bitsandbytes and (args.optim != "adamw" or args.loader == "bitsandbytes"):
        parser.error(f"--optim {args.optim} --loader {args.loader}: bitsandbytes, which has it, is not installed")
    return args


def gpu_and_its_memory(args: argparse.Namespace) -> tuple[str, float]:
    """The GPU by number, and the GiB that a step may take; with `--vram`, torch's allocator is held to it."""
    device = torch.device(args.device)
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    if args.vram is None:
        return f"cuda:{index}", total / 2**30
    left_by_the_context = args.vram * 2**30 - CONTEXT  # a card's memory holds the CUDA context too
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, left_by_the_context / total)), index)
    return f"cuda:{index}", args.vram


# -- the model ----------------------------------------------------------------------------------------------------


def load_base(args: argparse.Namespace) -> Any:
    """The frozen model, its linear layers in 4 bits, on the device. No two copies of it exist on the way."""
    dtype = getattr(torch, args.dtype)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    if args.random_8b:
        print("random weights in the shapes of Llama 3 8B: speed and memory only")
        return random_llama(LlamaConfig(**LLAMA_8B), four_bits, torch.device(args.device), dtype)
    if getattr(AutoConfig.from_pretrained(args.model), "quantization_config", None) is not None:
        print(f"base: {args.model}, quantized already, on {args.device}, {args.dtype}")
        return peftkern.load_quantized(args.model, device=args.device, dtype=dtype)
    print(f"base: {args.model}, quantized by {args.loader}, on {args.device}, {args.dtype}")
    if args.loader == "bitsandbytes":
        return AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, quantization_config=four_bits, device_map={"": args.device}
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)  # on the CPU: the GPU never holds it dense
    return peftkern.quantize_model(model, four_bits, device=args.device)


def random_llama(config: LlamaConfig, four_bits: BitsAndBytesConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of random weights in 4 bits, a decoder layer at a time: no more than one is ever dense."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with device:  # its frequencies are buffers with values, which the meta device has none of
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    blocks = model.model.layers
    for index in progress(len(blocks), "quantize"):
        give_values(blocks[index], config.initializer_range, device)
        peftkern.quantize_model(blocks[index], four_bits, progress=False)
    for edge in (model.model.embed_tokens, model.model.norm, model.lm_head):
        give_values(edge, config.initializer_range, device)
    return model.requires_grad_(False)


@torch.no_grad()
def give_values(module: torch.nn.Module, std: float, device: torch.device) -> None:
    """From the meta device to `device`: matrices are normal with that deviation, norms are one."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, std)
        else:
            parameter.fill_(1.0)


def adapted(model: Any, args: argparse.Namespace) -> Any:
    """LoRA on every linear layer of the frozen model, with gradient checkpointing.

    The adapters are float32 and the rest stays in its dtype: `peftkern.prepare_model_for_kbit_training` would also
    widen the norms to float32, which PEFT's recipe needs and this one does not.
    """
    model.config.use_cache = False
    # transformers 5.23 calls it by the first name, and warns of the other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=args.r,
        lora_alpha=2 * args.r,
        lora_dropout=args.dropout,
    )
    return peftkern.get_peft_model(model, config)


def optimizer_of(model: torch.nn.Module, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, str]:
    """AdamW of the adapters, as `--optim` says, and its name."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optim == "adamw":
        return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0), "AdamW, torch"
    bitsandbytes = importlib.import_module("bitsandbytes")
    # Paged: two moments that move to the host while the GPU is short of memory. A CPU has nowhere to move them.
    on_gpu = torch.device(args.device).type == "cuda"
    name = "PagedAdamW8bit" if args.optim == "paged" and on_gpu else "AdamW8bit"
    made = getattr(bitsandbytes.optim, name)(parameters, lr=args.lr, weight_decay=0.0)
    return made, f"{name}, bitsandbytes"


# -- the text and the step ----------------------------------------------------------------------------------------


def text_of(args: argparse.Namespace, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(tokens to learn, held-out tokens, bytes of the held-out text): Python's own sources, or noise."""
    if args.random_8b:
        ids = torch.randint(vocab_size, (64 * args.seq,), device=args.device)
        return ids, ids[: args.seq + 1], 0
    tokens = tokens_of(args.model, vocab_size)
    train_text, held_out_text = python_sources()
    print(f"text: {len(train_text):,} bytes of Python to learn, {len(held_out_text):,} held out")
    return *(tokens.encode(text).to(args.device) for text in (train_text, held_out_text)), len(held_out_text)


def language_model_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's own loss, which `use_chunked_loss` computes without the logits of all tokens.

    The model predicts the tokens that follow in what it is given, so the last of `ids` [batch, seq + 1] is left out.
    """
    ids = ids[:, :-1]
    return model(input_ids=ids, labels=ids).loss


def measured_peak(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, args: argparse.Namespace
) -> tuple[float, str]:
    """(the most bytes that training held, how that was counted).

    A CPU keeps no such count, so one more step is run under peftkern's own. It is not taken by the optimizer.
    """
    if ids.is_cuda:
        return torch.cuda.max_memory_allocated(ids.device), "torch's allocator, all of training"
    optimizer.zero_grad(set_to_none=False)
    batch = random_batch(ids, args.batch, args.seq + 1, torch.Generator().manual_seed(args.seed))
    held = [*model.parameters(), *model.buffers()]
    held += [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    model.train()
    with LiveBytes(held) as live:
        language_model_loss(model, batch).backward()
    optimizer.zero_grad()
    return sum(storages.values()) + live.peak, "tensors alive in a step"


def comparable(estimate: Estimate, device: str) -> int:
    """What of the estimate is tensors: not the CUDA context, nor what the allocator cannot hand out again; on a CPU
    there is no cuBLAS."""
    elsewhere = 0 if torch.device(device).type == "cuda" else estimate.part("cuBLAS workspaces")
    return estimate.total - estimate.of("assumed") - elsewhere


# -- is it the same adapter after all? ----------------------------------------------------------------------------


def compare(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """`agreement` of the trained model with the adapter loaded again, onto the same base: a second would not fit.

    The small base is also saved in 4 bits, loaded without bitsandbytes, and merged into a dense copy.
    """
    adapter = args.output / "adapter"
    expected = logits(model, ids)
    with model.disable_adapter():
        effect = (logits(model, ids) - expected).abs().max().item()
    base = model.unload()
    if args.small:
        peftkern.save_quantized(base, args.output / "base-4bit")
    reloaded = peftkern.PeftModel.from_pretrained(base, adapter)
    others = {"reloaded": logits(reloaded, ids)}
    if args.small:
        loaded = peftkern.load_quantized(args.output / "base-4bit", device=args.device)
        others["on the saved base"] = logits(peftkern.PeftModel.from_pretrained(loaded, adapter), ids)
        others["merged, dense"] = logits(reloaded.merge_and_unload(), ids)
    return {name: agreement(got, expected, effect, args.dtype) for name, got in others.items()}


def report(result: dict, args: argparse.Namespace) -> None:
    report_checks(result["checks"])
    estimated, measured = result["estimated_bytes"], result["measured_bytes"]
    unit, name = (1e9, "GB") if estimated >= 1e9 else (1e6, "MB")
    print("\n--- result")
    if args.random_8b:
        print("  random weights          speed and memory only")
        title = f"QLoRA r {args.r}: random weights in the shapes of Llama 3 8B"
    else:
        before, after = result["bits_per_byte_before"], result["bits_per_byte_after"]
        print(f"  held-out bits per byte  {before:.3f} -> {after:.3f}  (before: the base in {args.quant})")
        title = f"QLoRA r {args.r}: held-out bits per byte {before:.2f} -> {after:.2f}"
    print(f"  tokens a second         {result['tokens_a_second']:,.0f}  ({result['device']}, {result['dtype']})")
    print(f"  peak memory, estimated  {estimated / unit:,.2f} {name}  (without the CUDA context)")
    print(f"  peak memory, measured   {measured / unit:,.2f} {name}  ({result['measured_as']})")
    plot_loss(result["losses"], title, args.output)


if __name__ == "__main__":
    sys.exit(main())
