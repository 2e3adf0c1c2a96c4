"""What this machine has and which paths can run on it: `python -m peftkern.env`, or `--json`.

`collect` looks at the machine once and returns `Facts`; `paths` and `findings` are pure functions of those, so each
fault can be tested with made-up facts. The file imports nothing of peftkern and only tries to import torch, so
`python -P peftkern/env.py` (`make env`) also runs where torch is missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata

# The versions that were run; pyproject.toml says the same (tests/test_packaging.py compares them).
FLOORS = {
    "torch": "2.11",
    "safetensors": "0.8",
    "triton": "3.6",
    "transformers": "5.14",
    "accelerate": "1.15",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
}
REQUIRED = ("torch", "safetensors")
PYTHON_FLOOR = "3.11"
BACKENDS = ("auto", "triton", "torch", "unfused")
# As peftkern/backend.py has them (tests/test_env.py compares); importing that would import torch.
LOWEST_CUDA_ARCH = 80
AMD_ARCHITECTURES = ("gfx942", "gfx1100")


@dataclass(frozen=True)
class Device:
    """An accelerator: `arch` is "sm_90", "gfx942" or the device type; `memory_gib` is None where torch cannot tell."""

    name: str
    arch: str
    memory_gib: float | None = None


@dataclass(frozen=True)
class Facts:
    """What was found.

    Attributes:
        python: version of the interpreter, such as "3.11.7".
        system, machine: `sys.platform` and `platform.machine()`.
        packages: version of each package looked for, or None where it is not installed.
        broken: package -> error, for packages that are installed and fail to import.
        torch_build: "cpu", "cuda 13.0" or "rocm 7.1".
        devices: accelerators that torch sees.
        cpu: instruction set and thread count as torch reports them.
        nvidia_smi: whether NVIDIA's driver tools are on the PATH.
        c_compiler, cxx_compiler, python_headers: their paths, or None.
        interpret: whether TRITON_INTERPRET asks for Triton's interpreter.
        backend: PEFTKERN_BACKEND, or None.
        kernels_found: whether `peftkern_kernels` can be imported.
        kernels_folder: a folder on the import path that `import kernels` would take for that package.
    """

    python: str
    system: str
    machine: str
    packages: Mapping[str, str | None]
    broken: Mapping[str, str] = field(default_factory=dict)
    torch_build: str = "cpu"
    devices: tuple[Device, ...] = ()
    cpu: str = ""
    nvidia_smi: bool = False
    c_compiler: str | None = None
    cxx_compiler: str | None = None
    python_headers: str | None = None
    interpret: bool = False
    backend: str | None = None
    kernels_found: bool = True
    kernels_folder: str | None = None

    def usable(self, package: str) -> bool:
        """Whether the package is installed, imports, and is at least as new as what was run."""
        version = self.packages.get(package)
        return version is not None and package not in self.broken and not older(version, FLOORS.get(package, "0"))

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The devices that run Triton kernels at all: CUDA and ROCm."""
        return tuple(device for device in self.devices if device.arch.startswith(("sm_", "gfx")))


@dataclass(frozen=True)
class PathState:
    """One way of running an operation: whether it can be taken here, and why."""

    name: str
    runs: bool
    why: str


@dataclass(frozen=True)
class Finding:
    """Something to know. A "fault" stops or slows what should run here; a "note" says what is not to be had."""

    level: str
    what: str
    remedy: str


def older(version: str, floor: str) -> bool:
    """Whether `version` comes before `floor`, by their leading numbers ("2.11.0+cu130" counts as 2.11.0)."""

    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)
        return [int(part) for part in found[0].split(".")] if found else []

    have, want = numbers(version), numbers(floor)
    width = max(len(have), len(want))
    return have + [0] * (width - len(have)) < want + [0] * (width - len(want))


def collect() -> Facts:
    """Look at this machine. Imports torch, triton and transformers where they are installed; uses no device memory."""
    packages = {name: _version(name) for name in (*FLOORS, "numpy")}
    broken = {}
    for name in ("torch", "triton", "transformers"):
        if packages[name] is not None and (error := _import_error(name)):
            broken[name] = error
    build, cpu = "cpu", ""
    devices: tuple[Device, ...] = ()
    if packages["torch"] is not None and "torch" not in broken:
        build, devices, cpu = _ask_torch()
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    return Facts(
        python=platform.python_version(),
        system=sys.platform,
        machine=platform.machine(),
        packages=packages,
        broken=broken,
        torch_build=build,
        devices=devices,
        cpu=cpu,
        nvidia_smi=shutil.which("nvidia-smi") is not None,
        c_compiler=_compiler("CC", ("gcc", "clang", "cc")),
        cxx_compiler=_compiler("CXX", ("g++", "clang++", "c++", "cl")),
        python_headers=headers if os.path.exists(headers) else None,
        interpret=os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"),
        backend=os.environ.get("PEFTKERN_BACKEND"),
        kernels_found=importlib.util.find_spec("peftkern_kernels") is not None,
        kernels_folder=_kernels_folder(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken install raises anything: OSError for a library, AttributeError for a mix
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {first_line}"
    return None


def _ask_torch() -> tuple[str, tuple[Device, ...], str]:
    """(build, devices, cpu) as torch reports them."""
    import torch

    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"rocm {hip}" if hip else f"cuda {cuda}" if cuda else "cpu"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            arch = about.gcnArchName.split(":")[0] if hip else f"sm_{about.major}{about.minor}"
            devices.append(Device(about.name, arch, round(about.total_memory / 2**30, 1)))
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices.append(Device(str(kind), str(kind)))
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return build, tuple(devices), cpu


def _compiler(variable: str, names: Sequence[str]) -> str | None:
    named = os.environ.get(variable)
    return next((found for name in ([named] if named else names) if (found := shutil.which(name))), None)


def _kernels_folder() -> str | None:
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is not None:  # absent, or a real package
        return None
    return next(iter(spec.submodule_search_locations or ()), None)


def paths(facts: Facts) -> list[PathState]:
    """What can be done here: run plain PyTorch, run kernels on a GPU, interpret them, compile them for any GPU."""
    torch_runs = facts.usable("torch")
    plain = PathState("plain PyTorch", torch_runs, "any device" if torch_runs else "torch is missing or unusable")

    blocked = _what_blocks_the_gpu(facts)
    names = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in facts.gpus if _has_kernels(gpu))
    on_gpu = PathState("Triton kernels on a GPU", blocked is None, blocked or names)

    blocked = None
    if not facts.usable("triton"):
        blocked = "triton is missing or unusable"
    elif _interpreter_breaks(facts):
        blocked = f"the interpreter of triton {facts.packages['triton']} fails with numpy {facts.packages['numpy']}"
    how = "for tests: set TRITON_INTERPRET=1 before Python starts; about half a second for a 70 x 130 x 200 problem"
    interpreted = PathState("Triton kernels in the interpreter", blocked is None, blocked or how)

    compiles = facts.usable("triton")
    why = "python -m bench.static; needs no GPU" if compiles else "triton is missing or unusable"
    return [plain, on_gpu, interpreted, PathState("compiling the kernels for every GPU", compiles, why)]


def _what_blocks_the_gpu(facts: Facts) -> str | None:
    """The first reason for which Triton kernels cannot run on a GPU here, or None."""
    if not facts.usable("torch"):
        return "torch is missing or unusable"
    if not facts.gpus:
        return "torch sees no CUDA or ROCm device"
    if not facts.usable("triton"):
        return "triton is missing or unusable"
    if not facts.kernels_found:
        return "peftkern_kernels cannot be imported"
    if facts.interpret:
        return "TRITON_INTERPRET is set"
    if not any(_has_kernels(gpu) for gpu in facts.gpus):
        return f"the kernels are for {_SUPPORTED}"
    if facts.c_compiler is None:
        return "no C compiler"
    if facts.python_headers is None:
        return "no Python headers"
    return None


_SUPPORTED = f"sm_{LOWEST_CUDA_ARCH} and later, {' and '.join(AMD_ARCHITECTURES)}"


def _has_kernels(gpu: Device) -> bool:
    if gpu.arch.startswith("sm_"):
        return int(gpu.arch.removeprefix("sm_")) >= LOWEST_CUDA_ARCH
    return gpu.arch in AMD_ARCHITECTURES


def _interpreter_breaks(facts: Facts) -> bool:
    triton, numpy = facts.packages.get("triton"), facts.packages.get("numpy")
    return bool(triton and numpy) and older(str(triton), "3.7") and not older(str(numpy), "2.4")


def findings(facts: Facts) -> list[Finding]:
    """Everything worth saying about `facts`, faults before notes, each with one line of remedy."""
    found = [*_about_packages(facts), *_about_the_gpu(facts), *_about_settings(facts), *_about_extras(facts)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def _about_packages(facts: Facts) -> list[Finding]:
    """Python and packages: missing, broken, or older than what was run."""
    found = []
    if older(facts.python, PYTHON_FLOOR):
        what = f"Python {facts.python} is older than {PYTHON_FLOOR}"
        found.append(Finding("fault", what, f"make a virtual environment with Python {PYTHON_FLOOR} or later"))
    for name, floor in FLOORS.items():
        version = facts.packages.get(name)
        if version is None and name in REQUIRED:
            found.append(Finding("fault", f"{name} is not installed", f"pip install '{name}>={floor}'"))
        elif version is not None and name in facts.broken:
            remedy = f"pip install --force-reinstall '{name}>={floor}'"
            found.append(Finding("fault", f"{name} {version} fails to import: {facts.broken[name]}", remedy))
        elif version is not None and older(version, floor):
            level = "fault" if name in (*REQUIRED, "triton") else "note"
            what = f"{name} {version} is older than {floor}, the oldest that was run"
            found.append(Finding(level, what, f"pip install --upgrade '{name}>={floor}'"))
    if not facts.kernels_found:
        what = "peftkern_kernels cannot be imported, so only the plain path is there"
        found.append(Finding("fault", what, "pip install -e .  or put the checkout's kernels/ on PYTHONPATH"))
    return found


def _about_the_gpu(facts: Facts) -> list[Finding]:
    """What stands between a GPU and its kernels."""
    found = []
    if facts.nvidia_smi and not facts.gpus and facts.packages.get("torch") is not None:
        if facts.torch_build == "cpu":
            remedy = "install the CUDA build that pytorch.org's install page names"
            found.append(Finding("fault", "there is an NVIDIA driver, but torch is a CPU build", remedy))
        else:
            what = f"there is an NVIDIA driver, but torch ({facts.torch_build}) sees no device"
            remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be older than torch's CUDA"
            found.append(Finding("fault", what, remedy))
    for gpu in facts.gpus:
        if not _has_kernels(gpu):
            what = f"{gpu.name} is {gpu.arch}: the kernels are for {_SUPPORTED}"
            found.append(Finding("note", what, "nothing to do: this device takes the plain path"))
    if not facts.gpus:
        return found
    if facts.packages.get("triton") is None:
        remedy = "reinstall the GPU build of torch, which brings its own triton"
        found.append(Finding("fault", "there is a GPU, but triton is not installed", remedy))
    if facts.interpret:
        what = "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU"
        found.append(Finding("fault", what, "unset TRITON_INTERPRET"))
    if facts.c_compiler is None:
        what = "no C compiler: Triton cannot build its launchers"
        found.append(Finding("fault", what, "install gcc or clang, or name one in CC"))
    if facts.python_headers is None:
        what = "no Python.h: Triton cannot build its launchers"
        found.append(Finding("fault", what, "install Python's headers (Debian and Ubuntu: python3-dev)"))
    return found


def _about_settings(facts: Facts) -> list[Finding]:
    """Environment variables and folders that lead somewhere else than meant."""
    found = []
    if facts.backend is not None and facts.backend not in BACKENDS:
        what = f"PEFTKERN_BACKEND is {facts.backend!r}"
        found.append(Finding("fault", what, f"set it to one of {', '.join(BACKENDS)}, or unset it"))
    can_launch = facts.gpus or facts.interpret
    if facts.backend == "triton" and not can_launch:
        what = "PEFTKERN_BACKEND is 'triton', but there is no GPU"
        found.append(Finding("fault", what, "unset PEFTKERN_BACKEND"))
    if _interpreter_breaks(facts):
        what = f"triton {facts.packages['triton']}'s interpreter fails with numpy {facts.packages['numpy']}"
        found.append(Finding("fault" if facts.interpret else "note", what, "pip install 'numpy<2.4', for tests only"))
    transformers = facts.packages.get("transformers")
    if facts.kernels_folder and transformers and older(transformers, FLOORS["transformers"]):
        what = f"transformers {transformers} takes the folder {facts.kernels_folder} for the package kernels"
        remedy = f"pip install --upgrade 'transformers>={FLOORS['transformers']}', or start from another folder"
        found.append(Finding("fault", what, remedy))
    return found


def _about_extras(facts: Facts) -> list[Finding]:
    """What is optional and not here."""
    found = []
    has = {name for name, version in facts.packages.items() if version is not None}
    if "transformers" in has and "accelerate" not in has:
        what = "accelerate is not installed: transformers' Trainer needs it"
        found.append(Finding("note", what, f"pip install 'accelerate>={FLOORS['accelerate']}'"))
    if "transformers" in has and "peft" not in has:
        what = "peft is not installed: Trainer then saves whole models, not adapters, and refuses quantized ones"
        found.append(Finding("note", what, f"pip install 'peft>={FLOORS['peft']}'"))
    if "triton" not in has and not facts.gpus and facts.system == "linux":
        what = "triton is not installed: kernels can be neither interpreted nor compiled here"
        found.append(Finding("note", what, f"pip install 'triton>={FLOORS['triton']}', to test kernels without a GPU"))
    if facts.cxx_compiler is None:
        what = "no C++ compiler: torch.compile cannot build code for the CPU"
        found.append(Finding("note", what, "install g++ or clang++, or name one in CXX"))
    return found


def report(facts: Facts) -> str:
    """The text that `python -m peftkern.env` prints."""
    versions = [f"{name} {version or '-'}" for name, version in facts.packages.items()]
    devices = [f"{d.name} ({d.arch}{f', {d.memory_gib} GiB' if d.memory_gib else ''})" for d in facts.devices]
    lines = [
        f"python     {facts.python}, {facts.system} {facts.machine}",
        f"packages   {', '.join(versions)}",
        f"torch      {f'{facts.torch_build} build; CPU {facts.cpu}' if facts.usable('torch') else '-'}",
        f"devices    {'; '.join(devices) or 'no accelerator'}",
        f"compilers  C {facts.c_compiler or '-'}, C++ {facts.cxx_compiler or '-'}, "
        f"Python.h {facts.python_headers or '-'}",
        "",
        "paths",
    ]
    width = max(len(path.name) for path in paths(facts))
    lines += [f"  {'yes' if path.runs else 'no ':3} {path.name:{width}}  {path.why}" for path in paths(facts)]
    found = findings(facts)
    for finding in found:
        lines += ["", f"{finding.level}: {finding.what}", f"  -> {finding.remedy}"]
    if not any(finding.level == "fault" for finding in found):
        lines += ["", "no faults"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 if there is a fault, else 0."""
    parser = argparse.ArgumentParser(prog="python -m peftkern.env", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="facts, paths and findings as JSON")
    as_json = parser.parse_args(argv).json
    facts = collect()
    found = findings(facts)
    if as_json:
        everything = {
            "facts": asdict(facts),
            "paths": [asdict(path) for path in paths(facts)],
            "findings": [asdict(finding) for finding in found],
        }
        print(json.dumps(everything, indent=2))
    else:
        print(report(facts))
    return int(any(finding.level == "fault" for finding in found))


if __name__ == "__main__":
    sys.exit(main())
