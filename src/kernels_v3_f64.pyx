# The kernels in v3, f64, see kernels.pyx.
include "kernels.pyx"
