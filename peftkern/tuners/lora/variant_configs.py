"""The nested configurations of LoRA's variants: PEFT's names and defaults, so that user code and files parse.

LoftQ, EVA, CorDA and LoRA-GA are built; `LoraConfig` refuses the others by name. Their classes exist because PEFT's
users import them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class LoraRuntimeConfig:
    """Choices that hold for a run and are never saved."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ: adapters that start as the quantization error of the base weight (arXiv:2310.08659).

    Args:
        loftq_bits: 4 (NF4, blocks of 64, no double quantization) or 8 (LLM.int8), as in PEFT 0.21.2. 2 bits, which
            older releases simulated, are refused: no layer can hold them.
        loftq_iter: How often quantizing and decomposing take turns, at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA: adapters that start from the singular vectors of the activations (arXiv:2410.07170).

    Args:
        rho: A layer's rank may grow to rho times the configured one, at least 1.
        tau: Cosine, in [0, 1], between a component before and after a batch from which on it stands still.
        use_label_mask: Leave out tokens whose label is `label_mask_value`.
        label_mask_value: The label of tokens that do not count.
        whiten: Divide each component by the root of its singular value.
        adjust_scaling_factors: Change `lora_alpha` with the rank, so that the scaling stays.

    Raises:
        TypeError, ValueError: A value that is not allowed, by name.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("rho", 1.0, math.inf), ("tau", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not low <= value <= high or math.isinf(value):
                wanted = "finite and at least 1" if name == "rho" else "in [0, 1]"
                raise ValueError(f"{name} must be {wanted}, got {value!r}")


@dataclass
class CordaConfig:
    """CorDA: adapters that start from a context-oriented decomposition of the base weight (arXiv:2406.05223).

    Args:
        cache_file: Where what `preprocess_corda` found is kept: read if it is there, written if not.
        covariance_file: The same for the covariances of inputs, which serve any rank and method.
        corda_method: "ipm", the largest components, or "kpm", the smallest; None with a `cache_file` that is there.
        verbose: Show a bar.
        use_float16_for_covariance: Leave inputs in the dtype that they have.
        prune_temporary_fields: False leaves covariances on the layers.

    Raises:
        ValueError: `corda_method` is none of these.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _expect_word("corda_method", self.corda_method, ("ipm", "kpm", None))


@dataclass
class LoraGAConfig:
    """LoRA-GA: adapters that start along the full gradient (arXiv:2407.05000).

    Args:
        direction: Which of the gradient's 2r leading singular vectors A and B take: "ArBr" (A the second, fourth, ...,
            B the first, third, ...), "A2rBr" (A the second half, B the first), "ArB2r" (the other way round) or
            "random" (the same for both).
        scale: "stable" (B times the fourth root of out_features over the root of stable_gamma), "weight_svd" (as large
            as the weight), "gd_scale" (both by the adapter's scaling) or "unit".
        stable_gamma: Above 0.

    Raises:
        ValueError: A value that is not allowed, by name.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        _expect_word("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _expect_word("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        if isinstance(self.stable_gamma, bool) or not isinstance(self.stable_gamma, (int, float)):
            raise TypeError(f"stable_gamma must be a number, got {self.stable_gamma!r}")
        if not 0 < self.stable_gamma < math.inf:
            raise ValueError(f"stable_gamma must be above 0, got {self.stable_gamma!r}")


@dataclass
class VeloraConfig:
    """VeLoRA: activations compressed for the backward pass (arXiv:2405.17991)."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"


@dataclass
class MontecloraConfig:
    """Monte Carlo sampling of adapter weights."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150


@dataclass
class BdLoraConfig:
    """BD-LoRA: block-diagonal factors, for serving across devices."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True


@dataclass
class ArrowConfig:
    """Arrow: each token routed to some of several adapters (arXiv:2405.11157)."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None


@dataclass
class KasaConfig:
    """KaSA: a trained diagonal between the two factors, on a truncated base weight (arXiv:2412.06071)."""

    beta: float = 1e-4
    gamma: float = 1e-3


def _expect_word(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
