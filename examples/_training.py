"""What `quickstart.py` and `qlora.py` share: the training loop, what it took, whether two models agree, the plot."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

if importlib.util.find_spec("transformers") is None:
    raise SystemExit("this example adapts a transformers model: pip install 'peftkern[hf]'")

import torch
from _language import cosine_schedule, evaluating, next_token_loss, random_batch
from _progress import progress


def train(
    model: torch.nn.Module,
    ids: torch.Tensor,
    args: argparse.Namespace,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = next_token_loss,
) -> tuple[list[float], float]:
    """An ordinary training loop. Returns every step's loss, and tokens a second (the first step, a warm-up, aside).

    Args:
        model: its parameters that require gradients are trained.
        ids: the text's tokens, int64 [T], on the model's device.
        args: `steps`, `batch` (sequences in a step), `seq` (predicted tokens in a sequence), `lr`, `seed`.
        optimizer: of those parameters; None for AdamW.
        loss_of: the loss of `model` on a batch of ids [batch, seq + 1].
    """
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, args.steps, warmup=min(20, args.steps // 10 + 1))
    generator = torch.Generator().manual_seed(args.seed)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
    losses: list[torch.Tensor] = []  # on the device: reading each would make the host wait for the step
    start = time.perf_counter()
    model.train()
    bar = progress(args.steps, "train")
    for step in bar:
        loss = loss_of(model, random_batch(ids, args.batch, args.seq + 1, generator))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step == 0:
            start = time.perf_counter()
    read = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    return read, (args.steps - 1) * args.batch * args.seq / seconds


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """fp64 on the CPU, [batch, seq, vocabulary]."""
    with evaluating(model):
        return model(input_ids=ids).logits.double().cpu()


def agreement(got: torch.Tensor, expected: torch.Tensor, effect: float, dtype: str) -> dict:
    """Whether two models' outputs on the same text agree.

    They do if the root mean square of their difference is within 8 roundings of the dtype, relative to the outputs'
    own: a float32 model of many layers collects that much from another order of additions. The adapter's own effect is
    listed beside, so that an adapter that loads as nothing cannot pass for agreement.

    Args:
        got, expected: from `logits`.
        effect: the most by which the adapter moves a logit.
        dtype: what the models compute in.
    """
    bound = 8 * torch.finfo(getattr(torch, dtype)).eps
    relative = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    return {
        "max_abs_diff": (got - expected).abs().max().item(),
        "relative_rms_diff": relative,
        "bound": bound,
        "adapter_effect": effect,
        "ok": relative <= bound,
    }


def report_checks(checks: dict[str, dict]) -> None:
    """Print a line for each of the `agreement`s."""
    print("\n--- the adapter, saved and loaded again")
    for name, check in checks.items():
        verdict = "equal" if check["ok"] else "DIFFERENT"
        print(
            f"  {name:<21} {verdict}: logits differ by at most {check['max_abs_diff']:.1e} "
            f"(the adapter moves them by up to {check['adapter_effect']:.1f})"
        )


def report_sample(title: str, text: str) -> None:
    """Print what a model wrote, its first lines."""
    print(f"\n--- a sample {title}")
    print("\n".join(f"  | {line}" for line in text.splitlines()[:10]))


def peak_memory(device: str) -> float:
    """Megabytes: what the GPU's allocator held at most, or on a CPU what the whole process did."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB elsewhere


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def plot_loss(losses: list[float], title: str, output: Path) -> None:
    """Draw the loss curve to `output/loss.png`, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("  loss curve              not drawn: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    means = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
    axes.plot(losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(means, color="tab:blue", label="mean of 20 steps")
    axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(output / "loss.png", dpi=120)
    plt.close(figure)
    print(f"  loss curve              {output / 'loss.png'}")
