"""A framework that nothing names, of few lines: arrays over anyone's memory, on the host or on a GPU.

They are exported by DLPack with whatever offset, strides and device they are said to have, from a stream of their own.
"""

import ctypes

import numpy as np

KINDS = {"f": 2, "i": 0, "V": 4}
"""NumPy's kinds of types -> DLPack's; V is ml_dtypes' bfloat16."""
LEGACY_STREAM = 1
"""CUDA's number for the default stream."""


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)))


lent = {}
"""What is exported and not given back yet, by address."""
give_back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda address: lent.pop(address) and None)
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Array:
    """Over an array of NumPy's or CuPy's. device: DLPack's pair, as it says. has_strides: False for a null pointer in
    their place, which stands for an array without gaps."""

    def __init__(self, memory, device=None, has_strides=True, stream=None):
        on_host = isinstance(memory, np.ndarray)
        self.memory, self.has_strides, self.stream = memory, has_strides, stream
        self.device = device or ((1, 0) if on_host else (2, memory.device.id))
        self.pointer = memory.ctypes.data if on_host else memory.data.ptr
        self.asked = []
        """Streams that those who read it work on."""

    @property
    def dtype(self):
        return self.memory.dtype

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **_):
        self.asked.append(stream)
        if self.stream is not None:
            import cupy

            done = self.stream.record()
            cupy.cuda.runtime.streamWaitEvent(stream or LEGACY_STREAM, done.ptr, 0)
        x = self.memory
        shape = (ctypes.c_int64 * x.ndim)(*x.shape)
        strides = (ctypes.c_int64 * x.ndim)(*(stride // x.itemsize for stride in x.strides))
        offset = self.pointer % 4096  # as of an array inside of a page
        place = (self.device[0], self.device[1] or 0)
        kind = Tensor(self.pointer - offset, place, x.ndim, KINDS[x.dtype.kind], 8 * x.itemsize, 1, shape)
        kind.byte_offset = offset
        if self.has_strides:
            kind.strides = strides
        managed = Managed(kind, None, give_back)
        lent[ctypes.addressof(managed)] = (managed, shape, strides, x)
        return new_capsule(ctypes.addressof(managed), b"dltensor", None)


def from_dlpack(x):
    """An array of this framework in the memory of another's."""
    if x.__dlpack_device__()[0] == 1:
        return Array(np.from_dlpack(x))
    import cupy

    return Array(cupy.from_dlpack(x))
