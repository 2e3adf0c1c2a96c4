"""LoRA on a stack of experts: `grouped_lora_linear` beside the frozen experts and what PEFT does, on a GPU.

    python -m bench.experts [--smoke] [--minutes 8] [--out DIR] [--problems NAME ...] [--seconds 0.2] [--quick]

One mixture's experts, gate and up together, SiLU, down, at Qwen3-30B-A3B's and Mixtral 8x7B's sizes: forward and
backward, bfloat16 with fp32 adapters of rank 16 on both stacks in PEFT's layout. Rows come sorted by expert, as random
routing of the tokens gives them: routing and the weighted sum are everybody's, and left out. Each implementation is
checked against float64 first and then timed in turn with the others; the limit is the work that cannot be avoided at
the rates that this device was measured to reach. Results go to bench/results/<device>/experts.json (or DIR), and to
$OUT where that is set. Exits with 1 where peftkern was wrong. `--smoke` runs tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import grouped_mm, silu

from bench import check, limits, measure
from bench.problems import Row, parser, run_problems, time_in_turn, try_implementation
from peftkern import reference, use_backend
from peftkern.backend import current_backend
from peftkern.ops import grouped_linear, grouped_lora_linear
from peftkern.ops.grouped_lora_linear import plan_for

# x [T, K], weight [E, N, K], lora_A [E * r, K], lora_B [N, r * E], offsets [E] -> [T, N]
Projection = Callable[..., torch.Tensor]
SCALING = 2.0
RANK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A mixture's experts at a number of tokens, each of which goes to `top` of them."""

    name: str
    tokens: int
    experts: int
    top: int
    hidden: int
    intermediate: int
    rank: int = RANK

    @property
    def key(self) -> str:
        """As in the results."""
        return f"{self.name} tokens{self.tokens} experts{self.experts} of {self.top} r{self.rank}"

    @property
    def rows(self) -> int:
        """Of all experts."""
        return self.tokens * self.top

    @property
    def stacks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(K, N) of gate and up, and of down."""
        return (self.hidden, 2 * self.intermediate), (self.intermediate, self.hidden)


def cases(smoke: bool) -> list[Case]:
    """The grid, or a tiny one."""
    if smoke:
        return [Case("tiny", 12, 4, 2, 32, 16, 8)]
    models = (("Qwen3-30B-A3B", 128, 8, 2048, 768), ("Mixtral 8x7B", 8, 2, 4096, 14336))
    return [Case(name, tokens, *sizes) for tokens in (8192, 2048, 512) for name, *sizes in models]


def factors(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, r, K] and [E, N, r] as views of what PEFT stores."""
    E, N, K = weight.shape
    return a.view(E, -1, K), b.view(N, -1, E).permute(2, 0, 1)


def ours(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """`grouped_lora_linear`."""
    return grouped_lora_linear(x, weight, *factors(weight, a, b), SCALING, offsets)


def ours_plain(*operands: torch.Tensor) -> torch.Tensor:
    """The same where there is no Triton."""
    with use_backend("torch"):
        return ours(*operands)


def ours_frozen(x: torch.Tensor, weight: torch.Tensor, a: Any, b: Any, offsets: torch.Tensor) -> torch.Tensor:
    """Our experts without adapters."""
    return grouped_linear(x, weight, offsets)


def frozen(x: torch.Tensor, weight: torch.Tensor, a: Any, b: Any, offsets: torch.Tensor) -> torch.Tensor:
    """torch's experts without adapters, as transformers runs them."""
    return grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def as_peft(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> Any:
    """The operations of PEFT 0.21.2's parametrization, by hand: the experts over W + scaling * B A, written out."""
    left, right = factors(weight, a, b)
    dense = torch.baddbmm(weight, right.to(weight.dtype), left.to(weight.dtype), alpha=SCALING)
    return frozen(x, dense, a, b, offsets)


def low_rank_grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The low-rank path by torch's grouped_mm alone, which needs no kernel of ours."""
    left, right = (t.to(x.dtype) for t in factors(weight, a, b))
    s = grouped_mm(x, left.transpose(1, 2), offs=offsets)
    delta = grouped_mm(s, right.contiguous().transpose(1, 2), offs=offsets)
    return frozen(x, weight, a, b, offsets) + SCALING * delta


IMPLEMENTATIONS: dict[str, Projection] = {
    "frozen": frozen,
    "peftkern": ours,
    "peftkern: torch": ours_plain,
    "peftkern: frozen": ours_frozen,
    "as PEFT": as_peft,
    "low rank by grouped_mm": low_rank_grouped_mm,
}
WITHOUT_ADAPTERS = ("frozen", "peftkern: frozen")


class Work:
    """The operands of a case, of unit scale."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        # In Triton's interpreter products of bfloat16 are wrong, see CONTRIBUTING.md.
        self.dtype = dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        E, r = case.experts, case.rank
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(deviation)

        chosen = torch.rand(case.tokens, E, generator=generator, device=device).topk(case.top).indices
        self.offsets = chosen.flatten().bincount(minlength=E).cumsum(0, dtype=torch.int32)
        self.x = normal(case.rows, case.hidden).to(dtype).requires_grad_()
        self.dy = normal(case.rows, case.hidden).to(dtype)
        self.weights, self.adapters = [], []
        for K, N in case.stacks:
            # Expert by expert: no fp32 copy of a stack.
            weight = torch.empty(E, N, K, dtype=dtype, device=device)
            for each in weight:
                each.copy_(normal(N, K, deviation=K**-0.5))
            self.weights.append(weight)
            self.adapters += [normal(E * r, K, deviation=K**-0.5), normal(N, r * E, deviation=0.25 * r**-0.5)]
        for t in self.adapters:
            t.requires_grad_()

    def forward(self, projection: Projection) -> torch.Tensor:
        """The experts over x."""
        a1, b1, a2, b2 = self.adapters
        gate, up = projection(self.x, self.weights[0], a1, b1, self.offsets).chunk(2, dim=-1)
        return projection(silu(gate) * up, self.weights[1], a2, b2, self.offsets)

    def step(self, projection: Projection, learns: bool = True) -> tuple[torch.Tensor, ...]:
        """y, dx and, if there are adapters, the gradients of A and B of both stacks."""
        y = self.forward(projection)
        return (y, *torch.autograd.grad(y, (self.x, *self.adapters) if learns else (self.x,), self.dy))

    def truth(self, learns: bool) -> list[torch.Tensor]:
        """The same in float64, expert by expert."""
        x, dy = self.x.detach(), self.dy
        wide = [torch.zeros(t.shape, dtype=torch.float64, device=self.device) for t in self.adapters]
        outs, dxs, start = [], [], 0
        for e, stop in enumerate(self.offsets.tolist()):
            rows = x[start:stop].double().requires_grad_()
            own = [t[e].detach().double().requires_grad_() for t in self._factors(self.adapters)]
            ends, hidden = torch.tensor([stop - start], dtype=torch.int32), rows
            for i, weight in enumerate(self.weights):
                pair = [own[2 * i][None], own[2 * i + 1][None]] if learns else [None, None]
                hidden = reference.grouped_lora_linear(hidden, weight[e].double()[None], *pair, SCALING, ends)
                if i == 0:
                    gate, up = hidden.chunk(2, dim=-1)
                    hidden = silu(gate) * up
            asked = (rows, *own) if learns else (rows,)
            dx, *grads = torch.autograd.grad(hidden, asked, dy[start:stop].double())
            outs.append(hidden.detach())
            dxs.append(dx)
            for whole, part in zip(self._factors(wide), grads, strict=False):
                whole[e] = part
            start = stop
        return [torch.cat(outs), torch.cat(dxs), *(wide if learns else [])]

    def _factors(self, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each stack's [E, r, K] and [E, N, r], views."""
        views: list[torch.Tensor] = []
        for i, weight in enumerate(self.weights):
            views += factors(weight, stored[2 * i], stored[2 * i + 1])
        return views

    def check(self, results: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> dict[str, float]:
        """Relative errors; raises `WrongResultError` outside the bound of a few roundings."""
        errors = {}
        bound = check.tolerance(self.dtype, self.case.hidden + self.case.intermediate + self.case.rows)
        names = ("y", "dx", "dA gate_up", "dB gate_up", "dA down", "dB down")
        for name, got, truth in zip(names, results, truths, strict=False):
            errors[name] = check.relative_error(got.detach(), truth)
            if not errors[name] <= bound:
                raise check.WrongResultError(f"{name}: error {errors[name]:.3g}, more than {bound:.3g}")
        return errors


def limit_microseconds(case: Case, ceilings: limits.Ceilings, dtype: torch.dtype) -> float:
    """The floor of forward and backward: a stack's operands moved once a pass, experts without rows left out."""
    rate, size, total = ceilings.flops_per_second[str(dtype).removeprefix("torch.")], dtype.itemsize, 0.0
    T, present = case.rows, min(case.experts, case.rows)
    for K, N in case.stacks:
        adapters = present * case.rank * (K + N)
        weight = present * N * K
        # As limits.forward_work and backward_work; the adapters, and their gradients, are float32.
        forward = (2 * T * (N * K + case.rank * (K + N)), size * (T * (K + N) + weight) + 4 * adapters)
        backward = (
            2 * T * (N * K + 2 * case.rank * (K + N)),
            size * (T * (2 * K + N) + weight + 2 * T * case.rank) + 8 * adapters,
        )
        total += sum(max(flops / rate, moved / ceilings.bytes_per_second) for flops, moved in (forward, backward))
    return 1e6 * total


def measure_case(
    case: Case, device: torch.device, ceilings: limits.Ceilings, *, quick: bool, seconds: float
) -> list[dict[str, Any]]:
    """Check and time every implementation of a case; one row each."""
    work = Work(case, device)
    truths = {learns: work.truth(learns) for learns in (True, False)}
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[[], Any]] = {}
    limit = limit_microseconds(case, ceilings, work.dtype)
    for name, projection in IMPLEMENTATIONS.items():
        row = rows[name] = {"problem": case.key, "implementation": name, "status": "ok", "reason": "", "errors": {}}
        row |= dict.fromkeys(("path", "gpu_us", "wall_us", "ratio", "share_of_limit", "peak_bytes"))
        row["limit_us"] = round(limit, 3)
        learns = name not in WITHOUT_ADAPTERS
        run = partial(work.step, projection, learns)
        if try_implementation(row, lambda run=run, learns=learns: work.check(run(), truths[learns]), device):
            functions[name] = run
    rows["peftkern"]["path"] = plan_for(work.x, work.weights[0], current_backend()).path
    truths.clear()
    base = "frozen" if "frozen" in functions else next(iter(functions), None)
    if base is None:
        return list(rows.values())
    how: dict[str, Any] = {"once": 0 if quick else 2, "rounds": 3, "reps": (3, 40), "seconds": seconds}
    medians = time_in_turn(rows, functions, base, device, **how)
    for name, function in functions.items():
        row, median = rows[name], medians[name]
        row["ratio"] = round(median / medians[base], 4) if base == "frozen" else None
        row["share_of_limit"] = round(limit / median, 4) if name not in WITHOUT_ADAPTERS else None
        row["peak_bytes"] = measure.peak_bytes(function, device)
    return list(rows.values())


def print_rows(case: Case, rows: list[dict[str, Any]]) -> None:
    """The table of a case."""
    print(f"{case.key} (forward + backward; the limit: {rows[0]['limit_us']:.1f} us)")
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['implementation']:24s} {row['status']}: {row['reason']}")
            continue
        time_us, peak = (row["gpu_us"] or row["wall_us"])["median"], row["peak_bytes"]
        memory = "" if peak is None else f"  peak {peak / 2**20:8.0f} MiB"
        ratio = "" if row["ratio"] is None else f"  {row['ratio']:6.3f}"
        path = f"  path {row['path']}" if row["path"] else ""
        wall = row["wall_us"]["median"]
        print(
            f"  {row['implementation']:24s} {time_us:10.1f} us{ratio}  wall {wall:10.1f} us{memory}{path}", flush=True
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    return parser("bench.experts", __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)

    def prepare(device: torch.device) -> Callable[[Case], list[Row]]:
        quick = options.smoke or options.quick
        sizes = {"n": 64, "copied": 1 << 16} if quick else {}
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        ceilings = limits.measure_ceilings(device, {dtype}, **sizes)
        return lambda case: measure_case(case, device, ceilings, quick=quick, seconds=options.seconds)

    return run_problems("experts", options, cases(options.smoke), prepare, print_rows, backend_on_cpu="triton")


if __name__ == "__main__":
    sys.exit(main())
