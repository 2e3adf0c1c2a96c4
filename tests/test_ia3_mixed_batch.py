"""`adapter_names` on IA3 models: against separate runs, for real PEFT takes the names and ignores them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftkern
from test_mixed_batch import NAMES, gradients, separately, together_and_apart
from tiny_models import VOCAB, ids, mlp, randomize, tiny_llama

pytest.importorskip("transformers")

UP_DOWN = {"target_modules": ["up", "down"], "feedforward_modules": ["down"]}
ONE = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
TWO = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
WHOLE = {"modules_to_save": ["lm_head"]}


def adapted(base, *configs, **options):
    """`base` with the adapters "one", "two", "three" of these configurations, their values around what they were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(base, peftkern.IA3Config(**(options | configs[0])), adapter_name="one")
        for name, config in zip(("two", "three"), configs[1:], strict=False):
            model.add_adapter(name, peftkern.IA3Config(**(options | config)))
    spread(model)
    model.set_requires_grad(list(model.peft_config))
    return model.eval()


def spread(model, seed=1):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomize(model, ("ia3_", "modules_to_save"), seed)
    for name, p in model.named_parameters():
        if "ia3_" in name or "modules_to_save" in name:
            p.data.mul_(3).add_(before[name])


def assert_as_apart(model, x, names=NAMES, tolerance=1e-5, **kwargs):
    """The batch's output and gradients are those of each row run alone, and absent adapters have no gradient."""
    y, together, want, apart = together_and_apart(model, x, names, **kwargs)
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    assert set(together) == set(apart) and any("ia3_l" in name for name in apart)
    for name, gradient in apart.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(together[name], gradient, rtol=tolerance, atol=10 * tolerance * scale, msg=name)
    for name in set(model.peft_config) - set(names):
        assert not any(f".{name}" in key for key in together)


@pytest.mark.parametrize("how", ["fused", "hooked", "whole"])
def test_each_row_and_each_gradient_is_its_adapters(how):
    """Would catch a row under another's vector, a gradient that others' rows reach, and one of an absent adapter."""
    options = UP_DOWN | ({"modules_to_save": ["head"]} if how == "whole" else {})
    model = adapted(mlp(), {}, {}, {}, **options)
    if how == "hooked":
        for layer in (model.get_base_model().up, model.get_base_model().down):
            layer.base_layer.register_forward_hook(lambda *_: None)
    assert_as_apart(model, ids(4))
    assert_as_apart(model, ids(5), ["__base__", "three", "one", "three", "__base__"])


def test_adapters_of_different_layers():
    """Would catch a layer that scales rows whose adapter does not target it, or that runs for none of the batch."""
    model = adapted(mlp(), UP_DOWN, {"target_modules": ["down"], "feedforward_modules": ["down"]})
    assert_as_apart(model, ids(4))
    with torch.no_grad():
        base = model.get_base_model()
        x = base.emb(ids(2))
        with model.base_model.mixed_batch(["two", "__base__"]):
            assert torch.equal(base.up(x), base.up.base_layer(x))


@torch.no_grad()
def test_rows_that_are_tokens():
    """Would catch names that are taken for sequences where x has a row for each of them."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    layer, x = model.get_base_model().up, torch.randn(4, 16)
    want = torch.cat(separately(model, NAMES, lambda i: layer(x[i : i + 1])))
    for shape in ((4, 16), (2, 2, 16)):
        for hooked in (False, True):
            handle = layer.base_layer.register_forward_hook(lambda *_: None) if hooked else None
            with model.base_model.mixed_batch(NAMES):
                got = layer(x.view(shape))
            torch.testing.assert_close(got.view(4, -1), want, rtol=1e-5, atol=1e-6)
            if handle is not None:
                handle.remove()


def test_a_llama():
    """Would catch a head trained whole that ignores the names, and layers that see other rows than the batch's."""
    model = adapted(tiny_llama(), ONE | WHOLE, TWO | WHOLE, task_type="CAUSAL_LM")
    assert_as_apart(model, ids(4), use_cache=False)


@torch.no_grad()
def test_generate():
    """Would catch names that are lost after the prompt, and beams that take another prompt's adapter."""
    model = adapted(tiny_llama(), ONE | WHOLE, TWO | WHOLE, task_type="CAUSAL_LM")
    x = ids(4)
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        got = model.generate(input_ids=x, adapter_names=NAMES, **options)
        want = separately(model, NAMES, lambda i, o=options: model.generate(input_ids=x[i : i + 1], **o))
        assert torch.equal(got, torch.cat(want))
    assert len({tuple(model.generate(input_ids=x[:1], adapter_names=[n], **options)[0].tolist()) for n in NAMES}) > 1


@torch.no_grad()
def test_an_encoder_sees_each_prompt_once():
    """Would catch names that are repeated for an encoder's rows too, which beams are made of only afterwards."""
    import transformers

    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(config)
    first, second = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}, {"target_modules": ["q", "k"]}
    model = adapted(base, first, second | {"feedforward_modules": []}, task_type="SEQ_2_SEQ_LM")
    x, names = ids(3), ["one", "__base__", "two"]
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        got = model.generate(input_ids=x, adapter_names=names, **options)
        want = separately(model, names, lambda i, o=options: model.generate(input_ids=x[i : i + 1], **o))
        assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4bit_base(quant_type):
    """Would catch a base decoded in another dtype, or rows of the base alone that take bitsandbytes' own forward."""
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type}
    base = peftkern.quantize_model(tiny_llama(), how, progress=False)
    model = adapted(base, ONE, TWO, task_type="CAUSAL_LM")
    assert_as_apart(model, ids(4), tolerance=1e-4, use_cache=False)


def test_conv1d():
    """Would catch a weight that is stored the other way round, or a vector along the wrong axis of it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=32)
    base = transformers.GPT2LMHeadModel(config)
    targets = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    model = adapted(base, targets, targets, {"target_modules": ["c_fc"], "feedforward_modules": []})
    assert_as_apart(model, ids(4), use_cache=False)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv3d(2, 3, (1, 3, 3))

    def forward(self, x):
        return self.deep(self.flat(x).relu().unflatten(1, (2, 2)))


@pytest.mark.parametrize("feedforward", [[], ["flat", "deep"]])
def test_convolutions(feedforward):
    """Would catch a vector laid along another axis than the channels, or a row that takes another's."""
    torch.manual_seed(0)
    options = {"target_modules": ["flat", "deep"], "feedforward_modules": feedforward}
    model = adapted(Convolutions(), options, options)
    x = torch.randn(4, 3, 5, 6)
    assert_as_apart(model, x)
    with pytest.raises(ValueError, match="one name for each of the batch's 4 rows, got 3 "):
        model(x, adapter_names=NAMES[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True])
def test_16_bit_bases(dtype, masters):
    """Would catch a table of vectors that is rounded, and two adapters of different dtypes that cannot be stacked."""
    with torch.random.fork_rng():
        model = adapted(mlp().to(dtype), {}, {}, **UP_DOWN)
    for name, p in model.named_parameters():
        if "ia3_l" in name and not (masters and ".two" in name):
            p.data = p.data.to(dtype)
    # The arithmetic is the same but for the order of sums: each of the four roundings up to the result, those of up,
    # its scaled output, down and head, may fall to the neighbour, an eps, and so may the scaled input of down.
    bound = 5 * torch.finfo(dtype).eps
    x = ids(4)
    with torch.no_grad():
        got = model(x, adapter_names=NAMES)
        want = torch.cat(separately(model, NAMES, lambda i: model(x[i : i + 1])))
    assert got.dtype == dtype
    assert (got.double() - want.double()).abs().max() <= bound * want.double().abs().max()


def checkpointed_llama():
    model = adapted(tiny_llama(), ONE, TWO, task_type="CAUSAL_LM").train()
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Would catch layers that are computed again in backward with the active adapter in place of the rows' own."""
    model, x, found = checkpointed_llama(), ids(4), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=x, adapter_names=NAMES, use_cache=False).logits.square().mean().backward()
        found.append(gradients(model))
    assert found[0] and set(found[0]) == set(found[1])
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("first, second", [(["one", "two"], ["two", "one"]), (["one", "one"], ["two", "two"])])
def test_checkpointed_layers_under_another_batch_are_refused(first, second, learns):
    """Would catch gradients silently taken with a later batch's adapters, whose places may be the same numbers."""
    options = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = adapted(tiny_llama(), options, options, task_type="CAUSAL_LM").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if not learns:
        model.base_model.set_requires_grad(["one", "two"], False)
    loss = model(input_ids=ids(2), adapter_names=first, use_cache=False).logits.sum()
    model(input_ids=ids(2), adapter_names=second, use_cache=False)
    with pytest.raises(RuntimeError, match="another batch's adapters"):
        loss.backward()


def test_what_cannot_be_done_is_named():
    """Would catch names that are silently ignored, as PEFT does."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    x = ids(4)
    with pytest.raises(ValueError, match="no adapter is named .'nobody'"):
        model(x, adapter_names=["one", "nobody", "two", "one"])
    with pytest.raises(ValueError, match="each of the batch's 4 rows, got 3 "):
        model(x, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"no adapter is named \[1, 2"):
        model(x, adapter_names=[1, 2, 1, 2])
    with model.disable_adapter():  # it has the last word, as in PEFT
        assert torch.equal(model(x, adapter_names=NAMES), mlp()(x))
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=NAMES)
    model.unmerge_adapter()
    model(x, adapter_names=NAMES)


def test_afterwards_the_model_is_as_before():
    """Would catch a batch that stays on a layer after its forward, or after an error in it."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    x = ids(4)
    before = model(x)
    mixed = model(x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="each of the batch's 4 rows, got 3 "):
        model(x, adapter_names=NAMES[:3])
    assert torch.equal(model(x), before) and not torch.equal(mixed, before)
    torch.testing.assert_close(model(x, adapter_names=["one"] * 4), before, rtol=1e-5, atol=1e-6)


def test_adapters_that_change_between_batches():
    """Would catch slots of adapters that are gone, values of an earlier forward, and copies that share anything."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    x = ids(4)
    assert_as_apart(model, x)
    spread(model, seed=5)
    assert_as_apart(model, x)
    model.add_adapter("three", peftkern.IA3Config(target_modules=["down"], feedforward_modules=["down"]))
    spread(model, seed=6)
    assert_as_apart(model, x, ["three", "one", "two", "__base__"])
    model.delete_adapter("one")
    assert_as_apart(model, x, ["three", "two", "two", "__base__"])
    twin = copy.deepcopy(model)
    spread(model, seed=7)
    with torch.no_grad():
        assert not torch.allclose(twin(x, adapter_names=["two"] * 4), model(x, adapter_names=["two"] * 4))
    assert_as_apart(model, x, ["three", "two", "two", "__base__"])


def test_one_compilation_serves_all_batches_of_the_same_adapters():
    """Would catch rows' places that a compiled model takes as constants, and a graph that breaks at each layer."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    base, x = model.get_base_model(), ids(4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (NAMES, ["two", "two", "one", "__base__"]):
        want = model(x, adapter_names=names)
        with model.base_model.mixed_batch(names):
            got = compiled(x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert counter.frame_count == 1


def test_a_mixed_batch_is_explained():
    """Would catch IA3 layers that are said to refuse a mixed batch, or one that is silently slow."""
    model = adapted(mlp(), {}, {}, **UP_DOWN)
    model.get_base_model().down.base_layer.register_forward_hook(lambda *_: None)
    rows = {row.name.rpartition(".")[2]: row for row in peftkern.explain(model, tokens=64, mixed=True).rows}
    assert rows["up"].path == "torch"
    assert rows["down"].path == "unfused" and "hooks" in rows["down"].reason and "each row" in rows["down"].reason
    options = {"target_modules": ["flat"], "feedforward_modules": []}
    (row,) = peftkern.explain(adapted(Convolutions(), options, options), mixed=True).rows
    assert row.path == "unfused" and "convolution" in row.reason
