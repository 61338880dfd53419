# The kernels in baseline, f64, see kernels.pyx.
include "kernels.pyx"
