"""Find or make the Python environment that the Makefile works in, and print its interpreter's path.

    python tools/make_env.py --for test --venv .venv

The interpreter that runs this file is the active one (or the Makefile's `PYTHON=`). In this order:

1. It has all that the target needs, and torch imports: it is used as it is.
2. `.venv` has all of it: that is used.
3. torch imports but something else is missing: `.venv` is laid over the active environment, whose torch it sees, and
   takes only what is missing. The active environment is never changed.
4. Otherwise `.venv` is made from nothing; without `nvidia-smi` with the exact versions of constraints-ci.txt.

Progress goes to standard error, so that standard output is the one path. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints-ci.txt"
NEEDS = {
    "demo": ("hf",),
    "test": ("dev",),
    "check": ("dev",),
    "static": ("triton",),
    "bench": ("hf", "peft", "bench", "triton"),
}
MARKER = "peftkern-env.json"
SECONDS_TO_STOP = 10

SIZES = "To download: about 0.7 GB with PyTorch's CPU build (2.5 GB on disk), 3 GB with its CUDA build (8 GB on disk)."
HOW_TO_CHOOSE = (
    "pip takes {build}. To choose the build yourself, stop here (Ctrl-C) and name its index:\n"
    "  make {target} TORCH_INDEX=URL\n"
    "with the URL from pytorch.org's install page, such as the CPU index named there."
)


def say(*lines: str) -> None:
    """Tell the person at the terminal."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def requirements(extras: Iterable[str], pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """The project's requirements with these extras, in which `peftkern[a,b]` is replaced by what a and b require."""
    project = tomllib.loads(pyproject.read_text())["project"]
    found: list[str] = list(project["dependencies"])
    pending = list(extras)
    seen = set()
    while pending:
        extra = pending.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            if requirement.startswith("peftkern["):
                pending += requirement.removeprefix("peftkern[").rstrip("]").split(",")
            else:
                found.append(requirement)
    return list(dict.fromkeys(found))


def missing(needed: Iterable[str]) -> list[str]:
    """The requirements that this interpreter's packages do not meet."""
    return [requirement for requirement in needed if not is_met(requirement)]


def is_met(requirement: str) -> bool:
    """Whether `name>=floor` or `name>=floor; marker` holds here.

    Written out because an environment with torch need not have `packaging`.
    """
    parts = re.fullmatch(r"(?P<name>[\w.-]+)>=(?P<floor>[\d.]+)(; (?P<marker>.+))?", requirement)
    if parts is None:
        raise ValueError(f"expected `name>=floor` or `name>=floor; marker` in pyproject.toml, got {requirement!r}")
    # A marker's grammar, over these two names, is Python's.
    names = {"sys_platform": sys.platform, "platform_machine": platform.machine()}
    if parts["marker"] and not eval(parts["marker"], {"__builtins__": {}}, names):
        return True
    try:
        version = metadata.version(parts["name"])
    except metadata.PackageNotFoundError:
        return False
    return release(version) >= release(parts["floor"])


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version without trailing zeros: "2.11.0+cu130" -> (2, 11)."""
    numbers = [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def why_torch_fails() -> str | None:
    """None where torch imports, else the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns where numpy is missing
            importlib.import_module("torch")
    except Exception as error:  # a broken install raises anything: OSError for a library, AttributeError for a mix
        return f"{type(error).__name__}: {error}"
    return None


def interpreter_of(venv: Path) -> Path:
    """The Python of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ready(venv: Path, target: str) -> bool:
    """Whether `venv` meets the target's needs, and, if it was made here, still is what the project's files ask for."""
    python = interpreter_of(venv)
    if not python.exists():
        return False
    marker = venv / MARKER
    if marker.exists() and json.loads(marker.read_text())["digest"] != digest():
        return False
    probe = [str(python), __file__, "--for", target, "--venv", str(venv), "--probe"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def digest() -> str:
    """Changes when what is to be installed changes."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()


def create(venv: Path) -> Path:
    """Make the virtual environment, or go on with one that was left half made; returns its interpreter."""
    marker = venv / MARKER
    if venv.exists() and not marker.exists():
        sys.exit(
            f"{venv} is not of this Makefile's making and lacks something, so it is left alone. Install into it with\n"
            f"  {interpreter_of(venv)} -m pip install -e '.[dev]'\n"
            f"or choose another folder: make ... VENV=.venv-peftkern"
        )
    if not interpreter_of(venv).exists():
        say(f"Making {venv} with {sys.executable} ...")
        if subprocess.run([sys.executable, "-m", "venv", str(venv)], stdout=sys.stderr).returncode:
            shutil.rmtree(venv, ignore_errors=True)
            sys.exit("Python's venv module failed; on Debian and Ubuntu it is the package python3-venv")
    marker.write_text(json.dumps({"digest": None}))
    return interpreter_of(venv)


def pip(python: Path, *arguments: str) -> None:
    """Run pip with its progress on standard error; exits where pip fails."""
    command = [str(python), "-m", "pip", *arguments, "--no-compile"]  # Python compiles what it imports, when it does
    say("$ " + " ".join(command))
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit("pip failed (see above); what it had downloaded is kept, so the same command goes on from there")


def brings_triton(requires: Iterable[str]) -> bool:
    """Whether a torch with these requirements is a GPU build: on Linux those, and only those, require a triton."""
    return sys.platform == "linux" and any(line.startswith(("triton", "pytorch-triton")) for line in requires)


def torch_requirement() -> str:
    """The project's own requirement on torch."""
    return next(line for line in requirements(()) if line.startswith("torch"))


def install_from_nothing(python: Path, target: str, index: str) -> None:
    """Fill a new environment: torch first, from `index` if one is named, then the project with all its tools."""
    has_gpu = shutil.which("nvidia-smi") is not None
    constraints = [] if has_gpu else ["-c", str(CONSTRAINTS)]
    say(SIZES)
    if index:
        # Forced, for another build may be there already, from a run that was stopped to name this index.
        source = ["--force-reinstall", "--index-url", index]
    else:
        build = "the CUDA build" if has_gpu else "the CPU build where it finds one for this Python, else the CUDA build"
        say(HOW_TO_CHOOSE.format(target=target, build=build))
        source = []
    pip(python, "install", "--no-deps", *source, *constraints, torch_requirement())
    if constraints and brings_triton(requires_of_torch(python)):
        if not index:
            say("pip took the CUDA build, though there is no nvidia-smi here: 2.5 GB of CUDA libraries come next.")
            pause()
        # A CUDA build pins its own triton, which is not the one that goes with the CPU build in constraints-ci.txt.
        pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("triton==")]
        constraints = ["-c", write_constraints(python, pins)]
    pip(python, "install", *constraints, "-e", f"{ROOT}[dev]")


def pause() -> None:
    """Leave a person time to stop a large download; nobody waits where nobody watches."""
    if sys.stderr.isatty():
        say(f"Going on in {SECONDS_TO_STOP} seconds; Ctrl-C stops.")
        time.sleep(SECONDS_TO_STOP)


def requires_of_torch(python: Path) -> list[str]:
    """What the torch installed in an environment requires."""
    code = "import json; from importlib import metadata; print(json.dumps(metadata.requires('torch') or []))"
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True).stdout)


def write_constraints(python: Path, lines: Iterable[str]) -> str:
    """Constraints of this one environment, beside its interpreter; returns the file's path."""
    path = python.parent.parent / "peftkern-constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def lay_over_active(python: Path) -> None:
    """Let the new environment see this interpreter's packages, and add to it only what is missing."""
    seen = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site_packages) / "peftkern-base.pth").write_text("\n".join(seen) + "\n")
    # Whatever else pip brings must go with the torch and triton that are there.
    kept = []
    for name in ("torch", "triton"):
        try:
            kept.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    say("Up to 0.6 GB to download; PyTorch itself is not downloaded again.")
    pip(python, "install", "-c", write_constraints(python, kept), "-e", f"{ROOT}[dev]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--for", dest="target", choices=sorted(NEEDS), required=True)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--probe", action="store_true", help="only say by the exit status whether this Python will do")
    options = parser.parse_args()

    lacking = [line.partition(";")[0] for line in missing(requirements(NEEDS[options.target]))]
    has_torch = torch_requirement() not in lacking
    torch_error = why_torch_fails() if has_torch else "not installed, or too old"
    if torch_error is None and not lacking:
        print(sys.executable)
        return
    if options.probe:
        sys.exit(1)
    say(
        f"{sys.executable} will not do for `make {options.target}`: "
        + (f"torch: {torch_error}." if torch_error else f"it lacks {', '.join(lacking)}.")
    )
    python = interpreter_of(options.venv)
    if is_ready(options.venv, options.target):
        say(f"Using {python}.")
        print(python.absolute())
        return
    if torch_error is None:
        quoted = " ".join(f"'{line}'" for line in lacking)
        say(
            f"It is left as it is: {options.venv}, laid over it, takes what is missing. To have that in the active "
            f"environment instead, stop here and run\n  {sys.executable} -m pip install {quoted}"
        )
    started = time.monotonic()
    python = create(options.venv)
    if torch_error is None:
        lay_over_active(python)
    else:
        install_from_nothing(python, options.target, os.environ.get("TORCH_INDEX", ""))
    (options.venv / MARKER).write_text(json.dumps({"digest": digest()}))
    say(f"{options.venv} is ready after {time.monotonic() - started:.0f} s.")
    print(python.absolute())


if __name__ == "__main__":
    main()
