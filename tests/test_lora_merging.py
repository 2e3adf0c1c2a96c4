"""Merging LoRA's layers into their base weights, beside real PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_pairs import BASES, IN, OUT, Holder, inputs, pair
from peftkern.tuners.lora import LoraConfig, LoraModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
@pytest.mark.parametrize("kind", BASES)
def test_merged_bits_are_those_of_peft(kind, dtype, wide):
    """Catches a merge that rounds in another place than PEFT's, so that merged checkpoints differ."""
    variant = {} if kind in ("embedding", "no_bias") else {"lora_bias": True}
    ours, theirs = pair(BASES[kind]().to(dtype), ("default", "second"), **variant)
    for model in (ours, theirs):
        for name in ("default", "second"):
            model._cast_adapter_dtype(name, wide)
    before = ours.model.layer.weight.detach().clone()
    mine, other = ours.model.layer, theirs.model.layer
    assert torch.equal(mine.get_delta_weight("second"), other.get_delta_weight("second"))
    ours.merge_adapter()
    theirs.merge_adapter()
    exact = kind != "embedding" or dtype == torch.float32 or not wide
    for name in ["weight"] + ["bias"] * (kind in ("linear", "conv1d")):
        a, b = getattr(mine, name), getattr(other, name)
        if exact:
            assert torch.equal(a, b), name
        else:
            # PEFT rounds an embedding's delta to the weight's dtype before adding it, and the sum again.
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert mine.merged_adapters == other.merged_adapters == ["default", "second"]
    ours.unmerge_adapter()
    assert not mine.merged
    torch.testing.assert_close(mine.weight, before, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_merged_layer_computes_the_same(kind, safe_merge):
    """Catches a merge of the wrong adapters or scaling, and a safe merge that differs from a plain one."""
    base = BASES[kind]()
    ours, _ = pair(base, ("default", "second"))
    x = inputs(base).detach()
    want = ours(x)
    storage = ours.model.layer.weight.data_ptr()
    ours.model.layer.merge(safe_merge=safe_merge, adapter_names=["second"])
    with pytest.warns(UserWarning, match=r"merging \['default'\] beside"):
        ours.model.layer.merge(safe_merge=safe_merge, adapter_names=["default"])
    torch.testing.assert_close(ours(x), want)
    # Tied weights and views share the storage.
    assert ours.model.layer.weight.data_ptr() == storage


def test_safe_merge_leaves_weights_alone_when_a_sum_is_not_finite():
    """Catches a check that comes after the weight, or the layers before it, were changed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [p.detach().clone() for p in model.parameters()]
    tuned = LoraModel(model, LoraConfig(target_modules=["0", "1"]), "default")
    tuned.model[1].lora_B["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        tuned.merge_adapter(safe_merge=True)
    assert not tuned.model[0].merged and not tuned.model[1].merged
    with pytest.raises(ValueError, match="not finite"):
        tuned.merge_and_unload(safe_merge=True)
    after = [p for n, p in tuned.model.named_parameters() if "lora_" not in n]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_merging_twice_warns_and_changes_nothing():
    """Catches an adapter that is added twice."""
    ours, _ = pair(nn.Linear(IN, OUT), ("default", "second"))
    layer = ours.model.layer
    layer.merge(adapter_names=["default"])
    weight = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["default"])
    assert torch.equal(layer.weight, weight) and layer.merged_adapters == ["default"]
    with pytest.warns(UserWarning, match=r"merging \['second'\] beside"):
        layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        layer.unmerge()


def test_what_cannot_be_merged_is_refused_before_anything_is_changed():
    """Catches a merge into a temporary (a parametrized weight, or one that a hook makes anew: PEFT loses what it merges
    there), into nothing, or one that stops half way."""
    with pytest.warns(UserWarning, match="without a bias"):
        tuned = LoraModel(
            Holder(nn.Linear(4, 4, bias=False)), LoraConfig(target_modules=["layer"], lora_bias=True), "a"
        )
    before = tuned.model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="no bias"):
        tuned.merge_adapter()
    assert torch.equal(tuned.model.layer.weight, before)

    ours, _ = pair(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="parametrized"):
        ours.merge_adapter()
    # The layer by itself refuses too: nn.LoraLinear has no model above it.
    with pytest.raises(TypeError, match="parametrized"):
        ours.model.layer.merge()
    for changed in (nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        ours = LoraModel(Holder(changed(nn.Linear(4, 4))), LoraConfig(target_modules=["layer"]), "a")
        for merge in (ours.merge_adapter, ours.merge_and_unload, ours.model.layer.merge):
            with pytest.raises(TypeError, match="makes anew"):
                merge()
    ours, _ = pair(nn.Linear(4, 4, device="meta"), values=None)
    with pytest.raises(ValueError, match="meta"):
        ours.merge_adapter()
    with pytest.raises(TypeError, match="list"):
        ours.merge_adapter("default")
    with pytest.raises(ValueError, match="no adapter is named"):
        ours.merge_adapter(["typo"])
