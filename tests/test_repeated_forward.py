"""A mixed batch that comes again over a layer: the short way gives what the long one does, and only where it may."""

from __future__ import annotations

import pytest
import torch

import peftkern
from multi_data import RANKS, layer, make
from numerics import padded_randn
from peftkern.ops import multi_lora_linear, quantize_4bit
from peftkern.ops._repeated_forward import RepeatedForward
from peftkern.ops.adapter_route import AdapterBatch

# Rows of adapters in the pool's order and not, evenly apart and not, of one rank and several, some of the base alone.
BATCHES = [[3, 0], [0, 3], [0, 2, 3, 4, 0], [3, -1, 0, 7], [1, -1, 9], [2] * 6, [0, 0, 3, 3], [4, 3, 2, 0, -1, 0]]


def forwards(x, weight, bias, adapters, batch):
    """A first and a repeated forward of a batch without gradients, and that of bare ids, which is the general one."""
    with torch.no_grad():
        first, again = (multi_lora_linear(x, weight, adapters, batch, bias) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RepeatedForward, "run", lambda *_: pytest.fail("bare ids took the short way"))
            general = multi_lora_linear(x, weight, adapters, batch.ids, bias)
    return first, again, general


@pytest.mark.parametrize("slots", BATCHES, ids=str)
@pytest.mark.parametrize("each", [1, 3, 20])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, False), (torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_repeated_forward_is_the_first_one_to_the_bit(slots, each, dtype, masters):
    """Would catch products in another order, a scaling or a row that is left out, and adapters of another group."""
    torch.manual_seed(0)
    n, N, K = len(slots), 33, 40
    _, weight, bias, adapters, _ = make(2, N, K, dtype, torch.float32 if masters else None, grad=False)
    batch = AdapterBatch(torch.tensor(slots), len(RANKS))
    for x in (padded_randn(n * each, K, pad=3, dtype=dtype).view(n, each, K), torch.randn(n, each, 2, K).to(dtype)):
        first, again, general = forwards(x, weight, bias, adapters, batch)
        told = batch.repeated.get(adapters)
        if told is not None:  # nowhere where 16 bits are multiplied in fp32
            with torch.no_grad():
                assert told.serves(x, weight, bias, adapters, 0.0)
        else:
            assert dtype is torch.bfloat16
        assert torch.equal(first, again) and torch.equal(first, general) and again.shape == (*x.shape[:-1], N)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_weight_too(kind):
    """Would catch a weight that is taken for a dense one."""
    torch.manual_seed(0)
    dense = torch.randn(32, 64)
    weight = quantize_4bit(dense) if kind == "nf4" else peftkern.ops.quantize_8bit(dense)
    adapters = layer(32, 64, grad=False)
    batch = AdapterBatch(torch.tensor([3, 0, -1, 2]), len(RANKS))
    first, again, general = forwards(torch.randn(4, 1, 64), weight, None, adapters, batch)
    assert adapters in batch.repeated and torch.equal(first, again) and torch.equal(first, general)


def changed_values(x, weight, bias, adapters):
    adapters.entries[0].lora_B.data.mul_(3.0)
    weight.data.mul_(0.5)
    return x, weight, bias, {}


def scaled(x, weight, bias, adapters):
    adapters.rescale(3, -4.0)
    return x, weight, bias, {}


def put_anew(x, weight, bias, adapters):
    adapters.put(0, torch.randn(2, x.shape[-1]), torch.randn(weight.shape[0], 2), 1.0)
    return x, weight, bias, {}


def dropped(x, weight, bias, adapters):
    adapters.drop(3)
    return x, weight, bias, {}


def moved(x, weight, bias, adapters):
    for entry in adapters.entries:
        if entry is not None:
            entry.lora_A.data = 2.0 * entry.lora_A.data
    adapters.settle()
    return x, weight, bias, {}


def other_weight(x, weight, bias, adapters):
    return x, weight.clone().neg_(), bias, {}


def other_bias(x, weight, bias, adapters):
    return x, weight, bias.clone().neg_(), {}


def no_bias(x, weight, bias, adapters):
    return x, weight, None, {}


def other_shape(x, weight, bias, adapters):
    return torch.randn(x.shape[0], 5, x.shape[-1]), weight, bias, {}


def with_dropout(x, weight, bias, adapters):
    return x, weight, bias, {"dropout_p": 0.5, "seed": torch.tensor([7])}


CHANGES = [changed_values, scaled, put_anew, dropped, moved, other_weight, other_bias, no_bias, other_shape]


@pytest.mark.parametrize("change", [*CHANGES, with_dropout], ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_has_changed_is_seen(change):
    """Would catch a forward that is repeated with values, places, scalings, a weight or a mask that are gone."""
    torch.manual_seed(0)
    x, weight, bias, adapters, _ = make(4, 33, 40, grad=False)
    x = x.view(4, 1, 40).contiguous()
    batch = AdapterBatch(torch.tensor([3, 0, 2, 0]), len(RANKS))
    before = multi_lora_linear(x, weight, adapters, batch, bias)
    assert batch.repeated[adapters].serves(x, weight, bias, adapters, 0.0)
    x, weight, bias, options = change(x, weight, bias, adapters)
    got = multi_lora_linear(x, weight, adapters, batch, bias, **options)
    want = multi_lora_linear(x, weight, adapters, batch.ids, bias, **options)  # the general forward
    assert torch.equal(got, want) and (got.shape != before.shape or not torch.allclose(got, before))


def test_a_forward_for_backward_is_not_a_repeated_one():
    """Would catch gradients that are lost after a forward without them, and a mask under torch.no_grad."""
    torch.manual_seed(0)
    x, weight, bias, adapters, _ = make(4, 33, 40)
    batch = AdapterBatch(torch.tensor([3, 0, 2, 0]), len(RANKS))
    with torch.no_grad():
        multi_lora_linear(x, weight, adapters, batch, bias)
    y = multi_lora_linear(x, weight, adapters, batch, bias)
    y.sum().backward()
    entry = adapters.entries[3]
    assert x.grad is not None and entry is not None and entry.lora_A.grad is not None
    torch.testing.assert_close(entry.lora_B.grad, entry.scaling * (x[:1] @ entry.lora_A.T).expand(33, -1).detach())


@torch.no_grad()
def test_autocast_and_a_backend_in_force_are_seen():
    """Would catch fp32 under autocast, and a path that `use_backend` excludes."""
    torch.manual_seed(0)
    x, weight, bias, adapters, _ = make(4, 33, 40, grad=False)
    batch = AdapterBatch(torch.tensor([3, 0, 2, 0]), len(RANKS))
    y = multi_lora_linear(x, weight, adapters, batch, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert multi_lora_linear(x, weight, adapters, batch, bias).dtype is torch.bfloat16
    assert torch.equal(multi_lora_linear(x, weight, adapters, batch, bias), y)
    told = batch.repeated[adapters]
    assert told.serves(x, weight, bias, adapters, 0.0)
    with peftkern.use_backend("triton"):
        assert not told.serves(x, weight, bias, adapters, 0.0)


@torch.no_grad()
def test_an_argument_that_is_wrong_is_still_refused():
    """Would catch a repeated forward that is taken before the arguments were looked at."""
    torch.manual_seed(0)
    x, weight, bias, adapters, _ = make(4, 33, 40, grad=False)
    batch = AdapterBatch(torch.tensor([3, 0, 2, 0]), len(RANKS))
    multi_lora_linear(x, weight, adapters, batch, bias)
    with pytest.raises(ValueError, match="dropout_p"):
        multi_lora_linear(x, weight, adapters, batch, bias, dropout_p=2.0, training=False)
    with pytest.raises(TypeError, match="x"):
        multi_lora_linear(x.double(), weight, adapters, batch, bias)
    with pytest.raises(ValueError, match="ids"):
        multi_lora_linear(torch.randn(3, 40), weight, adapters, batch, bias)
