"""Two gloo processes through Accelerate, under DDP and FSDP2, train to the numbers of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peftkern  # noqa: E402
from distributed_worker import METHODS, make_model, make_optimizer, train  # noqa: E402
from tiny_models import ids, tiny_llama  # noqa: E402

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder that two ranks have left after training under DDP and under FSDP2."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or not hasattr(os, "fork"):
        pytest.skip("needs gloo and fork")
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(__file__).parent / "distributed_worker.py"), str(folder), str(port)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module", params=METHODS, ids=["lora", "dora", "adalora"])
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(method):
    """The model and the losses of one process that sees all rows."""
    torch.manual_seed(0)
    model = make_model(method)
    optimizer = make_optimizer(model)
    return model, train(model, optimizer, lambda loss: loss.backward())


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_to_the_numbers_of_one(runs, single, method, mode):
    """Would catch: gradients that are not reduced, an adapter whose shards are not gathered, ranks that are cut by what
    one process knows."""
    result = json.loads((runs / f"{mode}{method}.json").read_text())
    assert result["world"] == 2 and (mode == "ddp" or result["sharded"] > 20)
    assert result["losses"] == pytest.approx(single[1], abs=1e-5)
    want = peftkern.get_peft_model_state_dict(single[0])
    found = load_file(runs / f"{mode}{method}" / WEIGHTS)
    assert any("magnitude" in name for name in want) == (method == "_dora")
    assert any("lora_E" in name for name in want) == (method == "_adalora")
    assert set(found) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_peft_loads_what_was_trained(runs, single, method, mode):
    """Would catch: names of wrappers in the file, or a configuration that PEFT does not take."""
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), runs / f"{mode}{method}")
    assert getattr(loaded.peft_config["default"], "init_r" if method == "_adalora" else "r") == 4
    with torch.no_grad():
        want = single[0].eval()(input_ids=ids()).logits
        torch.testing.assert_close(loaded(input_ids=ids()).logits, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("end", ["gathered", "resumed"])
def test_sharded_parameters_are_gathered_and_resumed(runs, method, end):
    """Would catch: shards written as if they were the whole; accelerate's adapter-only checkpoint losing tensors."""
    want, found = (load_file(runs / f"fsdp2{method}{part}" / WEIGHTS) for part in ("", f"_{end}"))
    assert set(found) == set(want) and all(torch.equal(found[name], want[name]) for name in want)
