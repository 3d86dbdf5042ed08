/* The loops of cpu.c, once for each set of instructions: LEVEL names them, TARGET is their attribute. */

/* average += weight * (online - average), or the same from the other end. NaN and inf in `online` count as the average
 * itself, which so keeps its bits. */
#define LERP_BLOCK(FROM, TO, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                           \
    for (int64_t j = (FROM); j < (TO); j++) {                                                                          \
        const WIDE a = AVERAGE_OF(average[i + j]), x = ONLINE_OF(online[i + j]);                                       \
        const int fine = FINITE(x);                                                                                    \
        const WIDE target = fine ? x : a;                                                                              \
        bad[j] |= !fine;                                                                                               \
        const WIDE moved = all ? target : FMA(factor, target - a, small ? a : target);                                 \
        KEEP;                                                                                                          \
    }

/* A run may begin and end within a block of the full tensor. QUICK does a chunk in a quicker way if it can. */
#define LERP(NAME, WIDE, AVERAGE, ONLINE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, QUICK, BEFORE, KEEP)                     \
    TARGET static void LEVEL(NAME##_run)(AVERAGE *restrict const average, const ONLINE *restrict const online,         \
                                         int64_t count, int64_t first, uint32_t key, WIDE weight, uint32_t *bad) {     \
        const int small = weight < (WIDE)0.5, all = weight == 1;                                                       \
        const WIDE factor = small ? weight : weight - 1;                                                               \
        const int64_t before = first % BLOCK;                                                                          \
        const uint32_t counter = (uint32_t)(first / BLOCK * (BLOCK / 2));                                              \
        int64_t i = -before;                                                                                           \
        (void)key, (void)counter;                                                                                      \
        if (before) {                                                                                                  \
            BEFORE;                                                                                                    \
            LERP_BLOCK(before, count - i < BLOCK ? count - i : BLOCK, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)  \
            i += BLOCK;                                                                                                \
        }                                                                                                              \
        while (i + BLOCK <= count) {                                                                                   \
            const int64_t left = count - i, chunk = left < CHUNK ? left - left % BLOCK : CHUNK, stop = i + chunk;      \
            if (QUICK(average + i, online + i, chunk, counter + (uint32_t)((i + before) / 2), key, weight)) {          \
                i = stop;                                                                                              \
                continue;                                                                                              \
            }                                                                                                          \
            for (; i < stop; i += BLOCK) {                                                                             \
                for (size_t j = 0; j < sizeof(AVERAGE) * BLOCK; j += 64)                                               \
                    __builtin_prefetch((const char *)(average + i) + AHEAD + j, 1);                                    \
                for (size_t j = 0; j < sizeof(ONLINE) * BLOCK; j += 64)                                                \
                    __builtin_prefetch((const char *)(online + i) + AHEAD + j, 0);                                     \
                BEFORE;                                                                                                \
                LERP_BLOCK(0, BLOCK, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                   \
            }                                                                                                          \
        }                                                                                                              \
        if (i < count) {                                                                                               \
            BEFORE;                                                                                                    \
            LERP_BLOCK(0, count - i, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                   \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static int64_t LEVEL(NAME)(const struct piece *piece, double weight, uint32_t round) {                      \
        AVERAGE *const average = (AVERAGE *)piece->average;                                                            \
        const ONLINE *const online = (const ONLINE *)piece->online;                                                    \
        const uint32_t key = hash(piece->seed ^ round);                                                                \
        uint32_t bad[BLOCK] = {0}, any = 0; /* one for each place: no sum across a block in the loop */              \
        for (int64_t row = 0; row < piece->rows; row++)                                                                \
            for (int64_t done = 0, count; done < piece->run; done += count) {                                          \
                const int64_t first = piece->first + row * piece->step + done, left = piece->run - done;               \
                const int64_t at = row * piece->run + done;                                                            \
                count = left < CYCLE - first % CYCLE ? left : CYCLE - first % CYCLE;                                   \
                LEVEL(NAME##_run)(average + at, online + at, count, first, key ^ hash((uint32_t)(first / CYCLE)),      \
                                  (WIDE)weight, bad);                                                                  \
            }                                                                                                          \
        for (int64_t j = 0; j < BLOCK; j++)                                                                            \
            any |= bad[j];                                                                                             \
        return any;                                                                                                    \
    }

/* Each 32 random bits serve two neighbours, the first the lower half. */
#define DRAW                                                                                                           \
    uint32_t random[BLOCK];                                                                                            \
    for (int64_t j = 0; j < BLOCK / 2; j++) {                                                                          \
        const uint32_t drawn = hash((counter + (uint32_t)((i + before) / 2) + (uint32_t)j) ^ key);                     \
        random[2 * j] = drawn & 0xFFFF, random[2 * j + 1] = drawn >> 16;                                               \
    }

/* Do a chunk of full blocks with a bfloat16 average, if all numbers are so far from infinity that neither their
 * difference nor the rounding reaches it: then nothing is left out or clamped, which saves half of the work. Two
 * neighbours are one word of 32 bits: they are read, rounded and written in one, without shuffles. Prefetches come
 * between the arithmetic, not before it. */
#define ROUND_QUICKLY(NAME, ONLINE, BITS, LOWER, UPPER)                                                                \
    TARGET static int LEVEL(NAME)(uint16_t *restrict const average, const ONLINE *restrict const online, int64_t count,\
                                  uint32_t counter, uint32_t key, float weight) {                                      \
        const int shift = 8 * (sizeof(ONLINE) - sizeof(uint16_t));                                                     \
        const BITS *const bits = (const BITS *)online;                                                                 \
        const BITS magnitude = (BITS)-1 >> 1, to_sign = (BITS)0x180 << shift;                                          \
        uint16_t large = 0;                                                                                            \
        BITS large_online = 0;                                                                                         \
        for (int64_t i = 0; i < count; i++) { /* from 0x7E80 on, near 1e38, the sum sets the sign's bit */        \
            large |= (uint16_t)((average[i] & 0x7FFF) + 0x180);                                                        \
            large_online |= (BITS)((bits[i] & magnitude) + to_sign);                                                   \
        }                                                                                                              \
        if (weight == 1 || large >> 15 || large_online > magnitude)                                                    \
            return 0;                                                                                                  \
        if (weight < 0.5f)                                                                                             \
            ROUND_WORDS(ONLINE, LOWER, UPPER, weight, below, above)                                                    \
        else                                                                                                           \
            ROUND_WORDS(ONLINE, LOWER, UPPER, weight - 1, x_below, x_above)                                            \
        return 1;                                                                                                      \
    }

#define ROUND_WORDS(ONLINE, LOWER, UPPER, FACTOR, FROM_BELOW, FROM_ABOVE)                                              \
    for (int64_t i = 0; i < count; i += BLOCK) {                                                                       \
        word *const words = (word *)(average + i);                                                                     \
        const uint32_t start = counter + (uint32_t)(i / 2);                                                            \
        for (size_t j = 0; j < sizeof(uint16_t) * BLOCK; j += 64)                                                      \
            __builtin_prefetch((const char *)(average + i) + AHEAD + j, 1);                                            \
        for (size_t j = 0; j < sizeof(ONLINE) * BLOCK; j += 64)                                                        \
            __builtin_prefetch((const char *)(online + i) + AHEAD + j, 0);                                             \
        for (int64_t j = 0; j < BLOCK / 2; j++) {                                                                      \
            const uint32_t drawn = hash((start + (uint32_t)j) ^ key);                                                  \
            const float below = float_of(words[j] << 16), above = float_of(words[j] & 0xFFFF0000u);                    \
            const float x_below = LOWER(online + i, j), x_above = UPPER(online + i, j);                                \
            const float lower = __builtin_fmaf(FACTOR, x_below - below, FROM_BELOW);                                   \
            const float upper = __builtin_fmaf(FACTOR, x_above - above, FROM_ABOVE);                                   \
            words[j] = (bits_of(lower) + (drawn & 0xFFFF)) >> 16 | ((bits_of(upper) + (drawn >> 16)) & 0xFFFF0000u);   \
        }                                                                                                              \
    }

#define NEVER(...) 0

ROUND_QUICKLY(quick_bfloat16, uint16_t, uint16_t, lower_of, upper_of)
ROUND_QUICKLY(quick_float32, float, uint32_t, first_of, second_of)

LERP(float32_float32, float, float, float, from_float, from_float, is_finite, __builtin_fmaf, NEVER, ,
     average[i + j] = moved)
LERP(float32_bfloat16, float, float, uint16_t, from_bfloat16, from_float, is_finite, __builtin_fmaf, NEVER, ,
     average[i + j] = moved)
LERP(float32_float16, float, float, uint16_t, from_float16, from_float, is_finite, __builtin_fmaf, NEVER, ,
     average[i + j] = moved)
LERP(bfloat16_bfloat16, float, uint16_t, uint16_t, from_bfloat16, from_bfloat16, is_finite, __builtin_fmaf,
     LEVEL(quick_bfloat16), DRAW, average[i + j] = to_bfloat16(moved, random[j]))
LERP(bfloat16_float32, float, uint16_t, float, from_float, from_bfloat16, is_finite, __builtin_fmaf,
     LEVEL(quick_float32), DRAW, average[i + j] = to_bfloat16(moved, random[j]))
LERP(float16_float16, float, uint16_t, uint16_t, from_float16, from_float16, is_finite, __builtin_fmaf, NEVER, DRAW,
     average[i + j] = to_float16(moved, random[j]))
LERP(float16_float32, float, uint16_t, float, from_float, from_float16, is_finite, __builtin_fmaf, NEVER, DRAW,
     average[i + j] = to_float16(moved, random[j]))
LERP(float64_float64, double, double, double, , , is_finite_double, __builtin_fma, NEVER, , average[i + j] = moved)

TARGET static int64_t LEVEL(lerp_piece)(const struct piece *piece, double weight, uint32_t round) {
    static int64_t (*const of[])(const struct piece *, double, uint32_t) = {
        LEVEL(float32_float32),  LEVEL(float32_bfloat16), LEVEL(float32_float16), LEVEL(bfloat16_bfloat16),
        LEVEL(bfloat16_float32), LEVEL(float16_float16),  LEVEL(float16_float32), LEVEL(float64_float64),
    };
    return of[piece->pair](piece, weight, round);
}

/* Swap, and return the sum of the words that were at `left`: another sum later shows that they have changed. */
TARGET static uint64_t LEVEL(swap_bytes)(char *restrict const left, char *restrict const right, int64_t bytes) {
    const int64_t whole = bytes - bytes % 64;
    uint64_t sums[8] = {0}, sum = 0;
    for (int64_t i = 0; i < whole; i += 64) {
        uint64_t words[8], others[8];
        __builtin_prefetch(left + i + AHEAD, 1);
        __builtin_prefetch(right + i + AHEAD, 1);
        memcpy(words, left + i, 64);
        memcpy(others, right + i, 64);
        memcpy(left + i, others, 64);
        memcpy(right + i, words, 64);
        for (int k = 0; k < 8; k++)
            sums[k] += words[k];
    }
    for (int k = 0; k < 8; k++)
        sum += sums[k];
    for (int64_t i = whole; i < bytes; i++) {
        const char moved = left[i];
        left[i] = right[i];
        right[i] = moved;
        sum += (uint64_t)(unsigned char)moved << 8 * (i % 8);
    }
    return sum;
}

#undef LERP_BLOCK
#undef LERP
#undef DRAW
#undef ROUND_QUICKLY
#undef ROUND_WORDS
#undef NEVER
