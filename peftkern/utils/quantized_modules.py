"""Linear layers that hold a frozen quantized weight, ours and bitsandbytes'.

`Linear4bit` and `Linear8bit` stand where bitsandbytes' `Linear4bit` and `Linear8bitLt` would, without that package: the
same bytes under the same state-dict names (see `quantized_files`). `weight_of` reads the weight of either kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import nn

from peftkern.ops import quantize_4bit, quantize_8bit
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.utils.bitsandbytes_weights import kept_by, of_linear4bit, of_linear8bit
from peftkern.utils.linear_layers import rows_of
from peftkern.utils.quantized_files import (
    QuantizedFileError,
    is_quantized,
    quantized_keys,
    read_quantized,
    stored_as,
    write_quantized,
)
from peftkern.weights import NESTED_BLOCKSIZE, Weight4bit, Weight8bit

Quantized = Weight4bit | Weight8bit


class _QuantizedLinear(nn.Module):
    """What both layers share.

    Attributes:
        source_cls: The class of the dense layer whose place it takes, under transformers' name for it; None where
            nobody knows.

    The statistics are plain attributes: they move with the module as buffers would, but keep their dtype whatever it
    is cast to, and DDP does not broadcast them in every forward.
    """

    _statistics: tuple[str, ...]
    in_features: int
    out_features: int
    compute_dtype: torch.dtype | None
    weight: nn.Parameter
    bias: nn.Parameter | None
    source_cls: type[nn.Module] | None = None

    def quantized_weight(self) -> Quantized:
        """The weight, by reference.

        Raises:
            ValueError: the parameter or a statistic was replaced by something that does not fit.
        """
        attributes = self.__dict__
        weight = attributes["_parameters"].get("weight")
        # A fake or distributed tensor has no address to know it by.
        if type(weight) is not nn.Parameter or weight.dtype is not self._storage or torch.compiler.is_compiling():
            return self._put_together()
        kept = kept_by(self)
        if kept.still(weight.data_ptr(), *[attributes[name] for name in self._statistics]):
            return kept.weight
        return kept.hold(self._put_together())

    @property
    def _storage(self) -> torch.dtype:
        """The dtype that the weight's bytes are held as."""
        raise NotImplementedError(type(self).__name__)

    def _put_together(self) -> Quantized:
        raise NotImplementedError(type(self).__name__)

    def _take(self, weight: Any, *, keep_parameter: bool) -> None:
        """Hold the tensors of `weight`; a parameter that is kept (an optimizer or a wrapper may know it) gets them."""
        raise NotImplementedError(type(self).__name__)

    def _take_data(self, data: torch.Tensor, keep_parameter: bool) -> None:
        old = self._parameters.get("weight")
        # From the meta device to a real one a parameter cannot be changed in place.
        if keep_parameter and old is not None and torch._has_compatible_shallow_copy_type(old, data):
            old.data = data
        else:
            self.weight = nn.Parameter(data, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`y = x dequantize(W)^T + bias`, computed in `compute_dtype` (x's where that is None), in x's dtype."""
        dtype = x.dtype
        check_is_float(dtype)
        if self.compute_dtype is not None and dtype != self.compute_dtype:
            x = x.to(self.compute_dtype)
        y = linear_quantized(x, self.quantized_weight(), self.bias)
        # Under autocast y has autocast's dtype, whatever x had; bitsandbytes gives x's.
        return y if y.dtype == dtype else y.to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _QuantizedLinear:
        weight = cast(nn.Parameter, self._parameters.pop("weight"))
        try:
            super()._apply(fn, recurse)
        finally:
            bias = self._parameters.pop("bias")
            self._parameters["weight"], self._parameters["bias"] = weight, bias  # the order of their names counts
        data = weight.data
        moved = _moved(data, fn)
        if moved is not data:
            self._take_data(moved, keep_parameter=True)
        for name in self._statistics:
            statistic = getattr(self, name)
            if statistic is not None:
                setattr(self, name, _moved(statistic, fn))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in write_quantized(self.quantized_weight(), prefix).items():
            if key != prefix + "weight":
                destination[key] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = quantized_keys(prefix)
        held = {key: state_dict[key] for key in mine if key in state_dict}
        rest = {key: value for key, value in state_dict.items() if key.startswith(prefix) and key not in held}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key != prefix + "weight"]
        if not held:
            missing_keys += [key for key in missing if key == prefix + "weight"]
            return
        try:
            weight = self._read(held, prefix)
        except QuantizedFileError as error:
            error_msgs.append(str(error))
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            weight = _copied(weight, self.weight.device)
        self._take(weight, keep_parameter=not local_metadata.get("assign_to_params_buffers", False))

    def _read(self, held: dict[str, torch.Tensor], prefix: str) -> Quantized:
        """The weight in a part of a state dict, if it fits this layer."""
        if not is_quantized(held, prefix):
            reason = "a dense weight: quantize the model that it comes from by peftkern.quantize_model"
            raise QuantizedFileError("state_dict", reason, prefix + "weight")
        weight = read_quantized(held, prefix, dtype=self.weight_dtype)
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected or not isinstance(weight, self._format):
            reason = (
                f"expected a {self._format.__name__} of shape {list(expected)}, "
                f"got a {type(weight).__name__} of shape {list(weight.shape)}"
            )
            raise QuantizedFileError("state_dict", reason, prefix + "weight")
        return weight

    _format: type[Any]
    weight_dtype: torch.dtype


class Linear4bit(_QuantizedLinear):
    """A linear layer with a frozen weight in bitsandbytes' 4-bit format; its values are zeros until some are loaded.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one (zeros until loaded; not frozen).
        compute_dtype: what x is cast to for the product; None for x's own dtype.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale.
        double_quant: whether scales are quantized too.
        quant_storage: the dtype that the packed bytes are held as.
        dtype: what the weight dequantizes to by default, and the bias's; torch's default dtype if None.
        device: where.

    Attributes:
        weight: Parameter [bytes / itemsize, 1] of `quant_storage`, never trained.
        absmax, code, nested_absmax, nested_code, offset: as in `peftkern.weights.Weight4bit`.
        blocksize, quant_type, quant_storage, weight_dtype, compute_dtype, in_features, out_features, bias.
    """

    _statistics = ("absmax", "code", "nested_absmax", "nested_code", "offset")
    _format = Weight4bit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.quant_storage = quant_storage
        numel = in_features * out_features
        blocks = -(-numel // blocksize)

        def zeros(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        nested = (zeros(-(-blocks // NESTED_BLOCKSIZE)), zeros(256), zeros(1)) if double_quant else (None, None, None)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._take(
            Weight4bit(
                zeros(-(-numel // 2), torch.uint8),
                zeros(blocks, torch.uint8 if double_quant else torch.float32),
                zeros(16),
                torch.Size((out_features, in_features)),
                blocksize,
                quant_type,
                dtype,
                *nested,
            ),
            keep_parameter=False,
        )
        self.register_parameter("bias", nn.Parameter(zeros(out_features, dtype)) if bias else None)

    @classmethod
    def from_weight(
        cls,
        weight: Weight4bit,
        bias: torch.Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> Linear4bit:
        """A layer that holds `weight` by reference, and `bias` (itself, if it is a parameter)."""
        N, K = weight.shape
        made = cls(K, N, False, compute_dtype, quant_storage=torch.uint8, dtype=weight.dtype, device="meta")
        made.quant_storage = quant_storage
        made._take(weight, keep_parameter=False)
        made.bias = _as_parameter(bias)
        return made

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> Linear4bit:
        """`linear` (an `nn.Linear`, or a Conv1D, whose weight is turned first) with its weight quantized, on `device`
        (linear's if None); it shares the bias, if not moved."""
        dense = rows_of(linear)
        weight = quantize_4bit(dense.to(device or dense.device), quant_type, blocksize, double_quant)
        bias = _on(linear.bias, weight.device)  # type: ignore[arg-type]
        made = cls.from_weight(weight, bias, compute_dtype=compute_dtype, quant_storage=quant_storage)
        made.source_cls = type(linear)
        return made

    def _take(self, weight: Weight4bit, *, keep_parameter: bool) -> None:
        self._take_data(stored_as(weight.packed, self.quant_storage), keep_parameter)
        self.absmax, self.code, self.offset = weight.absmax, weight.code, weight.offset
        self.nested_absmax, self.nested_code = weight.nested_absmax, weight.nested_code
        self.blocksize, self.quant_type, self.weight_dtype = weight.blocksize, weight.quant_type, weight.dtype

    @property
    def _storage(self) -> torch.dtype:
        return self.quant_storage

    def _put_together(self) -> Weight4bit:
        weight = self.weight
        if weight.dtype != self.quant_storage:
            raise ValueError(
                f"weight: expected the packed bytes as {self.quant_storage}, got {weight.dtype}: something cast them "
                "as if they were numbers, and they are lost"
            )
        return Weight4bit(
            weight.view(-1).view(torch.uint8),
            self.absmax,
            self.code,
            torch.Size((self.out_features, self.in_features)),
            self.blocksize,
            self.quant_type,
            self.weight_dtype,
            self.nested_absmax,
            self.nested_code,
            self.offset,
        )

    def _read(self, held: dict[str, torch.Tensor], prefix: str) -> Quantized:
        weight = super()._read(held, prefix)
        self.quant_storage = held[prefix + "weight"].dtype
        return weight

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.nested_absmax is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}{nested}, compute_dtype={self.compute_dtype}"
        )


class Linear8bit(_QuantizedLinear):
    """A linear layer with a frozen weight in LLM.int8's format; its values are zeros until some are loaded.

    x stays in 16 or 32 bits: there is no outlier threshold and no int8 product (see `peftkern.weights.Weight8bit`).

    Args:
        in_features, out_features: K and N.
        bias: whether there is one (zeros until loaded; not frozen).
        compute_dtype: what x is cast to for the product; None for x's own dtype.
        dtype: what the weight dequantizes to by default, and the bias's; torch's default dtype if None.
        device: where.

    Attributes:
        weight: Parameter, int8 [N, K], never trained.
        SCB: float32 [N], each row's largest magnitude.
        weight_dtype, compute_dtype, in_features, out_features, bias.
    """

    _statistics = ("SCB",)
    _format = Weight8bit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        dtype = torch.get_default_dtype() if dtype is None else dtype
        data = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.zeros(out_features, dtype=torch.float32, device=device)
        self._take(Weight8bit(data, scale, dtype), keep_parameter=False)
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_weight(
        cls, weight: Weight8bit, bias: torch.Tensor | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> Linear8bit:
        """A layer that holds `weight` by reference, and `bias` (itself, if it is a parameter)."""
        N, K = weight.shape
        made = cls(K, N, False, compute_dtype, dtype=weight.dtype, device="meta")
        made._take(weight, keep_parameter=False)
        made.bias = _as_parameter(bias)
        return made

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Linear8bit:
        """`linear` (an `nn.Linear`, or a Conv1D, whose weight is turned first) with its weight quantized, on `device`
        (linear's if None); it shares the bias, if not moved.

        The weight is rounded to float16 first where that holds it, as `Linear8bitLt` does, so that the bits are its.
        """
        dense = rows_of(linear)
        dense = dense.to(device or dense.device)
        half = dense.to(torch.float16)
        weight = quantize_8bit(half if bool(half.isfinite().all()) else dense)
        weight = Weight8bit(weight.data, weight.scale, dense.dtype)
        bias = _on(linear.bias, weight.device)  # type: ignore[arg-type]
        made = cls.from_weight(weight, bias, compute_dtype=compute_dtype)
        made.source_cls = type(linear)
        return made

    def _take(self, weight: Weight8bit, *, keep_parameter: bool) -> None:
        self._take_data(weight.data, keep_parameter)
        self.SCB, self.weight_dtype = weight.scale, weight.dtype

    @property
    def _storage(self) -> torch.dtype:
        return torch.int8

    def _put_together(self) -> Weight8bit:
        return Weight8bit(self.weight.detach(), self.SCB, self.weight_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"int8, compute_dtype={self.compute_dtype}"
        )


def _as_parameter(bias: torch.Tensor | None) -> nn.Parameter | None:
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias, requires_grad=False)


def _on(bias: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return bias if bias is None or bias.device == device else bias.detach().to(device)


def _moved(t: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `fn` of `Module._apply` makes of t's bytes: another place, perhaps, but never another dtype."""
    flat = t.detach().contiguous().reshape(-1).view(torch.uint8)
    moved = fn(flat)
    if moved is flat:
        return t
    if moved.dtype != torch.uint8:  # Module.type(dtype) casts integers too
        moved = flat.to(moved.device)
    return moved.view(t.dtype).view(t.shape)


def _copied(weight: Quantized, device: torch.device) -> Quantized:
    """A copy of the weight on `device`."""
    copies: dict[str, Any] = {
        field.name: value.to(device, copy=True)
        for field in fields(weight)
        if isinstance(value := getattr(weight, field.name), torch.Tensor)
    }
    return replace(weight, **copies)


def check_is_float(dtype: torch.dtype) -> None:
    """Raise for an input of a quantized layer that is no floating-point tensor: casting it to the layer's dtype, as
    bitsandbytes does, would hide that a model has rounded it (LongT5 and Switch cast x to `wo.weight.dtype`: uint8)."""
    if not dtype.is_floating_point:
        raise TypeError(
            f"x: expected a floating-point tensor for a quantized layer, got {dtype}: models may cast x to the dtype "
            "of this layer's weight; if so leave the layer dense (skip_modules of quantize_model)"
        )


# --- the weight of a module ------------------------------------------------------------------------------------------


def holds_quantized(module: nn.Module) -> bool:
    """Whether `weight_of` knows the layer, be its weight quantized yet or not: nothing is read."""
    attributes = module.__dict__
    return (
        isinstance(module, _QuantizedLinear)
        or ("quant_state" in attributes and "compute_dtype" in attributes)
        or ("state" in attributes and hasattr(attributes["state"], "has_fp16_weights"))
    )


def weight_of(module: nn.Module) -> Quantized | None:
    """The frozen quantized weight of a linear layer, by reference; None for any other module.

    Known are `Linear4bit` and `Linear8bit` of this module, and bitsandbytes' `Linear4bit` and `Linear8bitLt` and their
    subclasses, by their attributes: bitsandbytes is not imported. Cheap enough for every forward: what was put together
    is kept with the module until one of its tensors is replaced.

    Raises:
        ValueError: bitsandbytes has not quantized the layer yet, or its state does not fit the weight.

    Warns:
        UserWarning: bitsandbytes repacked the weight for its CPU kernel, which rounds the scales: it is put back, but
            for that rounding.
    """
    if isinstance(module, _QuantizedLinear):
        return module.quantized_weight()
    attributes = module.__dict__
    if "quant_state" in attributes and "compute_dtype" in attributes:
        return of_linear4bit(module)
    if "state" in attributes and hasattr(attributes["state"], "has_fp16_weights"):
        return of_linear8bit(module)
    return None
