"""The rank that an adapter's scaling is divided by: a parameter in PEFT's state dicts, and a number on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Known = tuple[torch.Tensor, int | None, float]


class RankNumbers(nn.ParameterDict):
    """PEFT's `ranknum`: for each adapter a parameter [1], float32 and frozen; `value` has its number on the host.

    A forward divides by it, and must not wait for a device to tell it. So what is on the host counts. It is read again
    when a parameter is put in or loaded, and, outside of torch.compile, when its version says that it was changed in
    place. What only moves it, `to(device)` or FSDP's gathering, leaves the number as it is; casting does too, so that a
    model in bfloat16, which has no 257, divides by 257. Writing through `.data` is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Known] = {}

    def value(self, name: str) -> float:
        """The number of an adapter."""
        found = self._known[name]
        if torch.compiler.is_compiling():
            return found[2]
        parameter: Any = self._parameters[name]
        if parameter is found[0] and _version(parameter) != found[1]:
            return self._read(name)
        return found[2]

    def _read(self, name: str) -> float:
        parameter: Any = self._parameters[name]
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        number = self._known[name][2] if whole.is_meta else float(whole)
        self._known[name] = (parameter, _version(parameter), number)
        return number

    def put(self, name: str, number: float, device: torch.device | None) -> None:
        """Sets an adapter's number, its parameter on `device`, or on the CPU, since it has a value whatever others are
        loaded later."""
        where = "cpu" if device is None or device.type == "meta" else device
        made = nn.Parameter(torch.full((1,), number, dtype=torch.float32, device=where), requires_grad=False)
        self._known[name] = (made, _version(made), number)
        super().__setitem__(name, made)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        value = self._parameters[key].requires_grad_(False)
        self._known.setdefault(key, (value, None, 0.0))
        self._read(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._known.pop(key, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self:
            if f"{prefix}{name}" in state_dict:
                self._read(name)


def _version(parameter: torch.Tensor) -> int | None:
    """Changes when it is changed in place; None of an inference tensor, which does not tell."""
    return None if parameter.is_inference() else parameter._version
