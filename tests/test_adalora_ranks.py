"""`RankAllocator` beside real PEFT's: the schedule, scores and masks; and the cases that PEFT fails or errs in."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel, RankAllocator
from peftkern.tuners.adalora.orthogonality import orthogonality
from tiny_models import randomize

peft = pytest.importorskip("peft")

SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 5, "deltaT": 3}


class Layers(nn.Module):
    """Layers of several shapes, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def made(library: Any = peftkern, name: str = "default", base: Any = Layers, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = library.AdaLoraConfig(**(SCHEDULE | {"target_modules": ["a", "b", "c"]} | fields))
    model = library.AdaLoraModel(base(), config, name)
    randomize(model, ("lora_A", "lora_B", "lora_E"))
    return model


def give_gradients(model: nn.Module, seed: int, but: tuple[str, ...] = ()) -> None:
    """The same gradients for the same names."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        p.grad = None
        if p.requires_grad:
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if any(part in name for part in but) else grad


@pytest.mark.parametrize("fields", [{}, {"tinit": 0, "deltaT": 1}, {"target_r": 1, "tfinal": 0}, {"deltaT": 7}])
def test_budgets_scores_and_masks_are_those_of_peft(fields):
    """Catches a budget, a step at which ranks are cut, an exponential mean or a tie that differs."""
    ours, theirs = (made(library, **fields) for library in (peftkern, peft))
    for step in range(23):
        for model in (ours, theirs):
            give_gradients(model, step)
            model.update_and_allocate(step)
        mine, other = (model.rankallocator for model in (ours, theirs))
        assert mine.budget_schedule(step) == other.budget_schedule(step)
        for scores in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            assert getattr(mine, scores).keys() == getattr(other, scores).keys()
            torch.testing.assert_close(getattr(mine, scores), getattr(other, scores))
        pattern, want = (model.peft_config["default"].rank_pattern for model in (ours, theirs))
        assert pattern == (want and {key.removesuffix(".default"): kept for key, kept in want.items()})
        assert torch.equal(*(torch.cat([m.lora_E["default"] for m in (x.a, x.b, x.c)]) for x in (ours, theirs)))
    assert sum(map(sum, pattern.values())) == fields.get("target_r", 2) * 3
    assert (mine.init_bgt, mine.target_bgt, mine.name_set) == (other.init_bgt, other.target_bgt, other.name_set)


def test_a_name_that_is_in_others_scores_its_own_alone():
    """Catches PEFT's way to find an adapter, by its name in the names of parameters, where "a" is in all of them."""
    model = made(name="a")
    model.peft_config["ab"] = AdaLoraConfig(**SCHEDULE, target_modules=["a"], inference_mode=True)
    model.inject_adapter(model.model, "ab")
    model.a.lora_E["ab"].data.fill_(3)
    give_gradients(model, 0)
    model.update_and_allocate(1)
    model.update_and_allocate(15)
    assert set(model.peft_config["a"].rank_pattern) == {f"{name}.lora_E" for name in "abc"}
    assert (model.a.lora_E["ab"] == 3).all()


def test_what_has_no_gradient_counts_as_none():
    """Catches a layer that took no part in a step, or a gradient that is Inf (a GradScaler's first steps), and that
    stops training or keeps a layer's scores from ever being numbers; and a call after zero_grad."""
    model = made()
    give_gradients(model, 0, but=(".b.",))
    model.b.lora_A["default"].grad = None
    model.a.lora_A["default"].grad[0, 0] = float("inf")
    model.a.lora_E["default"].grad[1] = float("nan")
    model.update_and_allocate(1)
    allocator = model.rankallocator
    assert not allocator.ipt["b.lora_A.default"].any()
    for scores in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        assert len(scores) == 9 and all(value.isfinite().all() for value in scores.values())
    before = {name: value.clone() for name, value in allocator.exp_avg_ipt.items()}
    model.zero_grad()
    with pytest.raises(ValueError, match="before optimizer.zero_grad"):
        model.update_and_allocate(2)
    assert all(torch.equal(value, before[name]) for name, value in allocator.exp_avg_ipt.items())


def test_sixteen_bit_adapters_have_scores_of_thirty_two():
    """Catches |p * g| that is 0 in float16 for all, so that all triplets tie and are cut together."""
    model = made(base=lambda: Layers().half())
    assert model.a.lora_A["default"].dtype == torch.float16
    give_gradients(model, 0)
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad * 1e-5
    model.update_and_allocate(1)
    assert all(scores.dtype == torch.float32 for scores in model.rankallocator.exp_avg_ipt.values())
    model.update_and_allocate(15)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 6


def test_budgets_that_peft_cannot_serve():
    """Catches a target that is the initial rank, which cuts nothing, and one above it, which is refused."""
    model = made(target_r=4)
    for step in range(16):
        give_gradients(model, step)
        model.update_and_allocate(step)
    assert model.peft_config["default"].rank_pattern == {f"{name}.lora_E": [True] * 4 for name in "abc"}
    model = made(target_r=5)
    before = model.a.lora_E["default"].clone()
    give_gradients(model, 0)
    with pytest.raises(ValueError, match="target_r must be at most init_r"):
        model.update_and_allocate(15)
    assert torch.equal(model.a.lora_E["default"], before)


def test_steps_out_of_order_are_refused_by_name():
    """Catches a last phase without ranks, scores that were never taken, and steps that are no numbers."""
    model = made()
    give_gradients(model, 0)
    with pytest.raises(ValueError, match="no ranks were cut by step 15"):
        model.update_and_allocate(16)
    with pytest.raises(ValueError, match="no step has given a.lora_A.default a score"):
        model.update_and_allocate(15)
    for wrong in (1.0, True, "3"):
        with pytest.raises(TypeError, match="global_step must be an int"):
            model.update_and_allocate(wrong)
    allocator = model.rankallocator
    for wrong in (7, None, 0):
        with pytest.raises(ValueError, match="total_step"):
            allocator.set_total_step(wrong)
        assert model.peft_config["default"].total_step == 20
    allocator.set_total_step(40)
    assert allocator.budget_schedule(35) == (6, False)
    with pytest.raises(ValueError, match="expected 4 triplets of a, got 1"):
        allocator.mask_using_rank_pattern(model.model, {"a.lora_E": [True]})


def test_masks_follow_a_pattern_that_changes():
    """Catches a mask that is made once and kept, by either name of a layer, or that touches another layer."""
    model = made()
    allocator = RankAllocator(model.model, model.peft_config["default"], "default")
    pattern = {"a.lora_E.default": [True, False, True, True]}
    allocator.mask_using_rank_pattern(model.model, pattern)
    assert (model.a.lora_E["default"][:, 0] != 0).tolist() == [True, False, True, True]
    pattern["a.lora_E.default"][3] = False
    allocator.mask_using_rank_pattern(model.model, pattern)
    assert (model.a.lora_E["default"][:, 0] != 0).tolist() == [True, False, True, False]
    allocator.mask_using_rank_pattern(model.model, {"b.lora_E": [False] * 4})
    assert not model.b.lora_E["default"].any() and model.c.lora_E["default"].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_orthogonality_is_its_formula(dtype):
    """Catches a mean over layers in place of factors, a norm that is squared, ranks that are mixed up, a gradient that
    is NaN where a factor is orthogonal, and 16 bits or autocast where it is computed."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8, 5), (3, 4, 6), (2, 9, 9), (0, 4, 4)]
    pairs = [(torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)) for r, k, n in shapes]
    pairs[1] = torch.eye(3, 4), torch.eye(6, 3)
    pairs = [tuple(t.to(dtype).requires_grad_() for t in pair) for pair in pairs]
    wide = [tuple(t.detach().double().requires_grad_() for t in pair) for pair in pairs]
    terms = [m - torch.eye(len(m)) for A, B in wide for m in (A @ A.T, B.T @ B)]
    want = sum(torch.linalg.matrix_norm(term) if term.numel() else term.sum() for term in terms) / 8
    want.backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = orthogonality(pairs)
    got.backward()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    for pair, truth in zip(pairs, wide, strict=True):
        for t, exact in zip(pair, truth, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(t.grad.double(), exact.grad, rtol=4 * eps, atol=8 * torch.finfo(got.dtype).eps)
    assert orthogonality([]) is None


def test_a_deep_copy_has_its_own_scores():
    """Catches two models of which one's training changes the other's ranks."""
    model = made()
    give_gradients(model, 0)
    model.update_and_allocate(1)
    other = copy.deepcopy(model)
    give_gradients(other, 1)
    other.update_and_allocate(15)
    assert model.peft_config["default"].rank_pattern is None and model.rankallocator.ipt
    assert isinstance(other, AdaLoraModel) and not other.rankallocator.ipt
    assert model.add_losses(types.SimpleNamespace(loss=torch.tensor(1.0))).loss > 1
