"""`AdapterBank`: adapters that come and go over one model, mixed batches by name and by slot, files, training."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch._dynamo.testing

import peftkern
from peftkern import AdapterBank, BankFullError, LoraConfig, UnknownAdapterError, per_adapter_loss, per_slot_loss
from peftkern.utils.adapter_error import AdapterFileError
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

NAMES = ["law", "__base__", "code", "law"]


def bank_of(slots=3, max_rank=4, trainable=True):
    """An `Mlp` with "law" of rank 4 on two layers and "code" of rank 2 on one of them, random values in both."""
    bank = AdapterBank(mlp(), slots=slots, max_rank=max_rank, target_modules=["up", "down"])
    bank.add("law", trainable=trainable)
    bank.add("code", LoraConfig(r=2, lora_alpha=6, target_modules=["down"]), trainable=trainable)
    randomize(bank.model)
    return bank


def alone(model, name, x):
    """The output of one adapter by itself, by `lora_linear`'s own way."""
    if name == "__base__":
        return mlp()(x)
    model.set_adapter(name)
    y = model(x)
    model.base_model.set_adapter([])
    return y


def test_a_batch_by_names_and_by_slots():
    """Would catch rows that take another's adapter, and a model that is adapted outside of a batch."""
    bank, x = bank_of(), ids(4)
    with bank.batch(NAMES):
        got = bank.model(x)
    with torch.no_grad():
        want = torch.cat([alone(bank.model, name, x[i : i + 1]) for i, name in enumerate(NAMES)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert bank.ids(NAMES).tolist() == [0, -1, 1, 0]
    for each in (bank.ids(NAMES), bank.ids(NAMES).int(), torch.tensor([0, 7, 1, 0])):
        with bank.batch(each):
            assert torch.equal(bank.model(x), got)
    with bank.batch(bank.ids(NAMES).repeat_interleave(12)):  # an id for each token
        assert torch.equal(bank.model(x), got)
    assert torch.equal(bank.model.get_base_model()(x), mlp()(x))


def test_a_bank_s_model_says_that_no_adapter_is_active():
    """Would catch a KeyError of a name that only the making of the bank knew, before anything is active."""
    bank = AdapterBank(mlp(), target_modules=["up"])
    with pytest.raises(ValueError, match=r"no adapter is active: set_adapter makes one of \[\]"):
        _ = bank.model.active_peft_config
    bank.add("law")
    with pytest.raises(ValueError, match=r"no adapter is active: set_adapter makes one of \['law'\]"):
        _ = bank.model.active_peft_config
    bank.model.set_adapter("law")
    assert bank.model.active_peft_config is bank.model.peft_config["law"]


def test_a_folder_that_does_not_fit_the_bank_is_named(tmp_path):
    """Would catch: an error about a rank or a field of some adapter's file, of the many that a server loads, that does
    not say which."""
    peftkern.get_peft_model(mlp(), LoraConfig(r=9, target_modules=["up"])).save_pretrained(tmp_path)
    bank = bank_of(slots=3, max_rank=4)
    before = fingerprint(bank.model)
    for put in (lambda: bank.add("big", tmp_path), lambda: bank.replace("law", tmp_path)):
        with pytest.raises(AdapterFileError, match="its rank is 9, the bank has room for 4") as error:
            put()
        assert error.value.file == str(tmp_path / "adapter_config.json")
    assert fingerprint(bank.model) == before


def test_adapters_that_go_round_the_bank_have_to_fit_it():
    """Would catch a second set of pools beside the bank's, which its ids and captured graphs know nothing of."""
    bank = bank_of(slots=3, max_rank=4)
    before = fingerprint(bank.model)
    for config in (
        LoraConfig(r=5, target_modules=["up"]),
        LoraConfig(target_modules=["up"], r=2, rank_pattern={"up": 9}),
    ):
        with pytest.raises(ValueError, match=r"adapter 'big': its rank is \d, the bank has room for 4"):
            bank.model.add_adapter("big", config)
    assert fingerprint(bank.model) == before
    mixed = bank.model.base_model.mixed_adapters()
    bank.model.add_adapter("third", LoraConfig(r=4, target_modules=["up"]))
    bank.model(ids(4), adapter_names=["third", "law", "code", "__base__"])
    assert bank.model.base_model.mixed_adapters() is mixed is bank._mixed and bank.names == ["law", "code", "third"]
    bank.model.add_adapter("fourth", LoraConfig(r=4, target_modules=["up"]))
    with pytest.raises(ValueError, match="the bank has room for 3 adapters of rank 4, here are 4 of up to 4"):
        bank.model(ids(4), adapter_names=["fourth", "law", "code", "__base__"])


def test_a_layer_of_the_base_that_has_its_own_adapter_is_not_the_bank_s():
    """Would catch the adapter of a `peftkern.nn` layer taken for the bank's of that name, switched off, or removed."""
    model = mlp()
    model.head = own = peftkern.nn.LoraLinear.from_linear(model.head, r=2, init_lora_weights=False)
    x = ids(4)
    want = model(x)
    with pytest.warns(UserWarning, match="part of the base model: 'head'"):
        bank = AdapterBank(model, target_modules=["up", "down"])
    bank.add("default")
    with bank.batch(["default", "__base__"] * 2):
        torch.testing.assert_close(bank.model(x), want)  # the bank's own starts from nothing
    assert not any("head" in name for name, _ in bank.named_parameters("default"))
    assert not any("head" in name for name in bank.state_dict("default"))
    bank.replace("default")
    bank.remove("default")
    assert torch.equal(model(x), want) and own.active_adapters == ["default"]


def test_adapters_come_and_go():
    """Would catch a slot that keeps its old rows, a removed adapter that still adapts, a pool that is made anew."""
    bank, x = bank_of(slots=2), ids(4)
    pools = [pool.pool_a.data_ptr() for pool in bank._mixed.pools.values()]
    assert (bank.names, len(bank), bank.slots, "law" in bank, "x" in bank) == (["law", "code"], 2, 2, True, False)
    with pytest.raises(BankFullError, match="all 2 slots"):
        bank.add("third")
    bank.remove("law")
    with bank.batch(torch.tensor([0, 0, 0, 0])):
        assert torch.equal(bank.model(x), mlp()(x))
    assert bank.add("third", LoraConfig(r=3, target_modules=["up"])) == 0
    randomize(bank.model, seed=7)
    with bank.batch(["third", "code", "third", "__base__"]):
        got = bank.model(x)
    order = ["third", "code", "third", "__base__"]
    with torch.no_grad():
        want = torch.cat([alone(bank.model, name, x[i : i + 1]) for i, name in enumerate(order)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert [pool.pool_a.data_ptr() for pool in bank._mixed.pools.values()] == pools
    bank.remove("third")
    bank.remove("code")
    assert bank.names == [] and torch.equal(bank.model(x), mlp()(x))


def test_replace_keeps_the_slot_even_in_a_full_bank():
    """Would catch ids that mean another adapter after a replacement."""
    bank, x = bank_of(slots=2), ids(2)
    values = {key: torch.full_like(value, 0.1) for key, value in bank.state_dict("law").items()}
    assert bank.replace("law", state_dict=values) == 0
    assert bank.names == ["law", "code"] and all((t == 0.1).all() for t in bank.state_dict("law").values())
    with bank.batch(torch.tensor([0, 1])):
        got = bank.model(x)
    with torch.no_grad():
        want = torch.cat([alone(bank.model, name, x[i : i + 1]) for i, name in enumerate(["law", "code"])])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    before = {key: value.clone() for key, value in bank.state_dict("law").items()}
    with pytest.raises(ValueError, match="rank is 9"):
        bank.replace("law", LoraConfig(r=9, target_modules=["up"]))
    assert all(torch.equal(value, before[key]) for key, value in bank.state_dict("law").items())


def test_what_was_taken_out_of_the_bank_stays_as_it_was(tmp_path):
    """Would catch a state dict, or parameters in an optimizer, of an adapter that left becoming the next one's; and a
    saved state dict of one adapter that has the whole pool in it."""
    for leave in (lambda bank: (bank.remove("law"), bank.add("law")), lambda bank: bank.replace("law")):
        bank, x = bank_of(slots=2), ids(4)
        values, old = bank.state_dict("law"), list(bank.parameters("law"))
        before = {key: value.clone() for key, value in values.items()}
        optimizer = torch.optim.AdamW(old, lr=0.1)
        with bank.batch(NAMES):
            bank.model(x).square().sum().backward()
        leave(bank)
        randomize(bank.model, seed=5)
        now = bank.state_dict("law")
        optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in values.items())
        assert all(torch.equal(value, now[key]) for key, value in bank.state_dict("law").items())
        assert not any(torch.equal(value, now[key]) for key, value in values.items())
    bank = AdapterBank(mlp(), slots=64, max_rank=4, target_modules=["up", "down"])
    bank.add("law")
    torch.save(bank.state_dict("law"), tmp_path / "law.pt")
    file = (tmp_path / "law.pt").stat().st_size
    assert file < 4096 + sum(t.numel() * t.element_size() for t in bank.state_dict("law").values())


def test_what_is_active_or_learns_does_not_change_with_what_comes_and_goes():
    """Would catch adapters that are frozen, or one that becomes active unasked, when the active one is replaced or
    removed; outside of a batch the model would silently be another."""
    model = peftkern.get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"]))
    bank, x = AdapterBank(model), ids(2)
    bank.add("law", LoraConfig(r=2, target_modules=["up"]))
    bank.add("code", trainable=False)

    def check(active, **learn):
        randomize(model, seed=3)
        assert {name: {p.requires_grad for p in bank.parameters(name)} for name in bank.names} == learn
        assert model.active_adapters == active
        with torch.no_grad(), bank.batch((active or ["__base__"]) * 2):
            want = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)

    check(["default"], default={True}, law={True}, code={False})
    bank.replace("default", LoraConfig(r=4, target_modules=["up"]))
    check(["default"], default={True}, law={True}, code={False})
    assert model.active_adapter == "default"
    bank.replace("law", trainable=False)
    check(["default"], default={True}, law={False}, code={False})
    bank.remove("default")
    check([], law={False}, code={False})
    model.set_adapter("code")
    bank.remove("law")
    check(["code"], code={True})


BAD = [
    (lambda b, _: b.add("law"), ValueError, "'law' is taken"),
    (lambda b, _: b.add("__base__"), ValueError, "taken"),
    (lambda b, _: b.add("x", LoraConfig(r=9, target_modules=["up"])), ValueError, "rank is 9, the bank has room for 4"),
    (lambda b, _: b.add("x", LoraConfig(r=2, target_modules=["head"])), ValueError, "does not cover 'head'"),
    (lambda b, _: b.add("x", LoraConfig(r=2, target_modules=["nope"])), ValueError, "nope"),
    (lambda b, _: b.add("x", LoraConfig(r=2, bias="all", target_modules=["up"])), ValueError, "biases that all"),
    (lambda b, _: b.add("x", state_dict={"a": torch.ones(1)}), AdapterFileError, "no tensor of this adapter"),
    (lambda b, p: b.add("x", p), AdapterFileError, "adapter_config.json"),
    (lambda b, _: b.remove("x"), UnknownAdapterError, "'x' is not in the bank, which has"),
    (lambda b, _: b.ids(["law", "x"]), UnknownAdapterError, "'x' is not in the bank"),
    (lambda b, _: b.ids("law"), TypeError, "list of names"),
    (lambda b, _: b.batch(["x"]).__enter__(), UnknownAdapterError, "'x' is not in the bank"),
    (lambda b, _: b.state_dict("x"), UnknownAdapterError, "'x'"),
    (lambda b, p: b.save("x", p), UnknownAdapterError, "'x'"),
    (lambda b, _: b.load_state_dict("law", {"a": torch.ones(1)}), AdapterFileError, "no tensor of this adapter"),
    (lambda b, _: b.load_state_dict("law", doubled(b) | {"a": torch.ones(1)}), AdapterFileError, "'law'.*unknown 'a'"),
    (lambda b, _: b.load_state_dict("law", half(doubled(b))), AdapterFileError, "names are not those of.*missing"),
    (lambda b, _: b.replace("law", LoraConfig(r=9, target_modules=["up"])), ValueError, "adapter 'law': its rank is 9"),
    (lambda b, _: b.batch("law").__enter__(), TypeError, "expected a list of names or a tensor of slots, got 'law'"),
    (lambda b, _: b.batch([0, 1]).__enter__(), TypeError, "expected a list of names or a tensor of slots"),
]


def doubled(bank):
    """Other values for "law"."""
    return {key: value * 2 for key, value in bank.state_dict("law").items()}


def half(values):
    """Those of one of its two layers."""
    return {key: value for key, value in values.items() if "up" in key}


@pytest.mark.parametrize("act, error, message", BAD)
def test_what_cannot_be_done_changes_nothing(act, error, message, tmp_path):
    """Would catch a bank, or its model, that is half changed by an adapter that it then refuses."""
    bank = bank_of()
    before, names = fingerprint(bank.model.get_base_model()), bank.names
    with pytest.raises(error, match=message):
        act(bank, tmp_path)
    assert bank.names == names and fingerprint(bank.model.get_base_model())["values"] == before["values"]
    with bank.batch(NAMES):
        bank.model(ids(4))


def test_save_and_load_as_peft_folders(tmp_path):
    """Would catch a folder that PEFT cannot read, values that are another adapter's, or a bar that writes to a file."""
    bank, x = bank_of(), ids(4)
    for name in bank.names:
        bank.save(name, tmp_path / name)
    folders = {name: tmp_path / name for name in bank.names}
    again = AdapterBank.from_pretrained(mlp(), folders, slots=5)
    assert (again.names, again.slots, again.max_rank) == (["law", "code"], 5, 4)
    assert not any(p.requires_grad for p in again.model.parameters())
    with bank.batch(NAMES), again.batch(NAMES):
        assert torch.equal(bank.model(x), again.model(x))
    again.add("more", tmp_path / "code")
    with bank.batch(["code"] * 4), again.batch(["more"] * 4):
        assert torch.equal(bank.model(x), again.model(x))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(mlp(), tmp_path / "law")
    with bank.batch(["law"] * 4):
        torch.testing.assert_close(theirs(x), bank.model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", ["missing", "other model", "cut"])
def test_an_adapter_that_does_not_fit_leaves_the_model_alone(damage, tmp_path):
    """Would catch a model that is left with some of the adapters when a later one is refused."""
    bank = bank_of()
    for name in bank.names:
        bank.save(name, tmp_path / name)
    file = tmp_path / "code" / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"])
        other = AdapterBank(tiny_llama(), slots=1, max_rank=2, target_modules=["q_proj"])
        other.add("code", config)
        other.save("code", tmp_path / "code")
    base = mlp()
    before = fingerprint(base)
    with pytest.raises(ValueError, match="code"):
        AdapterBank.from_pretrained(base, {"law": tmp_path / "law", "code": tmp_path / "code"}, progress=False)
    assert fingerprint(base) == before


def test_more_folders_than_slots_are_a_full_bank(tmp_path):
    """Would catch a bank that is too small for its folders and fails without a name, or with the model changed."""
    bank = bank_of()
    for name in bank.names:
        bank.save(name, tmp_path / name)
    folders, base = {name: tmp_path / name for name in bank.names}, mlp()
    before = fingerprint(base)
    with pytest.raises(BankFullError, match=r"at least 2 for \['code', 'law'\], got 1"):
        AdapterBank.from_pretrained(base, folders, slots=1, progress=False)
    for wrong in ({"slots": 0}, {"max_rank": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected an int of at least 1"):
            AdapterBank.from_pretrained(base, folders, progress=False, **wrong)
    assert fingerprint(base) == before


def test_dropout_rests_in_a_model_that_serves(tmp_path):
    """Would catch the dropout of an adapter, loaded or added later, acting on rows of a model in evaluation mode."""
    config, x = LoraConfig(r=2, lora_dropout=0.5, target_modules=["up", "down"]), ids(4)
    model = peftkern.get_peft_model(mlp(), config)
    randomize(model)
    model.save_pretrained(tmp_path)

    @torch.no_grad()
    def acts(bank):
        with bank.batch(bank.names[-1:] * 4):
            return not torch.equal(bank.model(x), bank.model(x))

    folders = {"law": tmp_path, "code": tmp_path}
    assert not acts(AdapterBank.from_pretrained(mlp().train(), folders, slots=3, progress=False))
    for mode in (False, True):
        bank = AdapterBank(mlp().train(mode), slots=3, max_rank=2, target_modules=["up", "down"])
        assert bank.model.training == mode
        bank.add("a1", tmp_path)
        assert acts(bank) == mode
        bank.replace("a1", tmp_path)
        assert acts(bank) == mode
        bank.model.train(not mode)
        assert acts(bank) != mode
        bank.replace("a1", tmp_path)
        assert acts(bank) != mode


def test_a_folder_of_what_is_not_built_is_named(tmp_path):
    """Would catch an error that leaves open which of many folders is meant."""
    bank = bank_of()
    for name in bank.names:
        bank.save(name, tmp_path / name)
    file = tmp_path / "code" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_qalora": True}))
    folders = {name: tmp_path / name for name in bank.names}
    with pytest.raises(NotImplementedError, match="adapter 'code': .*use_qalora"):
        AdapterBank.from_pretrained(mlp(), folders, progress=False)


def test_an_adapter_that_was_deleted_from_the_model_is_unknown():
    """Would catch rows that silently take the base after their adapter was deleted past the bank."""
    bank = bank_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank.model.delete_adapter("law")
    with pytest.raises(UnknownAdapterError, match=r"'law' is not in the bank, which has \['code'\]"):
        bank.batch(NAMES).__enter__()
    assert bank.add("law") == 0


def test_a_model_that_moved_takes_another_adapter():
    """Bug: a pool that is where the model was, and refuses what is added where it is now; `.cuda()` is such a move."""
    bank, x = bank_of(), ids(4)
    bank.model.double()
    bank.add("new", LoraConfig(r=3, target_modules=["up", "down"]))
    randomize(bank.model)
    assert {p.dtype for name in bank.names for p in bank.parameters(name)} == {torch.float64}
    names = ["new", "__base__", "code", "new"]
    with torch.no_grad():
        with bank.batch(names):
            got = bank.model(x)
        want = [alone(bank.model, name, x[i : i + 1]) for i, name in enumerate(names) if name != "__base__"]
    torch.testing.assert_close(got[[0, 2, 3]], torch.cat(want), rtol=1e-9, atol=1e-9)


def test_an_empty_pool_follows_its_layer():
    """Bug: rows by slot through a layer that no adapter here targets, its pool still on the device that was left."""
    bank = AdapterBank(mlp(), slots=2, max_rank=4, target_modules=["up", "down"])
    bank.add("code", LoraConfig(r=2, target_modules=["down"]))
    up, down = bank._mixed.pools
    pool = bank._mixed.pools[up]
    kept = pool.pool_a
    with bank.batch(bank.ids(["code"])):
        assert pool.pool_a is kept
    pool._allocate(torch.float32, torch.device("meta"))  # the other device of a machine without a GPU
    x = ids(4)
    with torch.no_grad(), bank.batch(bank.ids(["code", "code", "__base__", "code"])):
        y = bank.model(x)
    assert pool.pool_a.device == y.device and y.isfinite().all() and bank._mixed.pools[down].entries[0] is not None


def test_parameters_stay_parameters():
    """Would catch `.to()`, `.half()` or an optimizer that swaps `p.data` leaving stale rows in the pool."""
    bank, x = bank_of(), ids(4)
    assert len(list(bank.parameters("law"))) == 4 and len(dict(bank.named_parameters("code"))) == 2
    assert all("code" in key for key, _ in bank.named_parameters("code"))

    def check():
        with torch.no_grad(), bank.batch(NAMES):
            got = bank.model(x)
            base = [copy.deepcopy(bank.model).unload()(x[1:2])]
        with torch.no_grad():
            parts = [alone(bank.model, n, x[i : i + 1]) if n != "__base__" else base[0] for i, n in enumerate(NAMES)]
        torch.testing.assert_close(got, torch.cat(parts), rtol=2e-3, atol=2e-3)

    with torch.no_grad():
        with bank.batch(NAMES):
            bank.model(x)
            for p in bank.parameters("law"):
                p.data = p.data * 2  # within a batch, as an 8-bit optimizer may
            moved = bank.model(x)
        with bank.batch(NAMES):
            assert torch.equal(bank.model(x), moved)
    check()
    bank.model.double()
    check()
    bank.model.bfloat16().float()
    check()
    state = bank.state_dict("law")
    bank.load_state_dict("law", {key: value * 3 for key, value in state.items()})
    check()


def test_adapters_trained_together_are_as_trained_apart():
    """Would catch an optimizer step of an absent adapter, and a loss in which short rows count for less."""
    data = [ids(4, seed=s) for s in range(4)]
    orders = [
        ["law", "code", "law", "law"],
        ["code", "code", "code", "code"],
        ["law", "law", "code", "__base__"],
        NAMES,
    ]

    def run(only):
        bank = bank_of()
        optimizers = {
            name: torch.optim.AdamW(bank.parameters(name), lr=0.05, weight_decay=0.1) for name in ("law", "code")
        }
        for x, names in zip(data, orders, strict=True):
            rows = [i for i, name in enumerate(names) if only in (None, name)]
            if not rows:
                continue
            mine = [names[i] for i in rows]
            with bank.batch(mine):
                logits = bank.model(x[rows])
            labels = x % 5
            labels[0, 3:] = -100  # rows of different lengths
            losses = per_adapter_loss(logits, labels[rows], mine)
            sum(loss for name, loss in losses.items() if name != "__base__").backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        return bank

    together = run(None)
    for name in ("law", "code"):
        apart = run(name)
        for key, want in apart.state_dict(name).items():
            torch.testing.assert_close(together.state_dict(name)[key], want, rtol=1e-4, atol=1e-5)


def test_each_loss_is_that_of_its_rows_alone():
    """Would catch a mean over the whole batch, labels that are not shifted, a row without labels that gives NaN, or an
    empty batch that fails."""
    logits, labels = torch.randn(4, 6, 9, dtype=torch.float64), torch.randint(0, 9, (4, 6))
    labels[0, 2:] = labels[3] = -100
    losses = per_adapter_loss(logits, labels, ["a", "b", "a", "c"])
    assert list(losses) == ["a", "b", "c"] and losses["c"] == 0
    for name, rows in (("a", [0, 2]), ("b", [1])):
        own, wanted = logits[rows][:, :-1].flatten(0, 1), labels[rows][:, 1:].flatten()
        want = torch.nn.functional.cross_entropy(own.float(), wanted)
        torch.testing.assert_close(losses[name], want)
    by_slot = per_slot_loss(logits, labels, torch.tensor([2, 0, 2, -1]), 3)
    torch.testing.assert_close(by_slot, torch.stack([losses["b"], losses["c"], losses["a"]]))
    flat = per_adapter_loss(logits[:, 0], labels[:, 0].clamp(min=0), ["a"] * 4, shift=False)
    assert flat["a"] > 0
    assert per_slot_loss(logits[:0], labels[:0], torch.empty(0, dtype=torch.int32), 2).tolist() == [0, 0]
    assert per_adapter_loss(logits[:0], labels[:0], []) == {}


def test_a_compiled_model_serves_adapters_that_come_later():
    """Would catch tables, slots or an adapter that became constants of the graph."""
    bank, x = bank_of(trainable=False), ids(4)
    model = bank.model.get_base_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    slots, frames = torch.tensor([0, -1, 1, 0]), []
    with torch.no_grad():
        for step in range(4):
            if step == 1:
                slots = torch.tensor([1, 0, 0, -1])
            elif step == 2:
                bank.remove("law")
                bank.add("late", LoraConfig(r=3, target_modules=["up", "down"]), trainable=False)
                randomize(bank.model, seed=9)
            elif step == 3:
                bank.replace("code", LoraConfig(r=1, target_modules=["down"]), trainable=False)
            with bank.batch(slots):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            if step == 0:
                frames.append(counter.frame_count)
    assert frames == [counter.frame_count]


def test_modules_trained_whole_and_embeddings_are_the_adapters_own(tmp_path):
    """Would catch a head that all adapters share, or one that a replaced adapter leaves behind."""
    bank, x = AdapterBank(mlp(), slots=2, max_rank=4, target_modules=["emb", "down"]), ids(3)
    for name in ("law", "code"):
        bank.add(name, LoraConfig(r=2, target_modules=["emb", "down"], modules_to_save=["head"]))
    randomize(bank.model)
    order = ["law", "code", "__base__"]

    def check():
        with torch.no_grad():
            with bank.batch(order):
                got = bank.model(x)
            want = torch.cat([alone(bank.model, name, x[i : i + 1]) for i, name in enumerate(order)])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        return got

    first = check()
    assert len(list(bank.parameters("law"))) == 6
    bank.save("code", tmp_path)
    bank.replace("law", tmp_path)
    second = check()
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1:], second[1:])
    bank.remove("code")
    order = ["law", "__base__", "law"]
    check()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_adapters_dtype(dtype):
    """Would catch adapters of a 16-bit base whose dtype is not the pool's."""
    bank = AdapterBank(mlp().bfloat16(), slots=1, max_rank=2, target_modules=["up"], dtype=dtype)
    bank.add("law")
    assert {p.dtype for p in bank.parameters("law")} == {dtype or torch.float32}
    with bank.batch(["law", "__base__"]):
        assert bank.model(ids(2)).dtype == torch.bfloat16


def test_over_a_model_that_get_peft_model_made():
    """Would catch a bank that forgets the adapters that were there, or takes those of another method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(mlp(), LoraConfig(r=4, target_modules=["up", "down"]), adapter_name="law")
        model.add_adapter("code", LoraConfig(r=2, target_modules=["down"]))
    randomize(model)
    x = ids(4)
    bank = AdapterBank(model, slots=3, max_rank=4)
    assert bank.names == ["law", "code"] and bank.model is model
    with bank.batch(NAMES):
        got = model(x)
    torch.testing.assert_close(got, model(x, adapter_names=NAMES))
    bank.add("third")
    assert bank.ids(["third"]).tolist() == [2]
    with pytest.raises(BankFullError, match="slots: expected at least 3"):
        AdapterBank(model, slots=1)
    with pytest.raises(ValueError, match="slots: expected an int"):
        AdapterBank(mlp(), slots=0, target_modules=["up"])
    with pytest.raises(ValueError, match="got none"):
        AdapterBank.from_pretrained(mlp(), {})


def test_generate_with_a_transformers_model():
    """Would catch a batch that ends with the first token, or rows that generate with another's adapter."""
    bank = AdapterBank(tiny_llama(), slots=2, max_rank=4, target_modules=["q_proj", "v_proj"])
    bank.add("law")
    bank.add("code")
    randomize(bank.model)
    x = ids(3)
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        with bank.batch(["code", "law", "__base__"]):
            got = bank.model.generate(input_ids=x, **options)
        assert torch.equal(got, bank.model.generate(input_ids=x, adapter_names=["code", "law", "__base__"], **options))
        assert torch.equal(got[2:], tiny_llama().generate(input_ids=x[2:], **options))
