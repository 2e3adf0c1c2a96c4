"""bitsandbytes' optimizers: what they have to be told of a model."""

from __future__ import annotations

from torch import nn

from peftkern.integrations.extras import require


def embeddings_in_32_bits(model: nn.Module) -> None:
    """Have 8-bit optimizers keep 32-bit states for the embeddings of `model`, whose gradients are sparse and large."""
    manager = require("bitsandbytes.optim", "an 8-bit optimizer").GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
