"""Tables and pictures of results over 4-bit weights: bench.quantized's and bench.qlora_step's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report_parts import COLOURS, GREY, finish, markdown_table, megabytes, new_figure, percent

# What is drawn, and as what.
LINES = {
    "peftkern": ("peftkern, LoRA on 4 bits", COLOURS["peftkern"], "-"),
    "peftkern dense": ("peftkern, LoRA on a dense weight", COLOURS["peftkern compiled"], "-"),
    "peft on bitsandbytes": ("PEFT on bitsandbytes", COLOURS["peft"], "-"),
    "peft on bitsandbytes fp32 adapters": (
        "PEFT on bitsandbytes, fp32 adapters",
        COLOURS["peft fp32 adapters"],
        "-",
    ),
    "bitsandbytes": ("bitsandbytes, no adapter", COLOURS["unsloth"], "--"),
    "peftkern: fused_4bit": ("peftkern, held to decoding in the product", GREY, ":"),
    "peftkern: dequantize:triton": ("peftkern, held to writing W out", "black", ":"),
}


def _time(row: dict[str, Any]) -> float:
    return (row["gpu_us"] or row["wall_us"])["median"]


def backward_times(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(problem, implementation) -> microseconds of forward + backward less forward's."""
    times = {(r["problem"], r["implementation"], r["passes"]): _time(r) for r in rows if r["status"] == "ok"}
    return {
        (problem, name): both - times[problem, name, "forward"]
        for (problem, name, passes), both in times.items()
        if passes == "forward+backward" and (problem, name, "forward") in times
    }


def dequantization_table(result: dict[str, Any]) -> str:
    """GB/s, share of a copy of the same bytes, and how many times bitsandbytes."""
    lines = []
    for shape in result["dequantization"]:
        rows = shape["implementations"]
        theirs = rows.get("bitsandbytes", {}).get("us")
        for name, row in rows.items():
            start = [f"{shape['N']} x {shape['K']} to {shape['dtype']}", name]
            if row["status"] != "ok":
                lines.append([*start, f"{row['status']}: {row['reason']}", "", "", ""])
                continue
            us = row["us"]["median"]
            times = "" if theirs is None or name == "copy" else f"{theirs['median'] / us:.2f}"
            lines.append([*start, f"{us:.1f}", f"{row['GB_per_s']:.0f}", f"{row['share_of_copy']:.0%}", times])
    header = ["dequantization", "implementation", "time us", "GB/s", "of a copy", "times bitsandbytes' speed"]
    return markdown_table(header, lines)


def quantized_table(result: dict[str, Any]) -> str:
    """The dequantization; every layer that was measured; why the others were not."""
    header = ["problem", "passes", "implementation", "time us", "over dense frozen", "wall us", "of limit"]
    header += [
        "backward: bitsandbytes' time over it",
        "peak MB",
        "beyond dense MB",
        "weight saved MB",
        "launches",
        "path",
    ]
    backward, lines = backward_times(result["rows"]), []
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        problem, name = row["problem"], row["implementation"]
        if row["status"] != "ok":
            reasons.setdefault((name, row["status"], row["reason"]), []).append(problem)
            continue
        ratio = ""
        if (
            row["passes"] == "forward+backward"
            and (problem, "bitsandbytes") in backward
            and backward[problem, name] > 0
        ):
            ratio = f"{backward[problem, 'bitsandbytes'] / backward[problem, name]:.2f}"
        share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
        lines.append(
            [
                problem,
                row["passes"],
                name,
                f"{_time(row):.1f}",
                percent(row["overhead"]),
                f"{row['wall_us']['median']:.1f}",
                share,
                ratio,
                megabytes(row["peak_bytes"]),
                megabytes(row["extra_bytes"]),
                megabytes(row["saved_weight_bytes"]),
                "" if row["launches"] is None else str(row["launches"]),
                row["path"] or "",
            ]
        )
    text = f"{dequantization_table(result)}\n\n{markdown_table(header, lines)}"
    for (name, status, reason), where in reasons.items():
        text += f"\n\n{name} {status} ({', '.join(dict.fromkeys(where))}): {reason}"
    for gap in result["missing"]:
        text += f"\n\nmissing: {gap['problem']}: {gap['reason']}"
    return text


def qlora_table(result: dict[str, Any]) -> str:
    """Tokens a second and memory of a whole step."""
    header = ["device", "tokens", "implementation", "tokens/s", "step ms", "10-90 %", "at rest GB", "peak GB"]
    header += ["reserved GB", "estimated GB", "optimizer"]
    lines = []
    for row in result["rows"]:
        start = [row["label"], str(row["seq"]), row["implementation"]]
        if row["status"] != "ok":
            lines.append([*start, f"{row['status']}: {row['reason']}", *[""] * 7])
            continue
        us = row["step_us"]
        sizes = (row["at_rest_bytes"], row["peak_bytes"], row["reserved_bytes"], row["estimated_bytes"])
        memory = ["" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        spread = f"{us['p10'] / 1e3:.0f}-{us['p90'] / 1e3:.0f}"
        step = [f"{row['tokens_per_second']:.0f}", f"{us['median'] / 1e3:.0f}", spread]
        lines.append([*start, *step, *memory, row["optimizer"]])
    shape = result["shape"]
    title = f"QLoRA step of a Llama of {shape['layers']} layers, hidden {shape['hidden']}, rank {result['rank']}; "
    return f"{title}random weights: speed and memory only\n\n{markdown_table(header, lines)}"


def plot_quantized(result: dict[str, Any], path: Path) -> Path | None:
    """Time over the dense frozen layer's by tokens, a panel for each kind of pass and each shape."""
    rows = [r for r in result["rows"] if r["status"] == "ok" and r["implementation"] in LINES]
    panels: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["passes"], row["K"], row["N"]), []).append(row)
    if not panels:
        return None
    figure, axes = new_figure(-(-len(panels) // 2), min(2, len(panels)), 12.0, 1.4 + 4.2 * -(-len(panels) // 2))
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis, ((passes, K, N), members) in zip(axes.flat, panels.items(), strict=False):
        for name, (label, colour, style) in LINES.items():
            points = sorted((r["M"], 1 + r["overhead"]) for r in members if r["implementation"] == name)
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3, label=label
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        tokens = sorted({r["M"] for r in members})
        axis.set_xticks(tokens, map(str, tokens))
        axis.set_title(f"{passes}, K {K}, N {N}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("time over the dense frozen layer's (1 = free)", fontsize=8)
    axes.flat[0].legend(fontsize=7, frameon=False)
    return finish(
        figure, "Linear layer over a 4-bit weight, beside the dense frozen layer (lower is better)", result, path
    )


TABLES = {"quantized": quantized_table, "qlora": qlora_table}
PLOTS = {"quantized": plot_quantized}
