"""`tools/make_env.py`: which environment the Makefile takes, and that it never changes one that is not its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "make_env.py"


@pytest.fixture(scope="module")
def make_env():
    spec = importlib.util.spec_from_file_location("make_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run([python, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_the_active_environment_is_taken_as_it_is(tmp_path):
    """Catches an environment made where none is needed. These tests' own environment has what the demo needs."""
    done = run("--for", "demo", "--venv", str(tmp_path / "venv"))
    assert done.stdout == f"{sys.executable}\n", done.stderr
    assert not (tmp_path / "venv").exists()


def test_extras_are_expanded(make_env):
    """Catches a requirement lost in an extra that names other extras."""
    dev = make_env.requirements(["dev"])
    for name in ("torch", "safetensors", "transformers", "accelerate", "peft", "pytest", "pytest-benchmark", "ruff"):
        assert any(line.startswith(f"{name}>=") for line in dev), name
    assert not any(line.startswith("peftkern") for line in dev)
    assert len(dev) == len(set(dev))


@pytest.mark.parametrize(
    "requirement, met",
    [
        ("torch>=2.11", True),
        ("torch>=999", False),
        ("no-such-package>=1", False),
        ("no-such-package>=1; sys_platform == 'none'", True),
        (f"no-such-package>=1; sys_platform == '{sys.platform}'", False),
    ],
)
def test_is_met(make_env, requirement, met):
    """Catches a requirement taken as met by any version, or asked for on a platform that it is not for."""
    assert make_env.is_met(requirement) is met


def test_a_requirement_of_another_form_is_refused(make_env):
    """Catches a pin written into pyproject.toml that would be read as something else."""
    with pytest.raises(ValueError, match="torch~=2.11"):
        make_env.is_met("torch~=2.11")


def test_versions_compare_as_numbers(make_env):
    """Catches "2.9" taken for later than "2.11"."""
    assert make_env.release("2.9.1") < make_env.release("2.11") == make_env.release("2.11.0+cu130")


def test_a_foreign_venv_is_left_alone(make_env, tmp_path):
    """Catches pip run in a virtual environment that somebody made for something else."""
    (tmp_path / "venv").mkdir()
    with pytest.raises(SystemExit, match="is left alone"):
        make_env.create(tmp_path / "venv")
    assert list((tmp_path / "venv").iterdir()) == []


def test_an_unfinished_environment_is_not_taken_for_ready(make_env, tmp_path, monkeypatch):
    """Catches an install that was stopped half-way and then taken for whole, and one older than the project's files."""
    folder = tmp_path / "venv"
    python = make_env.interpreter_of(folder)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(make_env.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    marker = folder / make_env.MARKER
    marker.write_text(json.dumps({"digest": None}))
    assert not make_env.is_ready(folder, "demo")
    marker.write_text(json.dumps({"digest": make_env.digest()}))
    assert make_env.is_ready(folder, "demo")


def test_an_overlay_sees_the_active_packages_and_keeps_their_torch(make_env, tmp_path, monkeypatch):
    """Catches an overlay that downloads torch again, or that installs into the environment below it."""
    import torch

    asked: list = []
    monkeypatch.setattr(make_env, "pip", lambda python, *arguments: asked.append((python, arguments)))
    venv.create(tmp_path / "venv", symlinks=True)
    python = make_env.interpreter_of(tmp_path / "venv")
    make_env.lay_over_active(python)
    ((installer, arguments),) = asked
    assert installer == python
    constraints = Path(arguments[arguments.index("-c") + 1]).read_text().splitlines()
    assert f"torch=={torch.__version__}" in constraints
    code = "import torch, sys; print(torch.__version__, sys.prefix)"
    seen = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == [str(torch.__version__), str(tmp_path / "venv")]


def test_gpu_builds_of_torch_are_known_by_what_they_require(make_env):
    """Catches the CPU build's triton asked for beside a CUDA build that pins another."""
    cuda_build = ["filelock", 'triton==3.7.1; platform_system == "Linux"']
    assert make_env.brings_triton(cuda_build) is (sys.platform == "linux")
    assert not make_env.brings_triton(["filelock", "sympy>=1.13.3"])


CPU_BUILD, CUDA_BUILD = ["filelock"], ["filelock", "triton==3.7.1"]


@pytest.mark.parametrize(
    "has_gpu, torch_requires, index, constrained, pins_triton",
    [
        (False, CPU_BUILD, "", True, True),
        (False, CUDA_BUILD, "", True, False),
        (False, CPU_BUILD, "the-cpu-index", True, True),
        (True, CUDA_BUILD, "", False, False),
    ],
)
def test_a_new_environment(make_env, tmp_path, monkeypatch, has_gpu, torch_requires, index, constrained, pins_triton):
    """Catches pins that cannot be met beside a CUDA build, pins forced on a GPU machine, an index used for all."""
    asked: list = []
    monkeypatch.setattr(make_env, "pip", lambda python, *arguments: asked.append(arguments))
    monkeypatch.setattr(make_env.shutil, "which", lambda name: "nvidia-smi" if has_gpu else None)
    monkeypatch.setattr(make_env, "requires_of_torch", lambda python: torch_requires)
    monkeypatch.setattr(make_env.sys, "platform", "linux")
    (tmp_path / "bin").mkdir()
    make_env.install_from_nothing(tmp_path / "bin" / "python", "test", index)
    torch_alone, everything = asked
    assert "--no-deps" in torch_alone and torch_alone[-1] == make_env.torch_requirement()
    assert (index in torch_alone if index else "--index-url" not in torch_alone) and "--index-url" not in everything
    assert everything[-2:] == ("-e", f"{ROOT}[dev]")
    assert ("-c" in everything) is constrained
    if constrained:
        pins = Path(everything[everything.index("-c") + 1]).read_text()
        assert "torch==" in pins and ("\ntriton==" in pins) is pins_triton


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["env", "demo", "test"])
def test_an_older_python_is_told_what_is_needed(target, tmp_path):
    """Would catch: "Unknown option: -P" and "No module named 'tomllib'" from the Python that PYTHON= names."""
    older = tmp_path / "python3.10"
    # As Python 3.10 does: it answers -c (that its version is below 3.11), and knows neither -P nor what 3.11 brought.
    older.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "Unknown option: $1" >&2\nexit 2\n')
    older.chmod(0o755)
    for python in (str(older), str(tmp_path / "nowhere")):
        done = subprocess.run(["make", target, f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and "Unknown option" not in done.stderr
        assert f"Python 3.11 or later is needed; {python} is not: name one with PYTHON=" in done.stderr
    done = subprocess.run(["make", target, "PYTHON="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or later is needed: name one" in done.stderr
    done = subprocess.run(["make", "-n", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
