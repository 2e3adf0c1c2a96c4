"""Forward of stacked experts by rows sorted by expert: against transformers' own, in double, and what sends a module
down the unfused path."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from moe_models import fill, moe, randomize, tokens
from peftkern.ops.expert_rows import expert_order, rows_by_expert, sum_by_token
from peftkern.tuners.lora import LoraConfig, ParamWrapper

transformers: Any = pytest.importorskip("transformers")
from transformers.integrations.moe import use_experts_implementation  # noqa: E402


class _Plain(nn.Module):
    """Experts in transformers' own manner."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, hidden, inner = 5, 8, 6
        self.gate_up_proj = nn.Parameter(torch.empty(5, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(5, hidden, inner))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.RMSNorm(hidden)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for t in range(hidden_states.shape[0]):
            for j, expert in enumerate(top_k_index[t].tolist()):
                if expert < self.num_experts:
                    gate, up = (self.gate_up_proj[expert] @ hidden_states[t]).chunk(2)
                    y = self.down_proj[expert] @ (self.act_fn(gate) * up)
                    normed = getattr(self, "has_post_expert_norm", False)
                    out[t] = out[t] + top_k_weights[t, j] * (self.post_expert_norm(y) if normed else y)
        return out.to(hidden_states.dtype)


Gated = use_experts_implementation(type("Gated", (_Plain,), {"forward": _Plain.forward}))
KINDS = [Gated]
if "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters:  # not in transformers 5.17
    with_norm = use_experts_implementation(has_post_expert_norm=True)
    KINDS.append(with_norm(type("Normed", (_Plain,), {"forward": _Plain.forward})))


class _Config:
    _experts_implementation = "eager"
    num_experts_per_tok = 2


def experts(kind: type = Gated, dtype: torch.dtype = torch.float64) -> Any:
    """Experts in a module, as a model has them; without their wrapper."""
    made = nn.Module()
    made.experts = kind(_Config()).to(dtype)
    fill(made)
    made.requires_grad_(False)
    return made


def wrapped(kind: type = Gated, dtype: torch.dtype = torch.float64, targets: Any = None, **fields: Any) -> Any:
    """The same with an adapter on both projections, or on those given."""
    targets = ["experts.gate_up_proj", "experts.down_proj"] if targets is None else targets
    made = experts(kind, dtype)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets, **fields)
    peftkern.inject_adapter_in_model(config, made)
    randomize(made)
    return made


def call(T: int = 7, dtype: torch.dtype = torch.float64, k: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tokens, experts (never the third) and weights; x and the weights require gradients."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, 8, generator=g).to(dtype).requires_grad_()
    chosen = torch.tensor([0, 1, 3, 4])[torch.rand(T, 4, generator=g).argsort(1)[:, :k]]
    weights = torch.rand(T, k, generator=g).to(dtype).requires_grad_()
    return x, chosen, weights


def merged(model: Any, dtype: torch.dtype) -> Any:
    """The experts with W + delta, made in double and then of `dtype`."""
    other = copy.deepcopy(model).double()
    for wrapper in other.experts._chain():
        delta = wrapper.get_delta_weight("default")
        wrapper.get_param().data += delta
    return other.experts.get_base_layer().to(dtype)


def grads_of(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((y.double() ** 2).sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [None, ["experts.gate_up_proj"], ["experts.down_proj"]])
def test_forward_and_gradients_in_double(kind, targets):
    """Catches a row that goes to another expert or back to another token, weights of another choice, a norm that is
    left out, an unadapted projection that is; gradients of x and of the router's weights too."""
    model = wrapped(kind, targets=targets)
    x, chosen, weights = call()
    y, truth = model.experts(x, chosen, weights), merged(model, torch.float64)(x, chosen, weights)
    assert torch.allclose(y, truth, rtol=1e-12, atol=1e-12)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets or "ab")
    for a, b in zip(grads_of(y, [x, weights]), grads_of(truth, [x, weights]), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    # A and B: the unfused path differentiates through W + delta.
    handle = model.experts.get_base_layer().register_forward_hook(lambda *_: None)
    assert "it has hooks" in model.experts.explain_row().reason
    slow = model.experts(x, chosen, weights)
    handle.remove()
    for a, b in zip(grads_of(y, trained), grads_of(slow, trained), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_sixteen_bits_lose_no_more_than_the_base(dtype, wide):
    """Catches fp32 adapters that are refused or that widen the output, and sums of choices taken in 16 bits: the error
    is within twice that of the merged experts run by transformers in the same dtype, and 4 eps of the largest value."""
    model = wrapped(dtype=dtype)
    for name, p in model.named_parameters():
        if wide and "lora_" in name:
            p.data = p.data.float()
    x, chosen, weights = (t.detach() for t in call(dtype=dtype))
    truth = merged(model, torch.float64)(x.double(), chosen, weights.double())
    theirs, y = merged(model, dtype)(x, chosen, weights), model.experts(x, chosen, weights)
    assert y.dtype == dtype and model.experts.explain_row().fused
    allowed = 2 * (theirs.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("T, k", [(0, 2), (1, 1), (3, 4)])
def test_few_tokens(T, k):
    """Catches no tokens, one choice, and all choices."""
    model = wrapped()
    x, chosen, weights = call(T, k=k)
    y = model.experts(x, chosen, weights)
    assert torch.allclose(y, merged(model, torch.float64)(x, chosen, weights), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_choices_of_no_expert():
    """Catches a number past the last expert, as expert parallelism has them, that takes one or spoils a gradient."""
    model = wrapped()
    x, chosen, weights = call()
    chosen[2, 0] = chosen[5] = 5
    y = model.experts(x, chosen, weights)
    assert torch.allclose(y, merged(model, torch.float64)(x, chosen, weights), rtol=1e-12, atol=1e-12)
    assert (y[5] == 0).all()
    dx, dw = grads_of(y, [x, weights])
    assert (dx[5] == 0).all() and (dw[5] == 0).all() and dw[2, 0] == 0 and dx.isfinite().all()


def test_the_same_bits_twice():
    """Catches sums in an order that depends on more than the input."""
    model = wrapped(dtype=torch.float32)
    x, chosen, weights = call(50, torch.float32, k=4)
    first = [model.experts(x, chosen, weights)]
    trained = [x, weights, *(p for p in model.parameters() if p.requires_grad)]
    first += grads_of(first[0], trained)
    again = [model.experts(x, chosen, weights)]
    again += grads_of(again[0], trained)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_by_expert():
    """Catches offsets of another expert, rows of one expert out of the tokens' order, and gradients of the gathers."""
    chosen = torch.tensor([[2, 0], [0, 3], [2, 1]])
    by_expert = expert_order(chosen, 4)
    assert by_expert.offsets.tolist() == [2, 3, 5, 6] and by_expert.offsets.dtype == torch.int32
    assert by_expert.order.tolist() == [1, 2, 5, 0, 4, 3]
    assert by_expert.inverse[by_expert.order].tolist() == list(range(6))
    x, w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.rand(3, 2, dtype=torch.float64)
    w.requires_grad_()

    def there_and_back(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sum_by_token(rows_by_expert(x, by_expert).sin(), w, by_expert)

    assert torch.allclose(there_and_back(x, w), x.sin() * w.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(there_and_back, (x, w))
    for bad, error in ((chosen.float(), TypeError), (chosen[0], ValueError), ([[0]], TypeError)):
        with pytest.raises(error, match="top_k_index"):
            expert_order(bad, 4)


# -- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_compiled(fused):
    """Catches a graph break, and gradients that a compiled step lacks."""
    model = wrapped(dtype=torch.float32)
    if not fused:
        model.experts.get_base_layer()._is_expert_parallel = True
        assert "expert parallelism" in model.experts.explain_row().reason
    x, chosen, weights = call(dtype=torch.float32)
    trained = [x, weights, *(p for p in model.parameters() if p.requires_grad)]
    eager = model.experts(x, chosen, weights)
    expected = [eager, *grads_of(eager, trained)]
    if not fused:  # whose own loop over experts depends on values
        model.experts.get_base_layer().config = type("C", (), {"_experts_implementation": "batched_mm"})()
        model.experts.get_base_layer()._is_expert_parallel = True
    y = torch.compile(model.experts, backend="aot_eager", fullgraph=True)(x, chosen, weights)
    for a, b in zip([y, *grads_of(y, trained)], expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_model(family, reentrant):
    """Catches a forward that is not the same when it is computed again, and experts without gradients then."""
    fields = dict(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    model = peftkern.get_peft_model(moe(family), LoraConfig(**fields)).train()
    randomize(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    got = gradients()
    assert all(torch.equal(expected[name], gradient) for name, gradient in got.items())


def test_a_compiled_model():
    """Catches a whole model that breaks in the experts."""
    fields = dict(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    model = peftkern.get_peft_model(moe("qwen3_moe"), LoraConfig(**fields)).train()
    randomize(model)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = compiled(input_ids=tokens(), labels=tokens()).loss
    assert torch.allclose(loss, other, rtol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(other, trained), torch.autograd.grad(loss, trained), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_autocast_with_fp32_adapters():
    """Catches an output or a gradient in another dtype than without autocast, and masters that are rounded for good."""
    model = wrapped(dtype=torch.bfloat16)
    peftkern.tuners.tuners_utils.cast_adapter_dtype(model, "default")
    x, chosen, weights = call(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.experts(x, chosen, weights)
    assert y.dtype == torch.float32
    (dA,) = torch.autograd.grad(y.sum(), [model.experts.lora_A["default"].weight])
    assert dA.dtype == torch.float32 and dA.abs().sum() > 0
    truth = merged(model, torch.float64)(x.double(), chosen, weights.double())
    assert (y - truth).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


# -- what runs another way --------------------------------------------------------------------------------------------


def _implementation(base: Any) -> None:
    base.config = type("C", (), {"_experts_implementation": "mine"})()


def _forward(base: Any) -> None:
    base.forward = type(base).forward.__get__(base)


def _dtypes(base: Any) -> None:
    base.down_proj.data = base.down_proj.data.float()


CHANGES = {
    "a hook": (lambda base: base.register_forward_hook(lambda *_: None), "it has hooks"),
    "its own forward": (_forward, "has a forward of its own"),
    "another implementation": (_implementation, "experts_implementation='mine' is none of transformers' own"),
    "two dtypes": (_dtypes, "of several dtypes: torch.float32, torch.float64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_why_it_is_unfused(change):
    """Catches a module that does more than its attributes say, run as if it did not; and silence about the path."""
    model = wrapped()
    act, reason = CHANGES[change]
    act(model.experts.get_base_layer())
    rows = peftkern.explain(model).rows
    assert [row.path for row in rows] == ["unfused"] * 2 and all(reason in row.reason for row in rows)


def test_calls_of_another_kind():
    """Catches keyword arguments and three dimensions, which transformers' own functions take, read by place."""
    model = wrapped()
    x, chosen, weights = call()
    y = model.experts(x, chosen, weights)
    other = model.experts(x, top_k_index=chosen, top_k_weights=weights)
    assert torch.allclose(y, other, rtol=1e-12, atol=1e-12)


def test_hooks_of_adapters_and_wrappers_run():
    """Catches a hook on lora_A or on the inner wrapper that never runs."""
    seen: list[str] = []
    model = wrapped()
    x, chosen, weights = call()
    y = model.experts(x, chosen, weights)
    handle = model.experts.base_layer.register_forward_hook(lambda *_: seen.append("wrapper"))
    assert torch.allclose(model.experts(x, chosen, weights), y, rtol=1e-12, atol=1e-12) and seen == ["wrapper"]
    handle.remove()
    model.experts.lora_A["default"].register_forward_hook(lambda *_: None)
    reasons = [row.reason for row in peftkern.explain(model).rows]
    assert "adapter 'default' of 'down_proj': it has hooks" in reasons[0] and reasons[1] == reasons[1]
    assert torch.allclose(model.experts(x, chosen, weights), y, rtol=1e-12, atol=1e-12)


def test_biases_as_parameters():
    """Catches experts whose bias is adapted too, which the grouped products do not know."""
    fields = dict(r=2, target_modules=[], target_parameters=["gate_up_proj", "gate_up_proj_bias"])
    model = peftkern.get_peft_model(moe("gpt_oss"), LoraConfig(**fields))
    randomize(model)
    reasons = {row.reason for row in peftkern.explain(model).rows}
    assert any("'gate_up_proj_bias' of GptOssExperts is adapted too" in reason for reason in reasons)
    with torch.no_grad():
        y = model(input_ids=tokens()).logits
        merged_model = model.merge_and_unload()
        assert torch.allclose(merged_model(input_ids=tokens()).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_offloaded_adapters_are_refused(targets):
    """Catches garbage: an adapter whose values an accelerate hook took away, added to experts that it brings."""
    accelerate = pytest.importorskip("accelerate")
    model = peftkern.get_peft_model(moe("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=targets))
    randomize(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad(), pytest.raises(ValueError, match=r"adapter 'default' of '.*_proj' is on the meta device"):
        model(input_ids=tokens())


def test_offloaded_experts():
    """Catches a delta that is added to a weight on the meta device, or lost when accelerate fetches the weight."""
    accelerate = pytest.importorskip("accelerate")
    model = wrapped(dtype=torch.float32)
    x, chosen, weights = call(dtype=torch.float32)
    y = model.experts(x, chosen, weights)
    base = model.experts.get_base_layer()
    accelerate.cpu_offload(base, execution_device="cpu", offload_buffers=True)
    assert base.gate_up_proj.is_meta
    assert "an accelerate hook is on it" in model.experts.explain_row().reason
    assert torch.allclose(model.experts(x, chosen, weights), y, rtol=1e-5, atol=1e-6)
    assert base.gate_up_proj.is_meta
    (dA,) = torch.autograd.grad(model.experts(x, chosen, weights).sum(), [model.experts.lora_A["default"].weight])
    assert dA.abs().sum() > 0


def test_eight_bit_floats():
    """Catches a sum in float8, which has no arithmetic, and one that becomes NaN past its largest number."""
    holder = nn.Module()
    holder.layer = nn.Linear(4, 4, bias=False)
    peftkern.inject_adapter_in_model(LoraConfig(r=1, target_modules=[], target_parameters=["layer.weight"]), holder)
    wrapper = holder.layer
    wrapper.lora_A["default"].weight.data.fill_(1.0)
    wrapper.lora_B["default"].weight.data.fill_(1000.0)
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    assert (wrapper._sum(weight, ["default"]).float() == torch.finfo(torch.float8_e4m3fn).max).all()


# -- beside the rest of the library -----------------------------------------------------------------------------------


def test_over_a_four_bit_model():
    """Catches dense experts beside 4-bit layers that cannot be adapted."""
    from peftkern.utils.quantized_modules import weight_of

    base = moe("mixtral", hidden_size=64, intermediate_size=32, num_attention_heads=4)
    with pytest.warns(UserWarning, match="stacked experts stay dense"):
        base = peftkern.quantize_model(base, {"load_in_4bit": True}, progress=False)
    base = peftkern.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    fields = dict(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    model = peftkern.get_peft_model(base, LoraConfig(**fields)).train()
    assert weight_of(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is not None
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 4 and all(g.abs().sum() > 0 for g in gradients.values())


def test_adapters_of_sixteen_bit_experts_are_wide():
    """Catches adapters in bfloat16, which small steps do not move, and a base that is widened with them."""
    model = peftkern.get_peft_model(
        moe("mixtral", torch.bfloat16), LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    )
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert all(w.lora_A["default"].weight.dtype == torch.float32 for w in wrappers)
    assert all(w.get_param().dtype == torch.bfloat16 for w in wrappers)
    assert repr(wrappers[0]).startswith("lora.ParamWrapper(\n  parameter_name='down_proj',")
    assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


def test_estimates_count_stacked_adapters():
    """Catches a table that leaves the adapters of the experts out, most of what such a step trains, or traces their
    unfused path."""
    config = moe("mixtral", tie_word_embeddings=False).config
    made = peftkern.estimate_memory(config, seq=32, r=2, quant="none")
    model = peftkern.get_peft_model(
        transformers.MixtralForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.part("adapters") == 4 * trained
    note = next(part.note for part in made.parts if part.name == "one layer, run and differentiated")
    assert "S of 6 adapters" in note  # four of attention, two of the experts; the router's is part of its weight
