"""Saving an adapter's two files is atomic: after a kill, a full disk or beside another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors.torch import load_file

import peftkern.peft_model_base as peft_model_base
from peftkern import LoraConfig, PeftModel, get_peft_model
from peftkern.utils.adapter_files import (
    read_config,
    read_weights,
    reading,
    write_adapter,
    write_config,
    write_text_file,
    write_weights,
)
from tiny_models import mlp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_shared_and_strided_tensors_are_saved(tmp_path):
    """Would catch: safetensors refusing tied weights or transposed views."""
    x = torch.randn(6, 4)
    write_weights(tmp_path, {"a": x, "b": x, "c": x.T, "d": x[2:4], "e": torch.zeros(0, 3)})
    read = load_file(tmp_path / WEIGHTS)
    assert torch.equal(read["b"], x) and torch.equal(read["c"], x.T) and torch.equal(read["d"], x[2:4])
    assert read["e"].shape == (0, 3)


def test_what_cannot_be_saved_leaves_the_old_adapter(saved):
    """Would catch: an error in the middle of saving that has already destroyed the old files."""
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    with pytest.raises(TypeError, match="'x'"):
        write_adapter(saved, {"r": 1}, {"x": "a string"})
    with pytest.raises(ValueError, match="meta"):
        write_adapter(saved, {"r": 1}, {"x": torch.zeros(3, device="meta")})
    with pytest.raises(ValueError):
        write_adapter(saved, {"r": float("nan")}, {"x": torch.zeros(3)})
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    """Would catch: half-written files, or a staging folder that is left lying about, when the disk is full."""
    import peftkern.utils.adapter_files as files

    def fail(path):
        raise OSError(28, "No space left on device")

    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    monkeypatch.setattr(files, "_sync", fail)
    with pytest.raises(OSError, match="No space"):
        write_adapter(saved, {"r": 1}, {"x": torch.zeros(3)})
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_loading_then_saving_over_the_same_file(saved):
    """Would catch: truncating a file that is still mapped into memory (a bus error)."""
    tensors = read_weights(saved)
    write_adapter(saved, read_config(saved), {k: v + 1 for k, v in tensors.items()})
    assert all(torch.equal(read_weights(saved)[k], v + 1) for k, v in tensors.items())


def test_adapter_names_cannot_lead_out_of_the_folder(tmp_path):
    """Would catch: an adapter named "/somewhere" written to /somewhere."""
    outside = str(tmp_path / "outside")
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]), adapter_name=outside)
    with pytest.raises(ValueError, match="outside of"):
        model.save_pretrained(tmp_path / "inside")
    assert not os.path.exists(outside)


# Runs in one process for all the kill points: a fork is killed at the n-th system call of a save, then the parent looks
# at what is left. PEFT's way of reading is tried as well as ours.
KILL_SCRIPT = """
    import json, os, shutil, signal, sys
    import torch
    from safetensors.torch import load_file
    import peftkern.utils.adapter_files as files

    folder = sys.argv[1]
    old = ({"r": 4, "alpha": 1}, {"w": torch.zeros(64, 64), "v": torch.zeros(7)})
    save_file = files.save_file

    def half_written(tensors, path, metadata=None):
        point(before=True)
        save_file(tensors, path, metadata=metadata)
        if count[0] == target[0]:
            os.truncate(path, os.path.getsize(path) // 2)
        point()

    def point(before=False):
        count[0] += 1
        if count[0] == target[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(name):
        real = getattr(os, name)
        def wrapped(*args, **kwargs):
            point(before=True)
            result = real(*args, **kwargs)
            point()
            return result
        setattr(os, name, wrapped)

    count, target = [0], [0]
    for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir"):
        wrap(name)
    files.save_file = half_written

    def which(new, config, tensors):
        values = {float(t.mean()) for t in tensors.values()}
        for label, (c, t) in {"old": old, "new": new}.items():
            if config == c and values == {float(t["w"].mean())}:
                return label
        return "torn"

    def by_others(new):
        path = os.path.join(folder, "adapter_config.json")
        if not os.path.exists(path):
            return "refused"
        tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
        return which(new, json.load(open(path)), tensors)

    def kill_everywhere(new):
        seen = []
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            count[0], target[0] = 0, -1
            files.write_adapter(folder, *old)
            count[0], target[0] = 0, len(seen) + 1
            child = os.fork()
            if child == 0:
                files.write_adapter(folder, *new)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            target[0] = -1
            left = {"ours": which(new, files.read_config(folder), files.read_weights(folder)), "others": by_others(new)}
            files.write_adapter(folder, *new)  # the next save finds its way out of whatever was left
            left["then"] = which(new, files.read_config(folder), files.read_weights(folder))
            left["visible"] = sorted(n for n in os.listdir(folder) if not n.startswith("."))
            left["commit"] = os.path.exists(os.path.join(folder, ".adapter_commit"))
            seen.append(left)
            if not os.WIFSIGNALED(status):
                return seen

    def two_writers():
        children = []
        for _ in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    for i in range(40):
                        files.write_adapter(folder, {"r": i}, {"w": torch.full((8, 8), float(i))})
                    os._exit(0)
                finally:
                    os._exit(1)
        codes = [os.waitpid(child, 0)[1] for child in children]
        return [*codes, files.read_config(folder)["r"], float(files.read_weights(folder)["w"].mean())]

    ones = {"w": torch.ones(64, 64), "v": torch.ones(7)}
    print(json.dumps({
        "same": kill_everywhere((dict(old[0]), ones)),
        "changed": kill_everywhere(({"r": 4, "alpha": 2}, ones)),
        "two": two_writers(),
    }))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict:
    """What was left after each kill, for an unchanged and a changed configuration; and after two writers at once."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("killed") / "adapter"
    command = [sys.executable, "-c", textwrap.dedent(KILL_SCRIPT), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("config", ["same", "changed"])
def test_a_kill_at_any_moment_leaves_the_old_adapter_or_the_new(killed, config):
    """Would catch: a torn weight file, or new weights beside an old configuration."""
    seen = killed[config]
    assert len(seen) > 15, "the save has more steps than that: were they intercepted?"
    ours = [left["ours"] for left in seen]
    assert set(ours) == {"old", "new"} and ours == sorted(ours, reverse=True), ours  # once new, always new
    others = {left["others"] for left in seen}
    assert others <= ({"old", "new"} if config == "same" else {"old", "new", "refused"}), others
    for left in seen:
        assert left["then"] == "new" and not left["commit"] and left["visible"] == [CONFIG, WEIGHTS]


def test_stale_staging_is_removed_and_a_fresh_one_kept(tmp_path):
    """Would catch: killed saves filling the disk, or one process removing what another is writing."""
    for name, age in (("stale", 7200), ("dead", 120), ("fresh", 10)):  # a lock tells the dead from the living
        path = tmp_path / f".adapter_staging_{name}"
        path.mkdir()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    write_config(tmp_path, {"r": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".adapter_staging_fresh", CONFIG]


def test_saved_files_can_be_read_by_whoever_may(saved):
    """Would catch: weights that only their owner can read beside a configuration that all can, as safetensors and so
    PEFT writes them: a server that runs as another user then fails. And a README whose staged copies pile up."""
    (saved / "plain").write_text("x")
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "plain").stat().st_mode}
    for name, age in ((".README.md_old", 7200), (".README.md_new", 10)):
        (saved / name).write_text("x")
        os.utime(saved / name, ((saved / name).stat().st_mtime - age,) * 2)
    write_text_file(saved / "README.md", "text")
    assert [path.name for path in saved.iterdir() if path.name.startswith(".")] == [".README.md_new"]


def test_two_processes_saving_into_one_folder(killed):
    """Would catch: ranks that all save (a forgotten is_main_process) failing on each other's files."""
    assert killed["two"] == [0, 0, 39, 39.0]


def test_both_files_that_are_read_are_of_one_save(saved, monkeypatch):
    """Would catch: old settings taken with new weights, or a file that is not found, when another process saves while
    an adapter is loaded. The lock is per open folder, so a thread stands for the process."""
    config, tensors = json.loads((saved / CONFIG).read_text()), load_file(saved / WEIGHTS)
    new = {name: torch.full_like(value, 7.0) for name, value in tensors.items()}
    load, writers = peft_model_base.load_config, []

    def save_in_between(*args, **kwargs):
        found = load(*args, **kwargs)
        writers.append(threading.Thread(target=write_adapter, args=(saved, config | {"lora_alpha": 99}, new)))
        writers[-1].start()
        writers[-1].join(0.2)
        return found

    monkeypatch.setattr(peft_model_base, "load_config", save_in_between)
    model = PeftModel.from_pretrained(mlp(), saved)
    writers[0].join(10)
    assert model.peft_config["default"].lora_alpha == 8
    assert torch.equal(model.base_model.model.up.lora_A["default"].weight, tensors["base_model.model.up.lora_A.weight"])
    assert read_config(saved)["lora_alpha"] == 99 and float(next(iter(read_weights(saved).values())).mean()) == 7.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_meanwhile_keeps_no_lock(saved):
    """Would catch: workers of a data loader, forked while an adapter is loaded or saved, whose copy of the handle keeps
    the lock, so that the next save waits for ever."""
    with reading(saved):
        child = os.fork()
        if child == 0:
            threading.Event().wait(20)
            os._exit(0)
    writer = threading.Thread(target=write_config, args=(saved, {"r": 1}), daemon=True)
    writer.start()
    writer.join(10)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not writer.is_alive() and read_config(saved) == {"r": 1}
