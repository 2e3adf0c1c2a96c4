"""`peftkern.explain` and the backend setting: what runs, said aloud."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import peftkern
from peftkern.nn import LoraEmbedding, LoraLinear


@pytest.fixture
def model():
    return nn.ModuleDict(
        {
            "words": LoraEmbedding(10, 8, r=2),
            "up": LoraLinear(8, 12, r=4),
            "plain": nn.Linear(12, 8),
            "down": LoraLinear(12, 8),
        }
    )


def test_a_row_for_each_adapted_layer(model):
    """Would catch a layer that is missing from the table, or one that is not adapted in it."""
    explained = peftkern.explain(model, tokens=64)
    assert [(row.name, row.r) for row in explained.rows] == [("words", 2), ("up", 4), ("down", 8)]
    assert explained.paths == {"torch": 3}
    assert all(row.reason for row in explained.rows)
    text = str(explained)
    assert "64 tokens" in text and "up" in text and "torch" in text
    # Each reason once, below the table, by the number that stands in the rows.
    assert text.count(explained.rows[0].reason) == 1
    assert text.splitlines()[-1] == f"1  {explained.rows[0].reason}" and text.splitlines()[3].endswith("torch  1")
    assert explained.summary().startswith("3 layers: torch")


def test_it_follows_the_backend_in_force(model):
    """Would catch an explanation of another setting than the one that calls would run under."""
    with peftkern.use_backend("triton"):
        assert peftkern.explain(model, tokens=64).paths == {"triton": 3}
        decode = peftkern.explain(model, tokens=4)
    assert [row.path for row in decode.rows] == ["triton", "decode", "decode"]


def test_what_is_not_fused_says_why(model):
    """Would catch a silently slow layer."""
    model["up"].base_layer.register_forward_hook(lambda *_: None)
    row = peftkern.explain(model).rows[1]
    assert row.path == "unfused" and "hooks" in row.reason


def test_16_bits_on_this_cpu(model):
    """Would catch a plan that does not know this machine's CPU: native products or fp32 blocks."""
    row = peftkern.explain(model["up"].to(torch.bfloat16), tokens=4096).rows[0]
    scalar = torch.bfloat16 in peftkern.backend.device_info(torch.device("cpu")).scalar_matmul
    assert row.path == ("torch_fp32" if scalar else "torch") and row.dtype == "bfloat16"


def test_nothing_adapted_and_wrong_arguments(model):
    """Would catch an empty table that looks like success, and a misuse that is not named."""
    assert str(peftkern.explain(model["plain"])) == "no adapted layers"
    with pytest.raises(TypeError, match="model: expected"):
        peftkern.explain("model")
    with pytest.raises(ValueError, match="tokens: expected"):
        peftkern.explain(model, tokens=0)


@pytest.mark.parametrize("value, expected", [("torch", "torch"), ("cuda", "expected one of auto, triton, torch")])
def test_environment_variable(value, expected):
    """Would catch a misspelt backend in the environment that is ignored."""
    code = "from peftkern.backend import current_backend; print(current_backend())"

    env = os.environ | {"PEFTKERN_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert expected in done.stdout + done.stderr


def test_a_mixed_batch_is_explained():
    """Would catch a mixed batch that is silently slow: each layer says what it does for rows of different adapters."""
    from tiny_models import mlp

    model = peftkern.get_peft_model(mlp(), peftkern.LoraConfig(r=4, target_modules=["emb", "up", "down"]))
    model.add_adapter("other", peftkern.LoraConfig(r=2, target_modules=["down"]))
    model.get_base_model().down.base_layer.register_forward_hook(lambda *_: None)
    explanation = peftkern.explain(model, tokens=64, mixed=True)
    by_name = {row.name.rpartition(".")[2]: row for row in explanation.rows}
    assert [by_name[name].path for name in ("emb", "up", "down")] == ["unfused", "torch", "unfused"]
    assert "grouped by adapter" in by_name["up"].reason and by_name["down"].r == 4
    assert "hooks" in by_name["down"].reason and "added for its rows" in by_name["down"].reason
    assert "an adapter for each row" in str(explanation)
