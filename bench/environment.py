"""What a measurement was taken on: device, versions, clocks. Recorded beside every number."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate")


def version_of(package: str) -> str | None:
    """The installed version of `package`, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A device's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The processor's name, with family and model where the name alone says little (virtual machines hide it)."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", name) and "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    return re.sub(r"\s*(\(R\)|\(TM\)|CPU|@.*|\d+-Core Processor)", "", name).strip()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def results_folder(device: torch.device) -> Path:
    """bench/results/<device>, "cpu-" before a processor's name."""
    name = slug(device_name(device))
    return RESULTS / (name if device.type == "cuda" else f"cpu-{name}")


def clocks() -> dict[str, str] | None:
    """Clocks, power and temperature of the first GPU as nvidia-smi reads them now; None where it cannot."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        return None
    return dict(zip(fields.split(","), (value.strip() for value in done.stdout.split(",")), strict=True))


def is_quiet() -> bool:
    """Whether the processor had next to nothing to do in the last minute, so that times on it mean something."""
    return os.getloadavg()[0] < 0.25 * (os.cpu_count() or 1)


def revision() -> str | None:
    """The commit that was measured, with "+" where files differ from it; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "peftkern", "kernels"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about the machine that a reader of the numbers needs."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version_of(name) for name in PACKAGES},
        "peftkern_revision": revision(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "clocks_before": clocks(),
        }
    else:
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found
