"""`AdaLoraConfig`: PEFT 0.21.2's fields, names and defaults."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from peftkern.config import _expect
from peftkern.tuners.lora.config import LoraConfig, starts_plain
from peftkern.utils.peft_types import PeftType

# Fields of LoRA that decide nothing here, as in PEFT: what they are then, and what to use.
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "r": ((8,), "the initial rank is init_r"),
    "use_rslora": ((False,), "the scaling is lora_alpha / init_r"),
    "lora_bias": ((False,), "lora_B has no bias"),
    "alpha_pattern": (({},), "lora_alpha is the same for all"),
    "init_lora_weights": ((True, False), "it counts as True"),
}


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: `y = x W^T + bias + lora_alpha / init_r * dropout(x) (E o A)^T B^T`, its ranks cut while it trains.

    Each row of A [init_r, in], its entry of E [init_r, 1] and its column of B [out, init_r] are a triplet (Zhang et al.
    2023, arXiv:2303.10512). For `tinit` steps all learn. Then, every `deltaT` steps, the least important triplets of
    the whole model get E = 0: so many that what is left shrinks by the cube of the remaining time to `target_r` a
    layer, on average, at step `total_step - tfinal`. From then on ranks stay. `AdaLoraModel.update_and_allocate` does
    it, once a step.

    Args:
        target_r: Average rank of a layer at the end, at least 1.
        init_r: Rank of each layer at the start, at least 1.
        tinit: Steps before ranks are cut.
        tfinal: Steps, the last ones, in which ranks stay.
        deltaT: Steps between two cuts, at least 1.
        beta1: How much of a triplet's smoothed sensitivity a step keeps, between 0 and 1.
        beta2: The same of its uncertainty.
        orth_reg_weight: What the loss gets of the distance of A A^T and B^T B from the identity (see `AdaLoraModel`),
            at least 0.
        total_step: Steps of the training, which must be given; more than `tinit + tfinal`.
        rank_pattern: Set by the training, not by hand: `<module>.lora_E` -> for each of the layer's triplets, whether
            it is kept.
        target_modules, exclude_modules, lora_alpha, lora_dropout, fan_in_fan_out, bias, modules_to_save,
        layers_to_transform, layers_pattern, trainable_token_indices, ensure_weight_tying: As for `LoraConfig`.
        init_lora_weights: True: E zero, A and B normal with deviation 0.02. False: all three normal with deviation 1.
        r, use_rslora, lora_bias, alpha_pattern: PEFT's, without effect in PEFT too; a warning says so.
        target_parameters and all others of `LoraConfig`: Not built; anything but the default raises.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field; DoRA and LoftQ, as in PEFT.
        NotImplementedError: A field that is not built.

    Warns:
        UserWarning: A field without effect.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    method: ClassVar[PeftType | None] = PeftType.ADALORA
    module_patterns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.alpha_pattern is None:  # of older files
            self.alpha_pattern = {}
        super().__post_init__()
        for name, (usual, instead) in _WITHOUT_EFFECT.items():
            value = getattr(self, name)
            if value not in usual:
                warnings.warn(f"AdaLoraConfig.{name}={value!r} has no effect: {instead}", stacklevel=3)

    def check(self) -> None:
        super().check()
        if self.use_dora:
            raise ValueError("use_dora=True does not go with AdaLoRA")
        if self.loftq_config:
            raise ValueError(f"LoftQ does not go with AdaLoRA, got loftq_config={self.loftq_config!r}")
        if not starts_plain(self.init_lora_weights):
            raise ValueError(
                "init_lora_weights must be True or False for AdaLoRA, which starts with E = 0, got "
                f"{self.init_lora_weights!r}"
            )
        if self.target_parameters:
            raise NotImplementedError(
                f"AdaLoraConfig.target_parameters={self.target_parameters!r} is not built in peftkern; leave it at its "
                "default, None"
            )
        for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT", "total_step"):
            least = 0 if name in ("tinit", "tfinal") else 1
            value = getattr(self, name)
            if name == "total_step" and value is None:
                raise ValueError("total_step must be given, an int of at least 1: ranks are cut by it; got None")
            _expect(name, value, (int,), f"an int of at least {least}")
            if value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        for name in ("beta1", "beta2"):
            _expect(name, getattr(self, name), (int, float), "a number between 0 and 1")
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        weight = self.orth_reg_weight
        _expect("orth_reg_weight", weight, (int, float), "a finite number of at least 0")
        if not 0 <= weight < math.inf:
            raise ValueError(f"orth_reg_weight must be a finite number of at least 0, got {weight!r}")
        self.check_schedule()
        self._check_rank_pattern()

    def check_schedule(self) -> None:
        """Raises ValueError where no step is left in which ranks could be cut."""
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"total_step must be more than tinit + tfinal, for ranks to be cut in between, got {self.total_step} "
                f"and {self.tinit} + {self.tfinal}"
            )

    def _check_rank_pattern(self) -> None:
        pattern = self.rank_pattern
        if pattern is None:
            return
        described = "a dict of names to lists of bool, or None"
        _expect("rank_pattern", pattern, (dict,), described)
        for name, kept in pattern.items():
            _expect("a key of rank_pattern", name, (str,), "a str")
            _expect(f"rank_pattern[{name!r}]", kept, (list, tuple), "a list of bool")
            if not all(isinstance(each, bool) for each in kept):
                raise TypeError(f"rank_pattern[{name!r}] must be a list of bool, got {kept!r}")
