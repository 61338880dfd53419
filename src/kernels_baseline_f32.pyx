# The kernels in baseline, f32, see kernels.pyx.
include "kernels.pyx"
