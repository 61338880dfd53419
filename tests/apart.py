"""Arrays for a run under AddressSanitizer."""

import ctypes

import numpy as np


class Apart:
    """Zeroed bytes on a 64-byte boundary, an allocation of their own that ends where they end."""

    libc = ctypes.CDLL(None)

    def __init__(self, size):
        self.at = ctypes.c_void_p()
        assert not self.libc.posix_memalign(ctypes.byref(self.at), ctypes.c_size_t(64), ctypes.c_size_t(size))
        ctypes.memset(self.at, 0, size)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (self.at.value, False)}

    def __del__(self, free=libc.free):
        free(self.at)


def aligned(shapes, dtype, page=64):
    """As `core.aligned`, but no array has a neighbour that hides an overrun from the sanitizer, nor begins with a page."""
    sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, shape in shapes.items()}
    blocks = {name: np.asarray(Apart(size)) if size else np.zeros(0, np.uint8) for name, size in sizes.items()}
    return {name: blocks[name].view(dtype).reshape(shape) for name, shape in shapes.items()}
