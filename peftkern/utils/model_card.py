"""The README.md beside an adapter: the Hub's model card, made or brought up to date without touching its prose.

Format: https://huggingface.co/docs/hub/model-cards. YAML between two lines of `---`, then Markdown. Only the few keys
that an adapter determines are written (`library_name: peft`, which the Hub's tools go by, `base_model`, `tags`,
`pipeline_tag`), so no YAML package is needed; other keys are kept as they stand.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from peftkern.utils.adapter_files import PathLike, write_text_file

_BODY = """
# {title}

An adapter for {base}, trained with peftkern. It loads in peftkern and in Hugging Face PEFT:

```python
model = PeftModel.from_pretrained(base_model, "path/or/id/of/this/adapter")
```
"""
_VERSIONS = "### Framework versions"


def update_model_card(
    folder: PathLike, *, base_model: str | None, tags: list[str], pipeline_tag: str | None, version: str
) -> None:
    """Write `README.md` in `folder`, or update the one that is there.

    Args:
        folder: Where the adapter is saved.
        base_model: Name or path of the base model, if it has one.
        tags: Tags to add to those of an existing card.
        pipeline_tag: The Hub's name of the task, set only where the card has none.
        version: peftkern's version, added under "Framework versions".
    """
    path = os.path.join(folder, "README.md")
    text = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    match = re.match(r"---\n(.*?)^---[ \t]*(?:\n|$)", text, re.DOTALL | re.MULTILINE)
    blocks = _split_blocks(match[1]) if match else {}
    body = text[match.end() :] if match else text
    if not body.strip():
        base = f"`{base_model}`" if base_model else "the model that it was trained on"
        body = _BODY.format(title="LoRA adapter" if "lora" in tags else "Adapter", base=base)
    if base_model:
        blocks["base_model"] = f"base_model: {_scalar(base_model)}\n"
    blocks["library_name"] = "library_name: peft\n"
    if pipeline_tag and "pipeline_tag" not in blocks:
        blocks["pipeline_tag"] = f"pipeline_tag: {pipeline_tag}\n"
    every = sorted({*_listed(blocks.get("tags", "")), *tags})
    if every:
        blocks["tags"] = "tags:\n" + "".join(f"- {_scalar(tag)}\n" for tag in every)
    line = f"- peftkern {version}"
    if line not in body.splitlines():
        if _VERSIONS in body:
            body = body.replace(_VERSIONS, f"{_VERSIONS}\n\n{line}", 1)
        else:
            body = f"{body.rstrip()}\n\n{_VERSIONS}\n\n{line}\n"
    head = "".join(blocks[name] for name in sorted(blocks))
    write_text_file(path, f"---\n{head}---\n{body}")


def _split_blocks(yaml: str) -> dict[str, str]:
    """The top-level keys of a YAML text with all their lines, indented ones and list items included."""
    blocks: dict[str, str] = {}
    name = ""
    for line in yaml.splitlines():
        match = re.match(r"([\w-]+):", line)
        name = match[1] if match else name
        blocks[name] = blocks.get(name, "") + line + "\n"
    return blocks


def _listed(block: str) -> list[str]:
    """The items of a YAML list of plain or quoted strings."""
    inline = re.match(r"[\w-]+:\s*\[(.*)\]\s*$", block)
    items: list[Any] = inline[1].split(",") if inline else re.findall(r"^\s*-\s+(.*)$", block, re.MULTILINE)
    return [item.strip().strip("'\"") for item in items if item.strip()]


def _scalar(text: str) -> str:
    """`text` as a YAML scalar, quoted where a plain one could be read as something else (JSON strings are YAML)."""
    return text if re.fullmatch(r"[A-Za-z][\w./:-]*", text) and not text.endswith(":") else json.dumps(text)
