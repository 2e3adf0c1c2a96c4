"""Layers that are not given the batch as their input's first dimension, for batches whose rows want different adapters.

Some modules of transformers take [batch, tokens, K] and hand their children its plain flattening [batch * tokens, K]:
`FLATTENING` lists those, and a layer in one of these places is served, each id for as many rows as it has tokens. The
shape alone would not do: experts get such a tensor too, of tokens in another order, and the layers of `TOKENS_FIRST`
have tokens where others have the batch. What a place is, is decided once, when the layers are looked for; that as many
sequences come as there are ids is seen where the batch still has a dimension, by a hook on the module that flattens,
for as long as the batch is in force.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftkern.ops.adapter_route import AdapterBatch, FlatBatch, ScatteredBatch, TokensFirstBatch

# (folder of transformers.models, class that takes [batch, tokens, K] first and flattens it, children that it calls with
# the plain flattening of that, or of what it made of each token). Read in transformers 5.23; tests run each of them.
_READ = (
    ("afmoe", "AfmoeSparseMoeBlock", "shared_experts"),
    ("afmoe", "AfmoeTokenChoiceRouter", "gate"),
    ("cohere2_moe", "Cohere2MoeSparseMoeBlock", "shared_experts"),
    ("dbrx", "DbrxRouter", "layer"),
    ("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "shared_experts"),
    ("flint", "FlintSparseMoeBlock", "shared_expert"),
    ("gemma4", "Gemma4TextDecoderLayer", "router"),
    ("hunyuan_v1_moe", "HunYuanMoEV1Moe", "gate"),
    ("hy_v3", "HYV3MoE", "shared_experts"),
    ("laguna", "LagunaSparseMoeBlock", "shared_experts"),
    ("llama4", "Llama4TextMoe", "shared_expert"),
    ("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", "shared_experts"),
    ("muse_spark", "MuseSparkMoE", "pre_expert_proj", "post_expert_proj"),
    ("nemotron_h", "NemotronHMoE", "fc1_latent_proj", "fc2_latent_proj"),
    ("opt", "OPTDecoderLayer", "fc1", "fc2"),
    ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "shared_expert", "shared_expert_gate"),
    ("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "shared_expert", "shared_expert_gate"),
    ("qwen3_next", "Qwen3NextSparseMoeBlock", "shared_expert", "shared_expert_gate"),
    ("step3p7", "Step3p7SparseMoeBlock", "shared_experts"),
)
FLATTENING = MappingProxyType(
    {f"transformers.models.{name}.modeling_{name}:{cls}.forward": children for name, cls, *children in _READ}
)
# (folder, class): modules whose layers get [tokens, batch, K].
_TOKENS_FIRST = (
    ("bridgetower", "BridgeTowerResidualAttention"),
    ("bros", "BrosBboxEmbeddings"),
    ("fsmt", "DecoderLayer"),
    ("fsmt", "EncoderLayer"),
    ("led", "LEDEncoderSelfAttention"),
    ("longformer", "LongformerSelfAttention"),
    ("mlcd", "MLCDEncoderLayer"),
    ("xlnet", "XLNetModel"),
)
TOKENS_FIRST = frozenset(f"transformers.models.{name}.modeling_{name}:{cls}.forward" for name, cls in _TOKENS_FIRST)
# A level of a module's name below which it sees tokens that a router picked, and the experts that see all of them.
_PICKED = "experts"


class TokenOrder:
    """The layers of a model that do not see the batch as it is.

    Args:
        model: holds the layers.
        layers: those that take adapters.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Any]) -> None:
        self._model, self._layers = model, layers
        self._look()

    def _look(self) -> None:
        # How such a layer sees a batch; a layer without an entry sees it as it is.
        self._sees: dict[Any, type[FlatBatch] | type[ScatteredBatch] | type[TokensFirstBatch]] = {}
        # A module that flattens, and one of its layers, which knows the batch.
        self._doors: dict[nn.Module, Any] = {}
        # What the modules run that this rests on.
        self._runs: dict[nn.Module, str] = {}
        modules, wanted = dict(self._model.named_modules(remove_duplicate=False)), set(self._layers)
        doors: dict[Any, list[nn.Module | None]] = {}  # of each place of a layer, which may have several
        turned = [module for module in modules.values() if _forward_of(module) in TOKENS_FIRST]
        tokens_first = {layer for module in turned for layer in module.modules()}
        for name, layer in modules.items():
            if layer in wanted:
                doors.setdefault(layer, []).append(self._door(modules, name))
                if _PICKED in name.split("."):
                    self._sees[layer] = ScatteredBatch
        self._sees |= dict.fromkeys(tokens_first & wanted, TokensFirstBatch)
        for layer, found in doors.items():
            if None not in found:
                self._sees[layer] = FlatBatch
                self._doors.update((door, layer) for door in found if door is not None)

    def _door(self, modules: dict[str, nn.Module], name: str) -> nn.Module | None:
        """The module known to give the layer of this name the plain flattening of its own input, if there is one.

        All that is in between must be of the same file of transformers, unchanged, for it might order tokens anew.
        """
        parent, _, child = name.rpartition(".")
        between: list[nn.Module] = []
        while parent:
            module = modules[parent]
            runs = _forward_of(module)
            if child in FLATTENING.get(runs, ()):
                chain = {each: _forward_of(each) for each in (*between, module)}
                if any(other.partition(":")[0] != runs.partition(":")[0] for other in chain.values()):
                    return None
                self._runs |= chain
                return module
            between.append(module)
            parent, _, child = parent.rpartition(".")
        return None

    def views(self, batch: AdapterBatch) -> dict[Any, AdapterBatch]:
        """The batch as each layer sees it that does not see it as it is."""
        # A forward may be exchanged at any time.
        if any(_forward_of(module) != runs for module, runs in self._runs.items()):
            self._look()
        made = {kind: kind(batch) for kind in dict.fromkeys(self._sees.values())}
        return {layer: made[kind] for layer, kind in self._sees.items()}

    def watch(self) -> Iterator[RemovableHandle]:
        """Have every module that flattens look at the input that it gets; each handle ends one's watch."""
        for module, layer in self._doors.items():
            yield module.register_forward_pre_hook(_Watch(layer), with_kwargs=True)


class _Watch:
    """A hook that checks the first input of a module that flattens against the batch of a layer in it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mixed = self.layer._mixed
        if mixed is None:
            return
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, torch.Tensor):
            raise ValueError(
                f"adapter_names: expected {type(module).__name__} to be given hidden states first, got "
                f"{type(x).__name__}: its layers cannot tell whose each token is"
            )
        AdapterBatch.check_rows(mixed.batch, x, "adapter_names")


def _forward_of(module: nn.Module) -> str:
    """`module:qualified name` of the function that a call of `module` runs; accelerate's hooks run it unchanged.

    By the function, not the class, so that a subclass that has it too counts (FSDP makes one), and one that has not, or
    a module whose forward was exchanged, does not.
    """
    held = vars(module)
    forward = held.get("_old_forward") if "_hf_hook" in held else held.get("forward")
    if getattr(getattr(forward, "func", None), "computes_what_the_class_does", False):  # one of peftkern's own
        forward = None
    function = getattr(forward or type(module).forward, "__func__", forward or type(module).forward)
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
