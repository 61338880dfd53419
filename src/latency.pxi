# How long steps take: a histogram of nanoseconds, kept in C.  Included by core.pyx.

cdef extern from *:
    """
    #if defined(_WIN32)
    #include <windows.h>
    static long long mpf_now(void) {
        LARGE_INTEGER count, per_second;
        QueryPerformanceCounter(&count);
        QueryPerformanceFrequency(&per_second);
        return (long long)(count.QuadPart * (1e9 / per_second.QuadPart));
    }
    #else
    #include <time.h>
    static long long mpf_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000LL + t.tv_nsec;
    }
    #endif
    """
    long long mpf_now() noexcept nogil

cdef enum:
    PARTS = 32  # of each factor of two: a percentile is right to 3 %
    BUCKETS = 40 * PARTS


cdef class Latency:
    """Time of every `Learner.step`, from its call to its return, since `start`.

    Off until `start`, and then without cost.  Percentiles come from a histogram whose buckets are 3 % wide
    (1 ns below 64 ns); `max` and `misses` are exact.  Times are in seconds.

    Examples
    --------
    >>> import numpy as np, modprop_fast as mf
    >>> learner = mf.Learner(mf.Network(1, 20, 1, rng=np.random.default_rng(0)))
    >>> learner.latency.start(deadline=1e-3)
    >>> for x in np.ones((100, 1), "float32"):
    ...     y = learner.step(x)
    >>> learner.latency.count, learner.latency.p50 < 1e-3
    (100, True)
    """

    cdef readonly bint on
    cdef readonly object deadline  # s, or None
    cdef readonly long long count, misses  # steps, and how many of them took longer than the deadline
    cdef long long longest, limit
    cdef long long buckets[BUCKETS]

    def start(self, deadline=None):
        """Begin to count anew; `deadline` in seconds."""
        if deadline is not None:
            deadline = number("deadline", deadline, low=0, high=1e9, above=True)
        self.deadline, self.limit = deadline, -1 if deadline is None else <long long>(deadline * 1e9)
        self.count = self.misses = self.longest = 0
        memset(self.buckets, 0, sizeof(self.buckets))
        self.on = True

    def stop(self):
        """Count no further; what was counted stays."""
        self.on = False

    cpdef void note(self, long long took) noexcept:
        """One step more, of so many nanoseconds."""
        cdef long long bucket = max(took, 0)
        cdef int octave = 0
        while bucket >= 2 * PARTS:
            bucket >>= 1
            octave += 1
        self.buckets[min(octave * PARTS + bucket, BUCKETS - 1)] += 1
        self.count += 1
        self.longest = max(self.longest, took)
        self.misses += 0 <= self.limit < took

    def percentile(self, double q) -> float:
        """Seconds that `q` percent of the steps did not exceed; nan before the first."""
        cdef long long seen = 0, bucket
        cdef int octave
        if not 0 <= q <= 100:
            raise ValueError(f"q: expected a percentage in [0, 100], got {q}")
        if not self.count:
            return float("nan")
        for bucket in range(BUCKETS):
            seen += self.buckets[bucket]
            if seen >= self.count * q / 100 and seen:
                break
        octave = max(bucket // PARTS - 1, 0)
        return min((bucket - octave * PARTS + 1 << octave) - 1, self.longest) * 1e-9

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    @property
    def max(self) -> float:
        """The longest step, in seconds."""
        return self.longest * 1e-9

    def __repr__(self):
        if not self.count:
            return f"Latency({'no step yet' if self.on else 'off'})"
        late = "" if self.deadline is None else f", {self.misses} over {1e6 * self.deadline:g} us"
        times = ", ".join(f"{name} {1e6 * t:.3g} us" for name, t in (("p50", self.p50), ("p99", self.p99), ("max", self.max)))
        return f"Latency({self.count} steps: {times}{late})"
