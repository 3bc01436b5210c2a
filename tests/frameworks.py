"""The array frameworks that the suite calls with: how to make their arrays of NumPy's, and back."""

import ctypes
import importlib.util

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


HAS_CUPY = not SIMULATED and not llsa.backends()["numba_cuda"] and importlib.util.find_spec("cupy") is not None
OF_BACKEND = {
    "numpy": [NumPy],
    "cupy_raw": [NumPy] if EMULATED else [CuPy, Numba],
    "numba_cuda": [Numba] if SIMULATED else [Numba, *([CuPy] if HAS_CUPY else [])],
}
"""The frameworks whose arrays each backend is called with."""
