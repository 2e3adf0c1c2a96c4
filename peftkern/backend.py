"""The one setting of the library: which backend operations may take, and what the devices here can do.

`use_backend` is read when an operation is called; backward follows its forward, whatever thread runs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
BACKENDS = ("auto", "triton", "torch", "unfused")
ENVIRONMENT_VARIABLE = "PEFTKERN_BACKEND"
# Numbers that stand for AMD architectures beside CUDA's compute capabilities (80, 90, ...).
AMD_ARCHITECTURES = {"gfx942": 942, "gfx1100": 1100}


@dataclass(frozen=True, slots=True, eq=False)  # remembered for each device, so identity is equality, and quicker
class DeviceInfo:
    """What a plan needs to know of a device.

    Attributes:
        type: "cpu", "cuda" (NVIDIA and AMD alike, as in torch) or another torch device type.
        arch: compute capability times ten (80, 89, 90, ...), 942 or 1100 for gfx942 and gfx1100, 0 where there is none.
        triton: why Triton kernels cannot run there, or "" if they can.
        scalar_matmul: dtypes for which it has no matrix instructions, so that torch multiplies them in a scalar loop.
    """

    type: str
    arch: int = 0
    triton: str = ""
    scalar_matmul: tuple[torch.dtype, ...] = ()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend: ContextVar[str | None] = ContextVar("peftkern_backend", default=None)


def current_backend() -> str:
    """The backend in force here: that of the innermost `use_backend`, else $PEFTKERN_BACKEND, else "auto"."""
    return _backend.get() or _environment_backend()


@functools.cache
def _environment_backend() -> str:
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}")


class use_backend:  # lower case, as torch.no_grad and torch.set_grad_enabled are
    """Run operations on `name` from this call on; `with use_backend(name):` within the block, as a decorator within
    the function. It holds for the thread that calls it. Backward computes a checkpointed forward again, on a GPU in a
    thread of autograd's: set $PEFTKERN_BACKEND there, or call this inside of what is checkpointed (a forward that is
    computed again on another path is refused, if not reentrant).

    Args:
        name: "auto" lets the plan choose the fastest path, "triton" asks for Triton kernels and raises where they
            cannot run, "torch" asks for the plain PyTorch path. "unfused" is that for operations, and has adapted
            layers call their base layer and their adapters' modules one after another, as PEFT does: more memory and
            time, and gradients of gradients.

    Raises:
        ValueError: for another name.
    """

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "use_backend(name)")
        self._before = _backend.set(self._name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _backend.reset(self._before)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        _backend.reset(self._before)  # where it decorates, nothing runs yet

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> T:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return within


@torch.compiler.assume_constant_result
def backend_in_force() -> str:
    """`current_backend()`, taken as a constant by torch.compile."""
    return current_backend()


@functools.cache
def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"


def interpreter_is_on() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter (by Triton's own reading of the variable)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _cpu_scalar_matmul() -> tuple[torch.dtype, ...]:
    """16-bit dtypes that oneDNN, which torch multiplies matrices with, has no kernels for on this CPU."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return tuple(dtype for dtype, check in checks.items() if not getattr(torch.ops.mkldnn, check)())


@functools.cache
def _device_info(device: torch.device) -> DeviceInfo:
    device_type, index = device.type, device.index
    missing = _triton_missing()
    if device_type == "cpu":
        if not missing and not interpreter_is_on():
            missing = "Triton has no CPU backend (TRITON_INTERPRET=1 runs its interpreter, slowly)"
        return DeviceInfo("cpu", 0, missing, _cpu_scalar_matmul())
    if device_type != "cuda":
        return DeviceInfo(device_type, 0, missing or f"no kernels for device type {device_type}")
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        arch = AMD_ARCHITECTURES.get(name, 0)
        return DeviceInfo("cuda", arch, missing or ("" if arch else f"{name} has not been compiled for"))
    major, minor = torch.cuda.get_device_capability(index)
    arch = 10 * major + minor
    return DeviceInfo("cuda", arch, missing or ("" if arch >= 80 else f"sm_{arch} is older than sm_80"))


@torch.compiler.assume_constant_result
def device_info(device: torch.device) -> DeviceInfo:
    """What the plan needs to know of `device`; remembered for each device."""
    return _device_info(device)
