# The kernels for x86-64-v4 (AVX-512); the flags are set in setup.py.
include "kernels.pyx"
