"""Merging the tensors of several tasks into one: arithmetic alone, under the names that PEFT's users import.

For tasks t_i with weights w_i, and p the pruning that a method has:

    task_arithmetic   sum of w_i * t_i                                           (Ilharco et al. 2022, arXiv:2212.04089)
    magnitude_prune   sum of w_i * p(t_i), p keeps the largest magnitudes
    dare_linear       sum of w_i * p(t_i), p keeps each element with probability `density`, divided by it
                                                                                 (Yu et al. 2023, arXiv:2311.03099)
    ties              mean of w_i * p(t_i) over the tasks whose p(t_i) has the sign that most have, element by element;
                      p keeps the largest magnitudes                             (Yadav et al. 2023, arXiv:2306.01708)
    dare_ties         the same with dare's p

A weight's own sign has no say in a majority. Results have at least float32, so that they are rounded once, by who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Tensors = list[torch.Tensor]
Sign = Literal["total", "frequency"]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weights` [n] as [n, 1, ..., 1], to be multiplied with the stacked tasks [n, ...]."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


# -- pruning -----------------------------------------------------------------------------------------------------------


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The `int(density * numel)` elements of largest magnitude, zeros elsewhere; in the tensor's dtype."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Each element with probability `density`, zeros elsewhere.

    The mask is drawn by torch's generator of the tensor's device, in the tensor's dtype and in the order of its memory,
    as PEFT draws it: after the same `torch.manual_seed` it is the same.

    Args:
        tensor: Any floating-point tensor.
        density: In [0, 1]; above 0 with `rescale`.
        rescale: Divide what is kept by `density`, in at least float32: the expectation is then the tensor.
    """
    kept = torch.bernoulli(torch.full_like(tensor, density)).bool()
    if not rescale:
        return tensor.masked_fill(~kept, 0)
    return wide(tensor).masked_fill(~kept, 0) / density


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """The share `density` of a tensor's elements, zeros elsewhere; all of it at density 1, where nothing is drawn.

    Args:
        tensor: Any floating-point tensor.
        density: In [0, 1].
        method: "magnitude" keeps the largest, "random" any.
        rescale: Of "random": divide what is kept by `density`.

    Raises:
        ValueError: Another method, or a density that is not in [0, 1], or 0 where it is divided by.
    """
    if method not in ("magnitude", "random"):
        raise ValueError(f"method must be 'magnitude' or 'random', got {method!r}")
    check_density(density, divides=method == "random" and rescale)
    if density == 1:
        return tensor
    return (
        magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)
    )


def check_density(density: float | None, divides: bool) -> None:
    """Raises ValueError unless `density` is in [0, 1], and above 0 if what is kept is divided by it."""
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or not 0 <= density <= 1:
        raise ValueError(f"density must be a number in [0, 1], the share that is kept, got {density!r}")
    if divides and density == 0:
        raise ValueError("density must be above 0 for dare, which divides what is kept by it, got 0")


# -- majorities --------------------------------------------------------------------------------------------------------


def calculate_majority_sign_mask(tensor: torch.Tensor, method: Sign = "total") -> torch.Tensor:
    """Where each task has the sign of most of them: a mask of the shape of `tensor`.

    Args:
        tensor: The tasks, stacked in dimension 0.
        method: "total": the sign of their sum; "frequency": that of the sum of their signs. A sum of 0 counts as
            positive; a 0 is of neither sign.

    Raises:
        ValueError: Another method.
    """
    check_sign_method(method)
    sign = tensor.sign()
    votes = (tensor if method == "total" else sign).sum(0)
    return torch.where(votes >= 0, sign > 0, sign < 0)


def check_sign_method(method: str) -> None:
    """Raises ValueError for another way to find a majority than "total" and "frequency"."""
    if method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {method!r}")


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over those of the stacked tasks that the mask keeps, element by element; 0 where it keeps none."""
    total = task_tensors.masked_fill(majority_sign_mask == 0, 0).sum(0)
    return total / majority_sign_mask.sum(0).clamp(min=1)


# -- methods -----------------------------------------------------------------------------------------------------------


def _stacked(task_tensors: Tensors, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tasks [n, ...] in at least float32, and the weights in its shape and on its device."""
    tasks = wide(torch.stack(task_tensors))
    return tasks, reshape_weight_task_tensors(tasks, weights.to(tasks))


def task_arithmetic(task_tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
    """`sum of weights[i] * task_tensors[i]`, in at least float32.

    Args:
        task_tensors: n tensors of one shape.
        weights: [n].
    """
    tasks, factors = _stacked(task_tensors, weights)
    return (tasks * factors).sum(0)


def magnitude_prune(task_tensors: Tensors, weights: torch.Tensor, density: float) -> torch.Tensor:
    """`task_arithmetic` of what pruning by magnitude keeps of each task; see `prune` for `density` and its errors."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Tensors, weights: torch.Tensor, density: float) -> torch.Tensor:
    """`task_arithmetic` of what random pruning keeps of each task, rescaled; see `random_pruning` for the draws."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: Tensors, weights: torch.Tensor, density: float, majority_sign_method: Sign = "total"
) -> torch.Tensor:
    """Pruned by magnitude, then the weighted mean over the tasks of the majority's sign, in at least float32.

    Args:
        task_tensors: n tensors of one shape.
        weights: [n]; they count in the mean, and not in the majority.
        density: The share that is kept, in [0, 1].
        majority_sign_method: See `calculate_majority_sign_mask`.

    Raises:
        ValueError: A density or method that is not allowed.
    """
    return _by_majority([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: Tensors, weights: torch.Tensor, density: float, majority_sign_method: Sign = "total"
) -> torch.Tensor:
    """`ties` with random pruning, rescaled; see `random_pruning` for the draws."""
    pruned = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _by_majority(pruned, weights, majority_sign_method)


def _by_majority(task_tensors: Tensors, weights: torch.Tensor, majority_sign_method: Sign) -> torch.Tensor:
    tasks, factors = _stacked(task_tensors, weights)
    return disjoint_merge(tasks * factors, calculate_majority_sign_mask(tasks, majority_sign_method))


# Methods by their name: tasks, weights, density, majority_sign_method -> what they are merged into.
METHODS: dict[str, Callable[[Tensors, torch.Tensor, float, Sign], torch.Tensor]] = {
    "linear": lambda tasks, weights, density, sign: task_arithmetic(tasks, weights),
    "magnitude_prune": lambda tasks, weights, density, sign: magnitude_prune(tasks, weights, density),
    "dare_linear": lambda tasks, weights, density, sign: dare_linear(tasks, weights, density),
    "ties": ties,
    "dare_ties": dare_ties,
}
