"""The base GEMMs with the expand of many adapters in their accumulators, against fp64: each kernel, by its own tile."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import factors, make_adapters, routed, rows_of, wide  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.gemm_tables import Tile  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.lora_linear import pointer_calls  # noqa: E402
from peftkern_kernels.lora_linear_4bit import (  # noqa: E402
    base_4bit_plus_expand_calls,
    base_4bit_transposed_plus_expand_calls,
)
from peftkern_kernels.lora_linear_split import split_calls  # noqa: E402
from peftkern_kernels.lora_linear_tma import tma_calls  # noqa: E402
from peftkern_kernels.multi_tile import MixedFactor  # noqa: E402
from peftkern_kernels.routing import slot_seed  # noqa: E402
from quantized_data import as_packed, random_4bit  # noqa: E402

BUILDERS = {
    "pointer": (pointer_calls, Tile(32, 32, 32, 4, 1)),
    "split": (split_calls, Tile(32, 32, 32, 4, 1, split_k=2)),
    "tma": (tma_calls, Tile(32, 32, 32, 4, 1, tma=True)),
}


def check(out, x, weight, s, factor, *, bias=None, dropout=None, rounded=0.0):
    """out [M, C] against base + each row's own expand; `weight` is [C, columns of x]."""
    adapters, routing = factor.adapters, factor.routing
    start, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        start, size = start + bias.double(), size + bias.double().abs()
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        truth, magnitude = start[rows], size[rows]
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        if rank:
            a, b = factors(adapters, slot, x.dtype)
            second, part = (b if factor.pool == "b" else a.T), s[rows, :rank].to(x.dtype).double()
            delta, delta_size = part @ second.T, part.abs() @ second.abs().T
            if dropout is not None:
                keep = reference.dropout_mask(slot_seed(dropout.seed, slot), len(rows), out.shape[1], dropout.p)
                delta, delta_size = delta * keep * dropout.keep_scale, delta_size * keep * dropout.keep_scale
            truth, magnitude = truth + delta, magnitude + delta_size
        assert_rounded(out[rows], truth, magnitude, terms=x.shape[1] + rank + 4, rounded=rounded)


@pytest.mark.parametrize("kind", ["mixed", "none", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_forward(name, dtype, kind, device):
    """Bugs: rows of a tile given another adapter's delta, a rank's tail read from the next, -1 adapted."""
    build, tile = BUILDERS[name]
    M, N, K = 70, 48, 80
    adapters = make_adapters(N, K, dtype, device)
    factor = MixedFactor(adapters, routed(M, 6, device, kind), "b")
    x, weight = (torch.randn(rows, K, device=device).to(dtype) for rows in (M, N))
    s, bias, out = wide(M, 64, dtype, device), torch.randn(N, device=device).to(dtype), x.new_empty(M, N)
    run_all(build(x, weight, s, factor, out, bias=bias, dropout=None, precision="ieee", tile=tile))
    check(out, x, weight, s, factor, bias=bias)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_backward_with_dropout(name, masters, device):
    """Bugs: the pool of A walked as if it were B's; the mask of the batch's row, or of another slot."""
    build, tile = BUILDERS[name]
    M, N, K, dtype = 70, 48, 80, torch.bfloat16
    adapters = make_adapters(N, K, torch.float32 if masters else dtype, device)
    factor = MixedFactor(adapters, routed(M, 6, device), "a")
    dropout = Dropout(torch.tensor([-(2**61) - 7], device=device), 0.3)
    dy, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, N), (N, K)))
    ds, out = wide(M, 64, dtype, device), dy.new_empty(M, K)
    run_all(build(dy, weight.t(), ds, factor, out, bias=None, dropout=dropout, precision="ieee", tile=tile))
    check(out, dy, weight.t(), ds, factor, dropout=dropout)


@pytest.mark.parametrize("split_k", [1, 2])
def test_over_a_4bit_weight(split_k, device):
    """Bugs: the two halves of the columns given different adapters or masks; a plane that starts with an expand."""
    M, N, K, dtype = 40, 64, 128, torch.float16
    adapters, routing = make_adapters(N, K, dtype, device), routed(M, 6, device)
    weight = random_4bit(N, K, dtype=dtype, device=device)
    dense, packed, arch = reference.dequantize_4bit(weight, dtype), as_packed(weight), arch_of(device)
    x, s, bias = wide(M, K, dtype, device), wide(M, 64, dtype, device), torch.randn(N, device=device).to(dtype)
    out, factor = x.new_empty(M, N), MixedFactor(adapters, routing, "b")
    tile = Tile(32, 32, 64, 4, 1, split_k=split_k)
    run_all(base_4bit_plus_expand_calls(x, packed, s, factor, out, bias=bias, arch=arch, tile=tile))
    check(out, x, dense, s, factor, bias=bias)
    dy, out, factor = wide(M, N, dtype, device), x.new_empty(M, K), MixedFactor(adapters, routing, "a")
    dropout, tile = Dropout(torch.tensor([99], device=device), 0.3), Tile(32, 128, 32, 4, 1, split_k=split_k)
    run_all(base_4bit_transposed_plus_expand_calls(dy, packed, s, factor, out, dropout=dropout, arch=arch, tile=tile))
    check(out, dy, dense.t(), s, factor, dropout=dropout)


def test_the_factor_says_what_it_stands_for(device):
    """Bugs: launch tables asked with the wrong rank; traffic counted for adapters that no row can ask for."""
    adapters, routing = make_adapters(48, 80, torch.float32, device), routed(3, 6, device)
    for pool, columns in (("b", 48), ("a", 80)):
        factor = MixedFactor(adapters, routing, pool)
        assert factor.shape == (columns, 64) and factor.dtype == torch.float32 and factor.element_size() == 4
        assert factor.numel() == 3 * columns * 64
