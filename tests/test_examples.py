"""The examples, run as a reader runs them: in their own process, on the shipped checkpoint, with few steps."""

import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BASE = EXAMPLES / "base"


def run_example(script: Path, *args: str, cwd: Path) -> str:
    """Run it with one thread; returns what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "kernels", EXAMPLES)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script.name} exited with {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def example(monkeypatch):
    """Import an example's module by name, as its neighbours do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_shipped_base_reproduces_its_record(example):
    """Bug: a checkpoint that is not the one its card describes (stale weights, another split, a changed metric)."""
    language = example("_language")
    record = json.loads((BASE / "training.json").read_text())
    assert 2e6 < (BASE / "model.safetensors").stat().st_size < 3e6
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    recorded = record["held_out_bits_per_byte"]
    assert f"**{recorded:.3f}**" in (BASE / "README.md").read_text()
    assert recorded < min(record["compressors_bits_per_byte"].values()), "a trained model beats xz and bzip2"
    text = example("_text").english()[1]
    bits = language.bits_per_byte(model, language.ByteTokens().encode(text), len(text), record["seq"])
    same_text = hashlib.sha256(text).hexdigest() == record["held_out_sha256"]
    # Another Python's manual words the held-out topics a little otherwise.
    assert bits == pytest.approx(recorded, abs=1e-4 if same_text else 0.1)


def test_english_split_shares_no_paragraph(example):
    """Bug: a topic that quotes a held-out topic puts held-out text into training (most of Python's topics do quote)."""
    text = example("_text")
    train, held_out = (
        {" ".join(paragraph.split()) for paragraph in part.decode().split("\n\n")} for part in text.english()
    )
    assert not train & held_out
    assert len(train) > 10 * len(held_out) / 2 > 100


def test_bits_per_byte_matches_a_model_of_known_entropy(example):
    """Bug: a shifted target, a window scored twice or a wrong logarithm."""
    language = example("_language")

    class Bigram(torch.nn.Module):
        """Gives probability 3/4 to the byte after the current one, the rest to all 256 alike."""

        def forward(self, input_ids):
            successor = torch.nn.functional.one_hot((input_ids + 1) % 256, 256)
            return transformers.modeling_outputs.CausalLMOutput(logits=(0.75 * successor + 0.25 / 256).log())

    ids = torch.arange(1000) % 256
    bits = language.bits_per_byte(Bigram(), ids, n_bytes=1000, seq=32)
    assert bits == pytest.approx(-math.log2(0.75 + 0.25 / 256), rel=1e-5), "to a sum of 256 in fp32"
    few = language.bits_per_byte(Bigram(), ids, n_bytes=2000, seq=32, windows=3)
    assert few == pytest.approx(bits / 2, rel=1e-5), "1000 tokens of two bytes each"


def test_quickstart(tmp_path):
    """Bug: anything that stops the demo, adapts nothing, or saves an adapter that PEFT reads differently."""
    pytest.importorskip("peft")
    results = tmp_path / "results.json"
    printed = run_example(
        EXAMPLES / "quickstart.py", "--steps", "40", "--windows", "32", "--json", str(results), cwd=tmp_path
    )
    result = json.loads(results.read_text())
    assert result["bits_per_byte_after"] < result["bits_per_byte_before"] - 0.3
    assert set(result["checks"]) == {"reloaded by peftkern", "merged", "reloaded by PEFT"}
    assert all(check["ok"] for check in result["checks"].values())
    assert result["checks"]["reloaded by peftkern"]["max_abs_diff"] == 0.0
    assert all(check["adapter_effect"] > 1.0 for check in result["checks"].values())
    # r 16 on every linear layer of 3 blocks: q, k, v, o (128 x 128), gate, up, down (128 x 352)
    assert result["trainable_parameters"] == 3 * 16 * (4 * (128 + 128) + 3 * (128 + 352))
    assert sum(result["paths"].values()) == 3 * 7
    assert result["tokens_a_second"] > 0 and result["peak_megabytes"] > 0
    assert "trainable params: 118,272" in printed
    assert (tmp_path / "outputs" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()


def test_quickstart_takes_a_model_with_a_tokenizer(example, tmp_path, monkeypatch):
    """Bug: `--model` works for the byte-level base only, or counts bits per token where it says bits per byte."""
    tokenizers = pytest.importorskip("tokenizers")
    quickstart = example("quickstart")
    train, held_out = (text[:50_000] for text in quickstart.python_sources())  # a tokenizer takes its time
    monkeypatch.setattr(quickstart, "python_sources", lambda: (train, held_out))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner = tokenizers.trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(quickstart.__file__).read_text()], learner)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    results, output = tmp_path / "results.json", tmp_path / "output"
    settings = ["--steps", "3", "--windows", "8", "--seq", "64", "--batch", "2", "--lr", "1e-3"]
    assert quickstart.main(["--model", str(tmp_path), "--output", str(output), "--json", str(results), *settings]) == 0
    # Untrained, it gives every token about the same probability: log2(512) = 9 bits.
    tokens_a_byte = len(tokenizer.encode(held_out.decode()).ids) / len(held_out)
    assert json.loads(results.read_text())["bits_per_byte_before"] == pytest.approx(9 * tokens_a_byte, rel=0.02)


def test_quickstart_fails_when_the_reloaded_adapter_differs(example, tmp_path, monkeypatch, capsys):
    """Bug: a comparison that cannot fail."""
    quickstart = example("quickstart")
    load = quickstart.peftkern.PeftModel.from_pretrained

    def load_damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.05)
        return model

    damaged = type("Damaged", (), {"from_pretrained": staticmethod(load_damaged)})
    monkeypatch.setattr(quickstart.peftkern, "PeftModel", damaged)
    settings = ["--steps", "3", "--windows", "4", "--batch", "2", "--output", str(tmp_path)]
    assert quickstart.main(settings) == 1
    assert "reloaded by peftkern  DIFFERENT" in capsys.readouterr().out


def test_custom_loop_is_five_lines_from_full_fine_tuning(tmp_path):
    """Bug: the file that claims "five lines" needs more: without the marked lines it must fine-tune every weight."""
    source = (EXAMPLES / "custom_loop.py").read_text()
    full_script = tmp_path / "full_fine_tuning.py"
    full_script.write_text("\n".join(line for line in source.splitlines() if "# LoRA" not in line) + "\n")
    marked = [line for line in source.splitlines() if "  # LoRA " in line]
    assert len(marked) == 5
    results = {}
    for name, script in (("lora", EXAMPLES / "custom_loop.py"), ("full", full_script)):
        file = tmp_path / f"{name}.json"
        run_example(script, "--steps", "80", "--width", "64", "--json", str(file), cwd=tmp_path)
        results[name] = json.loads(file.read_text())
    assert results["full"]["trainable_parameters"] == results["full"]["all_parameters"]
    base, adapters = results["full"]["all_parameters"], results["lora"]["trainable_parameters"]
    assert adapters == 16 * ((512 + 64) + (64 + 64) + (64 + 256))
    assert results["lora"]["all_parameters"] == base + adapters
    assert results["lora"]["bits_per_byte_before"] == results["full"]["bits_per_byte_before"]
    for result in results.values():
        assert result["bits_per_byte_after"] < result["bits_per_byte_before"] - 0.2


def test_trainer_saves_the_adapter_alone_and_resumes_exactly(tmp_path):
    """Bug: Trainer saves the whole model, or resumes with fresh adapters, another order of data or lost moments."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")  # Trainer knows an adapter model by its type only where peft is installed
    results = tmp_path / "results.json"
    run_example(EXAMPLES / "trainer.py", "--steps", "8", "--json", str(results), cwd=tmp_path)
    result = json.loads(results.read_text())
    assert "adapter_model.safetensors" in result["checkpoint_files"]
    assert "model.safetensors" not in result["checkpoint_files"]
    assert result["largest_difference_after_resuming"] == 0.0
    assert result["bits_per_byte_after"] < result["bits_per_byte_before"]


def test_make_base_writes_a_checkpoint_that_loads(example, tmp_path):
    """Bug: the script that is named as the checkpoint's source no longer runs, or writes other files than it ships."""
    run_example(EXAMPLES / "make_base.py", "--steps", "3", "--batch", "2", "--output", str(tmp_path), cwd=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in BASE.iterdir()}
    made, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, BASE))
    assert made | {"transformers_version": ""} == shipped | {"transformers_version": ""}
    assert json.loads((tmp_path / "training.json").read_text())["held_out_bits_per_byte"] < 8.0


def test_plain_progress_bar_counts_every_step(example, capsys):
    """Bug: without tqdm the loop would skip steps or the line would never reach the end."""
    bar = example("_progress")._PlainBar(5, "work")
    bar.set_postfix_str("loss 1.0")
    assert list(bar) == [0, 1, 2, 3, 4]
    assert "5/5" in capsys.readouterr().err
