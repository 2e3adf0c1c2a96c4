"""Where there is no GPU, Triton kernels run in Triton's interpreter, mended for bfloat16 (see interpreter.py).

Each of their addresses is checked there (see bounds.py).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process for each core: more threads than cores, which wait for one another in a loop, slow all of them down.
    # torch reads this when it is imported, and so do the programs that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this once, when it is imported, so it must stand before any test imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if not HAS_GPU and importlib.util.find_spec("triton") is not None:
    from bounds import check_bounds
    from interpreter import mend_bfloat16

    mend_bfloat16()
    check_bounds()


def pytest_collection_modifyitems(config, items):
    if HAS_GPU:
        return
    chosen = [item for item in items if item.get_closest_marker("gpu") is None]
    deselected = [item for item in items if item.get_closest_marker("gpu") is not None]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = chosen


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU if there is one, else the CPU under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a good adapter of rank 4 on `Mlp`'s `up` and `down`."""
    from peftkern import LoraConfig, get_peft_model
    from tiny_models import mlp, randomize

    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["up", "down"]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
