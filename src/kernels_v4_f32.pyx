# The kernels in v4, f32, see kernels.pyx.
include "kernels.pyx"
