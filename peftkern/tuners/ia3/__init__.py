"""IA3: configuration, layers and model."""

from peftkern.tuners.ia3.config import IA3Config
from peftkern.tuners.ia3.conv import Conv2d, Conv3d
from peftkern.tuners.ia3.layer import IA3Layer, Linear
from peftkern.tuners.ia3.model import IA3Model

__all__ = ["Conv2d", "Conv3d", "IA3Config", "IA3Layer", "IA3Model", "Linear"]
