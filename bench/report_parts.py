"""What tables and pictures of results share: colours, conditions, Markdown, a figure's frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Order and colour in tables and pictures; whatever else was measured follows in grey.
COLOURS = {
    "peftkern": "#0b6e4f",
    "peftkern fp32 adapters": "#2fa37c",
    "peftkern compiled": "#9ad1bd",
    "peft fp32 adapters": "#b23a48",
    "peft": "#d9737f",
    "peft compiled": "#ecb5bb",
    "chalk": "#3b5b92",
    "chalk fused kernel": "#7b97c4",
    "nemo automodel": "#8a6fb0",
    "unsloth": "#c08a2d",
    "axolotl": "#dcc07f",
}
GREY = "#9a9a9a"
LABELS = {
    "peftkern": "peftkern, 16-bit adapters",
    "peftkern fp32 adapters": "peftkern, fp32 adapters",
    "peft": "PEFT, 16-bit adapters",
    "peft fp32 adapters": "PEFT, fp32 adapters (default)",
    "peft compiled": "PEFT, torch.compile",
    "peftkern compiled": "peftkern, torch.compile",
}


def conditions(result: dict[str, Any]) -> str:
    """Device, versions and date in a line."""
    found = result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v and name != "accelerate")
    threads = f", {found['threads']} threads" if found.get("device_type") == "cpu" else ""
    revision = f", peftkern {found['peftkern_revision']}" if found.get("peftkern_revision") else ""
    return f"{found['device']}{threads}; {versions}{revision}; {found['date']}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float | None) -> str:
    """0.123 as "+12.3 %"."""
    return "" if share is None else f"{100 * share:+.1f} %"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure: Any, title: str, result: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    device, versions, date = conditions(result).split("; ")
    figure.suptitle(f"{title}\n{device}, {date}\n{versions}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
