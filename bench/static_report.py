"""How the static check tells what it found: a table, the failures, a JSON file, and a progress bar on the way."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.static_judge import ARCHITECTURES, WIDE_TILE_INSTRUCTION, Record, expected_matrix_instruction

RESULTS = Path(__file__).resolve().parent / "results" / "static"
HEADER = (
    "arch",
    "kernel",
    "launch",
    "tile",
    "regs",
    "spills",
    "stack",
    "shared",
    "matrix",
    "async",
    "decode",
    "",
    "case",
)


def progress(results: Iterable[Record], total: int) -> Iterator[Record]:
    """Pass the results through, tell each failure as it comes, and show how many have come (by tqdm if it is there)."""
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        with tqdm(results, total=total, desc="compiling", unit="kernel", dynamic_ncols=True) as bar:
            for result in bar:
                if result.faults:
                    bar.write(failures([result]), file=sys.stderr)
                yield result
        return
    for done, result in enumerate(results, 1):
        if result.faults:
            print(failures([result]), file=sys.stderr)
        if done == total or done % max(1, total // 10) == 0:
            print(f"compiled {done} of {total}", file=sys.stderr, flush=True)
        yield result


def tile_of(record: Record) -> str:
    """The tile, warps and stages in a word, such as "M128 N256 K64 w8 s4"."""
    blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in record.constants.items() if "BLOCK_" in name]
    return " ".join([*blocks, f"w{record.num_warps}", f"s{record.num_stages}"])


def row(record: Record) -> tuple[str, ...]:
    """A line of the table; "decode" counts instructions for an element of a 4-bit weight."""
    more = f" (+{len(record.cases) - 1})" if len(record.cases) > 1 else ""
    arch = ARCHITECTURES[record.arch]
    start = (arch.name, record.kernel, record.launch, tile_of(record))
    end = ("FAIL" if record.faults else "ok", record.cases[0] + more)
    if record.code is None:
        return (*start, *["-"] * 7, *end)
    code = record.code
    numbers = (code.registers, code.spills, code.stack, code.shared)
    loads = "not checked" if arch.vendor == "amd" else _counts(code.asynchronous)
    matrix = _counts(code.matrix)
    if (
        record.arch in WIDE_TILE_INSTRUCTION
        and expected_matrix_instruction(record.arch, record.dots, record.num_warps) == "HMMA"
    ):
        matrix += " (small tile)"
    decode = "-" if code.decode is None else f"{code.decode.per_element:.1f}"
    return (*start, *map(str, numbers), matrix, loads, decode, *end)


def _counts(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def failures(records: Sequence[Record]) -> str:
    """Every fault, with the kernel, the tile and a case that asks for it; an empty string if there is none."""
    lines = []
    for record in records:
        for fault in record.faults:
            where = f"{ARCHITECTURES[record.arch].name} {record.kernel} [{tile_of(record)}] {record.cases[0]}"
            lines.append(f"FAIL {where}: {fault}")
    return "\n".join(lines)


def summary(records: Sequence[Record]) -> str:
    """How many compilations passed on each architecture, with the most registers, bytes of shared memory, and
    instructions for an element decoded beside a matrix instruction."""
    rows = []
    for number, arch in ARCHITECTURES.items():
        mine = [record for record in records if record.arch == number]
        codes = [record.code for record in mine if record.code is not None]
        decodes = [code.decode.per_element for code in codes if code.decode is not None and code.matrix]
        if mine:
            good = sum(not record.faults for record in mine)
            most = [str(max((getattr(code, name) for code in codes), default=0)) for name in ("registers", "shared")]
            decode = f"{max(decodes):.1f}" if decodes else "-"
            rows.append((arch.name, str(len(mine)), str(good), str(len(mine) - good), *most, decode))
    return table(("arch", "compiled", "ok", "failed", "most registers", "most shared", "most to decode"), rows)


def write_json(path: Path, records: Sequence[Record], conditions: Mapping[str, Any]) -> None:
    """The records and under which conditions they were made, one record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    path.write_text(f'{{"conditions": {json.dumps(dict(conditions))},\n"records": [\n{lines}\n]}}\n')
