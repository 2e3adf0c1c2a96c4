"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peftkern

ROOT = Path(__file__).parents[1]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """Would catch an example that no longer works: on the first screen, and those that go on from it."""
    pytest.importorskip("transformers")
    first, adalora, qlora, many = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(first, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "trainable params: " in printed and " layers: " in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert namespace["loss"].item() < 1.0
    exec(compile(adalora, "README.md", "exec"), namespace)
    assert sum(map(sum, namespace["config"].rank_pattern.values())) == 8 * len(namespace["config"].rank_pattern)
    assert (tmp_path / "adalora" / "adapter_model.safetensors").is_file()
    gradients: list = []
    merge = peftkern.tuners.lora.LoraModel.merge_and_unload
    monkeypatch.setattr(
        peftkern.tuners.lora.LoraModel,
        "merge_and_unload",
        lambda model: (gradients.extend(p.grad for p in model.parameters() if p.requires_grad), merge(model))[1],
    )
    exec(compile(qlora, "README.md", "exec"), namespace)
    assert (tmp_path / "base-4bit" / "model.safetensors").stat().st_size < 1e6
    assert len(gradients) == 2 * 21 and all(g is not None for g in gradients)
    assert not any("4bit" in type(module).__name__ for module in namespace["merged"].modules())
    exec(compile(many, "README.md", "exec"), namespace)
    assert namespace["bank"].names == ["code"] and (tmp_path / "law-adapter" / "adapter_model.safetensors").is_file()


def test_every_relative_link_leads_somewhere():
    """Would catch a picture or a page that moved."""
    for page in ("README.md", "CONTRIBUTING.md", "examples/README.md", "bench/README.md", "bench/RESULTS.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), f"{page} links to {target}"
