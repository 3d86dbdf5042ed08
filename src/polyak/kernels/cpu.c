/* Many averages moved towards the weights of a model, by one weight, in plain C over pointers.
 *
 * Called through ctypes by a few threads at once, without the interpreter's lock. The numbers are those of the torch
 * kernel, bit for bit: one fused multiply-add an element, and rounding to bfloat16 by chance from a counter.
 */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

/* A contiguous part of one tensor, as cpu.py lays it out: a row of 64-bit integers. */
struct piece {
    int64_t average, online; /* addresses */
    int64_t rows, run;       /* runs that follow each other in memory, and the elements of each */
    int64_t first, step;     /* the index of the first element in the whole, and from one run to the next */
    int64_t pair, seed;      /* which pair of dtypes, and the seed of the rounding */
    int64_t tensor, left_out;
};

#define BLOCK 32 /* elements that are done at once; the halves of one share 16 random numbers of 32 bits */
#define CYCLE ((int64_t)1 << 33) /* elements after which these numbers come from another series */
#define AHEAD 2048 /* bytes to be asked for before they are needed: the hardware alone leaves a tenth of the speed */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* lowbias32 of Wellons, https://nullprogram.com/blog/2018/07/31/ */
static inline uint32_t hash(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

static inline float from_float(float value) { return value; }

static inline float from_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* Exact. No multiplication of subnormal numbers, which processors are slow at. */
static inline float from_float16(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFF;
    const uint32_t is_subnormal = -(uint32_t)(magnitude < 0x0400), is_infinite = -(uint32_t)(magnitude >= 0x7C00);
    const uint32_t normal = (magnitude << 13) + (112u << 23) + (is_infinite & 112u << 23);
    const uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return float_of((subnormal & is_subnormal) | (normal & ~is_subnormal) | (uint32_t)(bits & 0x8000) << 16);
}

static inline int is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

static inline int is_finite_double(double value) {
    return (bits_of_double(value) & 0x7FF0000000000000u) != 0x7FF0000000000000u;
}

/* `chance` is below 2 ** 16. A number too large for bfloat16 becomes its largest; nan stays. */
static inline uint16_t to_bfloat16(float value, uint32_t chance) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t rounded = magnitude + chance;
    rounded = rounded > 0x7F7FFFFFu ? 0x7F7FFFFFu : rounded;
    rounded = magnitude > 0x7F800000u ? 0x7FC00000u : rounded;
    return (uint16_t)((rounded | (bits & 0x80000000u)) >> 16);
}

#if defined(__x86_64__)
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "lerp.h"
#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "lerp.h"
#elif defined(__aarch64__)
#define LEVEL(name) name##_neon
#define TARGET
#include "lerp.h"
#else
#error "no fused multiply-add is known to be there"
#endif

typedef int64_t lerp(const struct piece *, double, uint32_t);

static lerp *chosen(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return lerp_piece_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? lerp_piece_avx2 : 0;
#else
    return lerp_piece_neon;
#endif
}

/* From which sources this was compiled, or 0 if this processor cannot run it. */
int64_t polyak_sources(void) { return chosen() ? SOURCES : 0; }

/* Do jobs until none is left: job i is the pieces from jobs[i] to jobs[i + 1]. Returns whether a value was left out. */
int64_t polyak_lerp(struct piece *pieces, const int64_t *jobs, int64_t num_jobs, int64_t *next, double weight,
                    uint32_t round) {
    lerp *const lerp_piece = chosen();
    int64_t any = 0;
    for (;;) {
        const int64_t job = atomic_fetch_add((_Atomic int64_t *)next, 1);
        if (job >= num_jobs)
            return any;
        for (int64_t i = jobs[job]; i < jobs[job + 1]; i++) {
            pieces[i].left_out = lerp_piece(&pieces[i], weight, hash(round));
            any |= pieces[i].left_out;
        }
    }
}
