"""Quantized weights under bitsandbytes' names: byte for byte what it writes, and every damage refused by name."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch

from peftkern.ops import quantize_4bit, quantize_8bit
from peftkern.utils.adapter_error import AdapterFileError
from peftkern.utils.quantized_files import (
    QuantizedFileError,
    is_quantized,
    quantized_keys,
    quantized_prefixes,
    read_quantized,
    write_quantized,
)
from peftkern.weights import Weight4bit, Weight8bit

P = "model.layers.0.mlp.up_proj."
STATE = P + "weight.quant_state.bitsandbytes__nf4"


def of_bitsandbytes(N: int, K: int, prefix: str = P, dtype=torch.bfloat16, blocksize: int = 64, **kwargs) -> dict:
    """The state dict that bitsandbytes itself writes for one quantized layer."""
    layer = bnb.nn.Linear4bit(K, N, bias=False, **kwargs)
    data = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)
    options = dict(quant_type=layer.weight.quant_type, quant_storage=layer.weight.quant_storage)
    options |= dict(compress_statistics=layer.weight.compress_statistics, blocksize=blocksize)
    layer.weight = bnb.nn.Params4bit(data, requires_grad=False, module=layer, **options)
    return {prefix + key: value for key, value in layer.to("cpu").state_dict().items()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal names in equal order, dtypes, shapes and bits."""
    assert list(a) == list(b)
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a[key], b[key])]
        assert torch.equal(*raw), key


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "N, K, blocksize, dtype",
    [
        (64, 64, 64, torch.bfloat16),
        (5, 13, 64, torch.float16),
        (1, 1, 64, torch.float32),
        (150, 130, 32, torch.float32),
    ],
)
def test_4bit_round_trip_is_byte_equal_to_bitsandbytes(N, K, blocksize, dtype, quant_type, nested):
    """Catches a state's JSON in another order or spacing, a shape or offset written otherwise, a lost odd element."""
    theirs = of_bitsandbytes(N, K, dtype=dtype, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    weight = read_quantized(theirs, P)
    assert isinstance(weight, Weight4bit)
    assert weight.nested is nested and weight.quant_type == quant_type and weight.blocksize == blocksize
    assert weight.shape == (N, K) and weight.dtype == dtype
    same_bytes(write_quantized(weight, P), theirs)
    assert set(theirs) <= set(quantized_keys(P))


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_quant_storage_is_a_view_of_the_same_bytes(storage):
    """Catches bytes that were converted as numbers, and a storage dtype that is lost when written again."""
    theirs = of_bitsandbytes(24, 40, quant_type="nf4", quant_storage=storage)
    weight = read_quantized(theirs, P)
    assert weight.packed.data_ptr() == theirs[P + "weight"].data_ptr(), "copied"
    assert torch.equal(weight.packed, of_bitsandbytes(24, 40, quant_type="nf4")[P + "weight"].view(-1))
    same_bytes(write_quantized(weight, P, storage), theirs)


def test_8bit_round_trip_is_byte_equal_to_bitsandbytes():
    """Catches a weight_format of another shape or dtype, and SCB or weight out of order."""
    layer = bnb.nn.Linear8bitLt(33, 7, bias=False, has_fp16_weights=False)
    theirs = {P + key: value for key, value in layer.to("cpu").state_dict().items()}
    weight = read_quantized(theirs, P, dtype=torch.float16)
    assert isinstance(weight, Weight8bit) and weight.shape == (7, 33) and weight.dtype == torch.float16
    same_bytes(write_quantized(weight, P), theirs)
    del theirs[P + "weight_format"]  # older files have none
    assert torch.equal(read_quantized(theirs, P).data, weight.data)


def test_offset_is_float32_whatever_the_default_dtype(monkeypatch):
    """Catches an offset made in torch's default dtype, which under bfloat16 changes most scales."""
    weight = quantize_4bit(torch.randn(64, 65))
    tensors = write_quantized(weight, P)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        read = read_quantized(tensors, P)
    finally:
        torch.set_default_dtype(before)
    assert read.offset.dtype == torch.float32 and read.offset.item() == weight.offset.item()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_another_table_is_refused_as_bitsandbytes_would_ignore_it(quant_type):
    """Catches a checkpoint whose weights are others here than in bitsandbytes, which goes by quant_type alone."""
    theirs = of_bitsandbytes(8, 64, quant_type=quant_type, compress_statistics=False)
    parts = {key.removeprefix(P + "weight."): value for key, value in theirs.items() if key != P + "weight"}
    state = bnb.functional.QuantState.from_dict(parts, torch.device("cpu"))
    before = bnb.functional.dequantize_4bit(theirs[P + "weight"], state)
    state.code = state.code / 2
    assert torch.equal(bnb.functional.dequantize_4bit(theirs[P + "weight"], state), before)
    for change in (0.5, 1 + 2**-20, -1.0):
        tensors = theirs | {P + "weight.quant_map": theirs[P + "weight.quant_map"] * change}
        with pytest.raises(QuantizedFileError, match=rf"weight.quant_map.*values of {quant_type}'s codes"):
            read_quantized(tensors, P)


def test_layers_are_known_by_their_names():
    """Catches a layer that is taken for dense because one of its names is missing, and one at the top of the model."""
    four, eight = (
        write_quantized(quantize_4bit(torch.randn(8, 8)), "a.b."),
        write_quantized(quantize_8bit(torch.randn(8, 8)), "c."),
    )
    top = write_quantized(quantize_4bit(torch.randn(8, 8)), "")
    names = [*four, *eight, *top, "a.b.bias", "norm.weight", "c.bias", "my_absmax", "xSCB"]
    found = quantized_prefixes(names)
    assert {prefix: sorted(keys) for prefix, keys in found.items()} == {
        "a.b.": sorted(four),
        "c.": sorted(eight),
        "": sorted(top),
    }
    assert quantized_prefixes(["a.b.weight.absmax"]) == {"a.b.": ["a.b.weight.absmax"]}
    assert quantized_prefixes(["a.weight.quant_state.bitsandbytes__x", "a.weight"])["a."][-1] == "a.weight"
    assert is_quantized(eight, "c.") and not is_quantized(eight, "a.b.")


def test_meta_weights_are_written_without_values():
    """Catches a state dict of a model on the meta device that fails for the offset's value."""
    made = write_quantized(quantize_4bit(torch.randn(8, 64)).to("meta"), P)
    assert made[P + "weight"].is_meta and STATE in made


# --- damage ----------------------------------------------------------------------------------------------------------


def edit(**changes):
    """Change fields of the state's JSON; None removes one."""

    def change(t: dict) -> None:
        fields = json.loads(bytes(t[STATE].tolist())) | changes
        t[STATE] = text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return change


def raw_offset(number: str):
    """Put `number` in the place of the offset in the JSON text."""

    def change(t: dict) -> None:
        head, _, _ = bytes(t[STATE].tolist()).decode().partition('"nested_offset": ')
        t[STATE] = text(head + '"nested_offset": ' + number + "}")

    return change


def text(content: str | bytes) -> torch.Tensor:
    raw = content if isinstance(content, bytes) else content.encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


def put(key: str, value):
    """Replace a tensor by what a function makes of it, or by a value."""
    return lambda t: t.__setitem__(key, value(t[key]) if callable(value) else value)


def drop(key: str):
    return lambda t: t.pop(key)


def rename(old: str, new: str):
    return lambda t: t.__setitem__(new, t.pop(old))


def poke(key: str, value: float):
    return put(key, lambda t: t.clone().index_fill_(0, torch.tensor([0]), value))


# name -> (what is done to the tensors, the key at fault, words of the message)
DAMAGE_4BIT = {
    "no state": (drop(STATE), STATE, "missing"),
    "no weight": (drop(P + "weight"), P + "weight", "missing"),
    "no absmax": (drop(P + "weight.absmax"), P + "weight.absmax", "missing"),
    "no quant_map": (drop(P + "weight.quant_map"), P + "weight.quant_map", "missing"),
    "no nested_absmax": (drop(P + "weight.nested_absmax"), P + "weight.nested_absmax", "missing"),
    "no nested_quant_map": (drop(P + "weight.nested_quant_map"), P + "weight.nested_quant_map", "missing"),
    "nothing nested": (
        lambda t: (t.pop(P + "weight.nested_absmax"), t.pop(P + "weight.nested_quant_map")),
        STATE,
        "nested tensors are missing",
    ),
    "unknown quant_type": (rename(STATE, STATE[:-3] + "int4"), STATE[:-3] + "int4", "unknown quant_type"),
    "two states": (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), STATE, "two states"),
    "weight short": (put(P + "weight", lambda t: t[:-1]), P + "weight", "expected 4096 bytes"),
    "weight long": (put(P + "weight", lambda t: torch.cat([t, t])), P + "weight", "expected 4096 bytes"),
    "weight int32": (put(P + "weight", lambda t: t.view(-1).view(torch.int32)), P + "weight", "int32"),
    "weight dense": (put(P + "weight", torch.zeros(64, 128)), P + "weight", "expected 4096 bytes"),
    "absmax short": (put(P + "weight.absmax", lambda t: t[:-1]), P + "weight.absmax", r"\[128\]"),
    "absmax long": (put(P + "weight.absmax", lambda t: torch.cat([t, t])), P + "weight.absmax", r"\[128\]"),
    "absmax not nested": (put(P + "weight.absmax", torch.ones(128)), P + "weight.absmax", "uint8"),
    "nested_absmax long": (put(P + "weight.nested_absmax", torch.ones(2)), P + "weight.nested_absmax", r"\[1\]"),
    "nested_absmax half": (
        put(P + "weight.nested_absmax", lambda t: t.half()),
        P + "weight.nested_absmax",
        "float32",
    ),
    "nested_absmax NaN": (poke(P + "weight.nested_absmax", float("nan")), P + "weight.nested_absmax", "NaN"),
    "nested_quant_map": (put(P + "weight.nested_quant_map", torch.ones(16)), P + "weight.nested_quant_map", "256"),
    "quant_map short": (put(P + "weight.quant_map", torch.ones(15)), P + "weight.quant_map", r"\[16\]"),
    "quant_map bf16": (put(P + "weight.quant_map", lambda t: t.bfloat16()), P + "weight.quant_map", "float32"),
    "quant_map Inf": (poke(P + "weight.quant_map", float("inf")), P + "weight.quant_map", "Inf"),
    "state empty": (put(STATE, text("")), STATE, "JSON"),
    "state cut": (put(STATE, lambda t: t[:30]), STATE, "JSON"),
    "state not UTF-8": (put(STATE, text(b'{"quant_type": "\xff"}')), STATE, "UTF-8"),
    "state a list": (put(STATE, text("[1]")), STATE, "object"),
    "state deep": (put(STATE, text("[" * 16_000)), STATE, "deep|JSON"),
    "state twice": (put(STATE, text('{"blocksize": 64, "blocksize": 32}')), STATE, "twice in 'blocksize'"),
    "state huge": (put(STATE, text("{" + " " * 20_000 + "}")), STATE, "20002 bytes is not plausible"),
    "state huge number": (put(STATE, text('{"blocksize": ' + "9" * 10_000 + "}")), STATE, "JSON"),
    "state fp32": (put(STATE, lambda t: t.float()), STATE, "uint8"),
    "state matrix": (put(STATE, lambda t: t[None]), STATE, "one dimension"),
    "lacks blocksize": (edit(blocksize=None), STATE, "lacks 'blocksize'"),
    "lacks shape": (edit(shape=None), STATE, "lacks 'shape'"),
    "lacks offset": (edit(nested_offset=None), STATE, "lacks 'nested_offset'"),
    "unknown field": (edit(code_path="x"), STATE, "unknown field 'code_path'"),
    "quant_type differs": (edit(quant_type="fp4"), STATE, "quant_type"),
    "blocksize 48": (edit(blocksize=48), STATE, "blocksize.*48"),
    "blocksize 8192": (edit(blocksize=8192), STATE, "blocksize.*8192"),
    "blocksize 0": (edit(blocksize=0), STATE, "blocksize"),
    "blocksize true": (edit(blocksize=True), STATE, "blocksize"),
    "blocksize 64.0": (edit(blocksize=64.0), STATE, "blocksize"),
    "blocksize text": (edit(blocksize="64"), STATE, "blocksize"),
    "blocksize list": (edit(blocksize=[64]), STATE, "blocksize"),
    "another blocksize": (edit(blocksize=32), P + "weight.absmax", r"\[256\]"),
    "dtype": (edit(dtype="float64"), STATE, "dtype.*float64"),
    "dtype code": (edit(dtype="load"), STATE, "dtype.*load"),
    "dtype number": (edit(dtype=16), STATE, "dtype"),
    "shape of three": (edit(shape=[64, 64, 2]), STATE, "shape"),
    "shape negative": (edit(shape=[-64, -128]), STATE, "shape"),
    "shape zero": (edit(shape=[0, 128]), STATE, "shape"),
    "shape large": (edit(shape=[2**40, 2**20]), P + "weight", "bytes"),
    "shape huge": (edit(shape=[2**40, 2**40]), STATE, r"shape.*below 2\*\*63"),
    "shape past printing": (edit(shape=[10**3000, 10**3000]), STATE, r"shape.*below 2\*\*63"),
    "shape text": (edit(shape="64x128"), STATE, "shape"),
    "shape long text": (edit(shape="x" * 5000), STATE, r"xxx\.\.\.$"),
    "shape true": (edit(shape=[True, 8192]), STATE, "shape"),
    "another shape": (edit(shape=[64, 64]), P + "weight", "expected 2048 bytes"),
    "nested_blocksize": (edit(nested_blocksize=128), STATE, "nested_blocksize.*128"),
    "nested_dtype": (edit(nested_dtype="bfloat16"), STATE, "nested_dtype.*bfloat16"),
    "offset text": (edit(nested_offset="0.05"), STATE, "nested_offset"),
    "offset infinite": (raw_offset("1e999"), STATE, "nested_offset.*inf"),
    "offset past float32": (edit(nested_offset=1e39), STATE, "nested_offset.*1e\\+39"),
    "offset NaN": (edit(nested_offset=float("nan")), STATE, "NaN is not JSON"),
}


@pytest.fixture(scope="module")
def good() -> dict[str, torch.Tensor]:
    return of_bitsandbytes(64, 128, quant_type="nf4", compress_statistics=True)


@pytest.mark.parametrize("name", DAMAGE_4BIT)
def test_damaged_4bit_weight_is_refused_by_name(good, name):
    """Catches damage that is read as numbers, an exception without file and key, memory taken after a hostile size."""
    damage, key, words = DAMAGE_4BIT[name]
    tensors = dict(good)
    damage(tensors)
    with pytest.raises(QuantizedFileError, match=words) as caught:
        read_quantized(tensors, P, file="folder/model.safetensors")
    assert caught.value.key == key and caught.value.file == "folder/model.safetensors"
    assert isinstance(caught.value, AdapterFileError) and key in str(caught.value)


DAMAGE_8BIT = {
    "no SCB": (drop(P + "SCB"), P + "SCB", "missing"),
    "no weight": (drop(P + "weight"), P + "weight", "missing"),
    "weight uint8": (put(P + "weight", lambda t: t.view(torch.uint8)), P + "weight", "int8"),
    "weight flat": (put(P + "weight", lambda t: t.view(-1)), P + "weight", "out_features"),
    "weight dense": (put(P + "weight", lambda t: t.half()), P + "weight", "float16"),
    "SCB short": (put(P + "SCB", lambda t: t[:-1]), P + "SCB", r"\[8\]"),
    "SCB half": (put(P + "SCB", lambda t: t.half()), P + "SCB", "float32"),
    "SCB NaN": (poke(P + "SCB", float("nan")), P + "SCB", "NaN"),
    "column layout": (put(P + "weight_format", torch.tensor(1, dtype=torch.uint8)), P + "weight_format", "got 1"),
    "layout of two": (put(P + "weight_format", torch.zeros(2)), P + "weight_format", "one integer"),
}


@pytest.mark.parametrize("name", DAMAGE_8BIT)
def test_damaged_8bit_weight_is_refused_by_name(name):
    """Catches the same for int8, and a weight of bitsandbytes' old layouts that would be read as rows."""
    damage, key, words = DAMAGE_8BIT[name]
    tensors = write_quantized(quantize_8bit(torch.randn(8, 24)), P)
    damage(tensors)
    with pytest.raises(QuantizedFileError, match=words) as caught:
        read_quantized(tensors, P)
    assert caught.value.key == key


def test_storage_that_does_not_divide_the_bytes_is_refused():
    """Catches bytes that are padded or cut to fit a storage dtype."""
    weight = quantize_4bit(torch.randn(3, 3))  # 5 bytes
    with pytest.raises(ValueError, match="quant_storage: 5 packed bytes"):
        write_quantized(weight, P, torch.bfloat16)
    with pytest.raises(ValueError, match="quant_storage: expected one of"):
        write_quantized(weight, P, torch.int32)
