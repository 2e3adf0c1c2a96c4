"""Every operation where the caller is in some mode: another autocast around backward, a dispatch mode around the whole
step (FlopCounterMode is one), and through the operators for no rows at all."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from multi_data import layer
from peftkern import use_backend
from peftkern.ops import (
    dequantize,
    dora_linear,
    gated_lora_linear,
    grouped_linear,
    grouped_lora_linear,
    ia3_linear,
    linear_cross_entropy,
    lora_embedding,
    lora_linear,
    lora_linear_shared,
    multi_ia3_linear,
    multi_lora_linear,
    multi_lora_linear_shared,
    quantize_4bit,
    quantize_8bit,
)
from peftkern.ops.linear_quantized import linear_quantized

N, K, R = 6, 8, 3


class AsItIs(TorchDispatchMode):
    """Looks at operators and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def leaves(dtype, rows=5):
    """x, weight, A, B, bias, a vector [N], two vectors [2, K], and a pool of adapters of one rank."""
    torch.manual_seed(1)
    shapes = {"x": (rows, K), "w": (N, K), "A": (R, K), "B": (N, R), "bias": (N,), "l": (N,), "ls": (2, K)}
    made = {name: torch.randn(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return made, layer(N, K, dtype, ranks=(2, 2, 2))


def ids(x):
    return torch.tensor([0, 2, -1, 0, 2])[: x.shape[0]]


def two(t):
    """A stack of two experts."""
    return torch.stack([t, 2 * t])


def ends(x):
    """Where the rows of two experts end; the last row is of neither."""
    return torch.tensor([2, 4], dtype=torch.int32).clamp(max=x.shape[0])


def frozen(t):
    return t["w"].detach()


def nf4(t):
    return quantize_4bit(frozen(t).float() if t["w"].dtype == torch.float64 else frozen(t), blocksize=32)


OPERATIONS = {
    "lora_linear": lambda t, pool: lora_linear(t["x"], t["w"], t["A"], t["B"], 0.7, t["bias"]),
    "lora_linear_products": lambda t, pool: lora_linear(t["x"], frozen(t), t["A"], t["B"], 0.7),
    "lora_linear_4bit": lambda t, pool: lora_linear(t["x"], nf4(t), t["A"], t["B"], 0.7, t["bias"]),
    "lora_linear_shared": lambda t, pool: sum(
        lora_linear_shared(t["x"], [frozen(t)] * 2, [t["A"]] * 2, [t["B"]] * 2, [0.7, 0.5])
    ),
    "multi_lora_linear": lambda t, pool: multi_lora_linear(t["x"], t["w"], pool, ids(t["x"]), t["bias"]),
    "multi_lora_linear_4bit": lambda t, pool: multi_lora_linear(t["x"], nf4(t), pool, ids(t["x"])),
    "multi_lora_linear_shared": lambda t, pool: sum(
        multi_lora_linear_shared(t["x"], [frozen(t)] * 2, [pool] * 2, ids(t["x"]))
    ),
    "dora_linear": lambda t, pool: dora_linear(t["x"], t["w"], t["A"], t["B"], t["l"], 0.7, t["bias"]),
    "dora_linear_4bit": lambda t, pool: dora_linear(t["x"], nf4(t), t["A"], t["B"], t["l"], 0.7, t["bias"]),
    "gated_lora_linear": lambda t, pool: gated_lora_linear(
        t["x"], 2 * t["x"], frozen(t), t["A"], t["B"], 0.7, activation="gelu"
    ),
    "gated_lora_linear_learned": lambda t, pool: gated_lora_linear(
        t["x"], 2 * t["x"], t["w"], t["A"], t["B"], 0.7, t["bias"]
    ),
    "gated_lora_linear_4bit": lambda t, pool: gated_lora_linear(t["x"], t["x"], nf4(t), t["A"], t["B"], 0.7),
    "ia3_linear": lambda t, pool: ia3_linear(t["x"], t["w"], t["l"], t["bias"]),
    "ia3_linear_4bit": lambda t, pool: ia3_linear(t["x"], nf4(t), t["l"]),
    "multi_ia3_linear": lambda t, pool: multi_ia3_linear(
        t["x"], t["w"], t["ls"], ids(t["x"]), t["bias"], is_feedforward=True
    ),
    "lora_embedding": lambda t, pool: lora_embedding(ids(t["x"]).clamp(0), t["w"], t["B"].t(), t["A"].t(), 0.7),
    "linear_cross_entropy": lambda t, pool: linear_cross_entropy(
        t["x"], t["w"], ids(t["x"]).clamp(0), bias=t["bias"], reduction="sum"
    ),
    "grouped_lora_linear": lambda t, pool: grouped_lora_linear(
        t["x"], two(t["w"]), two(t["A"]), two(t["B"]), 0.7, ends(t["x"]), two(t["bias"])
    ),
    "linear_of_experts": lambda t, pool: grouped_linear(t["x"], two(frozen(t)), ends(t["x"])),
    "linear_quantized": lambda t, pool: linear_quantized(t["x"], nf4(t), t["bias"]),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def gradients(t, pool):
    found = {name: leaf.grad for name, leaf in t.items() if leaf.grad is not None}
    for slot, entry in enumerate(pool.entries):
        found |= {f"{slot}{i}": p.grad for i, p in enumerate(entry[:2]) if p.grad is not None}
    return found


def assert_same(ours, theirs, ulps=0):
    """The same gradients, bit for bit or to so many roundings of the largest number of each."""
    assert ours.keys() == theirs.keys() and ours
    for name, want in theirs.items():
        atol = ulps * torch.finfo(want.dtype).eps * float(want.abs().max()) if ulps else 0.0
        torch.testing.assert_close(ours[name], want, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@each_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_around_backward_changes_nothing(operation, dtype):
    """Would catch autocast of an outer block that casts some operands of backward and not those of products in place:
    a layer that a model keeps out of autocast then failed with "must have the same dtype", or lost bits."""
    found = []
    for outer in (False, True):
        t, pool = leaves(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            with torch.autocast("cpu", enabled=False):
                y = OPERATIONS[operation](t, pool)
            y.backward(torch.ones_like(y))
        found.append(gradients(t, pool))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("is_feedforward", [False, True])
def test_vectors_of_another_16_bit_dtype_under_autocast(is_feedforward):
    """Would catch autocast that looks for the widest of two 16-bit dtypes where a table of vectors is made."""
    t, _ = leaves(torch.float32)
    scales = torch.randn(2, K if is_feedforward else N, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        y = multi_ia3_linear(t["x"], t["w"], scales, ids(t["x"]), is_feedforward=is_feedforward)
    want = multi_ia3_linear(t["x"], t["w"], scales.float(), ids(t["x"]), is_feedforward=is_feedforward)
    torch.testing.assert_close(y.float(), want, rtol=1e-2, atol=2e-2)


def test_an_embedding_takes_factors_of_any_dtype_under_autocast():
    """Would catch the check that refuses what is cast a few lines further on, as `lora_linear` casts it."""
    t, _ = leaves(torch.float32)
    a, b = (f.detach().bfloat16().requires_grad_() for f in (t["B"].t(), t["A"].t()))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_embedding(ids(t["x"]).clamp(0), t["w"], a, b, 0.7)
    want = lora_embedding(ids(t["x"]).clamp(0), t["w"], a.float(), b.float(), 0.7)
    assert torch.equal(y, want)
    y.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16


def test_another_default_device_changes_nothing():
    """Would catch a tensor made where `torch.set_default_device` or a `with torch.device(...)` says, and not beside the
    operands: a dropout mask, the order of a batch's rows, a buffer of dequantization; or the tables of the 4-bit
    formats, which another device may round otherwise."""
    t, pool = leaves(torch.float32)
    rows, seed, w = ids(t["x"]), torch.tensor([3]), frozen(t)

    def run():
        y = lora_linear(t["x"], w, t["A"], t["B"], 0.7, dropout_p=0.5, seed=seed)
        q = quantize_8bit(w.bfloat16())
        return [y, multi_lora_linear(t["x"], w, pool, rows), *nf4(t).tensors(), dequantize(q, torch.bfloat16)]

    want = run()
    with torch.device("meta"):
        got = run()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@each_operation
def test_a_dispatch_mode_around_the_whole_step_changes_nothing(operation):
    """Would catch results of an operator that lie in one memory: two adapters of one rank had their gradients out of
    one product, and the operator's check of that failed wherever backward ran under a mode."""
    found = []
    for mode in (False, True):
        t, pool = leaves(torch.float32)
        if mode:
            with AsItIs():
                OPERATIONS[operation](t, pool).sum().backward()
        else:
            OPERATIONS[operation](t, pool).sum().backward()
        found.append(gradients(t, pool))
    assert_same(found[1], found[0], ulps=8)  # projections that share x may be added in another order


@each_operation
def test_a_transform_of_torch_func_is_refused_in_words(operation):
    """Would catch torch's advice to write another autograd function, where ours is what to call instead."""
    t, pool = leaves(torch.float32)
    with pytest.raises(RuntimeError, match="transforms of torch.func .* Call the layers"):
        torch.func.grad(lambda x: OPERATIONS[operation](t | {"x": x}, pool).sum())(t["x"].detach())


@each_operation
def test_no_rows_through_the_operator(operation):
    """Would catch an operator that takes what was kept of no rows for what was not kept at all: no gradient in place of
    zeros, or an error in backward. torch.compile calls operators too."""
    t, pool = leaves(torch.float32, rows=0)
    with AsItIs():
        y = OPERATIONS[operation](t, pool)
    y.sum().backward()
    found = gradients(t, pool)
    eager, eager_pool = leaves(torch.float32, rows=0)
    OPERATIONS[operation](eager, eager_pool).sum().backward()
    assert_same(found, gradients(eager, eager_pool))
    assert all(not grad.any() for grad in found.values())


@each_operation
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_computed_again_on_another_path_is_refused(operation, use_reentrant):
    """Would catch gradients of B that are off by a scaling, without a word: S kept by kernels carries it, S kept by
    plain PyTorch does not, and `use_backend` may not be in force where backward computes a forward again."""
    pytest.importorskip("triton")
    t, pool = leaves(torch.float32)
    names = [name for name in t if name != "x"]

    def run(x, *others):
        return OPERATIONS[operation](dict(zip(names, others, strict=True)) | {"x": x}, pool)

    def step(backend):
        with use_backend("torch"):
            y = checkpoint(run, t["x"], *(t[name] for name in names), use_reentrant=use_reentrant)
        with use_backend(backend):
            y.sum().backward()
        return gradients(t, pool)

    want = {name: grad.clone() for name, grad in step("torch").items()}
    for p in (*t.values(), *(p for entry in pool.entries for p in entry[:2])):
        p.grad = None
    # Reentrant, all is computed again on one path; IA3 keeps the same on all, and the others have but one.
    is_same_on_all = operation.startswith(("ia3", "multi_ia3", "linear_"))
    if use_reentrant or is_same_on_all:
        assert_same(step("triton"), want, ulps=64)
    else:
        with pytest.raises(CheckpointError):
            step("triton")
