"""Uploading to the Hub: what is asked of its client, by a stand-in that records the calls."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

import peftkern
from tiny_models import mlp

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def calls(monkeypatch):
    """The calls of the Hub's client, in order; of an upload also the files and the model card's text."""
    made: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            made.append(("create_repo", {"repo_id": repo_id, "private": private, "token": self.token}))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, branch, exist_ok=False):
            made.append(("create_branch", {"repo_id": repo_id, "branch": branch}))

        def upload_folder(self, *, repo_id, folder_path, commit_message, commit_description, revision, create_pr):
            card = os.path.join(folder_path, "README.md")
            text = ""
            if os.path.exists(card):
                with open(card, encoding="utf-8") as file:
                    text = file.read()
            options = {"message": commit_message, "description": commit_description}
            options |= {"revision": revision, "create_pr": create_pr}
            files = sorted(os.listdir(folder_path))
            made.append(("upload_folder", {"repo_id": repo_id, "files": files, "card": text, **options}))
            return "https://example.test/commit"

    monkeypatch.setattr(hub, "HfApi", Client)
    return made


def test_a_model_is_uploaded_with_transformers_arguments(calls):
    """Would catch an argument of transformers' `push_to_hub` that is refused, or reaches the client under its name."""
    model = peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up"]))
    options = {"commit_message": "m", "commit_description": "d", "private": True, "token": "t", "revision": "next"}
    address = model.push_to_hub("x", tags=["a tag"], max_shard_size="1GB", **options)
    assert address == "https://example.test/commit"
    assert calls[0] == ("create_repo", {"repo_id": "x", "private": True, "token": "t"})
    assert calls[1] == ("create_branch", {"repo_id": "me/x", "branch": "next"})
    name, sent = calls[2]
    assert name == "upload_folder" and sent["files"] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sent["message"] == "m" and sent["description"] == "d" and sent["revision"] == "next"
    assert '- "a tag"' in sent["card"] and "- lora" in sent["card"] and not sent["create_pr"]


def test_a_configuration_is_uploaded(calls):
    """Would catch a configuration that only a model can upload."""
    peftkern.LoraConfig(target_modules=["up"]).push_to_hub("x", create_pr=True, revision="next")
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][1]["files"] == ["adapter_config.json"] and calls[1][1]["create_pr"]


def test_a_wrong_argument_is_refused_before_anything_is_made(calls, tmp_path):
    """Would catch a repository that exists since an upload which could never have worked."""
    config = peftkern.LoraConfig(target_modules=["up"])
    model = peftkern.get_peft_model(mlp(), config)
    for what in (model, config):
        with pytest.raises(TypeError, match="shard_size"):
            what.push_to_hub("x", shard_size=1)
        with pytest.raises(TypeError, match="save_pretrained: unknown arguments: max_shard"):
            what.save_pretrained(tmp_path / "out", max_shard=1)
        with pytest.raises(
            ValueError, match=r"push_to_hub: save_pretrained writes to a folder.*push_to_hub\(repo_id\)"
        ):
            what.save_pretrained(tmp_path / "out", push_to_hub=True)
        assert not (tmp_path / "out").exists()
        what.save_pretrained(tmp_path / "in", max_shard_size="1GB", push_to_hub=False, save_function=print)
        assert (tmp_path / "in" / "adapter_config.json").exists()
    assert calls == []
