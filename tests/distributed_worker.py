"""The ranks of test_distributed.py: train a few steps through Accelerate, under DDP and then under FSDP2, on the CPU.

Usage: distributed_worker.py FOLDER PORT. The imports are done once, then each rank is a fork. Rank 0 writes
FOLDER/<mode>.json, and the same of DoRA and AdaLoRA to FOLDER/<mode>_dora.json and FOLDER/<mode>_adalora.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from peft import PeftModel  # noqa: F401  here, so that it is imported once

import peftkern
from tiny_models import ids, randomize, tiny_llama

WORLD, STEPS, ROWS = 2, 5, 4
CONFIG = {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
METHODS = ("", "_dora", "_adalora")
# Ranks are cut from the second step on, and masked in the last. Few layers: each costs FSDP2 many small gatherings.
SCHEDULE = CONFIG | {
    "target_modules": ["q_proj", "v_proj"],
    "init_r": 4,
    "target_r": 2,
    "total_step": STEPS,
    "tfinal": 1,
}


def make_model(method: str = "") -> Any:
    if method == "_adalora":
        config: Any = peftkern.AdaLoraConfig(**SCHEDULE)
    else:
        config = peftkern.LoraConfig(**CONFIG, r=4, use_dora=method == "_dora")
    model = peftkern.get_peft_model(tiny_llama(), config)
    randomize(model, ("lora_A", "lora_B", "lora_E") if method == "_adalora" else ("lora_A",))
    return model.train()


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """This rank's share of the rows of one step."""
    return ids(ROWS, 8, seed=step)[rank * ROWS // world : (rank + 1) * ROWS // world]


def train(model: Any, optimizer: Any, backward: Any, rank: int = 0, world: int = 1) -> list[float]:
    losses = []
    for step in range(STEPS):
        rows = batch(step, rank, world)
        loss = model(input_ids=rows, labels=rows).loss
        backward(loss)
        optimizer.step()
        tuner = getattr(model, "module", model).base_model
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.detach().item())
    return losses


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def run(mode: str, method: str, folder: Path, accelerator: Accelerator) -> None:
    sharded, name = mode == "fsdp2", f"{mode}{method}"
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        # Accelerate offers FSDP on accelerators only; its code for it runs with gloo on the CPU as well.
        for state in (PartialState(), accelerator.state):  # the second is filled from the first again and again
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    rank, world = accelerator.process_index, accelerator.num_processes
    model = make_model(method)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    losses = train(model, optimizer, accelerator.backward, rank, world)
    mean = [accelerator.gather(torch.tensor([loss])).mean().item() for loss in losses]

    unwrapped = accelerator.unwrap_model(model)
    state_dict = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(folder / name, state_dict=state_dict, is_main_process=accelerator.is_main_process)
    result = {"losses": mean, "class": type(unwrapped).__name__, "world": world}
    if sharded:
        result["sharded"] = sum(hasattr(p, "full_tensor") for p in model.parameters())
        unwrapped.save_pretrained(folder / f"{name}_gathered", is_main_process=accelerator.is_main_process)
        # What Trainer does at a checkpoint, and when it resumes from one.
        save_fsdp_model(plugin, accelerator, model, str(folder / f"{name}_checkpoint"), adapter_only=True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        load_fsdp_model(plugin, accelerator, model, str(folder / f"{name}_checkpoint"), adapter_only=True)
        unwrapped.save_pretrained(folder / f"{name}_resumed", is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        (folder / f"{name}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def rank_main(rank: int, folder: Path, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that waits for ever says where
    accelerator = Accelerator(cpu=True)
    for mode in ("ddp", "fsdp2"):
        for method in METHODS:
            run(mode, method, folder, accelerator)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ranks = []
    for each in range(WORLD):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            rank_main(each, Path(sys.argv[1]), sys.argv[2])
            sys.stdout.flush()
            os._exit(0)
    sys.exit(any([os.waitpid(child, 0)[1] for child in ranks]))
