"""Tables and pictures of bench.many's results: the decode pair beside servers' kernels, and whole layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report_parts import COLOURS, GREY, finish, markdown_table, new_figure, percent

PAIRS = {
    "peftkern": ("peftkern", COLOURS["peftkern"]),
    "vllm": ("vLLM", COLOURS["chalk"]),
    "sglang triton_v2": ("SGLang triton_v2", COLOURS["nemo automodel"]),
    "torch": ("one tiny kernel", GREY),
}
LAYERS = {
    "peftkern: cublas": ("peftkern, expand first", COLOURS["peftkern"], "-"),
    "peftkern: triton": ("peftkern, expand inside the base product", COLOURS["peftkern fp32 adapters"], "-"),
    "peftkern one adapter": ("peftkern, one adapter", COLOURS["peftkern compiled"], "--"),
    "torch grouped_mm": ("grouped_mm, tokens sorted", COLOURS["unsloth"], "-"),
    "peft adapter_names": ("PEFT, adapter_names", COLOURS["peft"], "-"),
}


def _reasons(result: dict[str, Any]) -> str:
    """Why rows were not measured, and what is missing."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        if row["status"] != "ok":
            found.setdefault((row["implementation"], row["status"], row["reason"]), []).append(row["problem"])
    text = ""
    for (name, status, reason), where in found.items():
        problems = list(dict.fromkeys(where))
        shown = ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        text += f"\n\n{name} {status} ({shown}): {reason}"
    for gap in result["missing"]:
        text += f"\n\nmissing: {gap['problem']}: {gap['reason']}"
    return text


def decode_table(rows: list[dict[str, Any]]) -> str:
    """The pair, with its share of the limit and how many times peftkern's the others take."""
    ours = {
        (row["problem"], row["passes"]): row["us"]["median"]
        for row in rows
        if row["implementation"] == "peftkern" and row["status"] == "ok"
    }
    header = ["decode", "what", "implementation", "us", "10-90 %", "clock", "limit us", "of limit"]
    header += ["over peftkern's", "launches"]
    lines = []
    for row in rows:
        if row["status"] != "ok":
            continue
        us, own = row["us"], ours.get((row["problem"], row["passes"]))
        lines.append(
            [
                row["problem"].removeprefix("decode "),
                row["passes"],
                row["implementation"],
                f"{us['median']:.2f}",
                f"{us['p10']:.2f}-{us['p90']:.2f}",
                row["clock"],
                "" if row["limit_us"] is None else f"{row['limit_us']:.2f}",
                "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}",
                "" if own is None or row["implementation"] == "peftkern" else f"{us['median'] / own:.2f}",
                "" if row["launches"] is None else str(row["launches"]),
            ]
        )
    return markdown_table(header, lines)


def layer_table(rows: list[dict[str, Any]]) -> str:
    """Whole layers over the frozen one's time."""
    header = ["layer", "passes", "implementation", "us", "10-90 %", "over frozen", "launches"]
    lines = [
        [
            row["problem"],
            row["passes"],
            row["implementation"],
            f"{row['us']['median']:.1f}",
            f"{row['us']['p10']:.1f}-{row['us']['p90']:.1f}",
            percent(row["overhead"]),
            "" if row["launches"] is None else str(row["launches"]),
        ]
        for row in rows
        if row["status"] == "ok"
    ]
    return markdown_table(header, lines)


def many_table(result: dict[str, Any]) -> str:
    """Both tables, then why the others were not measured."""
    decode = [row for row in result["rows"] if row["group"] == "decode"]
    layers = [row for row in result["rows"] if row["group"] != "decode"]
    tables = [*([decode_table(decode)] if decode else []), *([layer_table(layers)] if layers else [])]
    return "\n\n".join(tables) + _reasons(result)


def plot_many(result: dict[str, Any], path: Path) -> Path | None:
    """The pair's time by tokens for distinct adapters, a panel a shape; layers over the frozen one by adapters."""
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    pairs: dict[Any, list[dict[str, Any]]] = {}
    layers: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        shape = f"K {row['K']}, N {row['N']}"
        if row["group"] == "decode" and row["passes"] in ("pair", "one tiny kernel") and row["ids"] == "distinct":
            ranks = "+".join(map(str, row["ranks"]))
            pairs.setdefault(f"decode pair, distinct adapters, rank {ranks}\n{shape}", []).append(row)
        elif row["group"] != "decode" and row["implementation"] in LAYERS:
            layers.setdefault(f"{row['passes']}, {row['M']} tokens\n{shape}", []).append(row)
    panels = len(pairs) + len(layers)
    if not panels:
        return None
    columns = min(3, panels)
    lines = -(-panels // columns)
    figure, axes = new_figure(lines, columns, 5.2 * columns, 1.4 + 3.6 * lines)
    for axis in list(axes.flat)[panels:]:
        axis.set_visible(False)
    drawn = iter(axes.flat)
    for title, members in pairs.items():
        axis = next(drawn)
        for name, (label, colour) in PAIRS.items():
            points = sorted((r["M"], r["us"]["median"]) for r in members if r["implementation"] == name)
            if points:
                style = ":" if name == "torch" else "-"
                axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=label)
        _finish_panel(axis, title, "tokens, each with an adapter of its own", "microseconds, cold cache", members, "M")
    for title, members in layers.items():
        axis = next(drawn)
        for name, (label, colour, style) in LAYERS.items():
            points = sorted((r["slots"], 1 + r["overhead"]) for r in members if r["implementation"] == name)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        _finish_panel(axis, title, "adapters", "time over the frozen layer's (1 = free)", members, "slots")
    return finish(figure, "Many adapters in one batch (lower is better)", result, path)


def _finish_panel(axis: Any, title: str, x: str, y: str, members: list[dict[str, Any]], field: str) -> None:
    """Axes of a panel whose abscissa is `field` of its rows."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    values = sorted({row[field] for row in members})
    axis.set_xticks(values, map(str, values))
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.legend(fontsize=7, frameon=False)


TABLES = {"many": many_table}
PLOTS = {"many": plot_many}
