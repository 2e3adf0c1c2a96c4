"""The layering and the house rules that can be read off the source, held by AST; nothing here imports the library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("peftkern", "kernels/peftkern_kernels")
EVERYTHING = (*LIBRARY, "tests", "bench", "examples", "tools")

# Floors of the house: a module imports only from its own floor and those below. The longest matching prefix counts.
FLOORS = {
    "peftkern_kernels": 0,
    "peftkern.reference": 1,
    "peftkern.backend": 1,
    "peftkern.weights": 1,
    "peftkern.adapter_pool": 2,
    "peftkern.ops": 2,
    "peftkern.utils": 3,  # with config: what the tuners share
    "peftkern.config": 3,
    "peftkern.utils.adapter_keys": 5,  # these five read and write the adapters of a whole model, so they know tuners
    "peftkern.utils.base_state_dict": 5,
    "peftkern.utils.expert_files": 5,
    "peftkern.utils.hotswap": 5,
    "peftkern.utils.save_and_load": 5,
    "peftkern.tuners": 4,
    "peftkern": 5,  # the face (nn, peft_model, mapping, auto, explain) and integrations
}
HEAVY = {"transformers", "accelerate", "trl", "bitsandbytes", "diffusers", "peft"}
NOT_FOR_THE_LIBRARY = {"tests", "bench", "examples", "tools", "conftest", "pytest"}
DEVICE_MODULES = ("torch.cuda", "torch.accelerator", "torch.xpu", "torch.mps", "torch.hip", "triton.runtime")
IMPORTERS = ("importlib.import_module", "import_module", "__import__")
# Ways up, inside functions only, so that importing still goes down: `PeftConfig.from_pretrained` gives the class that
# the file's `peft_type` names, which a table above knows (as in PEFT). A package may also offer its submodules' names.
WAYS_UP = {("peftkern.config", "peftkern.mapping")}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100


def module_name(path: Path) -> str:
    """peftkern/ops/plan.py -> peftkern.ops.plan; kernels/peftkern_kernels/launch.py -> peftkern_kernels.launch."""
    parts = list(path.with_suffix("").parts)
    if parts[0] == "kernels":
        parts.pop(0)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def floor_of(module: str) -> int | None:
    """The floor of a module of the library, None for anything else."""
    prefix = module
    while prefix not in FLOORS:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            return None
    return FLOORS[prefix]


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything imported anywhere in the file; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in IMPORTERS and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def _name(node: ast.expr) -> str:
    """The dotted name that an expression spells, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that is evaluated when the file is imported: no bodies of functions, no `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
            pending += [*node.decorator_list, *defaults]
        elif isinstance(node, ast.Lambda):
            pending += [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
        elif isinstance(node, ast.If) and _name(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def import_faults(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """Imports that go up, or that leave the one home of the package they name."""
    module = module_name(path)
    mine = floor_of(module)
    integrations = path.parts[:2] == ("peftkern", "integrations")
    at_import = {node.lineno for node in run_at_import(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    for line, target in imports_of(tree, module, path.name == "__init__.py"):
        top = target.split(".")[0]
        theirs = floor_of(target)
        is_way_up = any(module == here and target.startswith(f"{there}.") for here, there in WAYS_UP)
        offers_own = path.name == "__init__.py" and target.startswith(f"{module}.")
        allowed = (is_way_up or offers_own) and line not in at_import
        if theirs is not None and mine is not None and theirs > mine and not allowed:
            yield line, f"imports {target}, which is above it"
        if module.split(".")[0] == "peftkern_kernels":
            known = {"torch", "triton", "peftkern_kernels", "__future__"} | sys.stdlib_module_names
            if top not in known:
                yield line, f"imports {target}: kernels know torch, triton and the standard library"
        elif top in HEAVY and not integrations:
            yield line, f"imports {target} outside peftkern/integrations"
        elif top in HEAVY and line in at_import:
            yield line, f"imports {target} at import time: import it where it is used"
        elif top == "triton":
            yield line, f"imports {target}: only the kernels do, so that peftkern works without triton"
        if top in NOT_FOR_THE_LIBRARY:
            yield line, f"imports {target}: the library knows nothing of tests, bench and examples"


def device_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Anything that would touch a device when the file is imported."""
    for node in run_at_import(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name.startswith(tuple(f"{module}." for module in DEVICE_MODULES)):
            yield node.lineno, f"calls {name} at import"
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield node.lineno, "calls .cuda() at import"
        elif name.startswith("torch.") and name != "torch.device" and any(k.arg == "device" for k in node.keywords):
            yield node.lineno, f"calls {name}(device=...) at import"


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled by Triton: decorated with `triton.jit` or `jit`, called or not."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(_name(d) in ("triton.jit", "jit") for d in decorators)


def statement_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Asserts outside kernels, swallowed exceptions, autotuning, functions too long to read."""
    in_kernels = {child for node in ast.walk(tree) if is_kernel(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node not in in_kernels:
            yield node.lineno, "asserts: raise ValueError or TypeError that names the argument"
        elif isinstance(node, ast.ExceptHandler) and all(_does_nothing(statement) for statement in node.body):
            yield node.lineno, "swallows an exception"
        elif isinstance(node, ast.Call) and _name(node.func) in ("contextlib.suppress", "suppress"):
            if {_name(argument) for argument in node.args} & {"Exception", "BaseException"}:
                yield node.lineno, "swallows every exception"
        elif isinstance(node, ast.Attribute) and _name(node) == "triton.autotune":
            yield node.lineno, "autotunes: launch parameters come from the tables"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def _does_nothing(statement: ast.stmt) -> bool:
    is_literal = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or is_literal


def faults_in(source: str, path: str) -> list[str]:
    """Every fault of one file of the library, as `path:line: what`."""
    tree = ast.parse(source)
    found = [*import_faults(tree, Path(path)), *device_faults(tree), *statement_faults(tree)]
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def python_files(*folders: str) -> list[str]:
    """Paths of the Python files below the folders, relative to the root."""
    return sorted(str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", python_files(*LIBRARY))
def test_library_file_keeps_the_rules(path):
    """Catches an import that goes up, a package imported outside its home, device use at import, a stray assert."""
    found = faults_in((ROOT / path).read_text(), path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", python_files(*EVERYTHING))
def test_file_is_short_enough_to_read(path):
    """Catches a file that has become several ideas."""
    lines = (ROOT / path).read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines: split it by idea"


@pytest.mark.parametrize("path", python_files("bench", "examples", "tools"))
def test_nothing_imports_the_tests(path):
    """Catches a benchmark or an example that works only where the tests lie beside it."""
    tests = {Path(file).stem for file in python_files("tests")} | {"tests"}
    imported = imports_of(ast.parse((ROOT / path).read_text()), module_name(Path(path)), False)
    assert not [(line, target) for line, target in imported if target.split(".")[0] in tests]


def test_the_kernels_folder_is_no_package():
    """Catches a `kernels/__init__.py`, which would shadow the package `kernels` that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", LIBRARY)
def test_every_folder_of_the_library_is_a_package(folder):
    """Catches a folder without `__init__.py`, which a checkout imports and a wheel leaves out."""
    folders = {file.parent for file in (ROOT / folder).rglob("*.py")}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


BAD = [
    ("kernels/peftkern_kernels/a.py", "import peftkern.ops", "above it"),
    ("kernels/peftkern_kernels/a.py", "import numpy as np", "kernels know torch"),
    ("kernels/peftkern_kernels/a.py", "def f():\n    from transformers import AutoModel", "kernels know torch"),
    ("peftkern/ops/a.py", "from peftkern.tuners.lora import layer", "above it"),
    ("peftkern/ops/a.py", "from ..tuners import lora", "above it"),
    ("peftkern/ops/__init__.py", "from ..peft_model import PeftModel", "above it"),
    ("peftkern/tuners/lora/a.py", "def f():\n    from ...integrations import bnb", "above it"),
    ("peftkern/utils/a.py", "from peftkern import tuners", "above it"),
    ("peftkern/config.py", "def f():\n    from peftkern.peft_model import PeftModel", "above it"),
    ("peftkern/config.py", "from peftkern.mapping import config_class", "above it"),
    ("peftkern/utils/__init__.py", "from peftkern.utils.save_and_load import load_peft_weights", "above it"),
    ("peftkern/peft_model.py", "def f():\n    import transformers.utils", "outside peftkern/integrations"),
    ("peftkern/peft_model.py", "import importlib\nimportlib.import_module('peft')", "outside peftkern/integrations"),
    ("peftkern/integrations/a.py", "import bitsandbytes as bnb", "at import time"),
    ("peftkern/integrations/a.py", "try:\n    import peft\nexcept ImportError:\n    peft = None", "at import time"),
    ("peftkern/ops/a.py", "def f():\n    import triton", "only the kernels do"),
    ("peftkern/ops/a.py", "from tests import numerics", "knows nothing of tests"),
    ("peftkern/ops/a.py", "import torch\nHAS = torch.cuda.is_available()", "at import"),
    ("peftkern/ops/a.py", "import torch\ndef f(n=torch.cuda.device_count()):\n    return n", "at import"),
    ("peftkern/ops/a.py", "import torch\nclass C:\n    zero = torch.zeros(1, device='cuda')", "at import"),
    ("peftkern/ops/a.py", "def f(x):\n    assert x > 0", "asserts"),
    ("peftkern/ops/a.py", "def f():\n    try:\n        g()\n    except:\n        pass", "swallows"),
    ("peftkern/ops/a.py", "def f():\n    try:\n        g()\n    except OSError:\n        ...", "swallows"),
    ("peftkern/ops/a.py", "def f():\n    with contextlib.suppress(Exception):\n        g()", "swallows"),
    ("kernels/peftkern_kernels/a.py", "import triton\n@triton.autotune([], [])\ndef f(): ...", "autotunes"),
    ("peftkern/ops/a.py", "def f():\n" + "    g()\n" * 100, "lines, more than"),
]


@pytest.mark.parametrize("path, source, fault", BAD)
def test_the_checker_catches(path, source, fault):
    """Catches a checker that has stopped checking."""
    assert any(fault in line for line in faults_in(source, path)), faults_in(source, path)


GOOD = [
    ("kernels/peftkern_kernels/a.py", "import torch\nimport triton\nfrom .launch import Call\nimport dataclasses"),
    ("kernels/peftkern_kernels/a.py", "import triton\n@triton.jit\ndef k(x_ptr, N):\n    assert N > 0"),
    ("peftkern/ops/a.py", "def f():\n    from peftkern_kernels import lora_linear\n    from ..backend import mode"),
    ("peftkern/tuners/lora/a.py", "from ...config import PeftConfig\nfrom ... import ops\nfrom ..targets import x"),
    ("peftkern/peft_model.py", "def f():\n    from .integrations import trainer\n    from .tuners.lora import layer"),
    ("peftkern/integrations/a.py", "def f():\n    import bitsandbytes"),
    ("peftkern/integrations/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    ("peftkern/config.py", "def f():\n    from peftkern.mapping import config_class"),
    ("peftkern/utils/__init__.py", "def f():\n    from peftkern.utils.save_and_load import load_peft_weights"),
    ("peftkern/ops/a.py", "import torch\ndef f():\n    return torch.cuda.is_available()"),
    ("peftkern/ops/a.py", "import torch\nCPU = torch.device('cpu')"),
    ("peftkern/ops/a.py", "def f():\n    try:\n        g()\n    except OSError:\n        return None"),
]


@pytest.mark.parametrize("path, source", GOOD)
def test_the_checker_lets_pass(path, source):
    """Catches a checker so strict that people learn to work round it."""
    assert faults_in(source, path) == []
