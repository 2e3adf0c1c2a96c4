"""`peftkern.use_chunked_loss`: a transformers model that returns the same loss without its logits, and can go back."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import chunked_loss, liger_bridge
from peftkern.utils.live_bytes import LiveBytes
from test_trainer import adapted, losses, trainer
from tiny_models import VOCAB, ids, randomize, tiny_llama

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens, with a prompt of four that does not count."""
    return tokens.clone().index_fill_(1, torch.arange(4), -100)


def step(model: nn.Module, *args, **kwargs):
    """The outputs and every gradient of a step."""
    model.zero_grad()
    tokens = ids()
    outputs = model(tokens, *args, labels=labels_of(tokens), **kwargs)
    (outputs[0] if isinstance(outputs, tuple) else outputs.loss).backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(first, second) -> None:
    torch.testing.assert_close(first[0].loss, second[0].loss, rtol=1e-6, atol=1e-6)
    assert first[1].keys() == second[1].keys() and first[1]
    for name, gradient in first[1].items():
        torch.testing.assert_close(second[1][name], gradient, rtol=1e-4, atol=1e-6)


FAMILIES = [
    "LlamaConfig",
    "MistralConfig",
    "Qwen2Config",
    "Qwen3Config",
    "GemmaConfig",
    "Phi3Config",
    "OPTConfig",
    "GPT2Config",
    "GPTNeoXConfig",
    "FalconConfig",
    "MixtralConfig",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(family):
    """Would catch: a shift, a divisor or a part of a forward (a bias, a balancing loss) that is lost on the way."""
    other = {
        "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        "MixtralConfig": {"num_local_experts": 2},
    }
    extra = {"output_router_logits": True} if family == "MixtralConfig" else {}
    config = getattr(transformers, family)(**(SMALL | other.get(family, {}) | extra))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    for items in (None, torch.tensor(11)):
        model.train()
        want = step(model, num_items_in_batch=items)
        with peftkern.use_chunked_loss(model, chunk_size=5):
            found = step(model, num_items_in_batch=items)
        same(want, found)
        assert found[0].logits is None and want[0].logits is not None
        assert set(want[0].keys()) - set(found[0].keys()) == {"logits"}


@pytest.mark.parametrize("library", [peftkern, peft])
@pytest.mark.parametrize("wrap_first", [True, False])
def test_under_a_peft_model(library, wrap_first):
    """Would catch: a wrapper that is not looked into, and one that hides the new forward."""
    config = library.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = tiny_llama()
    handle = None if wrap_first else peftkern.use_chunked_loss(base, chunk_size=7)
    model = library.get_peft_model(base, config).train()
    randomize(model)
    if wrap_first:
        handle = peftkern.use_chunked_loss(model, chunk_size=7)
    found = step(model)
    handle.remove()
    same(step(model), found)
    assert found[0].logits is None


def test_only_a_training_step_with_labels_is_changed():
    """Would catch: an evaluation or a generation without logits."""
    model, tokens = tiny_llama(), ids()
    want, chosen = model(tokens, labels=tokens), model.generate(tokens, max_new_tokens=3, do_sample=False)
    handle = peftkern.use_chunked_loss(model)
    found = model(tokens, labels=tokens)
    assert torch.equal(found.logits, want.logits) and torch.equal(found.loss, want.loss)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), chosen)
    assert torch.equal(model.train()(tokens).logits, want.logits)
    handle.remove()
    peftkern.use_chunked_loss(model.eval(), training_only=False)
    evaluated = model(tokens, labels=tokens)
    assert evaluated.logits is None
    torch.testing.assert_close(evaluated.loss, want.loss)


def test_remove_leaves_nothing_behind():
    """Would catch: an attribute on the model, or a second use that nests."""
    model = tiny_llama().train()
    before = set(vars(model))
    handle = peftkern.use_chunked_loss(model)
    with pytest.raises(ValueError, match="already"):
        peftkern.use_chunked_loss(model)
    handle.remove()
    handle.remove()
    assert set(vars(model)) == before
    assert step(model)[0].logits is not None


def test_accelerate_hooks_still_run():
    """Would catch: a forward put over accelerate's, so that a device map (every bitsandbytes model has one) is lost."""
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append("before")
            return args, kwargs

    for hook_first in (True, False):
        model = tiny_llama().train()
        if hook_first:
            hooks.add_hook_to_module(model, Counting())
        handle = peftkern.use_chunked_loss(model)
        if not hook_first:
            hooks.add_hook_to_module(model, Counting())
        calls.clear()
        assert step(model)[0].logits is None and calls == ["before"]
        handle.remove()
        assert step(model)[0].logits is not None and calls == ["before", "before"]
        hooks.remove_hook_from_module(model)
        assert step(model)[0].logits is not None


def test_a_forward_wrapped_later_is_not_taken_away():
    """Would catch: remove() that drops a wrapper of somebody else's."""
    model = tiny_llama().train()
    handle = peftkern.use_chunked_loss(model)
    ours = model.forward.__func__

    def wrapped(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    wrapped.__dict__.update(ours.__dict__)  # as functools.wraps does
    model.forward = types.MethodType(wrapped, model)
    assert step(model)[0].logits is None
    with pytest.raises(ValueError, match="wrapped again"):
        handle.remove()
    assert model.forward.__func__ is wrapped


def test_a_copy_computes_its_own_loss():
    """Would catch: a copied or pickled model whose forward is still bound to the first."""
    model = tiny_llama().train()
    peftkern.use_chunked_loss(model)
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.lm_head.weight.zero_()
    assert step(made)[0].loss.item() == pytest.approx(torch.tensor(float(VOCAB)).log().item())
    assert step(model)[0].loss.item() != pytest.approx(step(made)[0].loss.item(), abs=1e-4)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(step(again)[0].loss, step(model)[0].loss)


def test_arguments_by_place_tuples_and_signature():
    """Would catch: labels by place, return_dict=False, a signature by which Trainer would drop every column."""
    import inspect

    model, tokens = tiny_llama().train(), ids()
    names = list(inspect.signature(model.forward).parameters)
    want = model(tokens, labels=tokens).loss
    peftkern.use_chunked_loss(model)
    assert list(inspect.signature(model.forward).parameters) == names
    place = names.index("labels")
    found = model(tokens, *([None] * (place - 1)), tokens)
    torch.testing.assert_close(found.loss, want)
    assert found.logits is None
    torch.testing.assert_close(model(tokens, labels=tokens, return_dict=False)[0], want)
    assert not any(isinstance(v, chunked_loss._PromisedLogits) for v in model(tokens, labels=tokens, return_dict=False))


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "hook"])
def test_an_lm_head_that_is_more_than_a_product(kind):
    """Would catch: an adapter on the lm_head, a trained copy of it, or a hook that is passed over."""
    model = tiny_llama()
    if kind == "hook":
        model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        options = {"target_modules": ["lm_head", "q_proj"]} if kind == "lora" else {"target_modules": ["q_proj"]}
        options |= {"modules_to_save": ["lm_head"]} if kind == "modules_to_save" else {}
        model = peftkern.get_peft_model(model, peftkern.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        randomize(model)
    model.train()
    want = step(model)
    peftkern.use_chunked_loss(model, chunk_size=5)
    found = step(model)
    same(want, found)
    assert found[0].logits is None
    if kind != "hook":
        assert any("lm_head" in name for name in found[1])


def test_trainer_learns_the_same(tmp_path):
    """Would catch: a wrong divisor under gradient accumulation, checkpointing that loses gradients."""
    curves = []
    for chunked in (False, True):
        model = adapted(peftkern)
        if chunked:
            peftkern.use_chunked_loss(model, chunk_size=9)
        made = trainer(model, tmp_path, steps=4, gradient_accumulation_steps=2, gradient_checkpointing=True)
        made.train()
        curves.append(losses(made))
        assert made.evaluate()["eval_loss"] > 0
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][0] != curves[0][-1]


def test_compiles():
    """Would catch: a graph break in the stand-in or the loss."""
    model = tiny_llama().train()
    want = step(model)
    peftkern.use_chunked_loss(model)
    tokens = ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=tokens, labels=labels_of(tokens)).loss
    torch.testing.assert_close(loss, want[0].loss)
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Linear", "lora"])
def test_the_logits_are_never_there(kind):
    """Would catch: logits of all tokens, made after all, in forward or in backward, with either kind of lm_head."""
    tokens = ids(2, 60)
    model = tiny_llama(vocab_size=5000).requires_grad_(False).train()
    targets = ["q_proj"] + (["lm_head"] if kind == "lora" else [])
    model = peftkern.get_peft_model(model, peftkern.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    peftkern.use_chunked_loss(model, chunk_size=4)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model(tokens, labels=tokens).loss.backward()
    assert live.peak < tokens.numel() * 5000 * 4


REFUSED = [
    ("Gemma2Config", "final_logit_softcapping"),
    ("CohereConfig", "logit_scale"),
    ("GraniteConfig", "logits_scaling"),
]


@pytest.mark.parametrize("family, field", REFUSED)
def test_models_that_change_their_logits_are_refused_by_name(family, field):
    """Would catch: a soft cap or a scale that is left out without a word."""
    extra = {} if family != "GraniteConfig" else {"logits_scaling": 8.0}
    config = getattr(transformers, family)(**(SMALL | extra | {"head_dim": 8} if "Gemma" in family else SMALL | extra))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=f"config.{field}"):
        peftkern.use_chunked_loss(model)


def test_a_change_of_logits_that_no_config_tells_is_refused():
    """Would catch: a forward of somebody's that scales its logits, trained on another loss than its own."""

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state) * 0.5
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)

    class Capped(Scaled):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = torch.tanh(self.lm_head(self.model(input_ids=input_ids).last_hidden_state))
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)

    for cls in (Scaled, Capped):
        model = cls(tiny_llama().config).train()
        peftkern.use_chunked_loss(model)
        with pytest.raises(NotImplementedError, match="computes with its logits"):
            model(input_ids=ids(), labels=ids())


def test_what_cannot_be_helped_is_named():
    """Would catch: an error from deep inside for a model that is none, another loss, or a wrong option."""
    with pytest.raises(TypeError, match="causal language model, got Linear"):
        peftkern.use_chunked_loss(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        peftkern.use_chunked_loss("model")
    with pytest.raises(ValueError, match="implementation"):
        peftkern.use_chunked_loss(tiny_llama(), implementation="triton")
    with pytest.raises(ValueError, match="chunk_size"):
        peftkern.use_chunked_loss(tiny_llama(), chunk_size=-1)
    other = tiny_llama()
    other.loss_function = nn.functional.cross_entropy
    with pytest.raises(NotImplementedError, match="ForCausalLMLoss"):
        peftkern.use_chunked_loss(other)
    replaced = tiny_llama()
    replaced.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="has been replaced"):
        peftkern.use_chunked_loss(replaced)
    model = tiny_llama().train()
    peftkern.use_chunked_loss(model)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids(), labels=ids(), logits_to_keep=1)
    only = tiny_llama().train()
    peftkern.use_chunked_loss(only, implementation="liger")
    with pytest.raises(RuntimeError, match="not on cpu"):
        step(only)


class _Recorded(torch.autograd.Function):
    """A function with the arguments of Liger's (release 0.8), which computes the loss in plain torch."""

    seen: dict = {}

    @staticmethod
    def forward(
        ctx, _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    ):  # fmt: skip
        _Recorded.seen = {"ce_weight": ce_weight, "lse": lse_square_scale, "smoothing": label_smoothing}
        logits = nn.functional.linear(_input, weight, bias)
        loss = nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
        return loss, None

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError


def test_liger_is_given_its_arguments_by_name(monkeypatch):
    """Would catch: ignore_index that lands in another argument's place in another release."""
    module = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = _Recorded
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hidden, weight, bias, targets = (
        torch.randn(6, 4),
        torch.randn(9, 4),
        torch.randn(9),
        torch.tensor([1, 7, 8, 7, 0, 7]),
    )
    found = liger_bridge.liger_linear_cross_entropy(hidden, weight, targets, bias, 7, "sum")
    logits = nn.functional.linear(hidden, weight, bias)
    assert torch.equal(found, nn.functional.cross_entropy(logits, targets, ignore_index=7, reduction="sum"))
    assert _Recorded.seen == {"ce_weight": None, "lse": 0.0, "smoothing": 0.0}
    module.LigerFusedLinearCrossEntropyFunction = type("Older", (), {"forward": staticmethod(lambda ctx, x, w: None)})
    with pytest.raises(ImportError, match="takes no _input"):
        liger_bridge.liger_linear_cross_entropy(hidden, weight, targets, bias, 7, "sum")


@pytest.mark.gpu
def test_liger_and_ours_agree_on_a_gpu():
    """Would catch: Liger's loss or gradients divided otherwise than ours."""
    pytest.importorskip("liger_kernel")
    model = tiny_llama(vocab_size=1024).to("cuda", torch.bfloat16).requires_grad_(False).train()
    model = peftkern.get_peft_model(model, peftkern.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model)
    tokens, results = ids(4, 60).cuda(), []
    for implementation in ("torch", "liger"):
        with peftkern.use_chunked_loss(model, implementation=implementation):
            model.zero_grad()
            loss = model(tokens, labels=labels_of(tokens)).loss
            loss.backward()
        results.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    for name, gradient in results[0][1].items():
        worst = gradient.abs().max()
        assert (results[1][1][name] - gradient).abs().max() <= 0.05 * worst, name
