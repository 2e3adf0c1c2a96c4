"""A GPU that does nothing: for the time that the host takes around launches, on a machine that has none.

Tensors lie in the CPU's memory, which nothing touches, and say that they are on a GPU; kernels are compiled for sm_90
and launched by Triton's own launcher, over a driver library whose functions return at once; cuBLAS's products, and
copies into memory that is given, are left out. What the driver and the GPU take is not in such a time, nor what torch's
own allocator on a GPU takes.

`install` changes torch for the rest of the process, for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CUDA = torch.device("cuda", 0)
ARCH = 90
NAME = "a GPU that does nothing"
PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9, name=NAME)
# What Triton's driver.c calls, and what it is to find written where a pointer says.
DRIVER = r"""
#include <string.h>
#include "cuda.h"
#define NOTHING { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) NOTHING
CUresult cuCtxSetLimit(CUlimit l, size_t v) NOTHING
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
    *v = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 132;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) NOTHING
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) NOTHING
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "no driver"; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) NOTHING
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)1; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *i) { *m = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) NOTHING
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = 0; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *t, CUtensorMapDataType d, cuuint32_t r, void *g, const cuuint64_t *gd, const cuuint64_t *gs,
    const cuuint32_t *bd, const cuuint32_t *es, CUtensorMapInterleave i, CUtensorMapSwizzle sw,
    CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o
) { memset(t, 0, sizeof *t); return CUDA_SUCCESS; }
"""


def compiler() -> str | None:
    """The C compiler that the driver library, and Triton's launcher, are built by; None if there is none."""
    return os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def install() -> None:
    """Have torch and Triton see a GPU that does nothing. Before this, Triton must not have looked for one.

    Raises:
        RuntimeError: there is no C compiler, or kernels are set to run in Triton's interpreter.
    """
    if compiler() is None:
        raise RuntimeError("no C compiler: Triton builds its launcher with one (set CC)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels are not launched")
    _keep_memory()
    _change_torch()
    _give_triton_a_driver()


def _keep_memory() -> None:
    """Have the C library keep what is freed, as torch's allocator on a GPU does, in place of asking the system anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; its numbers for "no memory of its own mapping", and "give back no more than"
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def _change_torch() -> None:
    changed: Any = torch.Tensor
    changed.device = property(lambda _: CUDA)
    changed.is_cpu = property(lambda _: False)
    changed.is_cuda = property(lambda _: True)
    for name in ("new_empty", "new_empty_strided", "new_zeros"):
        setattr(changed, name, _ignoring_device(getattr(changed, name)))
    changed.addmm_ = lambda out, *_, **__: out
    module: Any = torch
    for name in ("empty", "empty_strided", "zeros", "ones", "arange", "full", "randint"):
        setattr(module, name, _ignoring_device(getattr(module, name)))
    module.mm = module.addmm = lambda *_, out=None, **__: out
    cat = module.cat
    module.cat = lambda parts, *args, out=None: cat(parts, *args) if out is None else out
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.device = lambda _: contextlib.nullcontext()
    cuda.get_device_capability = lambda *_: (ARCH // 10, ARCH % 10)
    cuda.get_device_properties = lambda *_: PROPERTIES
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)
    within: Any = torch._C
    within._cuda_getCurrentRawStream = lambda _: 0


def _ignoring_device(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, device=None, **options: function(*args, **options)


def _give_triton_a_driver() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    folder = Path(tempfile.mkdtemp(prefix="peftkern-no-gpu-"))
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    include = Path(nvidia.__file__).parent / "include"
    command = [str(compiler()), "-shared", "-fPIC", "-O2", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # by its name a later dlopen finds the one that is loaded
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # its own asks torch for CUDA's functions
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda *_: (ARCH // 10, ARCH % 10)
            self.get_current_stream = self.get_current_device = lambda *_: 0
            self.set_current_device = lambda _: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", ARCH, 32)

    triton.runtime.driver.set_active(Driver())
