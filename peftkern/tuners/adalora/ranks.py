"""Which triplets of AdaLoRA's layers stay: how important each is, and how many there may be at a step.

With p a parameter, g its gradient, and j a triplet (row of A, entry of E, column of B) of some layer:

    I = |p * g|                                        sensitivity of each element, at each step
    S <- beta1 S + (1 - beta1) I                       smoothed
    U <- beta2 U + (1 - beta2) |I - S|                 how uncertain it is
    score_j = (S U) of E_j + mean of (S U) over A_j + mean of (S U) over B_j
    budget(t) = target + (initial - target) (1 - (t - tinit) / (total_step - tfinal - tinit))^3

(Zhang et al. 2023, arXiv:2303.10512, sections 3.2 and 3.3.) Of all triplets of the model those with the smallest scores
get E = 0, so many that the budget's are left; where scores tie, all of them, as in PEFT.

Names, schedule and scores are PEFT 0.21.2's, but for this. Layers are found by their class (PEFT looks for the
adapter's name in those of parameters, so that "a" is in all). Scores of 16-bit adapters are float32. A gradient that
is not finite, as a GradScaler meets some, counts as none (PEFT's scores stay NaN), and so does a layer that took no
part in a step (PEFT fails). A budget of all triplets is one (PEFT fails). Masks of all layers go to the host at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.tuners.adalora.layer import AdaLoraLayer
from peftkern.tuners.adalora.orthogonality import whole
from peftkern.utils.module_tree import named_modules_of

# Of a triplet, in the order of PEFT's parameters.
_KINDS = ("lora_A", "lora_B", "lora_E")
RankPattern = dict[str, list[bool]]


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The AdaLoRA layers of `model` that have an adapter, by name."""
    layers = {name: module for name, module in named_modules_of(model) if isinstance(module, AdaLoraLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}


def module_of(name: str, adapter_name: str) -> str:
    """The module that a key of a rank pattern is of: `<module>.lora_E`, in memory also `<module>.lora_E.<adapter>`."""
    return name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")


def by_module(pattern: Mapping[str, Sequence[bool]] | None, adapter_name: str) -> dict[str, list[bool]]:
    """A rank pattern by the names of modules."""
    return {module_of(name, adapter_name): list(kept) for name, kept in (pattern or {}).items()}


def as_saved(pattern: Mapping[str, Sequence[bool]], adapter_name: str) -> RankPattern:
    """A rank pattern by the names that files have, without the adapter's, which may be another when it is loaded."""
    return {f"{module}.lora_E": kept for module, kept in by_module(pattern, adapter_name).items()}


class RankAllocator:
    """Scores the triplets of one adapter, and masks those that a step's budget has no place for.

    Args:
        model: Holds the layers.
        peft_config: The adapter's `AdaLoraConfig`.
        adapter_name: Its name.

    Attributes:
        init_bgt, target_bgt: How many triplets there are at the start and at the end, in all layers.
        name_set: The names of the layers' parameters, with "%s" for `lora_A`.
        ipt, exp_avg_ipt, exp_avg_unc: I, S and U of each parameter, by its name in `model`.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        self.peft_config = peft_config
        self.adapter_name = adapter_name
        self.beta1: float = peft_config.beta1
        self.beta2: float = peft_config.beta2
        self.reset_ipt()
        layers = layers_with(model, adapter_name)
        self.init_bgt = sum(layer.r[adapter_name] for layer in layers.values())
        self.name_set = sorted(f"{name}.%s.{adapter_name}" for name in layers)
        self.target_bgt: int = peft_config.target_r * len(layers)
        self._masks: tuple[RankPattern, dict[str, torch.Tensor]] = ({}, {})

    def set_total_step(self, total_step: int) -> None:
        """Another length of the training.

        Raises:
            ValueError, TypeError: As for `AdaLoraConfig`.
        """
        before, self.peft_config.total_step = self.peft_config.total_step, total_step
        try:
            self.peft_config.check()
        except (ValueError, TypeError):
            self.peft_config.total_step = before
            raise

    def reset_ipt(self) -> None:
        """Forgets all scores."""
        self.ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_unc: dict[str, torch.Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many triplets there may be at a step, and whether it is one at which they are cut."""
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > config.total_step - config.tfinal:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt), step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Takes this step's parameters and gradients into the scores.

        Raises:
            ValueError: No parameter of the adapter has a gradient.
        """
        names, parameters, gradients = [], [], []
        for name, parameter in self._parameters(model):
            if name not in self.ipt:
                for scores in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                    scores[name] = torch.zeros_like(parameter, dtype=_score_dtype(parameter))
            if parameter.grad is None:
                self.ipt[name].zero_()
                continue
            names.append(name)
            parameters.append(parameter.to(_score_dtype(parameter)))
            gradients.append(parameter.grad.to(_score_dtype(parameter)))
        if not names:
            raise ValueError(
                f"update_and_allocate: no parameter of adapter {self.adapter_name!r} has a gradient: call it after "
                "loss.backward() and before optimizer.zero_grad()"
            )
        products = torch._foreach_mul(parameters, gradients)
        torch._foreach_abs_(products)
        for name, product in zip(names, products, strict=True):
            self.ipt[name] = product.nan_to_num_(0.0, 0.0, 0.0)
        now, smoothed, unsure = (list(d.values()) for d in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc))
        torch._foreach_mul_(smoothed, self.beta1)
        torch._foreach_add_(smoothed, now, alpha=1 - self.beta1)
        distances = torch._foreach_sub(now, smoothed)
        torch._foreach_abs_(distances)
        torch._foreach_mul_(unsure, self.beta2)
        torch._foreach_add_(unsure, distances, alpha=1 - self.beta2)

    def _parameters(self, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        found = []
        for layer_name, layer in layers_with(model, self.adapter_name).items():
            found += [(self._name(layer_name, k), getattr(layer, k)[self.adapter_name]) for k in _KINDS]
        return found

    def _name(self, layer_name: str, kind: str) -> str:
        return f"{layer_name}.{kind}.{self.adapter_name}" if layer_name else f"{kind}.{self.adapter_name}"

    def _scores(self, layer_name: str) -> torch.Tensor:
        """The score of each of a layer's triplets."""
        names = [self._name(layer_name, kind) for kind in _KINDS]
        missing = [name for name in names if name not in self.exp_avg_ipt]
        if missing:
            raise ValueError(f"update_and_allocate: no step has given {missing[0]} a score: call it once a step")
        a, b, e = (whole(self.exp_avg_ipt[name] * self.exp_avg_unc[name]) for name in names)
        return e.view(-1) + (a.mean(dim=1) + b.mean(dim=0))

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> RankPattern:
        """Sets E to zero for the triplets with the smallest scores, so that `budget` of them are left, or fewer where
        scores tie.

        Returns:
            For each parameter `lora_E`, by its name in `model`, which of its triplets are left.

        Raises:
            ValueError: There are no scores yet, or `target_r` is above `init_r`.
        """
        if self.target_bgt > self.init_bgt:
            config = self.peft_config
            raise ValueError(f"target_r must be at most init_r, got target_r={config.target_r}, init_r={config.init_r}")
        layers = layers_with(model, self.adapter_name)
        each = [self._scores(name) for name in layers]
        scores = torch.cat([score.to(each[0].device) for score in each])
        count = len(scores) - budget
        kept = torch.ones_like(scores, dtype=torch.bool)
        if count > 0:
            kept = scores > scores.kthvalue(count).values
        parts = kept.split([len(score) for score in each])
        pattern: RankPattern = {}
        on_host = iter(kept.tolist())
        for (name, layer), part in zip(layers.items(), parts, strict=True):
            E = layer.lora_E[self.adapter_name]
            E.masked_fill_(_like(~part[:, None], E), 0.0)
            pattern[self._name(name, "lora_E")] = [next(on_host) for _ in range(len(part))]
        return pattern

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, RankPattern | None]:
        """A step's budget, and what is left by it where triplets are cut: see `update_ipt` and `mask_to_budget`.

        Args:
            model: Holds the layers.
            global_step: The step that is done.
            force_mask: Cut triplets at this step, whatever the schedule says.
        """
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, is_cut = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if is_cut or force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Sequence[bool]]) -> None:
        """Sets E to zero for the triplets that a pattern, by names as in memory or as in files, does not keep.

        Raises:
            ValueError: It speaks of another number of triplets than a layer has.
        """
        layers = layers_with(model, self.adapter_name)
        held, masks = self._masks
        if held != rank_pattern:  # which is the same from the last cut on: made once, so that no step copies it over
            masks = {}
            for module, kept in by_module(rank_pattern, self.adapter_name).items():
                if module in layers:
                    E = layers[module].lora_E[self.adapter_name]
                    if len(kept) != len(E):
                        raise ValueError(f"rank_pattern: expected {len(E)} triplets of {module}, got {len(kept)}")
                    masks[module] = _like(~torch.tensor(kept, dtype=torch.bool)[:, None], E)
            self._masks = {name: list(kept) for name, kept in rank_pattern.items()}, masks
        for module, mask in masks.items():
            E = layers[module].lora_E[self.adapter_name]
            E.masked_fill_(mask if mask.device == E.device else _like(mask, E), 0.0)


def _like(mask: torch.Tensor, E: Any) -> torch.Tensor:
    """A mask on E's device, and sharded if FSDP2 shards E."""
    mask = mask.to(E.device)
    if not hasattr(E, "full_tensor"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, E.device_mesh, E.placements)


def _score_dtype(parameter: torch.Tensor) -> torch.dtype:
    """float32 at least: |p * g| of 16-bit numbers is often smaller than they can be."""
    return torch.promote_types(parameter.dtype, torch.float32)
