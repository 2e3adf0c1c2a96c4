"""`AdaLoraModel`: AdaLoRA adapters in a model, and the step that cuts their ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from peftkern.tuners.adalora.files import with_all_rows
from peftkern.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peftkern.tuners.adalora.orthogonality import orthogonality
from peftkern.tuners.adalora.ranks import RankAllocator, as_saved, layers_with, module_of
from peftkern.tuners.lora.model import LoraModel
from peftkern.tuners.mixed import MixedRows
from peftkern.tuners.targets import check_is_called, fit_fan_in_fan_out, is_linear
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.tuners.tuners_utils import BaseTuner
from peftkern.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from peftkern.utils.peft_types import PeftType


class AdaLoraModel(LoraModel):
    """A model with AdaLoRA adapters (Zhang et al. 2023, arXiv:2303.10512) around its linear layers.

    Changes `model` in place: an `SVDLinear` of `peftkern.tuners.adalora` is put around each targeted module. The
    arguments and errors are those of `BaseTuner`; the configuration is an `AdaLoraConfig`. Of several adapters one may
    be trainable, as in PEFT: a second one raises ValueError.

    A loss that the model returns (`outputs.loss`) gets `orth_reg_weight * R`, R of `tuners/adalora/orthogonality.py`,
    of the trainable adapter, in evaluation too, as in PEFT. Here also of a `PeftModel` without a `task_type`, where
    PEFT leaves it out; and not while the adapter is inactive, disabled or merged. Outputs in a tuple stay as they are.

    After each step of the optimizer call `update_and_allocate`.

    Attributes:
        rankallocator: The `RankAllocator` of the trainable adapter, if there is one.
    """

    tuner_layer_cls = AdaLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING

    rankallocator: RankAllocator | None = None

    @property
    def trainable_adapter_name(self) -> str | None:
        """The name of the trainable adapter: the one whose configuration is not in inference mode."""
        return next(iter(self._trainable()), None)

    def _trainable(self) -> list[str]:
        configs: dict[str, Any] = self.peft_config
        return [n for n, c in configs.items() if c.peft_type == PeftType.ADALORA and not c.inference_mode]

    # -- what a method says ------------------------------------------------------------------------------------

    def _check_new_adapter_config(self, config: Any) -> None:
        BaseTuner._check_new_adapter_config(self, config)  # what LoRA adds is of ranks by pattern, and of a bank
        trainable = self._trainable()
        if len(trainable) > 1:
            raise ValueError(
                f"AdaLoraModel supports only 1 trainable adapter, got {trainable}: inference_mode must be True for all "
                "others"
            )

    def settle_config(self, config: Any) -> None:
        """Gives `rank_pattern` the names that files have."""
        if config.rank_pattern is not None:
            name = next(name for name, held in self.peft_config.items() if held is config)
            config.rank_pattern = as_saved(config.rank_pattern, name)

    def check_target(self, config: Any, key: str, target: nn.Module) -> None:
        layer: Any = target
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, AdaLoraLayer):
            raise ValueError(f"target_modules names {key!r}, which another method adapted ({type(target).__name__})")
        base = layer.get_base_layer() if isinstance(layer, AdaLoraLayer) else layer
        if not is_linear(base):
            raise ValueError(
                f"target_modules names {key!r}, a {type(base).__name__}: AdaLoRA is built for nn.Linear and "
                "transformers' Conv1D (name the linear layers inside it, or keep it out with exclude_modules)"
            )
        check_is_called(config, self.model, key)

    def create_layer(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> BaseTunerLayer:
        if isinstance(target, AdaLoraLayer):
            target.update_layer(adapter_name, config.init_r, config.lora_alpha, config)
            return target
        fit_fan_in_fan_out(config, target)
        return SVDLinear(target, adapter_name, config, r=config.init_r, lora_alpha=config.lora_alpha)

    def match_parameters(self, model: nn.Module, config: Any, state_dict: Mapping[str, torch.Tensor] | None) -> list:
        return []

    def settle_layers(self, model: nn.Module) -> None:
        super().settle_layers(model)
        # What `add_losses` goes through at each forward, found once.
        self.__dict__["_adapted"] = self._layers()
        name = self.trainable_adapter_name
        if name is not None and (self.rankallocator is None or self.rankallocator.adapter_name != name):
            self.rankallocator = RankAllocator(model, self.peft_config[name], name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.rankallocator is not None and self.rankallocator.adapter_name == adapter_name:
            self.rankallocator = None

    def make_room(self, mixed: MixedRows | None) -> MixedRows:
        raise NotImplementedError("adapter_names: AdaLoraModel cannot mix adapters in a batch (nor can PEFT's)")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not of AdaLoRA, as in PEFT: raises TypeError."""
        raise TypeError("AdaLoraModel has no add_weighted_adapter, as in PEFT: LoraModel has")

    # -- training ----------------------------------------------------------------------------------------------

    def add_losses(self, outputs: Any) -> Any:
        """`outputs`, whose loss, if it has one, holds the regularization."""
        loss, name = getattr(outputs, "loss", None), self.trainable_adapter_name
        if not isinstance(loss, torch.Tensor) or name is None:
            return outputs
        config: Any = self.peft_config[name]
        if config.orth_reg_weight == 0:
            return outputs
        here = [layer for layer in self.__dict__["_adapted"] if name in layer.lora_A and _takes_part(layer, name)]
        total = orthogonality((layer.lora_A[name], layer.lora_B[name]) for layer in here)
        if total is not None:
            outputs.loss = loss + (config.orth_reg_weight * total).to(loss.device, loss.dtype)
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Scores the triplets of the trainable adapter, and cuts those that this step's budget has no place for.

        Call it once a step, after `loss.backward()` and `optimizer.step()` and before `optimizer.zero_grad()`; with a
        GradScaler after its `unscale_`, since scales that change would weigh steps unequally. `rank_pattern` of the
        adapter's configuration says what is left. Under DDP and FSDP2 all ranks call it.

        Args:
            global_step: The step that is done, counted from 0 or 1 like those of the configuration.

        Raises:
            ValueError: There is no trainable adapter, or it has no gradients; no ranks were cut when the last phase
                begins; or the adapter came from a file with its ranks cut, so that there is nothing to score.
            TypeError: `global_step` is no int.

        Example:
            >>> loss = model(**batch).loss
            >>> loss.backward()
            >>> optimizer.step()
            >>> model.update_and_allocate(step)
            >>> optimizer.zero_grad()
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int):
            raise TypeError(f"global_step must be an int, got {global_step!r} of type {type(global_step).__name__}")
        name, allocator = self.trainable_adapter_name, self.rankallocator
        if name is None or allocator is None:
            raise ValueError(
                f"update_and_allocate: no adapter is trainable (inference_mode) of {sorted(self.peft_config)}"
            )
        config: Any = self.peft_config[name]
        end = config.total_step - config.tfinal
        layers = layers_with(self.model, name)
        is_cut = any(layer.r[name] != config.init_r for layer in layers.values())
        if is_cut and global_step > end:
            return  # what was cut is not there
        if is_cut:
            raise ValueError(
                f"update_and_allocate: adapter {name!r} has its ranks cut already. To go on with its schedule, make "
                "one by get_peft_model with its configuration, and load_adapter the file into that"
            )
        if global_step > end:
            if config.rank_pattern is None:
                raise ValueError(f"update_and_allocate: no ranks were cut by step {end}: call it at each step")
            allocator.mask_using_rank_pattern(self.model, config.rank_pattern)
            return
        _, pattern = allocator.update_and_allocate(self.model, global_step, force_mask=global_step == end)
        if pattern:
            config.rank_pattern = as_saved(pattern, name)
        if global_step == end:
            allocator.reset_ipt()

    # -- ranks that are cut for good ------------------------------------------------------------------------------

    def resize_modules_by_rank_pattern(
        self, rank_pattern: Mapping[str, list[bool] | torch.Tensor], adapter_name: str
    ) -> None:
        """Takes the triplets that a pattern does not keep out of an adapter, as loading a file does.

        The parameters are new ones, in the dtype that they had (PEFT's take the base layer's, which rounds float32
        adapters of a 16-bit base): an optimizer has to be made after it.

        Args:
            rank_pattern: `<module>.lora_E` or `<module>.lora_E.<adapter>` -> a bool for each triplet, as a list or a
                tensor.
            adapter_name: One of the adapters here.

        Raises:
            TypeError: A value is neither a list nor a tensor.
            ValueError: No such adapter; a name that is no layer with it; another number of triplets than it has; or it
                is merged.
        """
        self._check_names([adapter_name])
        layers = layers_with(self.model, adapter_name)
        wanted = {}
        for name, kept in rank_pattern.items():
            if not isinstance(kept, (list, torch.Tensor)):
                raise TypeError(f"rank_pattern[{name!r}] must be a list or a tensor, got {type(kept).__name__}")
            module = module_of(name, adapter_name)
            if module not in layers:
                raise ValueError(f"rank_pattern: {name!r} is of no layer with adapter {adapter_name!r}")
            wanted[module] = [bool(each) for each in (kept if isinstance(kept, list) else kept.view(-1).tolist())]
            layers[module].check_resize(adapter_name, wanted[module])
        for module, each in wanted.items():
            layers[module].resize(adapter_name, each)

    def take_pattern(
        self, tensors: Mapping[str, torch.Tensor], adapter_name: str, saved: Any
    ) -> Mapping[str, torch.Tensor]:
        """What to load into an adapter that is here of a file with the configuration `saved`, whose `rank_pattern` it
        takes over: all of the adapter's triplets, those that were cut with E = 0 (see tuners/adalora/files.py)."""
        config: Any = self.peft_config[adapter_name]
        found = with_all_rows(self.model, tensors, adapter_name, saved)
        config.rank_pattern = None if saved.rank_pattern is None else as_saved(saved.rank_pattern, adapter_name)
        return found


def _takes_part(layer: Any, name: str) -> bool:
    return not (layer._disable_adapters or layer.merged_adapters) and name in layer.active_adapters
