# The kernels for any processor (128-bit vectors); the flags are set in setup.py.
include "kernels.pyx"
