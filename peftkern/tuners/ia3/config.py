"""`IA3Config`: PEFT 0.21.2's fields, names and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkern.config import PeftConfig, _check_names_in_regex, _check_regex, _expect, _expect_names
from peftkern.utils.peft_types import PeftType


@dataclass
class IA3Config(PeftConfig):
    """IA3: learned vectors that scale activations, `y = (x W^T + b) * l` or `y = (x * l) W^T + b`, with W frozen.

    Args:
        target_modules: Which modules to adapt: names or dotted suffixes of names; or a regular expression that a whole
            name must match; or "all-linear": every linear layer but the output head. None: the architecture's default.
        exclude_modules: Names, suffixes or a regular expression of modules to leave alone.
        feedforward_modules: Those of `target_modules` whose input is scaled rather than their output: endings of names
            (with or without a dot before), or a regular expression that a whole name must match. None: the
            architecture's default; [] for none.
        fan_in_fan_out: Whether weights are stored [in_features, out_features], as transformers' Conv1D does. Set by
            the kind of layer when it is plain from it.
        modules_to_save: Suffixes of names of modules to train and save whole.
        init_ia3_weights: Start from ones, which change nothing; False: from normal numbers.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field; among them feed-forward modules that are not all
            among `target_modules`, where both are names.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    method: ClassVar[PeftType | None] = PeftType.IA3

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                _expect_names(name, getattr(self, name))
                setattr(self, name, set(getattr(self, name)))
        super().__post_init__()

    def check(self) -> None:
        super().check()
        for name in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) and name != "modules_to_save":
                _check_regex(name, value)
            elif name == "modules_to_save":
                _check_names_in_regex(name, value)
            else:
                _expect_names(name, value)
        for name in ("fan_in_fan_out", "init_ia3_weights"):
            _expect(name, getattr(self, name), (bool,), "True or False")
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise ValueError(
                f"feedforward_modules must be among target_modules ({sorted(targets)}), got {sorted(feedforward)}"
            )
