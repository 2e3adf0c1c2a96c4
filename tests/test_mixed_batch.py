"""`adapter_names` on LoRA models: against PEFT's in inference, against separate runs in training."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import peftkern
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NAMES = ["one", "__base__", "two", "one"]
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}


def adapted(library, base, *configs, **options):
    """`base` with the adapters "one", "two", ... of these configurations, random values in all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = None
        for name, config in zip(("one", "two", "three"), configs, strict=False):
            made = library.LoraConfig(**(options | config))
            if model is None:
                model = library.get_peft_model(base, made, adapter_name=name)
            else:
                model.add_adapter(name, made)
    randomize(model)
    return model.eval()


def llamas():
    """The same two adapters, of different ranks and layers, on equal Llamas by peftkern and by PEFT."""
    first = LLAMA | {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    second = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"]}
    second |= {"task_type": "CAUSAL_LM"}
    return [adapted(library, tiny_llama(), first, second) for library in (peftkern, peft)]


def separately(model, names, run):
    """What each row gives with its adapter alone: `run(i)` is called for each row i."""
    results = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(i))
        else:
            model.set_adapter(name)
            results.append(run(i))
    return results


@torch.no_grad()
def test_forward_and_generate_agree_with_peft():
    """Would catch embeddings or whole modules that ignore the names, and beams that take another prompt's adapter."""
    ours, theirs = llamas()
    x = ids(4)
    got, want = (model(input_ids=x, adapter_names=NAMES).logits for model in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[1], ours(input_ids=x).logits[1], atol=1e-2)
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        first, second = (m.generate(input_ids=x, adapter_names=NAMES, **options) for m in (ours, theirs))
        assert torch.equal(first, second)


@torch.no_grad()
def test_an_encoder_sees_each_prompt_once():
    """Would catch names that are repeated for an encoder's rows too, which beams are made of only afterwards."""
    import transformers

    sizes = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    first, second = {"r": 4, "target_modules": ["q", "v", "wo"]}, {"r": 2, "target_modules": ["q", "k"]}
    models = []
    for library in (peftkern, peft):
        torch.manual_seed(0)
        base = transformers.T5ForConditionalGeneration(config)
        models.append(adapted(library, base, first, second, task_type="SEQ_2_SEQ_LM"))
    x, names = ids(3), ["one", "__base__", "two"]
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        got, want = (m.generate(input_ids=x, adapter_names=names, **options) for m in models)
        assert torch.equal(got, want)


@torch.no_grad()
def test_several_answers_of_a_prompt():
    """Would catch num_return_sequences, whose rows PEFT does not count, and beams of a configuration by position."""
    ours = llamas()[0]
    torch.manual_seed(0)
    out = ours.generate(input_ids=ids(2), adapter_names=["one", "two"], do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 6
    config = transformers.GenerationConfig(num_beams=2, max_new_tokens=3)
    out = ours.generate(ids(2), config, adapter_names=["one", "two"])
    assert torch.equal(out, ours.generate(input_ids=ids(2), generation_config=config, adapter_names=["one", "two"]))


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("fan", [False, True])
def test_linear_layers_and_conv1d(fan, lora_bias):
    """Would catch a transposed weight, or a lora_B's bias that is lost or not scaled."""
    base = mlp()
    if fan:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        base.up, up = conv1d(24, 16), base.up
        base.up.weight.data, base.up.bias.data = up.weight.data.t().contiguous(), up.bias.data
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 7}]
    options = {"target_modules": ["up", "down"], "lora_bias": lora_bias}
    ours, theirs = (adapted(lib, copy.deepcopy(base), *configs, **options) for lib in (peftkern, peft))
    with torch.no_grad():
        got, want = (model(ids(4), adapter_names=NAMES) for model in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def together_and_apart(model, x, names, **kwargs):
    """Output and gradients of a batch, and of each of its rows run alone under its adapter; the adapters that are named
    learn afterwards."""
    learn = [name for name in model.peft_config if name in names]
    model.set_requires_grad(list(model.peft_config))
    model.zero_grad()
    y = _logits(model(x, adapter_names=names, **kwargs))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    together = gradients(model)
    model.zero_grad()

    def alone(i):
        model.set_requires_grad(learn)
        row = _logits(model(x[i : i + 1], **kwargs))
        if row.requires_grad:
            row.backward(dy[i : i + 1])
        return row.detach()

    want = torch.cat(separately(model, names, alone))
    apart = gradients(model)
    model.set_requires_grad(learn)
    return y.detach(), together, want, apart


def _logits(out):
    return getattr(out, "logits", out)


@pytest.mark.parametrize(
    "how, lora_bias", [("fused", False), ("fused", True), ("hooked", False), ("hooked", True), ("embedding", False)]
)
def test_training_gives_each_adapter_its_own_gradients(how, lora_bias):
    """Would catch a gradient that another adapter's rows reach, and one for an adapter that no row named."""
    targets = ["emb", "up"] if how == "embedding" else ["up", "down"]
    configs = [{"r": 4}, {"r": 2}, {"r": 3}]
    options = {"target_modules": targets, "modules_to_save": ["head"], "lora_bias": lora_bias}
    model = adapted(peftkern, mlp(), *configs, **options)
    model.set_requires_grad(["one", "two", "three"])
    if how == "hooked":
        model.get_base_model().down.base_layer.register_forward_hook(lambda *_: None)
    x, dy = ids(4), torch.randn(4, 12, 5)
    model(x, adapter_names=NAMES).backward(dy)
    together = gradients(model)
    assert together and not any("three" in name for name in together)
    model.zero_grad()

    def alone(i):
        model.set_requires_grad(["one", "two"])
        y = model(x[i : i + 1])
        if y.requires_grad:
            y.backward(dy[i : i + 1])

    separately(model, NAMES, alone)
    apart = gradients(model)
    assert set(together) == set(apart)
    for name, want in apart.items():
        torch.testing.assert_close(together[name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_4bit_base():
    """Would catch a base decoded in another dtype, or rows of the base alone that take bitsandbytes' own forward."""
    base = peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, progress=False)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = adapted(peftkern, base, {"r": 4}, {"r": 2}, **options)
    x = ids(4)
    with torch.no_grad():
        got = model(input_ids=x, adapter_names=NAMES).logits
        want = torch.cat(separately(model, NAMES, lambda i: model(input_ids=x[i : i + 1]).logits))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Would catch layers that are computed again in backward with the active adapter in place of the rows' own."""
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = adapted(peftkern, tiny_llama(), {"r": 4}, {"r": 2}, **options).train()
    model.set_requires_grad(["one", "two"])
    model.enable_input_require_grads()
    x, found = ids(4), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=x, adapter_names=NAMES, use_cache=False).logits.square().mean().backward()
        found.append(gradients(model))
    assert set(found[0]) == set(found[1])
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-5, atol=1e-8)


def test_checkpointed_layers_under_another_batch_are_refused():
    """Would catch gradients silently taken with a later batch's adapters."""
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = adapted(peftkern, tiny_llama(), {"r": 4}, {"r": 4}, **options).train()
    model.set_requires_grad(["one", "two"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first = model(input_ids=ids(2), adapter_names=["one", "two"], use_cache=False).logits.sum()
    model(input_ids=ids(2), adapter_names=["two", "one"], use_cache=False)
    with pytest.raises(RuntimeError, match="another batch's adapters"):
        first.backward()


def test_adapters_with_dropouts_of_their_own():
    """Would catch one adapter dropping with another's probability: then they are added one by one."""
    model = adapted(
        peftkern, mlp(), {"r": 4, "lora_dropout": 0.5}, {"r": 2, "lora_dropout": 0.0}, target_modules=["up", "down"]
    )
    x = ids(4)
    plain = model(x, adapter_names=NAMES)
    model.train()
    first, second = model(x, adapter_names=NAMES), model(x, adapter_names=NAMES)
    assert torch.allclose(first[1:3], plain[1:3], atol=1e-6) and torch.allclose(second[1:3], plain[1:3], atol=1e-6)
    assert not torch.equal(first[0], second[0])
    shared = adapted(peftkern, mlp(), *[{"r": 4, "lora_dropout": 0.5}] * 2, target_modules=["up", "down"]).train()
    assert not torch.equal(shared(x, adapter_names=NAMES)[2], shared(x, adapter_names=NAMES)[2])


def test_what_cannot_be_done_is_named():
    """Would catch names that are silently ignored."""
    model = adapted(peftkern, mlp(), {"r": 4}, {"r": 2}, target_modules=["up", "down"])
    x = ids(4)
    with pytest.raises(ValueError, match="no adapter is named .'nobody'"):
        model(x, adapter_names=["one", "nobody", "two", "one"])
    with pytest.raises(ValueError, match="adapter_names: expected one name for each of the batch's 4 rows, got 3 "):
        model(x, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"no adapter is named \[1, 2"):
        model(x, adapter_names=[1, 2, 1, 2])
    with pytest.raises(TypeError, match="adapter_names: expected a list of names, got 'one'"):
        model(x[:1], adapter_names="one")
    model.base_model.model.up.enable_adapters(False)
    with pytest.raises(ValueError, match="disabled in some layers"):
        model(x, adapter_names=NAMES)
    model.base_model.model.up.enable_adapters(True)
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(NotImplementedError, match="alora_offsets"):
        model(x, alora_offsets=[1])
    biased = adapted(peftkern, mlp(), {"bias": "all", "target_modules": ["up"]})
    with pytest.raises(NotImplementedError, match="biases of the base model"):
        biased(x, adapter_names=["one"] * 4)


@pytest.mark.parametrize("whole", [[], ["lm_head"]])
def test_disabled_adapters_mean_the_base_for_each_row(whole):
    """Would catch a pass of the reference model (DPO's, say) over a batch with names that raises, or has adapters."""
    made = [
        adapted(library, tiny_llama(), {"r": 4}, {"r": 2}, target_modules=["q_proj"], modules_to_save=whole)
        for library in (peftkern, peft)
    ]
    x = ids(4)
    for model in made:
        with model.disable_adapter():
            y = model(input_ids=x, adapter_names=NAMES).logits
        torch.testing.assert_close(y, tiny_llama()(input_ids=x).logits, rtol=0, atol=0)
        with torch.no_grad():
            assert not torch.allclose(model(input_ids=x, adapter_names=NAMES).logits, y)


@torch.no_grad()
def test_the_tuner_takes_the_names_too():
    """Would catch names that go through the tuner to a model that ignores arguments it does not know."""
    ours, x = llamas()[0], ids(4)
    want = ours(input_ids=x, adapter_names=NAMES).logits
    assert torch.equal(ours.base_model(input_ids=x, adapter_names=NAMES).logits, want)


def test_too_few_names_are_counted_as_the_caller_knows_them():
    """Would catch a message about ids and tokens, which nobody who gave a name for each row knows of."""
    model = adapted(peftkern, tiny_llama(), {"r": 4}, target_modules=["q_proj"], modules_to_save=["lm_head"])
    x = ids(3, length=13)
    for names in (["one"], ["one"] * 5, []):
        words = f"^adapter_names: expected one name for each of the batch's 3 rows, got {len(names)} "
        with pytest.raises(ValueError, match=words):
            model(x, adapter_names=names)
        head = model.get_submodule("base_model.model.lm_head")
        with pytest.raises(ValueError, match=words), model.base_model.mixed_batch(names):
            head(torch.randn(3, 13, 64))
    bank = peftkern.AdapterBank(tiny_llama(), target_modules=["q_proj"])
    bank.add("one")
    with pytest.raises(ValueError, match="^adapter_names: .* the batch's 3 rows, got 1 "), bank.batch(["one"]):
        bank.model(x)
    with pytest.raises(ValueError, match="an id for each of x's 39 rows"), bank.batch(torch.tensor([0, 0])):
        bank.model(x)


def test_afterwards_the_model_is_as_before():
    """Would catch a batch that stays on a layer after its forward, or after an error in it."""
    model = adapted(peftkern, mlp(), {"r": 4}, {"r": 2}, target_modules=["emb", "up", "down"])
    x = ids(4)
    before = model(x)
    mixed = model(x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="expected one name for each of the batch's 4 rows, got 3 "):
        model(x, adapter_names=NAMES[:3])
    assert torch.equal(model(x), before) and not torch.equal(mixed, before)
    assert torch.equal(model(x, adapter_names=["one"] * 4), before)


def test_adapters_that_change_between_batches(tmp_path):
    """Would catch a pool of old values, scalings, dtypes or adapters, and files that do not hold what is in it."""
    model = adapted(peftkern, mlp(), {"r": 4}, {"r": 2}, target_modules=["up", "down"])
    x = ids(4)

    def check(names):
        with torch.no_grad():
            got = model(x, adapter_names=names)
            want = torch.cat(separately(model, names, lambda i: model(x[i : i + 1])))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    check(NAMES)
    randomize(model, seed=5)
    check(NAMES)
    model.get_base_model().up.set_scale("one", 3.0)
    check(NAMES)
    model.add_adapter("three", peftkern.LoraConfig(r=7, target_modules=["down"]))
    randomize(model, seed=6)
    check(["three", "one", "two", "__base__"])
    model.delete_adapter("one")
    check(["three", "two", "two", "__base__"])
    model.double()
    check(["three", "two", "two", "__base__"])
    twin = copy.deepcopy(model)
    randomize(model, seed=8)
    with torch.no_grad():
        assert not torch.allclose(twin(x, adapter_names=["two"] * 4), model(x, adapter_names=["two"] * 4))
    check(["three", "two", "two", "__base__"])
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(mlp().double(), tmp_path / "two", autocast_adapter_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x, adapter_names=["two"] * 4), rtol=1e-6, atol=1e-7)


def test_adapters_of_several_dtypes():
    """Would catch an adapter that is refused, or whose rows take the base alone, because another has another dtype."""
    model = adapted(peftkern, mlp().bfloat16(), {"r": 4}, {"r": 2}, target_modules=["up", "down"])
    for name, parameter in model.named_parameters():
        if ".two." in name:
            parameter.data = parameter.data.bfloat16()
    x = ids(4)
    named = dict(model.named_parameters())
    factors = [key for key in named if "lora_" in key]
    assert {named[key].dtype for key in factors} == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        want = torch.cat(separately(model, NAMES, lambda i: model(x[i : i + 1])))
        got = model(x, adapter_names=NAMES)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(got, model(x, adapter_names=["one", "__base__", "__base__", "one"]), atol=5e-2)
    rows = peftkern.explain(model, mixed=True).rows
    assert {row.path for row in rows} == {"unfused"} and all("dtypes" in row.reason for row in rows)

    model.base_model.set_adapter(["one", "two"])
    grads = torch.autograd.grad(model(x, adapter_names=NAMES).float().sum(), [named[key] for key in factors])
    for key, grad in zip(factors, grads, strict=True):
        assert grad.dtype == named[key].dtype and grad.abs().max() > 0, key

    for parameter in named.values():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():  # one dtype again: in one pool
        torch.testing.assert_close(model(x, adapter_names=NAMES), want, rtol=2e-2, atol=2e-2)
    assert "dtypes" not in str(peftkern.explain(model, mixed=True))


def test_a_state_dict_outlives_its_adapter():
    """Would catch tensors that were taken from an adapter becoming those of the one that got its place in the pool."""
    model = adapted(peftkern, mlp(), {"r": 4}, {"r": 2}, target_modules=["up", "down"])
    model(ids(4), adapter_names=NAMES)
    held = peftkern.get_peft_model_state_dict(model, adapter_name="two")
    before = {key: value.clone() for key, value in held.items()}
    model.delete_adapter("two")
    model.add_adapter("two", peftkern.LoraConfig(r=2, target_modules=["up", "down"]))
    randomize(model, seed=5)
    model(ids(4), adapter_names=NAMES)
    assert held and all(torch.equal(value, before[key]) for key, value in held.items())


def test_a_first_batch_in_inference_mode_leaves_the_adapters_trainable():
    """Would catch a pool that is made under inference_mode, whose tensors autograd refuses for ever."""
    model = adapted(peftkern, mlp(), {"r": 4}, {"r": 2}, target_modules=["up", "down"])
    with torch.inference_mode():
        first = model(ids(4), adapter_names=NAMES)
    model.set_requires_grad(["one", "two"])
    again = model(ids(4), adapter_names=NAMES)
    again.sum().backward()
    assert torch.equal(first, again) and gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert not torch.equal(model(ids(4), adapter_names=NAMES), first)


def test_a_method_without_mixed_batches_says_so():
    """Would catch a method that takes the names and ignores them, as PEFT does for IA3."""
    from peftkern.tuners.tuners_utils import BaseTuner

    class Other(BaseTuner):
        check_target = create_layer = None

    tuner = object.__new__(Other)
    nn.Module.__init__(tuner)
    with (
        pytest.raises(NotImplementedError, match="Other cannot mix adapters"),
        tuner._enable_peft_forward_hooks(adapter_names=["a"]),
    ):
        pass


def in_threads(calls):
    """Runs each of the calls 20 times in a thread of its own, all at once; the last result, or the error, of each."""
    results, start = [None] * len(calls), threading.Barrier(len(calls))

    def work(i):
        start.wait()
        try:
            for _ in range(20):
                results[i] = calls[i]()
        except RuntimeError as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_threads_take_turns(method):
    """Would catch: rows that take the adapters of another thread's batch, as they do in PEFT; slots given twice at the
    very first batch; a lock that is copied with its model."""
    if method == "lora":
        model = copy.deepcopy(
            adapted(peftkern, mlp(), {"target_modules": ["up"]}, {"target_modules": ["down"], "r": 2})
        )
    else:
        fields = {"target_modules": ["up", "down"], "feedforward_modules": ["down"]}
        model = peftkern.get_peft_model(mlp(), peftkern.IA3Config(**fields), "one")
        model.add_adapter("two", peftkern.IA3Config(**fields))
        randomize(model, ("ia3_",))
    names = [["one", "two"], ["two", "one"], ["__base__", "two"], ["one", "one"]]
    other = copy.deepcopy(model)
    want = [other(ids(), adapter_names=each) for each in names]
    pickle.loads(pickle.dumps(other))
    got = in_threads([lambda each=each: model(ids(), adapter_names=each) for each in names])
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right)


def test_a_call_without_names_does_not_take_another_threads_batch():
    """Would catch: a plain forward whose rows silently take the adapters of a batch in force in another thread."""
    model = adapted(
        peftkern, mlp(), {"target_modules": ["up"], "modules_to_save": ["head"]}, {"target_modules": ["up"]}
    )
    want = model(ids())
    inside, done, errors = threading.Event(), threading.Event(), []

    def hold():
        with model.base_model.mixed_batch(["two", "one"]):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    for module in (model, model.base_model.model.head):
        try:
            module(ids() if module is model else torch.ones(2, 16))
        except RuntimeError as error:
            errors.append(str(error))
    done.set()
    thread.join()
    assert len(errors) == 2 and all("batch of another thread" in error for error in errors)
    torch.testing.assert_close(model(ids()), want)


def test_a_model_compiles_after_a_batch_that_named_adapters():
    """Would catch layers that ask, while they are traced, whether a backward pass runs: that broke the graph."""
    model = llamas()[0].train()
    tokens = ids(4, 6)
    model(input_ids=tokens, adapter_names=NAMES).logits.sum().backward()
    expected = model(input_ids=tokens).logits
    model(input_ids=tokens, adapter_names=NAMES).logits.sum().backward()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=tokens).logits, expected)
