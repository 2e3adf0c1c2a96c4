"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_python_block_runs(tmp_path, monkeypatch, capsys):
    """Would catch an example on the first screen that no longer works."""
    pytest.importorskip("transformers")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "trainable params: " in printed and " layers: " in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert namespace["loss"].item() < 1.0


def test_every_relative_link_leads_somewhere():
    """Would catch a picture or a page that moved."""
    for page in ("README.md", "CONTRIBUTING.md", "examples/README.md", "bench/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), f"{page} links to {target}"
