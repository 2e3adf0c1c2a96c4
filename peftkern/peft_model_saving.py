"""What a `PeftModel` writes: its adapters' folders, their model card, and both to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.utils.adapter_files import PathLike, adapter_folder, write_adapter
from peftkern.utils.hub import check_save_options, upload
from peftkern.utils.model_card import update_model_card
from peftkern.utils.peft_types import PeftType
from peftkern.utils.save_and_load import config_to_save, get_peft_model_state_dict
from peftkern.weight_conversion import convert, read_initial_adapter


class SavesAdapters(nn.Module):
    """The part of `PeftModel` that saves."""

    peft_config: dict[str, PeftConfig]
    peft_type: Any
    _pipeline_tag: str | None = None

    def get_base_model(self) -> nn.Module:
        """The model that was given, with the adapters in it."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters as PEFT does: "default" in the folder itself, any other in a subfolder of its name.

        Each adapter's two files are replaced as one: after a kill there is the old adapter or the new one.

        Args:
            save_directory: The folder; made if it is not there.
            safe_serialization: Must be True: only safetensors are written.
            selected_adapters: Which; all by default.
            save_embedding_layers: As for `get_peft_model_state_dict`.
            is_main_process: Only then is anything written. With FSDP2 every rank has to call.
            path_initial_model_for_weight_conversion: Folder of the adapter as it was saved before training, where it
                started by PiSSA, OLoRA, CorDA or LoRA-GA: a LoRA of rank 2r for the unchanged base model is written.
            state_dict: The model's state dict, where it was gathered already.
            kwargs: See `peftkern.utils.hub.check_save_options`.

        Raises:
            ValueError: `save_directory` is a file, an adapter's name is unknown or leads out of the folder, or what was
                saved before training is not of this adapter.
        """
        check_save_options(kwargs)
        if not safe_serialization:
            raise ValueError("safe_serialization: only safetensors are written, so it must be True")
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory: expected a folder, got a file: {os.fspath(save_directory)}")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"selected_adapters: no adapter {unknown[0]!r}; there are {sorted(self.peft_config)}")
        before = path_initial_model_for_weight_conversion
        initial = None if before is None else read_initial_adapter(before)
        if state_dict is None:
            state_dict = self.state_dict()
        files: Iterable[Any] = (
            (self.peft_config[n], get_peft_model_state_dict(self, state_dict, n, False, save_embedding_layers))
            for n in names
        )
        if initial:
            files = [convert(config, tensors, initial) for config, tensors in files]  # all, before any is written
        for name, (config, tensors) in zip(names, files, strict=True):
            folder = adapter_folder(save_directory, name)
            if is_main_process:
                write_adapter(folder, config_to_save(config, self.get_base_model()), tensors)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: PathLike, tags: Sequence[str] = ()) -> None:
        """Write README.md in `output_dir`, or bring the one there up to date (see `peftkern.utils.model_card`).

        `tags` are added to those of the card and of the base model."""
        from peftkern import __version__

        base = self.get_base_model()
        name = getattr(base, "name_or_path", None)
        every = [*tags, *(getattr(base, "model_tags", None) or ())]
        every += ["lora"] if self.peft_type == PeftType.LORA else []
        every += ["transformers"] if any(c.__module__.startswith("transformers.") for c in type(base).__mro__) else []
        every += [f"base_model:adapter:{name}"] if name else []
        update_model_card(
            output_dir, base_model=name or None, tags=every, pipeline_tag=self._pipeline_tag, version=__version__
        )

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] | None = None, **kwargs: Any) -> str:
        """Upload the adapters, `tags` in their model card; see `peftkern.utils.hub.upload` for the rest."""

        def save(folder: str) -> None:
            self.save_pretrained(folder)
            if tags:
                self.create_or_update_model_card(folder, [tags] if isinstance(tags, str) else tags)

        return upload(save, repo_id, **kwargs)
