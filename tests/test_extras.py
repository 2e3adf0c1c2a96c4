"""Without the packages that an extra brings: what needs one says which, and how to get it."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

import peftkern
from peftkern.integrations.extras import require
from tiny_models import tiny_llama

pytest.importorskip("transformers")


class Missing:
    """A finder under which transformers is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_missing_transformers_is_told_by_its_extra(tmp_path, monkeypatch, capsys):
    """Would catch: a bare "No module named 'transformers'" in somebody's first minute."""
    from peftkern import estimate

    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = peftkern.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peftkern.get_peft_model(base, config).save_pretrained(tmp_path / "task")
    base = tiny_llama()
    base.name_or_path = str(tmp_path / "base")
    peftkern.get_peft_model(base, peftkern.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    peftkern.save_quantized(peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True}), tmp_path / "4bit")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    words = r"needs transformers, which is not installed: pip install 'peftkern\[hf\]'"
    for call in (
        lambda: peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "task"),
        lambda: peftkern.AutoPeftModel.from_pretrained(tmp_path / "plain"),
        lambda: peftkern.load_quantized(tmp_path / "4bit"),
        lambda: peftkern.estimate_memory(str(tmp_path / "base")),
    ):
        with pytest.raises(ImportError, match=words):
            call()
    assert estimate.main([str(tmp_path / "base")]) == 2
    assert "pip install 'peftkern[hf]'" in capsys.readouterr().err


def test_a_package_that_is_broken_speaks_for_itself(tmp_path, monkeypatch):
    """Would catch: "not installed" for a package that is there and lacks something itself."""
    (tmp_path / "broken_package.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_of_that_name'"):
        require("broken_package", "this")
    with pytest.raises(ModuleNotFoundError, match="this needs nowhere, which is not installed: pip install nowhere$"):
        require("nowhere.inside", "this")
    assert require("builtins", "this") is builtins
