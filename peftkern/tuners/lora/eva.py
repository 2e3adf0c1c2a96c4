"""EVA: A starts as the principal components of what a layer is given (Paischer et al. 2024, arXiv:2410.07170).

With V the leading right singular vectors of a layer's centred inputs, A = V_r and B = 0. Batches are run through the
model until the components stand still, and ranks go where they explain most of the inputs' variance: of r times the
number of layers in all, a layer gets up to rho * r, and none where others explain more.

    model = get_peft_model(model, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), ...))
    initialize_lora_eva_weights(model, dataloader)

Names, arguments and numbers are PEFT 0.21.2's. Layers that are given the same input share one decomposition.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peftkern.tuners.lora.calibration import in_mode, linear_targets
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.eva_weights import write_eva_weights
from peftkern.tuners.lora.layer import Linear
from peftkern.tuners.lora.model import LoraModel, rank_and_alpha
from peftkern.tuners.lora.running_svd import RunningSvd
from peftkern.tuners.targets import is_linear
from peftkern.tuners.tuner_layer import is_tuned
from peftkern.utils.adapter_error import shorten
from peftkern.utils.constants import PREFIX
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.progress import with_bar

PrepareModelInputs = Callable[[Any, LoraConfig], Any]
PrepareLayerInputs = Callable[[Any, Any, str], torch.Tensor]
# Above this rho is cut to what the largest parameter's size allows.
_LARGEST_RHO = 1000


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> torch.Tensor:
    """The places of a batch that count, [places, 2]: where there is attention and, with `use_label_mask`, a label.

    Raises:
        TypeError: The batch is no mapping.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(f"dataloader: expected batches that are dicts, got a {type(model_input).__name__}")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """A layer's input [batch, tokens, K] at the places of `prepare_model_inputs_fn_language_modeling`, [places, K]."""
    return _first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)`."""
    return model(**inputs)


def _all_places(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    x = _first_tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _first_tensor(layer_input: Any, layer_name: str) -> torch.Tensor:
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"the input of {layer_name} must be a tensor, or start with one, got a {type(x).__name__}: give "
            "prepare_layer_inputs_fn"
        )
    return x


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs
    | Mapping[str, PrepareLayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """What EVA makes A of: for each layer's name a matrix [rank, in_features], rank 0 included.

    Args:
        model: A `PeftModel` with LoRA, whose adapters are disabled meanwhile, or a base model.
        dataloader: Batches, with a length; gone through again until the components stand still.
        peft_config: The configuration; None for that of the model's adapter. Of a base model with `target_modules`
            None, all linear layers count.
        forward_fn: Runs a batch: `forward_fn(model, batch)`.
        prepare_model_inputs_fn: `(batch, peft_config)` -> what the next one is given; None: the batch.
        prepare_layer_inputs_fn: `(layer_input, model_input, layer_name)` -> the rows that count, [rows, in_features];
            or a dict of these by layer. None, and layers that are not in the dict: all rows.
        adapter_name: Whose configuration.
        gather_distributed_inputs: With torch.distributed, take the rows of all ranks.
        show_progress_bar: Show a bar on a terminal, if tqdm is installed.

    Raises:
        ValueError: No configuration, no batches, no layers, names in a dict that are no layers, rows of another size,
            fewer rows in all batches than components are asked for, or rows that are not finite. The model is left as
            it was.
    """
    tuner = getattr(model, "base_model", None)
    adapted = isinstance(tuner, LoraModel)
    if peft_config is None:
        if not adapted:
            raise ValueError(
                f"peft_config: needed for a model without LoRA adapters ({type(model).__name__}), got None"
            )
        peft_config = _config_of(model, adapter_name)
    if peft_config.eva_config is None:
        raise ValueError("peft_config.eva_config: expected an EvaConfig, got None")
    batches = len(dataloader) if isinstance(dataloader, Sized) else None
    if not batches:
        raise ValueError(f"dataloader: expected batches and a length, got {batches} of a {type(dataloader).__name__}")
    layers = _layers_of(model, peft_config, adapter_name if adapted else None)
    if isinstance(prepare_layer_inputs_fn, Mapping) and not prepare_layer_inputs_fn.keys() <= layers.keys():
        unknown = sorted(set(prepare_layer_inputs_fn) - set(layers))
        raise ValueError(f"prepare_layer_inputs_fn: no layers of these names: {shorten(unknown)}")
    without_adapters: Any = model.disable_adapter() if adapted else contextlib.nullcontext()
    with without_adapters, in_mode(model, training=False):
        search = _Search(model, layers, peft_config, prepare_layer_inputs_fn, gather_distributed_inputs)
        return search.run(dataloader, forward_fn, prepare_model_inputs_fn, show_progress_bar)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs
    | Mapping[str, PrepareLayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with `init_lora_weights="eva"` by EVA, in place.

    Layers get the ranks that EVA gives them, and those of rank 0 lose the adapter; the configuration's target_modules,
    rank_pattern and alpha_pattern say so afterwards. Make optimizers after that: parameters of other ranks are others.

    Args:
        model: A `PeftModel` with one active adapter.
        dataloader: As for `get_eva_state_dict`, where `eva_state_dict` is None.
        eva_state_dict: From `get_eva_state_dict`, of this model or of its base model; not changed.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, gather_distributed_inputs,
        show_progress_bar: As for `get_eva_state_dict`.

    Raises:
        ValueError: It is no such model or adapter, neither argument was given, an adapter is merged, or a matrix does
            not fit its layer. The model is left as it was.

    Warns:
        UserWarning: Layers without a matrix, such as embeddings, start as with init_lora_weights=True; and matrices
            without a layer are left out.
    """
    if not isinstance(getattr(model, "base_model", None), LoraModel):
        raise ValueError(f"model: expected a PeftModel with LoRA adapters, got a {type(model).__name__}")
    tuner: Any = model.base_model
    if len(tuner.active_adapters) > 1:
        raise ValueError(f"model: expected one active adapter, got {tuner.active_adapters}")
    config = _config_of(model, adapter_name)
    if config.init_lora_weights != "eva":
        raise ValueError(f"{adapter_name!r} must have init_lora_weights='eva', got {config.init_lora_weights!r}")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader: needed where eva_state_dict is None, got None")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    write_eva_weights(tuner, config, eva_state_dict, adapter_name)


def _config_of(model: Any, adapter_name: str) -> Any:
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: no adapter {adapter_name!r}; there are {sorted(model.peft_config)}")
    return model.peft_config[adapter_name]


def _layers_of(model: nn.Module, config: LoraConfig, adapter_name: str | None) -> dict[str, nn.Module]:
    """The layers whose inputs are looked at, by name, in the model's order: those with the adapter, if one is named."""
    named = dict(named_modules_of(model))
    if adapter_name is not None:
        tuned: dict[str, Any] = {name: m for name, m in named.items() if isinstance(m, Linear) and is_tuned(m)}
        found = {name: m for name, m in tuned.items() if adapter_name in m.scaling}
    elif config.target_modules is None:
        found = {name: m for name, m in named.items() if is_linear(m)}
    else:
        found = linear_targets(model, config)
    if not found:
        raise ValueError(f"model: no linear layers to look at in {type(model).__name__}")
    return found


def _to_device(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _to_device(value, device) for name, value in inputs.items()}
    return type(inputs)(_to_device(value, device) for value in inputs) if type(inputs) in (tuple, list) else inputs


class _Search:
    """The search for components: which layers are watched, and what was found of each."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        config: Any,
        prepare: PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None,
        gather: bool,
    ) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.prepare: dict[str, PrepareLayerInputs]
        if isinstance(prepare, Mapping):
            self.prepare = {name: prepare.get(name, _all_places) for name in layers}
        else:
            self.prepare = dict.fromkeys(layers, prepare or _all_places)
        self.gather = gather and dist.is_available() and dist.is_initialized()
        if self.gather:
            warnings.warn(
                "gather_distributed_inputs: EVA takes the inputs of all ranks, which must not be the same ones",
                stacklevel=4,
            )
        devices = {p.device for p in model.parameters() if not p.is_meta}
        self.device = devices.pop() if len(devices) == 1 else None
        rho = config.eva_config.rho
        if rho > _LARGEST_RHO:
            rho = min(rho, max(max(p.shape, default=0) for p in model.parameters()) // config.r)
        ranks = {name: rank_and_alpha(config, name.removeprefix(PREFIX))[0] for name in layers}
        self.budget = sum(ranks.values())
        self.most = {name: round(r * rho) for name, r in ranks.items()}
        self.model_input: Any = None
        # Of layers with the same input the first is watched: each layer -> that one.
        self.watched: dict[str, str] = {}
        self.found: dict[str, RunningSvd] = {}
        self.stands_still: dict[str, torch.Tensor] = {}
        self.grew = False

    def run(
        self,
        dataloader: Iterable[Any],
        forward_fn: Callable[[nn.Module, Any], Any],
        prepare_model_inputs: PrepareModelInputs | None,
        show_progress_bar: bool,
    ) -> dict[str, torch.Tensor]:
        def batch_of(inputs: Any) -> Any:
            inputs = inputs if self.device is None else _to_device(inputs, self.device)
            self.model_input = inputs if prepare_model_inputs is None else prepare_model_inputs(inputs, self.config)
            return inputs

        self._group_by_input(forward_fn, batch_of(next(iter(dataloader))))
        ranks = dict(self.most)
        watching: dict[str, Any] = {}
        try:
            for inputs in with_bar(self._batches(dataloader), "EVA", show_progress_bar, unit=" batches"):
                prepared = batch_of(inputs)
                for name in self.found:
                    done = bool(self.stands_still[name][: ranks[name]].all())
                    if done and name in watching:
                        watching.pop(name).remove()
                    elif not done and name not in watching:
                        watching[name] = self.layers[name].register_forward_hook(self._hook(name, self._add))
                if not watching:
                    break
                forward_fn(self.model, prepared)
                if all(svd.components is not None for svd in self.found.values()):
                    ranks = self._ranks()
        finally:
            for handle in watching.values():
                handle.remove()
        made = {}
        for name, rank in ranks.items():
            svd: Any = self.found[self.watched[name]]
            A = svd.components[:rank]
            if self.config.eva_config.whiten:
                A = A / svd.singular_values[:rank].sqrt()[:, None]
            made[name] = A.clone()
        return made

    def _batches(self, dataloader: Iterable[Any]) -> Iterator[Any]:
        """All batches again and again.

        Raises:
            ValueError: Once through, no layer took in anything.
        """
        while True:
            self.grew = False
            yield from dataloader
            if not self.grew:
                short = {name: svd.k for name, svd in self.found.items() if svd.components is None}
                name = next(iter(short), next(iter(self.found)))
                raise ValueError(
                    f"dataloader: no batch has as many rows as components are looked for ({self.found[name].k} at "
                    f"{name}): make batches larger, or r or rho smaller"
                )

    def _group_by_input(self, forward_fn: Callable[[nn.Module, Any], Any], inputs: Any) -> None:
        """Which layers are given the same, by one batch."""
        seen: dict[str, bytes] = {}

        def note(name: str, x: torch.Tensor) -> None:
            seen.setdefault(name, hashlib.blake2b(x.cpu().contiguous().numpy().tobytes()).digest())

        handles = [layer.register_forward_hook(self._hook(name, note)) for name, layer in self.layers.items()]
        try:
            forward_fn(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        uncalled = sorted(set(self.layers) - set(seen))
        if uncalled:
            raise ValueError(f"model: forward does not call {shorten(uncalled)}: keep them out with exclude_modules")
        first: dict[bytes, str] = {}
        groups: dict[str, list[str]] = {}
        for name in self.layers:
            groups.setdefault(first.setdefault(seen[name], name), []).append(name)
        for names in groups.values():
            self.most |= dict.fromkeys(names, max(self.most[name] for name in names))
        self.found = {name: RunningSvd(self.most[name]) for name in groups}
        self.stands_still = {name: torch.zeros(self.most[name], dtype=torch.bool) for name in groups}
        # The watched ones come first: equal shares of the variance are given to layers in this order.
        self.watched = {name: name for name in groups}
        self.watched |= {name: names[0] for names in groups.values() for name in names[1:]}

    def _hook(self, name: str, take: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = self.prepare[name](args, self.model_input, name)
            if not isinstance(x, torch.Tensor) or x.dim() != 2:
                shape = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"prepare_layer_inputs_fn: expected rows [rows, in_features] for {name}, got {shape}")
            x = _gathered(x) if self.gather else x
            take(name, x.float())

        return hook

    def _add(self, name: str, x: torch.Tensor) -> None:
        svd = self.found[name]
        if svd.k > x.shape[1]:
            raise ValueError(
                f"eva_config: rank times rho is {svd.k} at {name}, whose inputs have {x.shape[1]} features: make r or "
                "rho smaller"
            )
        if x.shape[0] < svd.k:  # left to a batch with more rows
            return
        if not bool(x.isfinite().all()):
            raise ValueError(f"the input of {name} has NaN or infinity")
        before = svd.components
        svd.add(x)
        self.grew = True
        if before is not None and svd.components is not None:
            alike = torch.nn.functional.cosine_similarity(svd.components, before)
            self.stands_still[name] = alike >= self.config.eva_config.tau

    def _ranks(self) -> dict[str, int]:
        """The ranks of all layers: the budget goes to the components that explain most, wherever they are."""
        owners, shares = [], []
        for name, watched in self.watched.items():
            explained = self.found[watched].explained[: self.most[watched]]
            owners += [name] * len(explained)
            shares.append(explained)
        order = torch.cat(shares).argsort(descending=True)[: self.budget].tolist()
        counts = Counter(owners[i] for i in order)
        ranks = {name: counts[name] for name in self.watched}
        for name, watched in self.watched.items():
            # A watched layer has the highest rank of its group: only as many components are looked at.
            if ranks[watched] < ranks[name]:
                ranks[watched], ranks[name] = ranks[name], ranks[watched]
        return ranks


def _gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, one rank's after the other's."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    counts[dist.get_rank()] = x.shape[0]
    dist.all_reduce(counts)
    padded = x.new_zeros(int(counts.max()), x.shape[1])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
