"""One LoRA adapter made of several, with PEFT 0.21.2's meaning of each combination.

For adapters (A_i [r_i, K], B_i [N, r_i], scaling s_i) with weights w_i, and f_i = w_i s_i; the new one's scaling is 1:

    cat                A = rows of all f_i A_i, B = columns of all B_i: exact, of the ranks' sum
    svd                the best approximation of sum of f_i B_i A_i of a given rank
    ties_svd, ...      likewise of what that method of `peftkern.utils.merge_utils` makes of the w_i and s_i B_i A_i
    linear, ties, ...  that method for the A_i with sign(f_i) sqrt|f_i| and for the B_i with sqrt|f_i|: cheap and rough

Computed in at least float32, rounded once. dare draws its masks as PEFT does, layer after layer in the model's order,
for all A before all B, from torch's generator, which the new adapter's initialization has drawn from before: after the
same `torch.manual_seed` the masks are PEFT's. A convolution's A and B are taken as matrices; with groups each group has
its own rows of A, and no B A, so that what needs that is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from peftkern.ops._common import without_autocast
from peftkern.tuners.lora.config import PLAIN_START, highest_rank, starts_plain
from peftkern.tuners.lora.dora import _factors, _stored_transposed, matrices
from peftkern.tuners.lora.merging import delta_weight
from peftkern.tuners.weighted import check_sources, joined_targets
from peftkern.utils.adapter_error import shorten
from peftkern.utils.merge_utils import METHODS, check_density, check_sign_method, wide
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.module_tree import modules_of
from peftkern.utils.other import ExclusiveAdapters

if TYPE_CHECKING:
    from peftkern.tuners.lora.model import LoraModel

COMBINATIONS = ("svd", "cat", *METHODS, *(f"{name}_svd" for name in METHODS if name != "linear"))
Pair = tuple[torch.Tensor, torch.Tensor]


class Combination(NamedTuple):
    """How adapters become one: the arguments of `LoraModel.add_weighted_adapter` of these names, and the new rank."""

    combination_type: str
    svd_clamp: float | None
    svd_driver: str | None
    density: float | None
    majority_sign_method: Any
    rank: int = 0

    @property
    def method(self) -> str:
        """The method of `merge_utils` that the combination rests on."""
        return "linear" if self.combination_type in ("svd", "cat") else self.combination_type.removesuffix("_svd")

    @property
    def decomposes(self) -> bool:
        return self.combination_type.endswith("svd")


def add_weighted(
    model: LoraModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    how: Combination,
    svd_rank: int | None,
) -> None:
    """Adds the adapter; see `LoraModel.add_weighted_adapter`. On an error the model is as it was."""
    if how.combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}, got {how.combination_type!r}")
    weights = check_sources(model, adapters, weights, adapter_name)
    if len(adapters) == 1:
        how = how._replace(combination_type="linear")  # as in PEFT: nothing there to combine
    configs: list[Any] = [model.peft_config[name] for name in adapters]
    _check_configs(adapters, configs)
    how = how._replace(rank=_new_rank(how, [highest_rank(config) for config in configs], svd_rank))
    held = {key: [n for n in adapters if n in layer.scaling] for key, layer in model._named_layers().items()}
    _check_layers(model, held, how)
    _check_options(how)

    first = configs[0]
    changes: dict[str, Any] = {"r": how.rank, "lora_alpha": how.rank, "rank_pattern": {}, "alpha_pattern": {}}
    # Scaling 1: with rsLoRA it would be the root of the rank, by which PEFT's new adapter is too large.
    changes |= {"use_rslora": False, "target_modules": joined_targets(model, adapters, "target_modules")}
    # A and B are given values below: one that is made from the base weight would change that, or freeze B.
    if not starts_plain(first.init_lora_weights):
        changes |= PLAIN_START
    with restored_on_error(model):
        model.peft_config[adapter_name] = dataclasses.replace(copy.deepcopy(first), **changes)
        model.inject_adapter(model.model, adapter_name, autocast_adapter_dtype=True)
        model.set_requires_grad(adapter_name, adapter_name in model.active_adapters)
        factors = [_factors(m, n)[0] for m in model._layers() for n in adapters if n in m.scaling]
        dtype = functools.reduce(torch.promote_types, (A.dtype for A in factors))
        for layer in model._layers():
            if adapter_name in layer.scaling:
                _fill(layer, adapter_name, list(zip(adapters, weights, strict=True)), how, dtype)
    _warn_of_left_out(model, adapters, adapter_name, held)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_configs(adapters: list[str], configs: list[Any]) -> None:
    """Raises ValueError for adapters that cannot be combined, whatever the combination."""
    for name, config in zip(adapters, configs, strict=True):
        if config.target_parameters:
            raise ValueError(f"adapters: {name!r} adapts parameters (target_parameters): those cannot be combined")
        if config.lora_bias:
            raise ValueError(
                f"adapters: {name!r} has lora_bias=True: a combination of A and B would leave out its biases"
            )


def _new_rank(how: Combination, ranks: list[int], svd_rank: int | None) -> int:
    """The rank of the new adapter, from the highest rank of each."""
    if how.combination_type == "cat":
        return sum(ranks)
    if how.decomposes:
        if svd_rank is None:
            return max(ranks)
        if not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1:
            raise ValueError(f"svd_rank must be an int of at least 1 or None, got {svd_rank!r}")
        return svd_rank
    if len(set(ranks)) > 1:
        raise ValueError(
            f"adapters: combination_type={how.combination_type!r} needs adapters of one rank, got ranks {ranks} "
            "('cat' and those that end in 'svd' take any)"
        )
    return ranks[0]


def _check_options(how: Combination) -> None:
    if how.method != "linear":
        check_density(how.density, divides=how.method.startswith("dare"))
    if how.method.endswith("ties"):
        check_sign_method(how.majority_sign_method)
    clamp = how.svd_clamp
    if how.decomposes and clamp is not None and not (isinstance(clamp, (int, float)) and 0 <= clamp <= 1):
        raise ValueError(f"svd_clamp must be a quantile in [0, 1] or None, got {clamp!r}")
    if how.decomposes and how.svd_driver not in (None, "gesvd", "gesvdj", "gesvda"):
        raise ValueError(f"svd_driver must be 'gesvd', 'gesvdj', 'gesvda' or None, got {how.svd_driver!r}")


def _check_layers(model: LoraModel, held: dict[str, list[str]], how: Combination) -> None:
    """Raises for a layer whose adapters cannot be combined, by its name.

    Raises:
        TypeError: A factor is sharded, or otherwise no plain tensor.
        NotImplementedError: The adapters' B A is asked for of a convolution with groups.
        ValueError: It is on the meta device or not finite; or the ranks here differ, where those must be one.
    """
    layers = model._named_layers()
    for key, names in held.items():
        for name in names:
            for factor in _factors(layers[key], name):
                if type(factor) not in (nn.Parameter, torch.Tensor):
                    raise TypeError(
                        f"adapters: {name!r} has a {type(factor).__name__} in {key!r}: expected plain tensors"
                    )
                if factor.is_meta:
                    raise ValueError(f"adapters: {name!r} is on the meta device in {key!r}: load its values first")
                if not torch.isfinite(factor).all():
                    raise ValueError(f"adapters: {name!r} has values in {key!r} that are not finite")
                if how.decomposes and how.svd_driver is not None and not factor.is_cuda:
                    raise ValueError(
                        f"svd_driver={how.svd_driver!r} is for CUDA devices, got {key!r} on {factor.device} (None lets "
                        "torch choose)"
                    )
        reason = layers[key].why_no_delta() if how.decomposes else ""
        if reason:
            raise NotImplementedError(f"combination_type={how.combination_type!r} does not go with {key!r}: {reason}")
        ranks = [layers[key].r[name] for name in names]
        if len(set(ranks)) > 1 and how.combination_type != "cat" and not how.decomposes:
            raise ValueError(
                f"adapters: combination_type={how.combination_type!r} needs one rank in each layer, got {ranks} in "
                f"{key!r} (rank_pattern)"
            )


def _warn_of_left_out(model: LoraModel, adapters: list[str], adapter_name: str, held: dict[str, list[str]]) -> None:
    """Warns of what the adapters have and the new one, as in PEFT, has not."""
    layers = model._named_layers()
    lost = [key for key, names in held.items() if names and adapter_name not in layers[key].scaling]
    if lost:
        warnings.warn(
            f"{adapter_name!r} has the configuration of {adapters[0]!r}, which (layers_to_transform, exclude_modules) "
            f"does not reach {shorten(lost, 3)}: what the adapters learned there is left out",
            stacklevel=4,
        )
    with_dora = [name for name in dict.fromkeys(adapters) if getattr(model.peft_config[name], "use_dora", False)]
    if with_dora:
        what = "starts with magnitudes of its own" if adapters[0] in with_dora else "has no magnitudes"
        warnings.warn(
            f"{adapter_name!r} combines A and B alone: the magnitudes of {with_dora} are left out, and it {what}",
            stacklevel=4,
        )
    for field, what in (("modules_to_save", "modules"), ("trainable_token_indices", "rows of tokens")):
        holders = [m for m in modules_of(model.model) if isinstance(m, ExclusiveAdapters)]
        here = {name for m in holders if m.what_is_trained == field for name in m.held_among(adapters)}
        trained = [name for name in dict.fromkeys(adapters) if name in here]
        if trained:
            warnings.warn(
                f"{adapter_name!r} combines A and B alone: {what} that {trained} trained whole ({field}) are the base "
                "model's in it",
                stacklevel=4,
            )


# -- a layer -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@without_autocast
def _fill(layer: Any, name: str, weighted: list[tuple[str, float]], how: Combination, dtype: torch.dtype) -> None:
    """Gives the new adapter of `layer` its values; where none of the others is, those that change nothing."""
    A, B = _factors(layer, name)
    here = [(source, weight) for source, weight in weighted if source in layer.scaling]
    pairs = [matrices(layer, source) for source, _ in here]
    groups = layer.rank_groups
    weights, scalings = [weight for _, weight in here], [layer.scaling[source] for source, _ in here]
    if not here:
        idle = A if name in layer.lora_embedding_A else B
        idle.zero_()
        new_A, new_B = matrices(layer, name)
    elif how.combination_type == "cat":
        new_A, new_B = _side_by_side(pairs, [w * s for w, s in zip(weights, scalings, strict=True)], groups)
    elif how.decomposes:
        new_A, new_B = _decomposed(pairs, weights, scalings, how, _stored_transposed(layer))
    else:
        roots = [math.sqrt(abs(w * s)) for w, s in zip(weights, scalings, strict=True)]
        signed = [math.copysign(root, w * s) for root, w, s in zip(roots, weights, scalings, strict=True)]
        # The sign on one side only: on both it would cancel.
        new_A = _merged([pair[0] for pair in pairs], signed, how)
        new_B = _merged([pair[1] for pair in pairs], roots, how)
    # Ranks that patterns make smaller leave zeros, so that every layer has the rank that the configuration says.
    # Those of A lie group by group.
    for parameter, made, blocks in ((A, new_A, groups), (B, new_B, 1)):
        values = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        within = values.view(blocks, parameter.shape[0] // blocks, -1)
        within[:, : made.shape[0] // blocks, : made.shape[1]] = made.unflatten(0, (blocks, -1))
        if not torch.isfinite(values).all():
            raise ValueError(f"adapter_name: {name!r} would have values that {dtype} cannot hold")
        parameter.data = values


def _merged(tensors: list[torch.Tensor], weights: list[float], how: Combination) -> torch.Tensor:
    """What the combination's method makes of the tensors."""
    tensors = [tensor.detach() for tensor in tensors]
    numbers = torch.tensor(weights, dtype=wide(tensors[0]).dtype, device=tensors[0].device)
    return METHODS[how.method](
        tensors, numbers, how.density if how.density is not None else 1.0, how.majority_sign_method
    )


def _side_by_side(pairs: list[Pair], factors: list[float], groups: int = 1) -> Pair:
    """A [sum of r, K] and B [N, sum of r / groups] with B A = sum of factors[i] * B_i A_i, in each of the groups."""
    scaled = [(wide(A) * factor).unflatten(0, (groups, -1)) for (A, _), factor in zip(pairs, factors, strict=True)]
    A = torch.cat(scaled, dim=1).flatten(0, 1)
    return A, torch.cat([wide(B) for _, B in pairs], dim=1)


def _decomposed(
    pairs: list[Pair], weights: list[float], scalings: list[float], how: Combination, transposed: bool
) -> Pair:
    """A with orthonormal rows and B with orthogonal columns, whose product is nearest to what the method makes."""
    if how.combination_type == "svd" and how.svd_clamp is None:
        A, B = _side_by_side(pairs, [w * s for w, s in zip(weights, scalings, strict=True)])
        if how.rank <= A.shape[0] <= min(A.shape[1], B.shape[0]):
            return _decomposed_product(A, B, how)
    # In the layout of the weight, as in PEFT: of equal magnitudes and random elements it decides which are kept.
    deltas = [delta_weight(wide(A), wide(B), s, transposed) for (A, B), s in zip(pairs, scalings, strict=True)]
    delta = _merged(deltas, weights, how)
    U, S, Vh = torch.linalg.svd(delta.T if transposed else delta, full_matrices=False, driver=how.svd_driver)
    A, B = Vh[: how.rank], U[:, : how.rank] * S[: how.rank]
    if how.svd_clamp is not None:
        bound = _quantile(torch.cat([B.flatten(), A.flatten()]), how.svd_clamp)
        A, B = A.clamp(-bound, bound), B.clamp(-bound, bound)
    return A, B


def _decomposed_product(A: torch.Tensor, B: torch.Tensor, how: Combination) -> Pair:
    """The same of B A, which has no more rank than A has rows: the decomposition of a matrix of that size.

    An 8B model's [14336, 4096] would take minutes each. Singular vectors have no sign of their own, so A and B may
    have others than PEFT's together.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False, driver=how.svd_driver)
    return Vh[: how.rank] @ Q_A.T, Q_B @ (U[:, : how.rank] * S[: how.rank])


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """`torch.quantile`, which takes no more than 16 million values, for any number of them."""
    place = q * (values.numel() - 1)
    below = values.kthvalue(math.floor(place) + 1).values
    above = values.kthvalue(math.ceil(place) + 1).values
    return torch.lerp(below, above, place - math.floor(place))
