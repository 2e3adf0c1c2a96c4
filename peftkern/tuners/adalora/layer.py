"""AdaLoRA's layers: LoRA with a singular value for each rank, which training can set to zero.

`y = base(x) + sum over active adapters of s * dropout(x) (E o A)^T B^T`, `s = lora_alpha / (ranknum + 1e-5)` (Zhang
et al. 2023, arXiv:2303.10512). Attribute and parameter names are PEFT 0.21.2's, so state dicts are the same. E o A
[r, in] is made at each forward, and is then the A of LoRA's operation: autograd takes its gradient on to E and A. All
else, which path runs and when the base layer is called as it is, is LoRA's (peftkern/tuners/lora/layer.py).

Beside PEFT: s is applied once, in float32 (PEFT divides what an fp16 layer may have made Inf of); `set_scale` and
`unscale_layer` go by s (PEFT divides by r once more).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftkern.ops.plan import Plan
from peftkern.tuners.adalora.ranknum import RankNumbers
from peftkern.tuners.fusing import ExplainRow
from peftkern.tuners.lora.layer import Linear, LoraLayer
from peftkern.tuners.lora.merging import delta_weight
from peftkern.utils.peft_types import PeftType

_FACTORS = ("lora_A", "lora_E", "lora_B")
# PEFT's: it keeps a rank of 0 from dividing by zero.
_EPSILON = 1e-5


class AdaLoraLayer(LoraLayer):
    """What AdaLoRA's layers share: for each adapter `lora_A` [r, in], `lora_E` [r, 1] and `lora_B` [out, r], parameters
    rather than modules, and `ranknum`, the rank that it was made with."""

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names: tuple[str, ...] = (*LoraLayer.other_param_names, "ranknum")
    peft_type: PeftType = PeftType.ADALORA
    least_rank: int = 0  # all of a layer's triplets may have been cut

    lora_A: nn.ParameterDict  # type: ignore[assignment]
    lora_B: nn.ParameterDict  # type: ignore[assignment]

    def _add_containers(self) -> None:
        self.lora_E = nn.ParameterDict()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.ranknum = RankNumbers()

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Gives the adapter its initial values: see `AdaLoraConfig.init_lora_weights`."""
        if init_lora_weights is False:
            return
        nn.init.zeros_(self.lora_E[adapter_name])
        nn.init.normal_(self.lora_A[adapter_name], mean=0.0, std=0.02)
        nn.init.normal_(self.lora_B[adapter_name], mean=0.0, std=0.02)

    def _initial_scaling(self, adapter: str) -> float:
        alpha = self.lora_alpha[adapter]
        if alpha > 0:
            return float(alpha)
        return self.ranknum.value(adapter) if adapter in self.ranknum else float(self.r[adapter])

    def effective_scaling(self, adapter: str) -> float:
        """What the adapter's product is multiplied by."""
        return self.scaling[adapter] / (self.ranknum.value(adapter) + _EPSILON)

    def explain_row(self, name: str = "") -> ExplainRow:
        row = super().explain_row(name)
        return dataclasses.replace(row, kind=f"{row.kind} (AdaLoRA)")

    def _make_anew(self, adapter_name: str, config: Any) -> None:
        number = self.ranknum.value(adapter_name)
        super()._make_anew(adapter_name, config)
        self.ranknum.put(adapter_name, number, self._base_device_and_dtype()[0])  # that of before ranks were cut

    def check_resize(self, adapter_name: str, kept: Sequence[bool]) -> None:
        """Raises ValueError where `resize` cannot be done."""
        if len(kept) != self.r[adapter_name]:
            raise ValueError(
                f"rank_pattern: expected a bool for each of {self.r[adapter_name]} triplets of adapter "
                f"{adapter_name!r}, got {len(kept)}"
            )
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before its ranks are cut")

    @torch.no_grad()
    def resize(self, adapter_name: str, kept: Sequence[bool]) -> None:
        """Leaves an adapter those of its triplets that are `kept`, as new parameters; its scaling stays what it was.

        Args:
            adapter_name: One of the layer's adapters.
            kept: A bool for each of its triplets.

        Raises:
            ValueError: Another number of triplets, or the adapter is merged.
        """
        self.check_resize(adapter_name, kept)
        if all(kept):
            return
        rows = torch.tensor([i for i, keep in enumerate(kept) if keep], dtype=torch.int64, device="cpu")
        for kind in _FACTORS:
            held: Any = getattr(self, kind)
            old = held[adapter_name]
            new = old.detach().index_select(1 if kind == "lora_B" else 0, rows.to(old.device))
            held[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)
        self.r[adapter_name] = len(rows)

    def __repr__(self) -> str:
        return "ada" + super().__repr__()


class SVDLinear(AdaLoraLayer, Linear):
    """AdaLoRA on a linear layer: `nn.Linear`, a quantized one, or transformers' Conv1D; arguments as for LoRA's."""

    factors_are_kept: bool = False

    def _check_adapter(self, config: Any, r: int) -> None:
        """What LoRA says of a bias of `lora_B` does not concern a layer without one."""

    def _make_weights(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_bias[adapter_name] = False
        self.lora_A[adapter_name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_E[adapter_name] = nn.Parameter(torch.randn(r, 1))
        self.lora_B[adapter_name] = nn.Parameter(torch.randn(self.out_features, r))
        torch.randn(1, device="cpu")  # PEFT draws for ranknum too: torch's generator then stands where it stands there
        self.ranknum.put(adapter_name, float(r), self._base_device_and_dtype()[0])
        self.scaling[adapter_name] = self._initial_scaling(adapter_name)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        wide = torch.promote_types(A.dtype, torch.float32)
        delta = delta_weight(self.lora_E[adapter].to(wide) * A, B, self.effective_scaling(adapter), self.fan_in_fan_out)
        return delta.to(B.dtype)

    def get_delta_bias(self, adapter: str) -> torch.Tensor | None:
        return None

    def _active_here(self) -> list[str]:
        # An adapter of which nothing is left adds nothing, and operations know no rank of 0.
        return [name for name in super()._active_here() if self.r[name]]

    def _why_no_factors(self, name: str, dtype: torch.dtype | None) -> str:
        for kind, part in zip(_FACTORS, self._parameters_of(name), strict=True):
            if type(part) not in (nn.Parameter, torch.Tensor) or part.is_meta:
                return f"its {kind} is a {type(part).__name__} on {part.device}"
            if dtype is not None and part.dtype != dtype and part.dtype != torch.float32:
                return f"{part.dtype} beside a base weight of {dtype}"
        return ""

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        A, E, B = self._parameters_of(name)
        return E * A, B, self.effective_scaling(name)

    def _bare_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        if not self.r.get(name) or any(type(p) is not nn.Parameter or p.is_meta for p in self._parameters_of(name)):
            return None
        return self._factors(name)

    def _parameters_of(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held: dict[str, Any] = self._modules
        A, E, B = (held[kind]._parameters.get(name) for kind in _FACTORS)
        if A is None:  # FSDP1 keeps what it gathered as attributes beside the parameters
            A, E, B = (held[kind].__dict__[name] for kind in _FACTORS)
        return A, E, B

    def _told_by(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._parameters_of(self._active_here()[0])

    def plan_mixed(self, tokens: int) -> Plan:
        """A batch whose rows want different adapters is refused."""
        return Plan("refused", "adapters of AdaLoRA cannot be mixed in a batch")

    def _part(self, x: torch.Tensor, name: str) -> torch.Tensor:
        A, E, B = self._parameters_of(name)
        if A.is_meta and not x.is_meta:
            raise ValueError(f"adapter {name!r} is on the meta device (low_cpu_mem_usage): load its values first")
        dropped = self.lora_dropout[name](self._cast_input_dtype(x, A.dtype))
        return (dropped @ (E * A).T) @ B.T * self.effective_scaling(name)
