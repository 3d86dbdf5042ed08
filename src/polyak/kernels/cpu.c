/* Moves many averages towards the weights of a model, or swaps them with these, in plain C over pointers.
 *
 * Called through ctypes, without the interpreter's lock. The results are those of the other kernels, bit for bit: one
 * fused multiply-add an element, and stochastic rounding to 16 bits by a hash of a counter.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

/* Since glibc 2.34 these are in libc, under a new version. The old one is in all, so that a wheel runs on older systems;
 * there, Python itself has loaded the library of threads. */
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join,pthread_join@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.17");
__asm__(".symver pthread_join,pthread_join@GLIBC_2.17");
#endif

/* A contiguous part of one tensor, as c.py lays it out: 64 bytes, a cache line. */
struct piece {
    int64_t average, online;   /* addresses */
    int64_t rows, run;         /* rows that follow each other in memory, and the elements of each */
    int64_t first, step;       /* the first element's index in the full tensor, and from one row to the next */
    uint32_t seed, pair;       /* of the rounding; the number of the pair of dtypes */
    uint32_t tensor, left_out; /* its number, and whether any of its elements was NaN or inf */
};

/* Bytes at two addresses that are swapped. */
struct pair {
    int64_t left, right, bytes;
    int64_t swapped; /* whether they are. The thread that swaps them writes it. */
    uint64_t sum;    /* of the words that were put at `left` */
    int64_t changed; /* whether the words that came back from there have another sum */
};

/* Work for any number of threads: job i is the pieces, or pairs, from starts[i] to starts[i + 1]. */
struct work {
    void *items;
    const int64_t *starts;
    int64_t num_jobs;
    double weight;
    uint32_t round;
    int64_t swapped;
    _Atomic int64_t next, any; /* the next job, and whether a value was left out */
};

typedef void worker(void *);

/* GOMP_parallel of the OpenMP that torch has loaded. Its threads wait for work on their cores after each of torch's
 * operations; other threads would contend with them. */
typedef void team(worker *, void *, unsigned, unsigned);

#define BLOCK 32 /* elements of a loop that the compiler vectorizes */
#define CYCLE ((int64_t)1 << 33) /* elements after which the random bits come from another series */
#define CHUNK 1024 /* elements that are checked first, for whether the quicker way will do */
#define AHEAD 2048 /* bytes to prefetch: without it a tenth of the speed is lost */
#define SOON 4     /* pieces ahead whose first bytes are prefetched */
#define FIRST 256  /* of these bytes */
#define MOST_THREADS 256

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

/* Two neighbours of 16 bits, the first in the lower half: all targets are little-endian. */
typedef uint32_t __attribute__((may_alias, aligned(2))) word;

static inline float lower_of(const uint16_t *all, int64_t pair) { return float_of(((const word *)all)[pair] << 16); }

static inline float upper_of(const uint16_t *all, int64_t pair) {
    return float_of(((const word *)all)[pair] & 0xFFFF0000u);
}

static inline float first_of(const float *all, int64_t pair) { return all[2 * pair]; }

static inline float second_of(const float *all, int64_t pair) { return all[2 * pair + 1]; }

/* Exact. It multiplies no subnormal numbers, at which processors are slow. */
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

/* `random` has 16 random bits. A number out of the range of bfloat16 becomes the largest in it; NaN stays. */
static inline uint16_t to_bfloat16(float value, uint32_t random) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t rounded = magnitude + random;
    rounded = rounded > 0x7F7FFFFFu ? 0x7F7FFFFFu : rounded;
    rounded = magnitude > 0x7F800000u ? 0x7FC00000u : rounded;
    return (uint16_t)((rounded | (bits & 0x80000000u)) >> 16);
}

/* As floor(value / unit + random / 2 ** 16) * unit, where unit is that of the last place of float16, constant below its
 * smallest normal number. A number out of range becomes the largest in it; NaN stays. */
static inline uint16_t to_float16(float value, uint32_t random) {
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    const uint32_t is_large = -(uint32_t)(magnitude >= 143u << 23), is_nan = -(uint32_t)(magnitude > 0x7F800000u);
    const float safe = float_of(bits_of(value) & ~is_large);
    const uint32_t exponent = magnitude >> 23, of_unit = exponent < 113 ? 113 : exponent;
    const float units = safe * float_of((2 * 127 + 10 - of_unit) << 23) + (float)(int32_t)(random >> 3) * 0x1p-13f;
    const int32_t cut = (int32_t)units, floored = cut - ((float)cut > units);
    const uint32_t sum = ((of_unit - 113) << 10) + (uint32_t)(floored < 0 ? -floored : floored);
    const uint32_t rounded = ((sum > 0x7BFFu ? 0x7BFFu : sum) & ~is_large) | (0x7BFFu & is_large);
    const uint32_t sign = ((bits_of(units) & ~is_large) | (bits_of(value) & is_large)) >> 16 & 0x8000;
    return (uint16_t)(((rounded & ~is_nan) | (0x7E00u & is_nan)) | sign);
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
#error "the processor must have a fused multiply-add"
#endif

typedef int64_t lerp(const struct piece *, double, uint32_t);
typedef uint64_t swap(char *, char *, int64_t);

#if defined(__x86_64__)
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static lerp *chosen(void) {
    if (has_avx512())
        return lerp_piece_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? lerp_piece_avx2 : 0;
}

static swap *chosen_swap(void) { return has_avx512() ? swap_bytes_avx512 : swap_bytes_avx2; }
#else
static lerp *chosen(void) { return lerp_piece_neon; }

static swap *chosen_swap(void) { return swap_bytes_neon; }
#endif

/* The id of the sources that this was compiled from; 0 if this processor cannot run it. */
int64_t polyak_sources(void) { return chosen() ? SOURCES : 0; }

static void *start(void *given) {
    void **const call = given;
    ((worker *)call[0])(call[1]);
    return 0;
}

/* Run the worker on several threads, and wait for them. Without a team it makes threads. */
static void together(team *team, worker *worker, struct work *work, int64_t num_threads) {
    if (num_threads > work->num_jobs)
        num_threads = work->num_jobs;
    if (team && num_threads > 1)
        team(worker, work, (unsigned)num_threads, 0);
    else {
        pthread_t others[MOST_THREADS];
        int64_t count = 0;
        void *call[] = {(void *)worker, work};
        while (count < num_threads - 1 && count < MOST_THREADS && !pthread_create(&others[count], 0, start, call))
            count++;
        worker(work);
        while (count)
            pthread_join(others[--count], 0);
    }
}

/* Small pieces are done before the hardware has prefetched the next ones. */
static void prefetch(const struct piece *piece) {
    for (int64_t i = 0; i < FIRST; i += 64) {
        __builtin_prefetch((const char *)piece->average + i, 1);
        __builtin_prefetch((const char *)piece->online + i, 0);
    }
}

static void lerp_all(void *given) {
    struct work *const work = given;
    struct piece *const pieces = work->items;
    lerp *const lerp_piece = chosen();
    for (int64_t job; (job = atomic_fetch_add(&work->next, 1)) < work->num_jobs;)
        for (int64_t i = work->starts[job], end = work->starts[job + 1]; i < end; i++) {
            if (i + SOON < end)
                prefetch(&pieces[i + SOON]);
            const uint32_t left_out = lerp_piece(&pieces[i], work->weight, work->round) != 0;
            if (left_out)
                atomic_store(&work->any, 1);
            if (pieces[i].left_out != left_out) /* so that most lines of the cache are only read */
                pieces[i].left_out = left_out;
        }
}

static void swap_all(void *given) {
    struct work *const work = given;
    struct pair *const pairs = work->items;
    swap *const swap_bytes = chosen_swap();
    for (int64_t job; (job = atomic_fetch_add(&work->next, 1)) < work->num_jobs;)
        for (int64_t i = work->starts[job]; i < work->starts[job + 1]; i++) {
            struct pair *const pair = &pairs[i];
            if (pair->swapped == work->swapped)
                continue;
            char *const left = (char *)pair->left, *const right = (char *)pair->right;
            if (work->swapped)
                pair->sum = swap_bytes(right, left, pair->bytes);
            else
                pair->changed = swap_bytes(left, right, pair->bytes) != pair->sum;
            pair->swapped = work->swapped;
        }
}

/* Returns whether any value was left out; `left_out` of the pieces says of which tensors. */
int64_t polyak_lerp(team *team, int64_t num_threads, struct piece *pieces, const int64_t *starts, int64_t num_jobs,
                    double weight, uint32_t round) {
    struct work work = {pieces, starts, num_jobs, .weight = weight, .round = hash(round)};
    together(team, lerp_all, &work, num_threads);
    return work.any;
}

/* Swap the pairs whose state is not `swapped`: 1, or 0 to swap them back. */
void polyak_swap(team *team, int64_t num_threads, struct pair *pairs, const int64_t *starts, int64_t num_jobs,
                 int64_t swapped) {
    struct work work = {pairs, starts, num_jobs, .swapped = swapped};
    together(team, swap_all, &work, num_threads);
}
