"""An adapter of PiSSA, OLoRA, CorDA or LoRA-GA as one for the base weight that they found, by PEFT's name for it:
subtracting the mutated initialization.

Training starts at W = W_res + s B_0 A_0 and ends at W_res + s B A, so what it added to W is

    s (B A - B_0 A_0) = s [B, -B_0] [A; A_0],

a LoRA of rank 2r with the same scaling. What was saved before training is only read; PEFT 0.21.2 sets
`init_lora_weights` in its configuration to true.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from peftkern.tuners.lora.config import PLAIN_START, LoraConfig, leaves_residual

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(embedding_)?(?P<kind>A|B)(\.weight)?")


def subtract_initial(
    trained: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of the converted adapter, under the names of `trained`.

    Magnitudes of DoRA and modules that are saved whole stay as they are: the adapted weight is the same one. What is
    left of the base weight in a layer with an adapter is left out, for the converted adapter does not belong to it.

    Args:
        trained: An adapter's tensors by the names that they have in a file.
        initial: The same adapter's before training.

    Raises:
        ValueError: A factor is missing in `initial`, or has another shape there.
    """
    matches = {name: _FACTOR.fullmatch(name) for name in trained}
    adapted = {match["layer"] for name, match in matches.items() if match and not match[2]}
    made = {}
    for name, value in trained.items():
        match = matches[name]
        if match is None:
            if name.removesuffix(".base_layer.weight") not in adapted and name.removesuffix(".weight") not in adapted:
                made[name] = value
            continue
        start = initial.get(name)
        if start is None or start.shape != value.shape:
            found = "nothing" if start is None else f"one of shape {list(start.shape)}"
            raise ValueError(
                f"{name}: the initial adapter must have a tensor of shape {list(value.shape)}, as the trained one has, "
                f"got {found}: was it saved from the same model before training?"
            )
        start = start.to(value.device)
        if match["kind"] == "B":
            made[name] = torch.cat([value, -start], dim=1)
        else:  # whose rows lie group by group, if it is that of a convolution with groups
            groups = _groups_of(value, trained.get(name.replace(".lora_A", ".lora_B")))
            made[name] = torch.cat([t.unflatten(0, (groups, -1)) for t in (value, start)], dim=1).flatten(0, 1)
    return made


def _groups_of(A: torch.Tensor, B: torch.Tensor | None) -> int:
    """The groups of the convolution that A and B are of; 1 of all else."""
    return 1 if B is None or A.dim() == 2 else max(A.shape[0] // B.shape[1], 1)


def converted_config(config: LoraConfig) -> LoraConfig:
    """The configuration of the converted adapter: twice the ranks with the scalings that they had.

    Raises:
        ValueError: rsLoRA with patterns, of which `lora_alpha` alone cannot keep the scalings; or `target_parameters`.

    Warns:
        UserWarning: The adapter's initialization, as far as its configuration tells, is none that can be taken back.
    """
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    if config.use_rslora and patterns:
        raise ValueError(
            "path_initial_model_for_weight_conversion does not go with use_rslora=True and "
            f"{patterns[0]}={getattr(config, patterns[0])!r}"
        )
    if config.target_parameters:
        raise ValueError(
            "path_initial_model_for_weight_conversion does not go with target_parameters="
            f"{sorted(config.target_parameters)}: their adapters change no base weight when they are made"
        )
    # True: as PEFT's users have it set before they save the initial adapter.
    if config.init_lora_weights is not True and not leaves_residual(config.init_lora_weights):
        warnings.warn(
            "path_initial_model_for_weight_conversion takes back what PiSSA, OLoRA, CorDA and LoRA-GA change, got "
            f"init_lora_weights={config.init_lora_weights!r}",
            stacklevel=4,
        )
    return dataclasses.replace(
        copy.deepcopy(config),
        **PLAIN_START,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (2**0.5 if config.use_rslora else 2),
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: 2 * alpha for key, alpha in config.alpha_pattern.items()},
    )


def check_same_scaling(config: Any, initial: Any) -> None:
    """Raises ValueError unless both configurations give all layers the same ranks and scalings."""
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        mine, other = getattr(config, name), getattr(initial, name)
        if mine != other:
            raise ValueError(
                f"path_initial_model_for_weight_conversion: the initial adapter must have {name}={mine!r}, as the "
                f"trained one has, got {other!r}"
            )
