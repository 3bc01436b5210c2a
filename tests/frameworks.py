"""The array frameworks that the suite calls with: how to make their arrays of NumPy's, and back."""

import ctypes
import importlib.util
import os

import numpy as np
from strategies import EMULATED, SIMULATED

import llsa_np as llsa


class NumPy:
    name = "numpy"
    has_operations = True

    @staticmethod
    def array(x):
        return x

    @staticmethod
    def to_numpy(x):
        return x


class Numba:
    """numba.cuda's device arrays; in the simulator with the memory order of the NumPy array."""

    name = "numba"
    has_operations = False

    @staticmethod
    def array(x):
        from llsa_np.gpu.numba_cuda.cuda import to_device

        if SIMULATED:
            from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

            return FakeCUDAArray(x)
        return to_device(x)

    @staticmethod
    def to_numpy(x):
        from llsa_np.gpu.numba_cuda.cuda import to_host

        return to_host(x)


class CuPy:
    """CuPy's arrays, with the memory order of the NumPy array."""

    name = "cupy"
    has_operations = True

    @staticmethod
    def array(x):
        import cupy

        if x.size == 0:
            return cupy.empty(x.shape, x.dtype)
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = cupy.asarray(np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8))
        first = x.__array_interface__["data"][0] - low
        return cupy.ndarray(x.shape, x.dtype, memptr=memory.data + first, strides=x.strides)

    @staticmethod
    def to_numpy(x):
        import cupy

        return cupy.asnumpy(x)


class Torch:
    """PyTorch's tensors, with the memory order of the NumPy array; where a stride is negative, which torch does not
    have, in plain order."""

    name = "torch"
    has_operations = True
    share = 3
    """One in so many of the cases that a property draws: on the CPU NumPy's arrays test the reference."""
    device = "cpu"

    @classmethod
    def array(cls, x):
        import torch

        from llsa_np.adapters.pytorch import TORCH_TYPES

        dtype = TORCH_TYPES.get(x.dtype.name)
        if x.size == 0 or dtype is None:
            return torch.from_numpy(x.copy()) if dtype is None else torch.empty(x.shape, dtype=dtype, device=cls.device)
        if min(x.strides, default=0) < 0:
            x = x.copy()
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8).copy()
        flat = torch.from_numpy(memory).to(cls.device).view(dtype)
        return flat.as_strided(x.shape, [stride // x.dtype.itemsize for stride in x.strides])

    @staticmethod
    def to_numpy(x):
        from llsa_np.adapters.pytorch import adapter

        return adapter.to_numpy(x)


class TorchOnTheGPU(Torch):
    share = 1
    device = "cuda"


class Jax:
    """JAX's arrays, which are dense, in 64 bits too."""

    name = "jax"
    has_operations = True
    share = 6
    """One in so many of the cases that a property draws: XLA compiles three programs for each."""
    platform = "cpu"

    @classmethod
    def array(cls, x):
        import jax

        return jax.device_put(np.ascontiguousarray(x), jax.local_devices(backend=cls.platform)[0])

    @staticmethod
    def to_numpy(x):
        return np.asarray(x)


class JaxOnTheGPU(Jax):
    platform = "cuda"


def has_jax():
    """With 64 bits, and on a GPU without taking most of its memory from the other processes."""
    if SIMULATED or EMULATED or importlib.util.find_spec("jax") is None:
        return False
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    import jax

    jax.config.update("jax_enable_x64", True)
    return True


HAS_JAX = has_jax()
HAS_TORCH = not SIMULATED and not EMULATED and importlib.util.find_spec("torch") is not None
HAS_CUPY = not SIMULATED and not llsa.backends()["numba_cuda"] and importlib.util.find_spec("cupy") is not None
ON_THE_GPU = [*([TorchOnTheGPU] if HAS_TORCH else []), *([JaxOnTheGPU] if HAS_JAX else [])]
OF_BACKEND = {
    "numpy": [NumPy, *([Torch] if HAS_TORCH else []), *([Jax] if HAS_JAX else [])],
    "cupy_raw": [NumPy] if EMULATED else [CuPy, Numba, *ON_THE_GPU],
    "numba_cuda": [Numba] if SIMULATED else [Numba, *([CuPy] if HAS_CUPY else []), *ON_THE_GPU],
}
"""The frameworks whose arrays each backend is called with."""
