"""The extension modules; everything else is in pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = ["src/model.pxd", "src/threads.h", "src/exponential.h", "src/kernels.pyx", *map(str, Path("src").glob("*.pxi"))]
# -ffp-contract=off: products and sums are fused where the kernels say so and nowhere else (see src/kernels.pyx).
# -fno-trapping-math: nobody asks which exceptions were raised; without it no loop that chooses by a comparison, like those of
# the activations, becomes one over vectors.  The other kernels are vectorised by hand; what -ftree-slp-vectorize makes of
# the sums of lanes is slower than what is written.
PORTABLE = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-slp-vectorize"]
FLAGS = ["/O2"] if sys.platform == "win32" else PORTABLE
# A kernel's inline functions take numbers that become constants where they are called (ranks, counts, what to do with the
# result); left to its own measure, the compiler makes one general function of some: 10 to 15 % of a step.
INLINE = [] if sys.platform == "win32" else [("CYTHON_INLINE", "inline __attribute__((always_inline))")]
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32":
    ISA_FLAGS["v3"] = ["-march=x86-64-v3"]
    ISA_FLAGS["v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

extensions = [
    Extension(
        "modprop_fast.core",
        ["src/core.pyx"],
        depends=["modprop_fast/include/modprop_fast.h", "src/threads.h"],
        include_dirs=["src", "modprop_fast/include", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=FLAGS,
    )
] + [
    Extension(
        f"modprop_fast._kernels_{isa}_f{bits}",
        [f"src/kernels_{isa}_f{bits}.pyx"],
        depends=SOURCES,
        include_dirs=["src"],
        define_macros=[*INLINE, ("MPF_BITS", str(bits))],
        extra_compile_args=FLAGS + flags,
    )
    for isa, flags in ISA_FLAGS.items()
    for bits in (32, 64)
]

DIRECTIVES = {
    "language_level": 3,
    "cdivision": True,  # the kernels index plain pointers: Python's division is the only check there is to turn off
    "auto_pickle": False,  # an engine is addresses
    "autotestdict": False,
}

setup(
    ext_modules=cythonize(extensions, include_path=["src", "."], compiler_directives=DIRECTIVES),
    options={"build_ext": {"parallel": min(os.cpu_count() or 1, len(extensions))}},
)
