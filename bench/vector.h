/* Bytes of a vector of this machine; a wider one would be kept in memory. */
#ifdef __AVX512F__
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
