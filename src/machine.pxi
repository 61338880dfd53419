# The processor and its compiler: instruction sets, subnormal numbers.  Included by core.pyx.

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED  /* reference counts are split between threads and say little */
    #define MPF_COUNTS_TELL 0
    #else
    #define MPF_COUNTS_TELL 1
    #endif
    #if defined(__clang__)
    #define MPF_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define MPF_COMPILER "gcc " __VERSION__
    #else
    #define MPF_COMPILER "unknown compiler"
    #endif
    /* Subnormal numbers are flushed to zero while kernels run, and only then: a unit long at rest has traces that
       small, and processors take them slowly. The thread's own setting is put back afterwards. */
    #if defined(__x86_64__) || defined(_M_X64)
    #include <xmmintrin.h>
    static unsigned long long mpf_flush(void) { unsigned s = _mm_getcsr(); _mm_setcsr(s | 0x8040); return s; }
    static void mpf_unflush(unsigned long long s) { _mm_setcsr((unsigned)s); }
    #elif defined(__aarch64__) && defined(__GNUC__)
    static unsigned long long mpf_flush(void) {
        unsigned long long s;
        __asm__ volatile("mrs %0, fpcr" : "=r"(s));
        __asm__ volatile("msr fpcr, %0" : : "r"(s | (1ull << 24)));
        return s;
    }
    static void mpf_unflush(unsigned long long s) { __asm__ volatile("msr fpcr, %0" : : "r"(s)); }
    #else
    static unsigned long long mpf_flush(void) { return 0; }
    static void mpf_unflush(unsigned long long s) { (void)s; }
    #endif
    #if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    /* __builtin_cpu_supports asks the processor and whether the system saves the wide registers. */
    static int mpf_cpu_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 1;
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) return 3;
        return 4;
    }
    #else
    static int mpf_cpu_level(void) { return 1; }
    #endif
    """
    const char *MPF_COMPILER
    int mpf_cpu_level()
    bint MPF_COUNTS_TELL
    unsigned long long mpf_flush() noexcept nogil
    void mpf_unflush(unsigned long long state) noexcept nogil


cdef void flushed(Model *m, void (*work)(Model *m) noexcept nogil) noexcept nogil:
    """Do that, subnormal numbers flushed to zero."""
    cdef unsigned long long fp = mpf_flush()
    work(m)
    mpf_unflush(fp)


# ---------------------------------------------------------------- instruction sets

def compiler() -> str:
    """Name and version of the compiler that built the engine."""
    return MPF_COMPILER.decode()


def available_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor runs, the widest last."""
    found = ["baseline"]
    for level in range(3, mpf_cpu_level() + 1):
        try:
            import_module(f"modprop_fast._kernels_v{level}_f32")
            found.append(f"v{level}")
        except ImportError:
            pass  # not built for this platform
    return tuple(found)


def isa() -> str:
    """Instruction set that a new engine uses: the widest, or the one named by MODPROP_FAST_ISA."""
    available = available_isas()
    forced = os.environ.get("MODPROP_FAST_ISA")
    if not forced:
        return available[-1]
    if forced not in available:
        raise ValueError(f"MODPROP_FAST_ISA: expected one of {', '.join(available)} on this machine, got {forced!r}")
    return forced
