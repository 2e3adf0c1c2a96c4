"""`peftkern.env`: each fault is told, with its remedy, from made-up facts; and the real machine can be described."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftkern import env

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {
    "torch": "2.13.0",
    "safetensors": "0.8.0",
    "triton": "3.9.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "numpy": "2.4.6",
}
H200 = env.Device("NVIDIA H200", "sm_90", 139.8)
CPU = env.Facts(
    python="3.11.7",
    system="linux",
    machine="x86_64",
    packages=VERSIONS,
    c_compiler="cc",
    cxx_compiler="c++",
    python_headers="Python.h",
)
GPU = dataclasses.replace(CPU, torch_build="cuda 13.0", devices=(H200,), nvidia_smi=True)
OLD_GPU = env.Device("Tesla T4", "sm_75", 15.6)

PLAIN, ON_GPU, INTERPRETED, COMPILED = range(4)


def but(facts: env.Facts, **changes: object) -> env.Facts:
    """The facts with some changed; the name of a package sets its version."""
    versions = {name: changes.pop(name) for name in list(changes) if name in VERSIONS}
    return dataclasses.replace(facts, packages={**facts.packages, **versions}, **changes)


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["CPU", "H200"])
def test_a_good_machine_has_nothing_to_mend(facts):
    """Catches a finding that cries wolf."""
    assert env.findings(facts) == []
    assert "no faults" in env.report(facts)


FAULTS = [
    ("old python", but(CPU, python="3.10.13"), "Python 3.10.13 is older", "virtual environment"),
    ("no torch", but(CPU, torch=None), "torch is not installed", "pip install 'torch>=2.11'"),
    ("old torch", but(CPU, torch="2.9.1"), "torch 2.9.1 is older than 2.11", "--upgrade 'torch>=2.11'"),
    ("broken torch", but(CPU, broken={"torch": "OSError: libcudart"}), "OSError: libcudart", "--force-reinstall"),
    ("no safetensors", but(CPU, safetensors=None), "safetensors is not installed", "pip install 'safetensors"),
    ("old triton", but(GPU, triton="3.5.1"), "triton 3.5.1 is older", "--upgrade 'triton>=3.6'"),
    ("GPU, no triton", but(GPU, triton=None), "triton is not installed", "reinstall the GPU build of torch"),
    ("CPU build", but(GPU, torch_build="cpu", devices=()), "torch is a CPU build", "pytorch.org's install page"),
    ("driver too old", but(GPU, devices=()), "sees no device", "driver may be older"),
    ("no C compiler", but(GPU, c_compiler=None), "no C compiler", "install gcc or clang"),
    ("no headers", but(GPU, python_headers=None), "no Python.h", "python3-dev"),
    ("interpreter on a GPU", but(GPU, interpret=True), "TRITON_INTERPRET is set", "unset TRITON_INTERPRET"),
    ("unknown backend", but(CPU, backend="cuda"), "PEFTKERN_BACKEND is 'cuda'", "auto, triton, torch"),
    ("triton on no GPU", but(CPU, backend="triton"), "there is no GPU", "unset PEFTKERN_BACKEND"),
    ("interpreter, numpy", but(CPU, triton="3.6.0", interpret=True), "fails with numpy 2.4.6", "numpy<2.4"),
    (
        "kernels folder",
        but(CPU, transformers="5.0.0", kernels_folder="checkout/kernels"),
        "takes the folder checkout/kernels",
        "--upgrade 'transformers>=5.14'",
    ),
    ("no kernels", but(CPU, kernels_found=False), "peftkern_kernels cannot be imported", "PYTHONPATH"),
]


@pytest.mark.parametrize("facts, what, remedy", [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_each_fault_is_told_with_its_remedy(facts, what, remedy):
    """Catches a fault that goes unsaid, or is said without what to do about it."""
    faults = [finding for finding in env.findings(facts) if finding.level == "fault"]
    assert [f for f in faults if what in f.what and remedy in f.remedy], faults
    text = env.report(facts)
    assert what in text and remedy in text and "no faults" not in text


NOTES = [
    ("no peft", but(CPU, peft=None), "Trainer then saves whole models", "pip install 'peft>=0.21.2'"),
    ("no accelerate", but(CPU, accelerate=None), "Trainer needs it", "pip install 'accelerate"),
    ("no triton", but(CPU, triton=None), "neither interpreted nor compiled", "pip install 'triton>=3.6'"),
    ("no C++ compiler", but(CPU, cxx_compiler=None), "torch.compile cannot build", "g++"),
    ("old GPU", but(GPU, devices=(OLD_GPU,)), "is sm_75: the kernels are for sm_80", "plain path"),
    ("unknown AMD", but(GPU, devices=(env.Device("Radeon", "gfx906", 16.0),)), "is gfx906", "plain path"),
    ("old peft", but(CPU, peft="0.15.0"), "peft 0.15.0 is older", "--upgrade 'peft>=0.21.2'"),
]


@pytest.mark.parametrize("facts, what, remedy", [row[1:] for row in NOTES], ids=[row[0] for row in NOTES])
def test_what_is_optional_is_a_note(facts, what, remedy):
    """Catches an optional package turned into a fault, which would make `python -m peftkern.env` fail without need."""
    (finding,) = env.findings(facts)
    assert finding.level == "note" and what in finding.what and remedy in finding.remedy


def test_the_supported_devices_are_those_of_the_plan():
    """Catches a device that `peftkern.env` promises and the library does not serve, or the other way round."""
    from peftkern import backend

    assert set(env.AMD_ARCHITECTURES) == set(backend.AMD_ARCHITECTURES)
    assert env.BACKENDS == backend.BACKENDS


def test_macos_is_not_told_to_install_triton():
    """Catches a remedy that cannot be followed: triton has no wheels there."""
    assert env.findings(but(CPU, system="darwin", machine="arm64", triton=None)) == []


@pytest.mark.parametrize(
    "facts, states",
    [
        (CPU, (True, False, True, True)),
        (GPU, (True, True, True, True)),
        (but(CPU, triton=None), (True, False, False, False)),
        (but(CPU, torch=None), (False, False, True, True)),
        (but(CPU, triton="3.6.0"), (True, False, False, True)),
        (but(GPU, devices=(OLD_GPU,)), (True, False, True, True)),
        (but(GPU, devices=(OLD_GPU, H200)), (True, True, True, True)),
        (but(GPU, devices=(env.Device("MI300X", "gfx942", 191.5),)), (True, True, True, True)),
        (but(GPU, c_compiler=None), (True, False, True, True)),
        (but(GPU, interpret=True), (True, False, True, True)),
        (but(CPU, devices=(env.Device("mps", "mps"),)), (True, False, True, True)),
    ],
)
def test_which_paths_can_run(facts, states):
    """Catches a path promised where it cannot run, or denied where it can."""
    assert tuple(path.runs for path in env.paths(facts)) == states


def test_the_first_reason_that_blocks_the_gpu_is_named():
    """Catches a path refused for a reason that does not hold."""
    why = {name: env.paths(facts)[ON_GPU].why for name, facts, *_ in FAULTS}
    assert why["no C compiler"] == "no C compiler"
    assert why["no headers"] == "no Python headers"
    assert why["CPU build"] == "torch sees no CUDA or ROCm device"
    assert "sm_90" in env.paths(GPU)[ON_GPU].why


@pytest.mark.parametrize(
    "version, floor, expected",
    [
        ("2.9.1", "2.11", True),
        ("2.11.0+cu130", "2.11", False),
        ("2.11", "2.11.0", False),
        ("2.12.0a0+git1234", "2.11", False),
        ("10.0", "9.1", False),
        ("0.21.1", "0.21.2", True),
    ],
)
def test_older(version, floor, expected):
    """Catches versions compared as text ("2.9" after "2.11")."""
    assert env.older(version, floor) is expected


def test_json_of_this_machine():
    """Catches facts that cannot be collected or written, and a package reported with a version that is not its own."""
    import torch

    done = subprocess.run([sys.executable, "-P", "peftkern/env.py", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    # The build ("+cu130") stands in the one or in both: wheels differ in what their metadata says.
    assert told["facts"]["packages"]["torch"].partition("+")[0] == str(torch.__version__).partition("+")[0]
    assert told["paths"][PLAIN]["runs"] is True
    assert done.returncode == any(finding["level"] == "fault" for finding in told["findings"])


def test_it_runs_where_torch_is_missing():
    """Catches an import of torch, or of peftkern, on the way to the line that says that torch is missing."""
    hidden = """
import importlib.metadata, runpy, sys
sys.modules["torch"] = None  # import torch: ModuleNotFoundError
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("no-such-package" if name == "torch" else name)
sys.argv = ["env"]
runpy.run_path("peftkern/env.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-P", "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "fault: torch is not installed\n  -> pip install 'torch>=2.11'" in done.stdout


def test_it_runs_as_a_module_where_torch_is_broken(tmp_path):
    """Catches a traceback in place of the remedy, for `import peftkern` brought torch along."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "peftkern.env"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "fails to import: OSError: libtorch_cpu.so" in done.stdout and "--force-reinstall" in done.stdout
