"""What is shipped: wheel and source distribution, built without network from a copy of the tree, and what they run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = (".*", "build", "dist", "outputs", "*.egg-info", "__pycache__", "*.pyc")  # what git ignores, and git's own
DOT_FILES = (".ci", ".gitignore")


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build "wheel" or "sdist" by setuptools itself, as pip does but without its isolated, downloaded environment."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, check=True, capture_output=True)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in DOT_FILES:
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build("wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    return build("sdist", tree, tree.parent / "sdist")


@pytest.fixture(scope="module")
def unpacked(wheel) -> Path:
    """The wheel's files alone, as an installer lays them out."""
    folder = wheel.parent.parent / "site"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def library_files() -> set[str]:
    """Every Python file of the library by its place in a wheel."""
    ours = {str(f.relative_to(ROOT)) for f in (ROOT / "peftkern").rglob("*.py")}
    return ours | {str(f.relative_to(ROOT / "kernels")) for f in (ROOT / "kernels").rglob("*.py")}


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    """Catches a folder that a checkout imports and a wheel lacks, a missing py.typed, and tests shipped to users."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == library_files() | {"peftkern/py.typed", "peftkern_kernels/py.typed"}


def test_the_wheel_carries_its_licence_and_its_metadata(wheel):
    """Catches a wheel without LICENSE or NOTICE, and requirements that differ from pyproject.toml."""
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    for requirement in PROJECT["dependencies"]:
        assert f"Requires-Dist: {requirement}\n" in text
    assert set(re.findall(r"Provides-Extra: (.+)", text)) == set(PROJECT["optional-dependencies"])


def test_the_sdist_holds_the_whole_project(sdist, tree):
    """Catches a source distribution from which nobody can run the tests, the demo or the benchmark."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    names = {name for name in names if name not in made and ".egg-info/" not in name}
    here = {str(f.relative_to(tree)) for f in tree.rglob("*") if f.is_file() and "build" not in f.parts}
    here = {name for name in here if ".egg-info/" not in name}
    assert names >= here - {".gitignore"}, sorted(here - names)
    assert not [name for name in names if "__pycache__" in name]


def test_a_wheel_from_the_sdist_is_the_same(sdist, wheel, tmp_path):
    """Catches a file that the build needs and the source distribution leaves out."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def run_from(folder: Path, code: str) -> str:
    """Run code with the unpacked wheel first on the import path, away from the checkout, with triton hidden."""
    hide = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_all_but_triton(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find(name, path, target)
PathFinder.find_spec = staticmethod(find_all_but_triton)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "TRITON"))}
    command = [sys.executable, "-c", f"{hide}sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_imports_and_trains_without_triton(unpacked):
    """Catches an import of triton on the way to the plain path, and code that only the checkout has."""
    code = """
import torch, peftkern, peftkern_kernels
from peftkern import ops
x, w = torch.randn(5, 8), torch.randn(6, 8)
a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
y = ops.lora_linear(x, w, a, b, 0.5)
y.sum().backward()
torch.testing.assert_close(y, x @ w.T + 0.5 * x @ a.T @ b.T)
print(peftkern.__file__, peftkern_kernels.__file__, a.grad.shape == a.shape, peftkern.__version__)
"""
    ours, kernels, has_grad, version = run_from(unpacked, code).split()
    assert Path(ours) == unpacked / "peftkern" / "__init__.py"
    assert Path(kernels) == unpacked / "peftkern_kernels" / "__init__.py"
    assert has_grad == "True"
    assert version == PROJECT["version"]


def test_importing_is_light(unpacked):
    """Catches an import of transformers, peft or another large package, or a CUDA context, by `import peftkern`."""
    heavy = ("transformers", "accelerate", "peft", "bitsandbytes", "diffusers", "trl", "triton", "huggingface_hub")
    code = f"""
import peftkern, torch
print([name for name in {heavy!r} if name in sys.modules], torch.cuda.is_initialized())
"""
    assert run_from(unpacked, code).split("\n")[0] == "[] False"


def test_the_floors_that_env_reports_are_the_project_s():
    """Catches `peftkern.env` calling a version too old that pyproject.toml allows, or the other way round."""
    from peftkern import env

    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["hf"], *extras["bnb"], *extras["peft"], *extras["triton"]]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines if not line.startswith("peftkern["))
    assert floors == env.FLOORS
    assert PROJECT["requires-python"] == f">={env.PYTHON_FLOOR}"


def test_ci_pins_meet_the_floors():
    """Catches a pin that is older than what the project asks of its users, or that is missing."""
    spec = importlib.util.spec_from_file_location("make_env", ROOT / "tools" / "make_env.py")
    make_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_env)
    lines = [line for line in (ROOT / "constraints-ci.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    for requirement in make_env.requirements(["dev", "bnb"]):
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert make_env.release(pins[name]) >= make_env.release(floor), name


def test_no_upper_pins():
    """Catches an upper pin: each GPU build of torch pins its own triton, which a pin here could only fight."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    assert not [line for line in lines if re.search(r"<|==|~=|!=", line.partition(";")[0])]
