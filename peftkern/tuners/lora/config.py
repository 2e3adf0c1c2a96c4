"""`LoraConfig`: PEFT 0.21.2's fields, names and defaults; what is not built is refused by name, never ignored."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from peftkern.config import PeftConfig, _check_names_in_regex, _check_regex, _expect, _expect_names
from peftkern.tuners.lora.variant_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peftkern.tuners.trainable_tokens.config import check_token_ids
from peftkern.utils.peft_types import PeftType

# Those that are built, but for True and False; `gaussian` and `olora` in any case, as in PEFT.
_BUILT_INITS = (
    "'gaussian', 'loftq', 'pissa', 'pissa_niter_<n>', 'olora', 'orthogonal', 'mica', 'eva', 'corda' or 'lora_ga'"
)
# What makes an adapter start as usual, over whatever base weight there is.
PLAIN_START: dict[str, Any] = {"init_lora_weights": True, "loftq_config": {}} | dict.fromkeys(
    ("eva_config", "corda_config", "lora_ga_config")
)
# Fields whose empty value means the same as their default.
_OFF_WHEN_EMPTY = ("alora_invocation_tokens", "layer_replication")
# Fields that must keep their default until what they ask for is built.
_UNBUILT: dict[str, Any] = {
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "runtime_config": LoraRuntimeConfig(),
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}


@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adaptation: `y = x W^T + bias + (lora_alpha / r) * dropout(x) A^T B^T`, with W frozen.

    Args:
        r: Rank of the adapters, at least 1.
        target_modules: Which modules to adapt: names or dotted suffixes of names; or a regular expression that a whole
            name must match; or "all-linear": every linear layer but the output head (embeddings and convolutions are
            adapted where they are named). None: the architecture's default.
            Where transformers 5 stacked layers in one parameter, their names, and "all-linear", mean that parameter.
        exclude_modules: Names, suffixes or a regular expression of modules to leave alone.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability, in [0, 1), that an element of the adapter's input is dropped in training.
        fan_in_fan_out: Whether weights are stored [in_features, out_features], as transformers' Conv1D does. Set by
            the kind of layer when it is plain from it.
        bias: Which biases of the base model train: "none", "all", or "lora_only" (those of adapted layers).
        use_rslora: Scale by `lora_alpha / sqrt(r)` (arXiv:2312.03732).
        modules_to_save: Suffixes of names of modules to train and save whole.
        init_lora_weights: True: A as `nn.Linear` starts, B zero. "gaussian": A normal with deviation 1 / r, B zero.
            False: both random, so that the adapter changes the output from the start. "loftq": A and B make up for what
            quantizing the base weight loses, which is replaced by the quantized one, dense still (`loftq_config`); for
            a base in 4 bits already see `peftkern.replace_lora_weights_loftq`. "pissa": A and B are the weight's
            largest r singular values and vectors; "pissa_niter_<n>": nearly, by n iterations; "olora": the first r
            columns and rows of its QR decomposition (also of a quantized weight, which is quantized anew). "corda" and
            "lora_ga": from what a layer is given, or from its gradient, once `preprocess_corda` or `preprocess_loraga`
            was called on the base model. Of these the base weight keeps what is left, also when the adapter is deleted,
            unloaded or disabled; a saved adapter is loaded over the original base ("lora_ga": over the saved one), or
            see `PeftModel.save_pretrained` for one that leaves its base alone. "orthogonal": random A and B with
            B A = 0, r even. "mica": A zero, B the singular vectors of the smallest r singular values, frozen. "eva": A
            the principal components of a layer's inputs, with ranks by what they explain, once
            `peftkern.initialize_lora_eva_weights` was called; B zero. Formulas and sources:
            peftkern/tuners/lora/initial_values.py. Embeddings know all but "loftq", and start as with True under those
            that are no "mica" or False. Convolutions know True, False and "gaussian", and start as with True under
            "lora_ga".
        layers_to_transform: Indices of the layers to adapt, for `target_modules` as a list.
        layers_pattern: Name of the list of layers (such as "layers" or "h") that those indices count.
        rank_pattern: Name, suffix or regular expression of modules -> their rank.
        alpha_pattern: The same for `lora_alpha`.
        loftq_config: `LoftQConfig`, or a dict of its fields, where `init_lora_weights` is "loftq"; a dict from then on.
        eva_config, corda_config, lora_ga_config: `EvaConfig`, `CordaConfig`, `LoraGAConfig` or a dict of their fields,
            where `init_lora_weights` is "eva", "corda" or "lora_ga"; None: their defaults.
        use_dora: Train a magnitude for each output beside A and B, and scale the adapted weight's rows to it
            (arXiv:2402.09353): `y = m / ||V|| * (x V^T) + bias` with V = W + scaling * B A.
        lora_bias: Give `lora_B` a trained bias; not with `use_dora`.
        target_parameters: Names, or dotted tails of names, of parameters to adapt in modules that are no layers, such
            as "experts.gate_up_proj": a matrix, or a stack of matrices that each get an adapter of rank r. All adapters
            of a model that have any must have the same.
        trainable_token_indices: Ids of tokens whose rows of an embedding train beside the adapter: a list, for the
            model's input embedding (without one, for modules whose names end with "embed_tokens"); or a dict of endings
            of module names to lists. Rows are saved in the order of the ids. A head that is tied to the input embedding
            takes the same rows, unless the dict gives it other ones.
        ensure_weight_tying: Keep what shares the input embedding's weight tied: with `modules_to_save` of one of these
            modules all are trained as one, and `modules_to_save` then names the embedding; `trainable_token_indices`
            that give them different ids are refused. PEFT's meaning for `target_modules` is not built.
        megatron_config, megatron_core, velora_config, alora_invocation_tokens, use_qalora, qalora_group_size,
        monteclora_config, layer_replication, runtime_config, use_bdlora, arrow_config, kasa_config: PEFT's, not built;
            anything but the default raises NotImplementedError.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
        NotImplementedError: A field that is not built.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    method: ClassVar[PeftType | None] = PeftType.LORA
    # Fields that map name patterns of modules to values.
    module_patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                _expect_names(name, getattr(self, name))
                setattr(self, name, set(getattr(self, name)))
        # Older files hold null where newer ones hold an empty dict.
        for name in (*self.module_patterns, "loftq_config"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        self._settle_loftq()
        self._settle("eva_config", EvaConfig, "eva")
        self._settle("corda_config", CordaConfig, "corda")
        self._settle("lora_ga_config", LoraGAConfig, "lora_ga")
        super().__post_init__()

    def _settle_loftq(self) -> None:
        """`loftq_config` as a dict with all its fields; empty, as in PEFT, where the initialization is another."""
        value: Any = self.loftq_config
        _expect("loftq_config", value, (LoftQConfig, dict), "a LoftQConfig or a dict of its fields")
        if not value:
            return
        if self.init_lora_weights != "loftq":
            warnings.warn(
                f"loftq_config={value!r} has no effect with init_lora_weights={self.init_lora_weights!r}: left out",
                stacklevel=4,
            )
            self.loftq_config = {}
            return
        fields = vars(LoftQConfig())
        given = dict(value if isinstance(value, dict) else vars(value))
        unknown = sorted(str(name) for name in given if name not in fields)
        if unknown:
            raise ValueError(f"loftq_config must have no fields but {', '.join(fields)}, got {unknown}")
        self.loftq_config = fields | given

    def _settle(self, name: str, kind: type, init: str) -> None:
        """The configuration of an initialization as its class: files hold a dict."""
        value: Any = getattr(self, name)
        _expect(name, value, (kind, dict, type(None)), f"{kind.__name__}, a dict of its fields, or None")
        if isinstance(value, dict):
            fields = vars(kind())
            unknown = sorted(str(field) for field in value if field not in fields)
            if unknown:
                raise ValueError(f"{name} must have no fields but {', '.join(fields)}, got {unknown}")
            setattr(self, name, kind(**value))
        if self.init_lora_weights == init and value is None:
            warnings.warn(f"init_lora_weights={init!r} without {name}: {kind.__name__}() is taken", stacklevel=4)
            setattr(self, name, kind())
        elif self.init_lora_weights != init and value is not None:
            warnings.warn(
                f"{name}={value!r} has no effect with init_lora_weights={self.init_lora_weights!r}", stacklevel=4
            )

    def check(self) -> None:
        super().check()
        for name, what in (("lora_bias", "a bias of lora_B"), ("megatron_config", "Megatron's parallel layers")):
            if self.use_dora and getattr(self, name):
                raise ValueError(f"use_dora=True does not go with {what}, got {name}={getattr(self, name)!r}")
        for name, default in _UNBUILT.items():
            value = getattr(self, name)
            if value != default and not (name in _OFF_WHEN_EMPTY and not value):
                raise NotImplementedError(
                    f"LoraConfig.{name}={value!r} is not built in peftkern; leave it at its default, {default!r}"
                )
        self._check_numbers()
        self._check_names()
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            _expect(name, getattr(self, name), (bool,), "True or False")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        _check_init(self.init_lora_weights)
        if self.init_lora_weights == "loftq":
            _check_loftq(self.loftq_config)
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and leaves_residual(self.init_lora_weights):
            warnings.warn(
                f"init_lora_weights={self.init_lora_weights!r} with use_rslora=True and rank_pattern or alpha_pattern: "
                "save_pretrained cannot convert such an adapter to one for the unchanged base "
                "(path_initial_model_for_weight_conversion)",
                stacklevel=4,
            )
        _check_tokens(self.trainable_token_indices)
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias=True needs init_lora_weights True or False, got {self.init_lora_weights!r}")
        if self.use_dora and self.init_lora_weights == "mica":
            raise ValueError("use_dora=True does not go with init_lora_weights='mica', which trains A alone")

    def _check_numbers(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _expect("lora_dropout", self.lora_dropout, (int, float), "a number in [0, 1)")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        for name in self.module_patterns:
            check, patterns = _check_rank if name == "rank_pattern" else _check_alpha, getattr(self, name)
            _expect(name, patterns, (dict,), "a dict of name patterns to numbers")
            for pattern, value in patterns.items():
                _expect(f"a key of {name}", pattern, (str,), "a str")
                _check_regex(f"the key {pattern!r} of {name}", f"({pattern})")
                check(f"{name}[{pattern!r}]", value)

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) and name not in ("modules_to_save", "target_parameters"):
                _check_regex(name, value)
                continue
            # These two are put into expressions; targets and exclusions are compared as text.
            check = _check_names_in_regex if name in ("layers_pattern", "modules_to_save") else _expect_names
            check(name, value)
        indices = self.layers_to_transform
        if indices is not None:
            _expect("layers_to_transform", indices, (int, list, tuple), "an int, a list of ints, or None")
            for index in indices if isinstance(indices, (list, tuple)) else [indices]:
                _expect("an index of layers_to_transform", index, (int,), "an int")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} goes with target_modules as a list of names, got target_modules="
                        f"{self.target_modules!r}"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got None")

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """PEFT's private hook for layer classes of one's own: not built."""
        raise NotImplementedError(f"LoraConfig._register_custom_module is not built in peftkern, got {mapping!r}")


def highest_rank(config: Any) -> int:
    """The largest rank that `config` gives any module."""
    return max([config.r, *config.rank_pattern.values()])


def _check_rank(name: str, value: Any) -> None:
    _expect(name, value, (int,), "an int of at least 1")
    if value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _check_alpha(name: str, value: Any) -> None:
    _expect(name, value, (int, float), "a finite number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite:
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def _check_tokens(value: Any) -> None:
    name = "trainable_token_indices"
    if value is None:
        return
    _expect(name, value, (list, tuple, dict), "a list of ids, a dict of module names to such lists, or None")
    if not value:
        raise ValueError(f"{name} must hold at least one id, or be None, got {value!r}")
    if not isinstance(value, dict):
        check_token_ids(name, value)
        return
    for key, indices in value.items():
        _expect(f"a key of {name}", key, (str,), "a str")
        if not key:
            raise ValueError(f"{name} must not have an empty name, got {value!r}")
        _expect(f"{name}[{key!r}]", indices, (list, tuple), "a list of ids")
        check_token_ids(f"{name}[{key!r}]", indices)


def _check_loftq(settings: Any) -> None:
    _expect("loftq_config", settings, (dict,), "a dict with the fields of LoftQConfig")
    if not settings:
        raise ValueError("init_lora_weights='loftq' needs loftq_config, such as LoftQConfig(), got none")
    bits, iterations = (settings.get(name) for name in ("loftq_bits", "loftq_iter"))
    _expect("loftq_bits", bits, (int,), "4 or 8")
    if bits not in (4, 8):
        raise ValueError(f"loftq_bits must be 4 (NF4) or 8 (LLM.int8), the formats that layers can hold, got {bits!r}")
    _expect("loftq_iter", iterations, (int,), "an int of at least 1")
    if iterations < 1:
        raise ValueError(f"loftq_iter must be an int of at least 1, got {iterations!r}")


def pissa_iterations(init: Any) -> int | None:
    """n of "pissa_niter_<n>"; None for any other initialization."""
    match = re.fullmatch(r"pissa_niter_([0-9]{1,4})", init) if isinstance(init, str) else None
    return None if match is None else int(match[1])


def leaves_residual(init: Any) -> bool:
    """Whether an initialization moves a part of the base weight into the adapter: PiSSA, OLoRA, CorDA, LoRA-GA."""
    if not isinstance(init, str):
        return False
    return init in ("pissa", "corda", "lora_ga") or init.lower() == "olora" or pissa_iterations(init) is not None


def warn_of_drawn_residual(config: Any) -> None:
    """Warns that an adapter which is about to be loaded may not find the base weight that it was trained over."""
    init = getattr(config, "init_lora_weights", None)
    if pissa_iterations(init) is not None:
        warnings.warn(
            f"init_lora_weights={init!r} draws at random what it leaves in the base weight: that is what the adapter "
            "was trained over only if torch's generator is in the same state. Save the base model too, or the adapter "
            "with path_initial_model_for_weight_conversion",
            stacklevel=3,
        )


def starts_plain(init: Any) -> bool:
    """Whether an initialization looks neither at the base weight nor at data, and so is one of A and B alone."""
    return isinstance(init, bool) or init.lower() == "gaussian"


def changes_base(init: Any) -> bool:
    """Whether an initialization replaces the base weight."""
    return init == "loftq" or leaves_residual(init)


def _check_init(value: Any) -> None:
    _expect("init_lora_weights", value, (bool, str), f"True, False, {_BUILT_INITS}")
    if starts_plain(value) or value in ("orthogonal", "mica", "eva") or changes_base(value):
        return
    raise ValueError(f"init_lora_weights must be True, False, {_BUILT_INITS}, got {value!r}")
