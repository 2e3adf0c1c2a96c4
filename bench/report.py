"""From result files to a table in Markdown and pictures.

    python -m bench.report [FOLDER] [--no-plots]

Reads every result under bench/results (or FOLDER), prints the tables, and draws a picture beside each result: overhead
over the frozen layer for a headline, and by tokens for 4-bit weights, ratios to PEFT for a training step on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import records, report_many, report_quantized
from bench.environment import RESULTS
from bench.report_layers import layers_table
from bench.report_parts import COLOURS, GREY, LABELS, conditions, finish, markdown_table, megabytes, new_figure, percent


def headline_table(result: dict[str, Any]) -> str:
    """Every row that was measured, problem by problem, then why the others were not."""
    header = ["problem", "passes", "implementation", "time us", "10-90 %", "over frozen", "wall us", "of limit"]
    header += ["saved MB", "peak MB", "launches", "path"]
    lines, reasons = [], {}
    for row in result["rows"]:
        if row["status"] != "ok":
            where = reasons.setdefault((row["implementation"], row["status"], row["reason"]), [])
            where.append(row["problem"])
            continue
        times = row["gpu_us"] or row["wall_us"]
        share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
        lines.append(
            [
                row["problem"],
                row["passes"],
                row["implementation"] + (f" ({row['group']})" if row["implementation"] == "frozen" else ""),
                f"{times['median']:.1f}",
                f"{times['p10']:.1f}-{times['p90']:.1f}",
                percent(row["overhead"]),
                f"{row['wall_us']['median']:.1f}",
                share,
                megabytes(row["saved_bytes"]),
                megabytes(row["peak_bytes"]),
                "" if row["launches"] is None else str(row["launches"]),
                row["path"] or "",
            ]
        )
    text = markdown_table(header, lines)
    for (name, status, reason), where in reasons.items():
        problems = list(dict.fromkeys(where))
        shown = ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        text += f"\n\n{name} {status} ({shown}): {reason}"
    for gap in result["missing"]:
        text += f"\n\nmissing: {gap['group']}, {gap['problem']}: {gap['reason']}"
    return text


def step_table(result: dict[str, Any]) -> str:
    """The CPU's training step, and the cost of a call."""
    header = ["training", "peftkern ms", "PEFT ms", "ratio", "10-90 %", "target"]
    header += ["saved in layers MB", "PEFT's", "ratio", "target", "saved in all MB", "PEFT's", "ratio"]
    lines = []
    for row in result["rows"]:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        line = [row["mode"], f"{row['peftkern_ms']:.0f}", f"{row['peft_ms']:.0f}", f"{row['ratio']:.2f}", spread]
        targets = {name: f"{target:.2f}" for name, target in row["targets"].items()}
        line.append(targets.get("time", ""))
        if "saved_bytes" in row:  # of a checkpointed step nobody asks
            inside, whole = row["saved_in_layers"], row["saved_bytes"]
            line += [megabytes(inside["peftkern"]), megabytes(inside["peft"]), f"{row['saved_in_layers_ratio']:.2f}"]
            line += [targets["saved"], megabytes(whole["peftkern"]), megabytes(whole["peft"])]
            line.append(f"{row['saved_ratio']:.2f}")
        lines.append([*line, *[""] * (len(header) - len(line))])
    calls = []
    for row in result["calls"]:
        us = {name: f"{m['median']:.0f}" for name, m in row["microseconds"].items()}
        kind = f"{row['dtype']}, {row['adapter_dtype']} adapters, x {row.get('shape', [1, 64])}"
        calls.append(
            [
                kind,
                *(us.get(name, "") for name in ("frozen", "peftkern", "peft", "composed")),
                f"{row['ratio']:.2f}",
                f"{row['targets']['overhead']:.2f}",
            ]
        )
    names = ["frozen us", "peftkern us", "PEFT us", "products alone us"]
    head = ["call at 1 x 64 x 64", *names, "overhead over PEFT's", "target"]
    return markdown_table(header, lines) + "\n\n" + markdown_table(head, calls)


def mixed_table(result: dict[str, Any]) -> str:
    """A batch of many adapters: the time of all, and what adapters add to the model without them."""
    header = [
        "hidden",
        "batch",
        "peftkern ms",
        "PEFT ms",
        "without adapters ms",
        "PEFT over peftkern",
        "10-90 %",
        "target",
    ]
    header.append("adapters alone")
    lines = []
    for row in result["rows"]:
        added = (row["peft_ms"] - row["frozen_ms"]) / max(row["peftkern_ms"] - row["frozen_ms"], 1e-9)
        lines.append(
            [
                str(result["size"]["hidden"]),
                row["case"],
                *(f"{row[f'{name}_ms']:.2f}" for name in ("peftkern", "peft", "frozen")),
                f"{row['speedup']:.2f}",
                f"{row['speedup_p10']:.2f}-{row['speedup_p90']:.2f}",
                f"{row['targets']['speedup']:.1f}",
                f"{added:.1f}",
            ]
        )
    return markdown_table(header, lines)


def tokens_table(result: dict[str, Any]) -> str:
    """A few tokens through a model, forward and in training."""
    header = ["pass", "peftkern ms", "PEFT ms", "frozen ms", "ratio", "10-90 %", "frozen over PEFT's"]
    lines = []
    for row in result["rows"]:
        times = [f"{row[f'{name}_ms']:.2f}" for name in ("peftkern", "peft", "frozen")]
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        lines.append([row["case"], *times, f"{row['ratio']:.2f}", spread, f"{row['frozen_ratio']:.2f}"])
    return markdown_table(header, lines)


def adapters_table(result: dict[str, Any]) -> str:
    """What is done to adapters around forwards: made, loaded, switched, saved, merged."""
    header = ["operation", "peftkern ms", "PEFT ms", "ratio", "10-90 %"]
    lines = []
    for row in result["rows"]:
        times = [f"{row[f'{name}_ms']:.0f}" for name in ("peftkern", "peft")]
        lines.append(
            [row["operation"], *times, f"{row['ratio']:.2f}", f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"]
        )
    return markdown_table(header, lines)


def experts_table(result: dict[str, Any]) -> str:
    """A mixture's training step with LoRA on its stacked experts."""
    header = [
        "training",
        "peftkern ms",
        "PEFT ms",
        "ratio",
        "10-90 %",
        "frozen ms",
        "saved in all MB",
        "PEFT's",
        "ratio",
    ]
    lines = []
    for row in result["rows"]:
        saved = row["saved_bytes"]
        times = [f"{row[f'{name}_ms']:.0f}" for name in ("peftkern", "peft")]
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        bytes_ = [megabytes(saved["peftkern"]), megabytes(saved["peft"]), f"{row['saved_ratio']:.2f}"]
        lines.append([row["mode"], *times, f"{row['ratio']:.2f}", spread, f"{row['frozen_ms']:.0f}", *bytes_])
    return markdown_table(header, lines)


def table(result: dict[str, Any]) -> str:
    """A result as Markdown, with its conditions; "" for a kind that has no table."""
    own = {"headline": headline_table, "step": step_table, "mixed": mixed_table, "experts": experts_table}
    own |= {"tokens": tokens_table, "adapters": adapters_table}
    tables = {**own, **report_quantized.TABLES, **report_many.TABLES, "ia3": layers_table, "dora": layers_table}
    if result["kind"] in ("experts", "dora") and result["environment"]["device_type"] == "cuda":
        tables[result["kind"]] = layers_table  # on a CPU a whole model's step has that name
    if result["kind"] not in tables:
        return ""
    return f"{conditions(result)}\n\n{tables[result['kind']](result)}"


def plot_headline(result: dict[str, Any], path: Path) -> Path | None:
    """Overhead of forward + backward over the frozen layer, a panel for each problem; None if nothing was measured."""
    order = list(COLOURS)
    rows = [
        row
        for row in result["rows"]
        if row["status"] == "ok"
        and row["passes"] == "forward+backward"
        and row["implementation"] != "frozen"
        and ": " not in row["implementation"]
    ]
    if not rows:
        return None
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(row["problem"], []).append(row)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(p) for p in panels.values())
    figure, axes = new_figure(lines, columns, 4.2 * columns, 1.2 + lines * (0.9 + 0.26 * tallest))
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis, (problem, members) in zip(axes.flat, panels.items(), strict=False):
        members.sort(key=lambda r: order.index(r["implementation"]) if r["implementation"] in order else len(order))
        names = [LABELS.get(r["implementation"], r["implementation"]) for r in members]
        values = [100 * r["overhead"] for r in members]
        bars = axis.barh(range(len(names)), values, color=[COLOURS.get(r["implementation"], GREY) for r in members])
        axis.bar_label(bars, [f"{v:+.1f} %" for v in values], padding=3, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.margins(x=0.25)
        axis.set_title(f"{problem}\n{members[0]['M']} x {members[0]['K']} x {members[0]['N']}", fontsize=8)
        axis.set_xlabel("time over the frozen layer, %", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
    return finish(
        figure, "LoRA layer, forward + backward, over the frozen layer (0 = free; lower is better)", result, path
    )


def plot_step(result: dict[str, Any], path: Path) -> Path | None:
    """Step time and saved bytes over PEFT's, and the microseconds of one call; None if there are no rows."""
    rows, calls = result["rows"], result["calls"]
    if not rows:
        return None
    figure, axes = new_figure(1, 3, 14.5, 1.8 + 0.5 * len(rows))
    green, red = COLOURS["peftkern"], COLOURS["peft fp32 adapters"]
    names = [r["mode"].replace(", dropout 0.1", "\ndropout 0.1").replace(", dropout 0", "\nno dropout") for r in rows]
    panels = (
        ("ratio", "time", "step time over PEFT's"),
        ("saved_in_layers_ratio", "saved", "bytes that adapted layers save for backward, over PEFT's"),
    )
    for axis, (field, target, label) in zip(axes[0], panels, strict=False):
        values = [r.get(field, 0.0) for r in rows]
        spread = [[r["ratio"] - r["ratio_p10"] for r in rows], [r["ratio_p90"] - r["ratio"] for r in rows]]
        bars = axis.barh(
            range(len(rows)), values, color=green, xerr=spread if field == "ratio" else None, ecolor="black", capsize=2
        )
        axis.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], label_type="center", color="white", fontsize=9)
        aims = [(i, row["targets"][target]) for i, row in enumerate(rows) if target in row["targets"]]
        for i, aim in aims:
            axis.plot([aim] * 2, [i - 0.4, i + 0.4], color="black", linestyle=":", label="" if i else "target")
        axis.axvline(1, color=red, label="PEFT")
        axis.set_yticks(range(len(rows)), names if axis is axes[0][0] else [""] * len(rows), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(1.15, 1.05 * max(values)))
        axis.set_xlabel(f"{label} (lower is better)", fontsize=8)
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False)
    axis = axes[0][2]
    kinds = (("frozen", GREY, "frozen layer"), ("peftkern", green, "peftkern"), ("peft", red, "PEFT"))
    for k, (kind, colour, label) in enumerate(kinds):
        values = [row["microseconds"][kind]["median"] for row in calls]
        bars = axis.barh([i + 0.27 * (k - 1) for i in range(len(calls))], values, 0.25, color=colour, label=label)
        axis.bar_label(bars, [f"{v:.0f}" for v in values], padding=3, fontsize=8)
    names = [f"{r['dtype']}, x {r.get('shape', [1, 64])}\n{r['adapter_dtype']} adapters" for r in calls]
    axis.set_yticks(range(len(calls)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("microseconds of a call, 1 x 64 x 64, forward + backward", fontsize=8)
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False)
    size = result["size"]
    title = (
        f"Training step of a {size['layers']}-layer Llama (hidden {size['hidden']}, {size['batch']} x {size['tokens']} "
        f"tokens), LoRA rank {result['rank']} on all linear layers"
    )
    return finish(figure, title, result, path)


def plot(result: dict[str, Any], path: Path) -> Path | None:
    """The picture of a result; None where there is nothing to draw."""
    plots = {"headline": plot_headline, "step": plot_step, **report_quantized.PLOTS, **report_many.PLOTS}
    return plots.get(result["kind"], lambda *_: None)(result, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--no-plots", action="store_true", help="only print the tables")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    paths = records.find(options.folder)
    if not paths:
        print(f"no results under {options.folder}", file=sys.stderr)
        return 1
    for path in paths:
        result = records.read(path)
        text = table(result)
        if not text:
            continue
        print(f"### {path.parent.name}: {path.stem}\n\n{text}\n")
        picture = None if options.no_plots else plot(result, path.with_suffix(".png"))
        if picture:
            print(f"drawn: {picture}\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
