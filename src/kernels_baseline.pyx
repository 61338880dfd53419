# The kernels for every processor of this architecture; the flags are set in setup.py.
include "kernels.pyx"
