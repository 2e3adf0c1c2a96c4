"""Configurations of adapters: what `adapter_config.json` holds, with PEFT's names, defaults and bytes.

Source of the file format: Hugging Face PEFT 0.21.2.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftkern.utils.adapter_error import cut, short_messages
from peftkern.utils.peft_types import PeftType, TaskType

# What a saved config says under `peft_version`: the release whose file format is written here.
PEFT_FORMAT_VERSION = "0.21.2"

# What `from_pretrained` passes on to the file layer and, through it, to the hub's download.
_HUB_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "endpoint",
        "etag_timeout",
        "force_download",
        "headers",
        "library_name",
        "library_version",
        "local_dir",
        "local_files_only",
        "proxies",
        "repo_type",
        "revision",
        "subfolder",
        "token",
        "user_agent",
    }
)


def _expect(name: str, value: Any, kinds: tuple[type, ...], described: str) -> None:
    """Raises TypeError unless `value` is one of `kinds`; a bool is no number here."""
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {described}, got {value!r} of type {type(value).__name__}")


def _expect_positive(name: str, value: Any, optional: bool = False) -> None:
    """Raises unless `value` is an int of 1 or more, or, if it is `optional`, None."""
    if value is None and optional:
        return
    _expect(name, value, (int,), "a positive int or None" if optional else "a positive int")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _expect_names(name: str, value: Any) -> None:
    """Raises unless `value` is a list, tuple or set of non-empty strings."""
    _expect(name, value, (list, tuple, set, frozenset), "a list of str, or None")
    for item in value:
        _expect(f"an entry of {name}", item, (str,), "a str")
        if not item:
            raise ValueError(f"{name} must not hold an empty name, got {value!r}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:  # too deep; a{99999999999}
        raise ValueError(f"{name} must be a regular expression, got {pattern!r}: {error}") from error


def _check_names_in_regex(name: str, names: Any) -> None:
    """Raises unless `names` is a list of non-empty strings that can stand in a regular expression, as they will."""
    _expect_names(name, names)
    for item in names:
        _check_regex(f"an entry of {name}", f"({item})")


def _json_ready(value: Any) -> Any:
    """Sets become sorted lists and enum members their strings, so that equal configs give equal bytes."""
    if isinstance(value, (PeftType, TaskType)):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {k: _json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(v) for v in value]
    return value


@dataclass
class PeftConfigMixin:
    """The fields and file handling common to every adapter's configuration.

    Args:
        task_type: What the model is for (`TaskType` or its string), or None.
        peft_type: The method (`PeftType` or its string); each method's config sets its own.
        auto_mapping: For models outside transformers' auto classes: where the base class is found.
        peft_version: The file format's release; filled in when None.

    Raises:
        ValueError: An unknown task or method.
        TypeError: A field of the wrong type.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None

    # The one method a subclass configures; None for the general classes.
    method: ClassVar[PeftType | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> PeftConfigMixin:
        """Refuses unknown fields before `__init__` does, which would not say what is near."""
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        unknown = sorted(set(kwargs) - set(fields))
        if unknown:
            near = difflib.get_close_matches(unknown[0], fields)
            hint = f"near names: {', '.join(near)}" if near else f"its fields: {', '.join(sorted(fields))}"
            raise TypeError(f"{cls.__name__} has no field {unknown[0]!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION
        if self.peft_type is None:
            self.peft_type = self.method
        with short_messages():
            self.check()
        if self.peft_type is not None:
            self.peft_type = PeftType(self.peft_type)

    def check(self) -> None:
        """Raises ValueError or TypeError for a value that is not allowed; called again before an adapter is made."""
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = ", ".join(t.value for t in TaskType)
            raise ValueError(f"task_type must be None or one of {known}, got {self.task_type!r}")
        if self.peft_type is not None and self.peft_type not in list(PeftType):
            raise ValueError(f"peft_type must be one of {known_methods()}, got {self.peft_type!r}")
        if self.method is not None and self.peft_type != self.method:
            name = type(self).__name__
            raise ValueError(f"peft_type of {name} must be {self.method.value!r}, got {self.peft_type!r}")
        if self.auto_mapping is not None:
            _expect("auto_mapping", self.auto_mapping, (dict,), "a dict or None")
        _expect("peft_version", self.peft_version, (str,), "a str or None")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict, without what is never saved (`runtime_config`); the method and task as str."""
        config = dataclasses.asdict(self)
        config.pop("runtime_config", None)
        for name in ("peft_type", "task_type"):
            if isinstance(config[name], (PeftType, TaskType)):
                config[name] = config[name].value
        return config

    def to_json_dict(self) -> dict[str, Any]:
        """`to_dict` with only what JSON knows: sets as sorted lists, tuples as lists.

        `json.dumps(config.to_json_dict(), indent=2, sort_keys=True)` is the text of `adapter_config.json`.
        """
        return _json_ready(self.to_dict())

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, auto_mapping_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """Writes `adapter_config.json` into `save_directory`, which is made when it does not exist.

        Args:
            save_directory: A folder.
            auto_mapping_dict: Written as `auto_mapping` in place of this config's own, which stays as it is.
            **kwargs: See `peftkern.utils.hub.check_save_options`.

        Raises:
            ValueError: `save_directory` is a file.
        """
        from peftkern.utils.adapter_files import write_config
        from peftkern.utils.hub import check_save_options

        check_save_options(kwargs)
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory must be a folder, got the file {os.fspath(save_directory)!r}")
        os.makedirs(save_directory, exist_ok=True)
        content = self.to_json_dict()
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        write_config(os.fspath(save_directory), content)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads `adapter_config.json` to a hub repository; see `peftkern.utils.hub.upload` for arguments and more."""
        from peftkern.utils.hub import upload

        return upload(self.save_pretrained, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any
    ) -> PeftConfigMixin:
        """Reads `adapter_config.json` from a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: A folder, or the id of a hub repository.
            subfolder: A folder inside it.
            **hub_kwargs: What the hub's download takes (`revision`, `token`, `cache_dir`, ...).

        Returns:
            A config of the class that the file's `peft_type` names.

        Raises:
            TypeError: An argument that is not the hub's; to change a field, set it on the returned config.
            AdapterFileError: (a ValueError) No such file, a damaged one, an unknown or missing `peft_type`, or a field
                with a value that is not allowed; it names the file.
            NotImplementedError: It asks for what is not built here; it names file and field.
        """
        from peftkern.utils.adapter_files import blamed_on_config, read_config

        unknown = sorted(set(hub_kwargs) - _HUB_ARGUMENTS)
        if unknown:
            raise TypeError(
                f"from_pretrained got {unknown}, which the hub's download does not take; to change a field of the "
                "configuration, set it on the returned object"
            )
        if subfolder is not None:
            hub_kwargs["subfolder"] = subfolder
        with blamed_on_config(pretrained_model_name_or_path, hub_kwargs):
            content = dict(read_config(os.fspath(pretrained_model_name_or_path), **hub_kwargs))
            content.setdefault("peft_type", None)
            return cls.from_peft_type(**content)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration's file as a dict, without `runtime_config`, which is never saved.

        Args:
            path_json_file: The file, such as `adapter_config.json`.
            **kwargs: Ignored, as in PEFT.

        Raises:
            ValueError: No such file, or it holds no JSON object.
        """
        from peftkern.utils.adapter_files import read_config_file

        content = read_config_file(path_json_file)
        if content.pop("runtime_config", None) is not None:
            warnings.warn("runtime_config found in a saved configuration: ignored, it is never saved", stacklevel=2)
        return content

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PeftConfigMixin:
        """Builds the config that `config["peft_type"]` names from the content of an `adapter_config.json`."""
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, got {type(config).__name__}")
        return cls.from_peft_type(**config)

    @classmethod
    def from_peft_type(cls, /, **kwargs: Any) -> PeftConfigMixin:
        """Builds the config class that `peft_type` names from the other arguments.

        A key that the class does not know is named in a warning and left out, as PEFT does: a newer release may have
        added it. `runtime_config` is never taken from a file.

        Raises:
            ValueError: `peft_type` is missing (on a general class), unknown, or not built.
        """
        from peftkern.mapping import config_class

        with short_messages():
            config_cls = cls if "peft_type" not in kwargs and cls.method is not None else config_class(kwargs)
        if "runtime_config" in kwargs:
            warnings.warn("runtime_config found in a saved configuration: ignored, it is never saved", stacklevel=2)
            kwargs.pop("runtime_config")
        fields = {field.name for field in dataclasses.fields(config_cls) if field.init}
        unknown = cut(str(sorted(set(kwargs) - fields)))
        if unknown != "[]":
            warnings.warn(
                f"{config_cls.__name__} does not know the keys {unknown}: ignored. The configuration may come from a "
                f"newer release than {PEFT_FORMAT_VERSION}, and the adapter may then mean something else here.",
                stacklevel=2,
            )
        return config_cls(**{key: value for key, value in kwargs.items() if key in fields})

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Splits mixed keyword arguments into those of the hub's download, fields of this class, and the rest."""
        fields = set(inspect.signature(cls).parameters)
        hub = {k: v for k, v in kwargs.items() if k in _HUB_ARGUMENTS}
        own = {k: v for k, v in kwargs.items() if k in fields and k not in hub}
        return hub, own, {k: v for k, v in kwargs.items() if k not in hub and k not in own}

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens rather than layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False: adaption prompts are not a method of peftkern. PEFT's callers ask."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """The configuration of an adapter on a named base model.

    Args:
        base_model_name_or_path: The base model's folder or hub id.
        revision: The base model's revision on the hub.
        inference_mode: Whether the adapter's parameters are frozen when the adapter is made.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check(self) -> None:
        super().check()
        for name in ("base_model_name_or_path", "revision"):
            if getattr(self, name) is not None:
                _expect(name, getattr(self, name), (str,), "a str or None")
        _expect("inference_mode", self.inference_mode, (bool,), "True or False")


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the prompt methods have in common: they train what stands before a text and leave every layer as it is.

    The sizes that are None are those of the model, and are filled in when the adapter is made.

    Args:
        num_virtual_tokens: How many virtual tokens stand before the text. Must be given by then.
        token_dim: Their width: that of the word embeddings; of a prefix, that of all heads of a layer's keys.
        num_transformer_submodules: 2 for an encoder-decoder model (SEQ_2_SEQ_LM), otherwise 1.
        num_attention_heads: Heads; of a prefix, those of the keys and values.
        num_layers: Layers; of a prefix, those of the decoder.
        modules_to_save: Suffixes of names of modules to train and save whole.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def check(self) -> None:
        super().check()
        names = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        for name in names:
            _expect_positive(name, getattr(self, name), optional=True)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(f"num_transformer_submodules must be 1, 2 or None, got {self.num_transformer_submodules}")
        if self.modules_to_save is not None:
            _check_names_in_regex("modules_to_save", self.modules_to_save)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens rather than layers: always True."""
        return True


def check_is_config(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is one of peftkern's configurations; PEFT's are told how to become one."""
    if isinstance(value, PeftConfig):
        return
    cls = type(value)
    kind = cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    message = f"{name}: expected a PeftConfig of peftkern's, got {kind}"
    if cls.__module__.partition(".")[0] == "peft" and hasattr(value, "to_dict"):
        built = cls.__name__ in _built_classes()
        advice = f"make one of it by peftkern.{cls.__name__}(**config.to_dict())"
        message += f": {advice}" if built else f", a method that is not built here (those that are: {known_methods()})"
    raise TypeError(message)


def _built_classes() -> set[str]:
    """The names of the methods' configurations."""
    from peftkern.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {cls.__name__ for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values()}


def known_methods() -> str:
    """The methods that are built, for messages."""
    from peftkern.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return ", ".join(sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING))
