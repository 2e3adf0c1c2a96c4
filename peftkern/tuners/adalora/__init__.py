"""AdaLoRA: configuration, layers, the allocation of ranks, and model."""

from peftkern.tuners.adalora.config import AdaLoraConfig
from peftkern.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peftkern.tuners.adalora.model import AdaLoraModel
from peftkern.tuners.adalora.ranks import RankAllocator

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "RankAllocator", "SVDLinear"]
