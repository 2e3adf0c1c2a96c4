"""Tables of the benchmarks of one kind of layer on a GPU: IA3, DoRA, stacks of experts."""

from __future__ import annotations

from typing import Any

from bench.report_parts import markdown_table


def layers_table(result: dict[str, Any]) -> str:
    """Forward and backward of each implementation, beside the frozen layer's."""
    header = ["problem", "implementation", "path", "GPU us", "over frozen", "wall us"]
    lines = []
    for row in result["rows"]:
        if row["status"] != "ok":
            lines.append([row["problem"], row["implementation"], row["status"], row["reason"], "", ""])
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        gpu, wall = (f"{row[name]['median']:.0f}" if row[name] else "" for name in ("gpu_us", "wall_us"))
        lines.append([row["problem"], row["implementation"], row["path"] or "", gpu, ratio, wall])
    return markdown_table(header, lines)
