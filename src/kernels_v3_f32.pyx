# The kernels in v3, f32, see kernels.pyx.
include "kernels.pyx"
