"""Trained rows of an embedding (`trainable_token_indices`): values, gradients and training, against PEFT and fp64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkern
import tiny_models
from peftkern.integrations.chunked_loss import use_chunked_loss
from peftkern.tuners.trainable_tokens import TrainableTokensLayer, TrainableTokensWrapper

EVERY = [[3, 1, 7], {"embed_tokens": [1, 3]}, {"embed_tokens": [1, 3], "lm_head": [1, 3]}]
EVERY += [{"embed_tokens": [1, 3], "lm_head": [4, 1]}, {"lm_head": [2, 1]}]


def ids() -> torch.Tensor:
    """Ids of which some are trained, some of those several times."""
    x = tiny_models.ids()
    x[0, :5] = torch.tensor([1, 3, 7, 3, 4])
    return x


def adapted(lib: Any, indices: Any, tied: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny Llama of `peft` or `peftkern` with LoRA and trained rows, both random; equal for equal arguments."""
    model = tiny_models.tiny_llama(tie_word_embeddings=tied).to(dtype).train()
    config = lib.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    made = lib.get_peft_model(model, config, **options)
    tiny_models.randomize(made, ("lora_", "tokens_delta"))
    return made


def both(indices: Any, **options: Any) -> tuple[Any, Any]:
    return adapted(peft, indices, **options), adapted(peftkern, indices, **options)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    x = ids()
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", EVERY, ids=str)
def test_everything_is_as_in_peft(indices, tied):
    """Catches a row that is not found or is another's, a head that is tied where it is not or the reverse, gradients
    of a row from one of its two uses alone, and names, counts or flags that are not PEFT's."""
    theirs, ours = both(indices, tied=tied)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-6, atol=1e-6)
    a, b = gradients(theirs), gradients(ours)
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-6, msg=name)
    parameters = [[(n, p.shape, p.requires_grad) for n, p in m.named_parameters()] for m in (theirs, ours)]
    assert parameters[0] == parameters[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert [vars(s) for s in ours.get_layer_status()] == [vars(s) for s in theirs.get_layer_status()]
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    assert ours.peft_config["default"].trainable_token_indices == indices


def test_a_new_adapter_changes_nothing():
    """Catches rows that start as something else than the base's."""
    base = tiny_models.tiny_llama(tie_word_embeddings=True)
    expected = base(ids()).logits
    config = peftkern.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    assert torch.equal(peftkern.get_peft_model(base, config)(ids()).logits, expected)


def test_training_is_as_in_peft():
    """Catches a gradient that is a little off, or an optimizer's state that belongs to another parameter."""
    losses, rows = [], []
    for model in both([3, 1, 7]):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(input_ids=ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
        rows.append(model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].detach())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [True, False])
def test_16_bit_bases(dtype, widen):
    """Catches rows that are kept, or take part, in another dtype than PEFT's."""
    theirs, ours = both([3, 1, 7], dtype=dtype, autocast_adapter_dtype=widen)
    rows = [m.get_input_embeddings().token_adapter.trainable_tokens_delta["default"] for m in (theirs, ours)]
    assert rows[0].dtype == rows[1].dtype == (torch.float32 if widen else dtype)
    embedded = [m.get_input_embeddings()(ids()) for m in (theirs, ours)]
    assert torch.equal(*embedded) and embedded[0].dtype == dtype
    logits = [m(ids()).logits for m in (theirs, ours)]
    assert logits[0].dtype == logits[1].dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*logits, rtol=2 * eps, atol=2 * eps)
    a, b = (gradients(m) for m in (theirs, ours))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=8 * eps, atol=8 * eps * a[name].abs().max().item(), msg=name)


def test_under_autocast():
    """Catches a product of the trained rows in another dtype than that of the head."""
    results = []
    for model in both([3, 1, 7]):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(ids()).logits)
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-7)


# -- the layer ---------------------------------------------------------------------------------------------------------


def layer_with(base: nn.Module, indices: list[int], seed: int = 0) -> TrainableTokensLayer:
    """A layer in float64 with random trained rows."""
    torch.manual_seed(seed)
    layer = TrainableTokensLayer(base.double())
    layer.update_layer("default", indices)
    layer.set_adapter("default")
    layer.trainable_tokens_delta["default"].data.normal_()
    return layer


def whole_matrix(layer: TrainableTokensLayer) -> tuple[torch.Tensor, nn.Parameter, nn.Parameter]:
    """W', made in the plainest way, and the parameters that it is made of: trained rows and the base's."""
    rows = nn.Parameter(layer.trainable_tokens_delta["default"].detach().clone())
    base = nn.Parameter(layer.weight.detach().clone())
    indices = layer.token_indices["default"]
    return torch.stack([rows[indices.index(i)] if i in indices else base[i] for i in range(len(base))]), rows, base


OPTIONS = [{}, {"padding_idx": 4}, {"padding_idx": 0}, {"max_norm": 1.0}, {"max_norm": 2.0, "norm_type": 1.0}]
OPTIONS += [{"scale_grad_by_freq": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding_is_that_of_the_whole_matrix(options, dtype):
    """Catches an option of the embedding that trained rows do not follow, a padding that learns, and ids that are
    trained for their neighbours: below the first trained id, above the last one, between them."""
    layer = layer_with(nn.Embedding(9, 5, **options), [6, 2, 4])
    weight, rows, base = whole_matrix(layer)
    x = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 6], [2, 2, 2, 4, 6]], dtype=dtype)
    expected = F.embedding(x, weight.clone(), **options)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(layer.trainable_tokens_delta["default"].grad, rows.grad)
    torch.testing.assert_close(layer.weight.grad, base.grad)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_odd_shapes_of_ids(shape):
    """Catches a batch without tokens, or one id alone, that a lookup cannot do."""
    layer = layer_with(nn.Embedding(9, 5), [6])
    y = layer(torch.full(shape, 6))
    assert y.shape == (*shape, 5)
    assert torch.equal(y, layer.trainable_tokens_delta["default"][0].expand(*shape, 5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_head_is_that_of_the_whole_matrix(bias, hooked):
    """Catches columns in the wrong order, a bias that is lost (PEFT loses it), a gradient that still goes through the
    base's rows, and an output that a hook has seen and that is then written over."""
    base = nn.Linear(5, 9, bias=bias)
    layer = layer_with(base, [6, 2, 4])
    weight, rows, frozen = whole_matrix(layer)
    seen = []
    if hooked:
        base.register_forward_hook(lambda module, args, out: seen.append((out, out.detach().clone())))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(other, weight, base.bias)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.trainable_tokens_delta["default"].grad, rows.grad)
    torch.testing.assert_close(base.weight.grad, frozen.grad)
    assert all(torch.equal(out, then) for out, then in seen) and len(seen) == hooked


def test_scaled_embeddings():
    """Catches trained rows without the factor that the class multiplies its output by (Gemma, BART)."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    x = torch.tensor([[1, 2, 3]])
    for base in (Gemma3TextScaledWordEmbedding(6, 4, 0, 3.0), BartScaledWordEmbedding(6, 4, 0, 3.0)):
        layer = layer_with(base, [2])
        plain = layer.base_layer(x)
        y = layer(x)
        torch.testing.assert_close(y[0, 1], 3.0 * layer.trainable_tokens_delta["default"][0])
        assert torch.equal(y[0, [0, 2]], plain[0, [0, 2]])


def test_weight_is_read_as_it_is_in_force():
    """Catches model code that reads an embedding's weight and gets the base's; attributes that are not passed on."""
    model = adapted(peftkern, [3, 1])
    embedding = model.get_input_embeddings()
    layer = embedding.token_adapter
    assert isinstance(embedding, TrainableTokensWrapper) and embedding.num_embeddings == tiny_models.VOCAB
    assert torch.equal(embedding.weight[[3, 1]], layer.trainable_tokens_delta["default"])
    embedding.weight[3].sum().backward()
    assert torch.equal(layer.trainable_tokens_delta["default"].grad[:, 0], torch.tensor([1.0, 0.0]))
    with model.disable_adapter():
        assert embedding.weight is layer.base_layer.weight
    assert not hasattr(embedding, "nothing_of_that_name")


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Catches an output that is written over although it is a leaf, and gradients that get lost on the way."""
    expected = gradients(adapted(peftkern, [3, 1, 7]))
    model = adapted(peftkern, [3, 1, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own names
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_an_embedding_whose_output_requires_gradients():
    """Catches an in-place change of a leaf: the hook may be on the embedding itself, from before it was wrapped."""
    model = tiny_models.tiny_llama(tie_word_embeddings=True)
    model.enable_input_require_grads()
    config = peftkern.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    assert any("tokens_delta" in name for name in gradients(peftkern.get_peft_model(model, config)))


def test_compiled_as_one_graph():
    """Catches a graph break, or a lookup that depends on values."""

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(20, 8, padding_idx=3), nn.Linear(8, 20, bias=False)
            self.head.weight = self.emb.weight
            self.up = nn.Linear(8, 8)
            self.config = {"tie_word_embeddings": True}

        def get_input_embeddings(self):
            return self.emb

        def forward(self, x):
            return self.head(torch.tanh(self.up(self.emb(x))))

    torch.manual_seed(0)
    config = peftkern.LoraConfig(r=2, target_modules=["up"], trainable_token_indices=[1, 3])
    model = peftkern.get_peft_model(Ends(), config)
    tiny_models.randomize(model, ("lora_", "tokens_delta"))
    x = torch.tensor([[0, 1, 2, 3, 3]])
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*results)
    assert len(results[0][1]) == 3


def test_first_used_in_inference_mode():
    """Catches a lookup that was made where gradients cannot be, and that training then fails at."""
    expected = gradients(adapted(peftkern, [3, 1, 7]))
    model = adapted(peftkern, [3, 1, 7])
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.token_adapter._lookups.clear()  # as after accelerate put the weights elsewhere
    with torch.inference_mode():
        model(ids())
    assert list(gradients(model)) == list(expected)


def test_moved_without_values():
    """Catches ids that are read from memory that `to_empty` left as it was found."""
    layer = layer_with(nn.Embedding(9, 5), [6, 2, 4])
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.arange(9)
    expected = layer(x)
    moved = layer.to("meta")
    assert moved(x.to("meta")).is_meta and moved._lookups["default"].indices.is_meta
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(state)
    assert torch.equal(moved(x), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_apart_and_still_tied(how):
    """Catches a copy whose head looks at the rows of the original."""
    model = adapted(peftkern, [3, 1])
    again = tiny_models.copied(model, how)
    expected = model(ids()).logits
    assert torch.equal(again(ids()).logits, expected)
    rows = again.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    rows.data.zero_()
    assert torch.equal(again.get_output_embeddings()(torch.ones(1, 64))[0, [3, 1]], torch.zeros(2))
    assert torch.equal(model(ids()).logits, expected)


def test_per_sample_gradients_by_vmap():
    """Catches an in-place change of logits that a transform of torch.func cannot follow."""
    layer = layer_with(nn.Linear(5, 9, bias=False).requires_grad_(False), [6, 2])
    x, name = torch.randn(4, 5, dtype=torch.float64), "trainable_tokens_delta.default"

    def loss(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {name: rows}, (x[None],)).square().sum()

    rows = layer.trainable_tokens_delta["default"].detach()
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(rows, x)
    torch.testing.assert_close(found, torch.stack([2 * (rows @ row)[:, None] * row for row in x]))


def test_quantized_layers_around_dense_embeddings():
    """Catches a quantized model that is refused, or of which the rows do not learn."""
    model = tiny_models.tiny_llama(tie_word_embeddings=True)
    peftkern.quantize_model(model, {"load_in_4bit": True})
    config = peftkern.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    made = peftkern.get_peft_model(peftkern.prepare_model_for_kbit_training(model), config)
    tiny_models.randomize(made, ("tokens_delta",))
    grads = gradients(made)
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "tokens_delta" in name)
    assert sum("tokens_delta" in name for name in grads) == 1


def test_chunked_loss():
    """Catches a loss that takes the head's weight past the trained rows."""
    model = adapted(peftkern, [3, 1, 7])
    expected = gradients(copy.deepcopy(model))
    use_chunked_loss(model, chunk_size=5)
    assert model(input_ids=ids(), labels=ids()).logits is None
    found = gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
