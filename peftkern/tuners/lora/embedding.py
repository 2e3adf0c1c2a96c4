"""LoRA on an embedding: `y = W[i] + scaling * (A[:, i])^T B^T`, with A [r, num_embeddings] and B [embedding_dim, r].

As in PEFT, A starts at zero and B normal, the configuration's dropout is not used, and the parameters are
`lora_embedding_A.<adapter>` and `lora_embedding_B.<adapter>`, without `.weight`. With `use_dora` the sum is scaled, see
peftkern/tuners/lora/dora.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftkern.backend import current_backend, device_info
from peftkern.ops import lora_embedding
from peftkern.ops.plan import Plan, plan_lora_embedding
from peftkern.tuners.fusing import is_nested, plain_weight, why_called_as_is
from peftkern.tuners.lora import dora
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.merging import delta_weight
from peftkern.tuners.lora.mixed import add_parts
from peftkern.utils.other import batch_in_force


class Embedding(LoraLayer, nn.Module):
    """LoRA on an `nn.Embedding`.

    Args:
        base_layer: The embedding to wrap. One whose class has a forward of its own is called as it is; if that class
            says its output's factor in `embed_scale`, the adapter is scaled by it too.
        adapter_name: Name of the first adapter, which becomes active.
        config: Its configuration.
        r: Its rank; 0 for the configuration's.
        lora_alpha: None for the configuration's.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int | float | None = None,
        **_: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, base_layer.num_embeddings, base_layer.embedding_dim)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r or config.r, config.lora_alpha if lora_alpha is None else lora_alpha, config)

    def _check_adapter(self, config: LoraConfig, r: int) -> None:
        if config.lora_bias:
            raise ValueError("lora_bias=True does not go with an embedding: its adapter has no bias")

    def _make_weights(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(self.out_features, r))

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        if init_lora_weights is not False:
            nn.init.zeros_(self.lora_embedding_A[adapter_name])
            nn.init.normal_(self.lora_embedding_B[adapter_name])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        return delta_weight(A, B, self.scaling[adapter], True)

    def _why_not_fused(self, names: list[str]) -> str:
        base: Any = self._modules["base_layer"]
        reason = why_called_as_is(base, nn.Embedding.forward)
        if not reason and plain_weight(base) is None:
            reason = f"its weight is a {type(base.weight).__name__} on {base.weight.device}"
        if not reason:
            set_ = [name for name in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(base, name)]
            reason = f"it has {' and '.join(set_)}" if set_ else ""
        if reason:
            return f"base layer: {reason}"
        for name in names:
            factors = [self.lora_embedding_A[name], self.lora_embedding_B[name]]
            for part in [*factors, self.lora_magnitude_vector[name].weight] if self.use_dora[name] else factors:
                if part.dtype not in (base.weight.dtype, torch.float32):
                    return f"adapter {name!r}: {part.dtype} beside a base weight of {base.weight.dtype}"
                if type(part) is not nn.Parameter or part.is_meta:
                    return f"adapter {name!r}: its weight is a {type(part).__name__} on {part.device}"
        return ""

    def plan(self, tokens: int) -> Plan:
        """The path that forward takes for `tokens` ids: "unfused", or that of `lora_embedding`."""
        row = self.explain_row()
        if not row.fused:
            return Plan("unfused", row.reason)
        plan = plan_lora_embedding(tokens, self.weight.dtype, device_info(self.weight.device), current_backend())
        with_magnitude = any(self.use_dora[name] for name in self._active_here())
        return Plan(plan.path, f"{plan.reason}; DoRA's scale by plain PyTorch") if with_magnitude else plan

    def plan_mixed(self, tokens: int) -> Plan:
        """The path that forward takes for a batch whose rows want different adapters."""
        return Plan("unfused", "an embedding: each adapter is added for its rows by plain PyTorch")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mixed = batch_in_force(self)
        if mixed is not None:
            return add_parts(self, self.base_layer(x, *args, **kwargs), x, mixed)
        names = self._names_to_add(kwargs)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs or is_nested(x) or self._why_not_fused(names):
            return self._add_plain(self.base_layer(x, *args, **kwargs), x, names)
        base: Any = self._modules["base_layer"]
        first = names[0]
        y = lora_embedding(
            x,
            base.weight,
            self.lora_embedding_A[first],
            self.lora_embedding_B[first],
            self.scaling[first],
            padding_idx=base.padding_idx,
        )
        if self.use_dora[first]:
            y = (y * dora.row_scale(self, first)).to(y.dtype)
        # The others by plain gathers: joining the A's would copy a row for every word at every step.
        return self._add_plain(y, x, names[1:]) if len(names) > 1 else y

    def _add_plain(self, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """`y` plus each adapter's part by plain PyTorch, looked up with the base layer's own settings; in y's dtype."""
        total = y
        for name in names:
            total = total + self._part(x, name)
            if self.use_dora[name]:
                total = total * dora.row_scale(self, name)
        return total.to(y.dtype)

    def _part(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What an adapter adds; in its own dtype."""
        base = self.get_base_layer()
        scale = getattr(base, "embed_scale", None)
        if isinstance(scale, torch.Tensor) and scale.numel() != 1:
            raise ValueError(f"embed_scale of {type(base).__name__} must be one number, got shape {tuple(scale.shape)}")
        rows = F.embedding(
            x,
            self.lora_embedding_A[name].T,
            base.padding_idx,
            base.max_norm,
            base.norm_type,
            base.scale_grad_by_freq,
            base.sparse,
        )
        part = (rows @ self.lora_embedding_B[name].T) * self.scaling[name]
        return part if scale is None else part * scale
