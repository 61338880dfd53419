# The kernels in v4, f64, see kernels.pyx.
include "kernels.pyx"
