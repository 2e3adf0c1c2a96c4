"""The result file: its shape, its arithmetic, reading and writing.

`{"schema": 1, "kind": ..., "environment": {...}, "rows": [...], "missing": [...], ...}`, where kind is "headline",
"quantized", "step", "mixed", "many", "qlora", "host" or "tune". A row of a headline is one implementation in one
problem and one kind of pass; ROW_FIELDS says what it holds, QUANTIZED_FIELDS what one over a 4-bit weight holds
besides, MANY_FIELDS what one over many adapters holds. What was not measured is None with a reason in `status` and
`reason`: no number in a result file is anything but measured, or arithmetic on measured ones.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "wrong", "failed", "not run")
# name -> (types, meaning)
ROW_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "problem": ((str,), "shape, rank, dtype and dropout in words; unique within a run"),
    "passes": ((str,), "forward, or forward+backward"),
    "group": ((str,), "what was measured in turn with it; overhead is over the frozen layer of the same group"),
    "implementation": ((str,), "name of the rival, frozen for the layer without an adapter"),
    "version": ((str, type(None)), "of the package it comes from"),
    "status": ((str,), "ok; wrong: outside the bound, so not timed; failed: it raised; not run"),
    "reason": ((str,), "why, where status is not ok"),
    "path": ((str, type(None)), "the path that peftkern took"),
    "M": ((int,), "tokens"),
    "K": ((int,), "in_features"),
    "N": ((int,), "out_features"),
    "R": ((int,), "rank"),
    "dtype": ((str,), "of x and the frozen weight"),
    "dropout": ((float,), "probability"),
    "gpu_us": ((dict, type(None)), "GPU microseconds a call: median, least, p10, p90, samples"),
    "wall_us": ((dict, type(None)), "wall microseconds a call in a loop"),
    "overhead": ((float, type(None)), "time over the frozen layer's, minus 1; GPU time, wall time on a CPU"),
    "limit_us": ((float, type(None)), "the physical limit in microseconds"),
    "share_of_limit": ((float, type(None)), "limit over time: 1 is the limit"),
    "peak_bytes": ((int, type(None)), "most memory held during a call beyond what was there before"),
    "saved_bytes": ((int, type(None)), "saved for backward, parameters excluded"),
    "launches": ((int, type(None)), "kernels launched in a call"),
    "errors": ((dict,), "relative error of each result, as checked before timing"),
}
# Of a row over a 4-bit weight, besides.
QUANTIZED_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "weight_bytes": ((int,), "of the 4-bit weight with its scales"),
    "saved_weight_bytes": ((int,), "the dense weight's bytes beyond those"),
    "extra_bytes": ((int, type(None)), "peak beyond that of peftkern's layer over the dense weight"),
    "allowed_bytes": ((int, type(None)), "what extra_bytes may be at most, of peftkern"),
}
# Of a batch over many adapters.
MANY_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    name: ROW_FIELDS[name]
    for name in ROW_FIELDS
    if name not in ("R", "path", "dropout", "gpu_us", "wall_us", "peak_bytes", "saved_bytes")
} | {
    "passes": ((str,), "pair, routing, or both; one tiny kernel: the least; forward, or forward + backward"),
    "group": ((str,), "decode, prefill or train"),
    "ids": ((str,), "what the tokens want: distinct, uniform, skewed, identical, half base, or sequences"),
    "slots": ((int,), "adapters that there is room for"),
    "ranks": ((list,), "of the slots, in turn"),
    "clock": ((str, type(None)), "graph: a replay by GPU events; gpu: a call by GPU events; wall"),
    "us": ((dict, type(None)), "microseconds by that clock: median, least, p10, p90, samples"),
    "bytes": ((int, type(None)), "that a pair must move: distinct adapters once, x and y of rows that have one"),
}
FIELDS_OF = {"headline": ROW_FIELDS, "quantized": ROW_FIELDS | QUANTIZED_FIELDS, "many": MANY_FIELDS}


def overhead(time: float, frozen: float) -> float:
    """How much longer than the frozen layer: 0.12 for 12 %.

    Raises:
        ValueError: a time that is not positive.
    """
    if time <= 0 or frozen <= 0:
        raise ValueError(f"time, frozen: expected positive times, got {time!r} and {frozen!r}")
    return time / frozen - 1.0


def validate(result: dict[str, Any]) -> None:
    """Raise ValueError, naming the place, for a result that is not of the schema above."""
    if result.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {result.get('schema')!r}")
    for field, kind in (("kind", str), ("environment", dict), ("rows", list), ("missing", list)):
        if not isinstance(result.get(field), kind):
            raise ValueError(f"{field}: expected a {kind.__name__}, got {result.get(field)!r}")
    for field in ("device", "date", "versions"):
        if field not in result["environment"]:
            raise ValueError(f"environment: {field} is missing")
    fields = FIELDS_OF.get(result["kind"])
    if fields is None:
        return
    seen = set()
    for i, row in enumerate(result["rows"]):
        if row.keys() != fields.keys():
            raise ValueError(f"rows[{i}]: fields {sorted(row.keys() ^ fields.keys())} are missing or unknown")
        for field, (types, _) in fields.items():
            if not isinstance(row[field], types):
                raise ValueError(
                    f"rows[{i}].{field}: expected {' or '.join(t.__name__ for t in types)}, got {row[field]!r}"
                )
        if row["status"] not in STATUSES:
            raise ValueError(f"rows[{i}].status: expected one of {', '.join(STATUSES)}, got {row['status']!r}")
        times = row["us" if result["kind"] == "many" else "wall_us"]
        if (row["status"] == "ok") != (times is not None) or (row["status"] != "ok") != bool(row["reason"]):
            raise ValueError(
                f"rows[{i}]: status {row['status']!r} does not fit its times or its reason {row['reason']!r}"
            )
        key = (row["problem"], row["passes"], row["group"], row["implementation"])
        if key in seen:
            raise ValueError(f"rows[{i}]: {key} is there twice")
        seen.add(key)


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a valid result beside `path` and rename, so that a run that is stopped leaves no torn file."""
    validate(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """A result file, checked.

    Raises:
        ValueError: it is not of the schema; the message names the file.
    """
    try:
        result = json.loads(path.read_text())
        validate(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return result


def find(folder: Path) -> list[Path]:
    """Every result file under `folder`."""
    # The static check's files hold compilations and not timings; that program reads them itself.
    return sorted(path for path in folder.glob("**/*.json") if path.parent.name != "static")


def rows_of(result: dict[str, Any], **wanted: Any) -> Iterable[dict[str, Any]]:
    """Rows whose fields have the wanted values."""
    return [row for row in result["rows"] if all(row[k] == v for k, v in wanted.items())]


def has_no_place(options: Any) -> bool:
    """Whether a program was told --smoke or --quick without --out; if so, says that nothing is worth keeping then."""
    if options.out is not None or not (options.smoke or getattr(options, "quick", False)):
        return False
    print("--smoke, --quick: nothing worth keeping is measured, so --out says where it goes", file=sys.stderr)
    return True
