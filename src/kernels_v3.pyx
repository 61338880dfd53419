# The kernels for x86-64-v3 (AVX2); the flags are set in setup.py.
include "kernels.pyx"
