"""What the examples ask of a language model: its tokens, its bits per byte on held-out text, and a sample."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn


class ByteTokens:
    """Bytes are the tokens: id = byte. What the shipped base reads."""

    def encode(self, text: bytes) -> torch.Tensor:
        """int64 [len(text)]."""
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def decode(self, ids: torch.Tensor) -> str:
        return bytes(ids.tolist()).decode("utf-8", "replace")


class TokenizerTokens:
    """The tokens of a model's own tokenizer, without special ones."""

    def __init__(self, model_id: str):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_id)

    def encode(self, text: bytes) -> torch.Tensor:
        """int64 [tokens]."""
        ids = self._tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    def decode(self, ids: torch.Tensor) -> str:
        return self._tokenizer.decode(ids)


def tokens_of(model_id: str, vocab_size: int) -> ByteTokens | TokenizerTokens:
    """A vocabulary of 256 means bytes; any other model brings a tokenizer."""
    return ByteTokens() if vocab_size == 256 else TokenizerTokens(model_id)


def random_batch(ids: torch.Tensor, batch: int, seq: int, generator: torch.Generator) -> torch.Tensor:
    """`batch` crops of `seq` tokens at random places of `ids` [T]: int64 [batch, seq], on the device of `ids`.

    Raises:
        ValueError: the text is shorter than one crop.
    """
    if len(ids) < seq:
        raise ValueError(f"seq: expected at most the text's {len(ids)} tokens, got {seq}")
    starts = torch.randint(len(ids) - seq + 1, (batch,), generator=generator)
    return torch.stack([ids[start : start + seq] for start in starts.tolist()])


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, ids: torch.Tensor, n_bytes: int, seq: int, batch: int = 16, windows: int | None = None
) -> float:
    """Mean negative log2-likelihood of a text, a byte: `nll / ln 2 * tokens / bytes`. For byte tokens: `nll / ln 2`.

    Windows of `seq` predicted tokens overlap by half, and only the second half of each is scored, so every scored
    token has at least `seq // 2` tokens before it. (The first half window of the text is therefore not scored.)

    Args:
        model: maps ids [batch, seq] to an output with `.logits` [batch, seq, vocabulary].
        ids: the text's tokens, int64 [T] with T > seq, on the model's device.
        n_bytes: the length of the same text in bytes.
        seq: tokens in a window.
        batch: windows in a forward pass.
        windows: score only so many windows, evenly spaced; None scores the whole text.

    Raises:
        ValueError: the text is not longer than one window.
    """
    if len(ids) <= seq:
        raise ValueError(f"seq: expected less than the text's {len(ids)} tokens, got {seq}")
    half = seq // 2
    starts = list(range(0, len(ids) - seq, seq - half))
    if windows is not None and windows < len(starts):
        starts = [starts[i * len(starts) // windows] for i in range(windows)]
    nll, scored = 0.0, 0
    with evaluating(model):
        for first in range(0, len(starts), batch):
            crops = torch.stack([ids[start : start + seq + 1] for start in starts[first : first + batch]])
            logits = model(input_ids=crops[:, :-1]).logits[:, half:].float()
            targets = crops[:, 1 + half :]
            nll += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            scored += targets.numel()
    return nll / scored / math.log(2) * len(ids) / n_bytes


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of tokens 1.. of `ids` [batch, seq + 1], each given those before it."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def continuation(model: nn.Module, tokens: ByteTokens | TokenizerTokens, prompt: str, length: int, seed: int) -> str:
    """`prompt` and `length` sampled tokens (temperature 0.7), the same at every call with the same model and seed."""
    ids = tokens.encode(prompt.encode())[None].to(next(model.parameters()).device)
    with evaluating(model), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.7,
            max_new_tokens=length,
            pad_token_id=0,
        )
    return tokens.decode(out[0].cpu())


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's factor: linear from 0 to 1 over `warmup` steps, then half a cosine down to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the mode that was before it outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
