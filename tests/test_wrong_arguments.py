"""What no operation or function can mean is refused by the argument's name, before anything is changed: what trying
everything for each argument found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peftkern
from multi_data import layer
from peftkern.adapter_loss import per_adapter_loss, per_slot_loss
from peftkern.ops import (
    dequantize,
    dequantize_4bit,
    dora_linear,
    dora_norm,
    gated_lora_linear,
    grouped_lora_linear,
    ia3_linear,
    linear_cross_entropy,
    lora_embedding,
    lora_linear,
    lora_linear_shared,
    lora_mlp,
    multi_lora_linear,
    quantize_4bit,
    quantize_8bit,
)
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.optimizers import create_loraplus_optimizer
from tiny_models import fingerprint, mlp

N, K, R = 6, 8, 3
torch.manual_seed(0)
X, W, A, B, BIAS = (torch.randn(*shape) for shape in ((5, K), (N, K), (R, K), (N, R), (N,)))
LABELS = torch.tensor([0, 1, 2, 5, -100])


def grouped(scaling):
    return grouped_lora_linear(X, W[None], A[None], B[None], scaling, torch.tensor([5], dtype=torch.int32))


def shared(weights=(W, W), scalings=(1.0, 1.0), biases=None):
    return lora_linear_shared(X, weights, (A, A), (B, B), scalings, biases)


NOT_NUMBERS = ([1.0], {}, 1j, 10**400, object(), b"1", "1", None)


@pytest.mark.parametrize("scaling", NOT_NUMBERS)
def test_a_scaling_that_is_no_number_is_named(scaling):
    """Would catch float()'s own error, which does not say which argument it is about."""
    for call in (
        lambda: lora_linear(X, W, A, B, scaling),
        lambda: dora_linear(X, W, A, B, BIAS, scaling),
        lambda: dora_norm(W, A, B, scaling),
        lambda: shared(scalings=(1.0, scaling)),
        lambda: grouped(scaling),
        lambda: gated_lora_linear(X, X, W, A, B, scaling),
        lambda: lora_embedding(LABELS[:3], torch.randn(K, N), A, B, scaling),
    ):
        with pytest.raises(TypeError, match="scaling"):
            call()


@pytest.mark.parametrize("nan", [float("nan"), torch.tensor(float("nan"))])
def test_a_scaling_of_nan_is_refused(nan):
    """Would catch a broken configuration that trains to NaN without a word."""
    for call in (lambda: lora_linear(X, W, A, B, nan), lambda: shared(scalings=(1.0, nan)), lambda: grouped(nan)):
        with pytest.raises(ValueError, match="scaling"):
            call()


WRONG = [
    (lambda: lora_linear(X, W, A, B, 1.0, dropout_p=torch.tensor([0.1, 0.2])), TypeError, "dropout_p"),
    (lambda: shared(weights=None), TypeError, "weights"),
    (lambda: shared(scalings=1.0), TypeError, "scalings"),
    (lambda: shared(biases=torch.tensor(1.0)), TypeError, "biases"),
    (lambda: lora_embedding(LABELS[:3], torch.randn(K, N), A, B, 1.0, padding_idx="0"), TypeError, "padding_idx"),
    (lambda: lora_embedding(LABELS[:3], torch.randn(K, N), A, B, 1.0, padding_idx=1.5), TypeError, "padding_idx"),
    (lambda: linear_cross_entropy(X, W, LABELS + 1, ignore_index=-99), ValueError, "labels: expected ids in"),
    (lambda: linear_cross_entropy(X, W, LABELS - 1), ValueError, "labels: expected ids in"),
    (lambda: linear_cross_entropy(X, W, LABELS, ignore_index=None), TypeError, "ignore_index"),
    (lambda: linear_cross_entropy(X, W, LABELS, num_items_in_batch="4"), TypeError, "num_items_in_batch"),
    (lambda: linear_cross_entropy(X, W, LABELS, num_items_in_batch=LABELS), ValueError, "num_items_in_batch"),
    (lambda: quantize_4bit(W.to("meta")), ValueError, "w: .*meta"),
    (lambda: quantize_8bit(W.to("meta")), ValueError, "w: .*meta"),
    (lambda: dequantize_4bit(quantize_4bit(W), out="W"), TypeError, "out"),
    (lambda: dequantize(W, out=[W]), TypeError, "out"),
    (lambda: linear_quantized(X, quantize_4bit(W), 1.0), TypeError, "bias"),
    (lambda: gated_lora_linear(X, X, W, A, B, 1.0, activation=["silu"]), ValueError, "activation"),
    (lambda: lora_mlp(None, *[(W, A, B, 1.0)] * 3, dropout_p=0.5, seed=torch.tensor([1])), TypeError, "lora_mlp: x"),
    (lambda: quantize_4bit(W, blocksize=64.0), ValueError, "blocksize"),
    (lambda: replace(quantize_4bit(W), absmax=None), TypeError, "absmax: expected a tensor"),
    (lambda: replace(quantize_4bit(W), shape=None), TypeError, "shape: expected"),
    (lambda: replace(quantize_8bit(W), data=[1]), TypeError, "data: expected a tensor"),
    (lambda: dequantize(W, torch.int64), ValueError, "dtype: expected float32"),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_others_are_named(call, error, message):
    """Would catch an AttributeError, an OverflowError or an error from deep inside torch, or a wrong argument that
    passes (a padding index of 1.5, a tensor of several numbers)."""
    with pytest.raises(error, match=message):
        call()


def test_a_dense_weight_is_written_to_a_parameter():
    """Would catch autograd's refusal to write to a leaf: only the 4-bit format was written to any `out`."""
    for weight in (W, quantize_4bit(W), quantize_8bit(W)):
        out = torch.nn.Parameter(torch.empty(N, K))
        assert dequantize(weight, torch.float32, out) is out and torch.equal(out, dequantize(weight, torch.float32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_makes_no_float_of_what_is_none(dtype):
    """Would catch integers, or the real part of complex numbers, that pass for activations under autocast alone."""
    x = X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: lora_linear(x, W, A, B, 1.0),
            lambda: lora_linear(x, quantize_4bit(W), A, B, 1.0),
            lambda: lora_linear_shared(x, [W], [A], [B], [1.0]),
            lambda: multi_lora_linear(x, W, layer(N, K), LABELS),
            lambda: ia3_linear(x, W, BIAS),
            lambda: linear_quantized(x, quantize_4bit(W)),
            lambda: linear_cross_entropy(x, W, LABELS),
        ):
            with pytest.raises(TypeError, match="(x|hidden): expected"):
                call()


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_loss_under_autocast_names_what_is_no_tensor(name):
    """Would catch the cast that comes before the check."""
    arguments = {"hidden": X, "weight": W, "labels": LABELS, "bias": BIAS} | {name: [1.0]}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{name}: expected a tensor"):
        linear_cross_entropy(**arguments)


def test_meta_tensors_under_autocast():
    """Would catch asking for the autocast of a device that has none, where shapes are worked out on "meta"."""
    x, w, a, b = (t.to("meta") for t in (X, W, A, B))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, a, b, 1.0)
    assert y.is_meta and y.shape == (5, N)


LOGITS, TARGETS = torch.zeros(4, 6, 9), torch.zeros(4, 6, dtype=torch.int64)
ROW_NAMES, SLOTS = ["a"] * 4, torch.arange(4)


@pytest.mark.parametrize(
    "loss, changed, error, message",
    [
        (per_adapter_loss, {"labels": TARGETS[:, 1:]}, ValueError, "labels: expected shape"),
        (per_adapter_loss, {"adapter_names": ["a"] * 3}, ValueError, "adapter_names: .*one for each of 4 rows"),
        (per_adapter_loss, {"adapter_names": "abcd"}, TypeError, "adapter_names: expected a list of names"),
        (per_adapter_loss, {"adapter_names": None}, TypeError, "adapter_names: expected a list of names"),
        (per_adapter_loss, {"logits": None}, TypeError, "logits: expected a tensor"),
        (per_slot_loss, {"logits": LOGITS.to(torch.complex64)}, TypeError, "logits: expected floats"),
        (per_slot_loss, {"logits": LOGITS[..., :0]}, ValueError, "logits: expected shape"),
        (per_slot_loss, {"labels": TARGETS.int()}, TypeError, "labels: expected int64"),
        (per_slot_loss, {"labels": TARGETS.to("meta")}, ValueError, "labels: expected device"),
        (per_slot_loss, {"adapter_ids": [0, 1, 2, 3]}, TypeError, "adapter_ids: expected a tensor"),
        (per_slot_loss, {"adapter_ids": SLOTS.float()}, TypeError, "adapter_ids: expected integers"),
        (per_slot_loss, {"adapter_ids": SLOTS.to("meta")}, ValueError, "adapter_ids: expected device"),
        (per_slot_loss, {"slots": 1.5}, ValueError, "slots: expected"),
        (per_slot_loss, {"ignore_index": None}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_a_loss_names_what_does_not_fit(loss, changed, error, message):
    """Would catch an error from inside torch, complex logits whose imaginary part is dropped, or 1.5 slots."""
    rows = {"adapter_names": ROW_NAMES} if loss is per_adapter_loss else {"adapter_ids": SLOTS, "slots": 4}
    with pytest.raises(error, match=message):
        loss(**{"logits": LOGITS, "labels": TARGETS, **rows, **changed})


CONFIG = peftkern.LoraConfig(r=2, target_modules=["up"])


def adapted():
    return peftkern.get_peft_model(mlp(), peftkern.LoraConfig(r=2, target_modules=["up"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: peftkern.get_peft_model(model, CONFIG),
        lambda model: peftkern.PeftModelForCausalLM(model, CONFIG),
        lambda model: peftkern.PeftModel.from_pretrained(model, "no/folder/that/is/here"),
        lambda model: peftkern.inject_adapter_in_model(CONFIG, model),
        lambda model: peftkern.AdapterBank(model),
        lambda model: peftkern.AdapterBank.from_pretrained(model, {"a": "no/folder/that/is/here"}),
        lambda model: peftkern.quantize_model(model, {"load_in_4bit": True}),
        lambda model: peftkern.prepare_model_for_kbit_training(model),
        lambda model: peftkern.cast_mixed_precision_params(model, torch.bfloat16),
        lambda model: create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16),
    ],
)
def test_a_name_where_a_model_belongs(call):
    """Would catch "'str' object has no attribute '__dict__'", for the commonest of mistakes."""
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module, got str"):
        call("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("argument", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"])
def test_rates_of_loraplus_are_checked(argument):
    """Would catch a rate that trains to NaN, or fails at the first step: torch checks those of no group."""
    for value, error in ((float("nan"), ValueError), (-1e-3, ValueError), ("1e-3", TypeError), (None, TypeError)):
        with pytest.raises(error, match=argument):
            create_loraplus_optimizer(
                adapted(), torch.optim.SGD, **{"lr": 0.1, "loraplus_lr_ratio": 2, argument: value}
            )


BANK = [
    ("max_rank", lambda model: peftkern.AdapterBank(model, target_modules=["up"], max_rank=2**62), Exception),
    ("dtype", lambda model: peftkern.AdapterBank(model, target_modules=["up"], dtype=torch.int64), TypeError),
    ("device", lambda model: peftkern.quantize_model(model, {"load_in_4bit": True}, device=""), RuntimeError),
]


@pytest.mark.parametrize("argument, call, error", BANK, ids=[argument for argument, *_ in BANK])
def test_a_model_is_as_it_was(argument, call, error):
    """Would catch layers that stay wrapped, or quantized, where what follows fails: no memory for a bank's pools, a
    dtype that no pool can have, a device that is none."""
    model = mlp()
    before = fingerprint(model)
    with pytest.raises(error):
        call(model)
    assert fingerprint(model) == before


def test_a_bank_is_as_it_was_where_trainable_is_no_bool():
    """Would catch an adapter that is in the model but has no slot, so that its name is taken for ever."""
    bank = peftkern.AdapterBank(mlp(), slots=2, target_modules=["up"])
    bank.add("one")
    for method, name in ((bank.add, "two"), (bank.replace, "one")):
        with pytest.raises(TypeError, match="trainable: expected True or False, got 1"):
            method(name, trainable=1)
    assert list(bank.model.peft_config) == bank.names == ["one"]
    assert bank.add("two", trainable=False) == 1


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_device_that_is_none_is_not_blamed_on_the_file(device, tmp_path):
    """Would catch "not a valid safetensors file" of a file that is valid."""
    model = adapted()
    model.save_pretrained(tmp_path)
    for call in (
        lambda: peftkern.load_peft_weights(tmp_path, device=device),
        lambda: model.load_adapter(tmp_path, "b", torch_device=device),
    ):
        with pytest.raises(ValueError, match="^device: expected"):
            call()


@pytest.mark.parametrize(
    "argument, value",
    [("model_class", "LlamaForCausalLM"), ("dtype", "auto"), ("dtype", torch.int64), ("device", "meta")],
)
def test_arguments_are_not_blamed_on_a_checkpoint(argument, value, tmp_path):
    """Would catch "config.json: transformers cannot use it", of a file that nothing is wrong with."""
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
        peftkern.load_quantized(tmp_path, **{argument: value})


def test_a_dict_is_no_configuration_of_a_saved_adapter(tmp_path):
    """Would catch "'dict' object has no attribute 'base_model_name_or_path'"."""
    with pytest.raises(TypeError, match="config: expected a PeftConfig of peftkern's, got dict"):
        peftkern.AutoPeftModel.from_pretrained(tmp_path, config={})
