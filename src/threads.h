/* What threads share: flags that one at a time holds, counters, and waiting for one another. */
#ifndef MPF_THREADS_H
#define MPF_THREADS_H

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#include <intrin.h>
#include <windows.h>
static inline int mpf_take(int *flag) { return _InterlockedExchange((volatile long *)flag, 1); }
static inline void mpf_release(int *flag) { _InterlockedExchange((volatile long *)flag, 0); }
static inline int mpf_read(int *count) { return _InterlockedOr((volatile long *)count, 0); }
static inline void mpf_add(int *count, int n) { _InterlockedExchangeAdd((volatile long *)count, n); }
static inline void mpf_let_others(void) { SwitchToThread(); }
#else
#include <sched.h>
static inline int mpf_take(int *flag) { return __atomic_exchange_n(flag, 1, __ATOMIC_SEQ_CST); }
static inline void mpf_release(int *flag) { __atomic_store_n(flag, 0, __ATOMIC_RELEASE); }
static inline int mpf_read(int *count) { return __atomic_load_n(count, __ATOMIC_SEQ_CST); }
static inline void mpf_add(int *count, int n) { __atomic_add_fetch(count, n, __ATOMIC_SEQ_CST); }
static inline void mpf_let_others(void) { sched_yield(); }
#endif

/* Wait until a counter is `value`, or with `other` until it is not: it changes within microseconds, or a thread of
   the team has lost its processor. */
static inline void mpf_wait(int *count, int value, int other) {
    int turn;
    for (turn = 0; (mpf_read(count) == value) == other; turn++) {
        if (turn > 10000) mpf_let_others();
#if defined(__x86_64__) || defined(_M_X64)
        else _mm_pause();
#endif
    }
}
#endif
