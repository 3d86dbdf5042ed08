/* The loops of cpu.c, once for each set of instructions: LEVEL names them, TARGET is their attribute. */

/* average += weight * (online - average), or what is the same from the other end. What is not finite in `online` counts
 * as the average itself, which so keeps its bits. */
#define LERP_BLOCK(FROM, TO, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                           \
    for (int64_t j = (FROM); j < (TO); j++) {                                                                          \
        const WIDE a = AVERAGE_OF(average[i + j]), x = ONLINE_OF(online[i + j]);                                       \
        const int fine = FINITE(x);                                                                                    \
        const WIDE target = fine ? x : a;                                                                              \
        bad[j] |= !fine;                                                                                               \
        const WIDE moved = all ? target : FMA(factor, target - a, small ? a : target);                                 \
        KEEP;                                                                                                          \
    }

/* A run begins anywhere in a block of the whole: its first block may be a part of one, and its last. */
#define LERP(NAME, WIDE, AVERAGE, ONLINE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, BEFORE, KEEP)                            \
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
        for (; i + BLOCK <= count; i += BLOCK) {                                                                       \
            for (size_t j = 0; j < sizeof(AVERAGE) * BLOCK; j += 64)                                                   \
                __builtin_prefetch((const char *)(average + i) + AHEAD + j, 1);                                        \
            for (size_t j = 0; j < sizeof(ONLINE) * BLOCK; j += 64)                                                    \
                __builtin_prefetch((const char *)(online + i) + AHEAD + j, 0);                                         \
            BEFORE;                                                                                                    \
            LERP_BLOCK(0, BLOCK, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                       \
        }                                                                                                              \
        if (i < count) {                                                                                               \
            BEFORE;                                                                                                    \
            LERP_BLOCK(0, count - i, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                   \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static int64_t LEVEL(NAME)(const struct piece *piece, double weight, uint32_t round) {                      \
        AVERAGE *const average = (AVERAGE *)piece->average;                                                            \
        const ONLINE *const online = (const ONLINE *)piece->online;                                                    \
        const uint32_t key = hash((uint32_t)piece->seed ^ round);                                                      \
        uint32_t bad[BLOCK] = {0}, any = 0; /* one for each place: no sum over a block within the loop */              \
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

/* Each 32 bits of chance serve two elements, half a block apart. */
#define DRAW                                                                                                           \
    uint32_t chance[BLOCK];                                                                                            \
    for (int64_t j = 0; j < BLOCK / 2; j++) {                                                                          \
        const uint32_t drawn = hash((counter + (uint32_t)((i + before) / 2) + (uint32_t)j) ^ key);                    \
        chance[j] = drawn & 0xFFFF, chance[j + BLOCK / 2] = drawn >> 16;                                               \
    }

LERP(float32_float32, float, float, float, from_float, from_float, is_finite, __builtin_fmaf, , average[i + j] = moved)
LERP(float32_bfloat16, float, float, uint16_t, from_bfloat16, from_float, is_finite, __builtin_fmaf, ,
     average[i + j] = moved)
LERP(float32_float16, float, float, uint16_t, from_float16, from_float, is_finite, __builtin_fmaf, ,
     average[i + j] = moved)
LERP(bfloat16_bfloat16, float, uint16_t, uint16_t, from_bfloat16, from_bfloat16, is_finite, __builtin_fmaf, DRAW,
     average[i + j] = to_bfloat16(moved, chance[j]))
LERP(bfloat16_float32, float, uint16_t, float, from_float, from_bfloat16, is_finite, __builtin_fmaf, DRAW,
     average[i + j] = to_bfloat16(moved, chance[j]))
LERP(float64_float64, double, double, double, , , is_finite_double, __builtin_fma, , average[i + j] = moved)

TARGET static int64_t LEVEL(lerp_piece)(const struct piece *piece, double weight, uint32_t round) {
    static int64_t (*const of[])(const struct piece *, double, uint32_t) = {
        LEVEL(float32_float32),   LEVEL(float32_bfloat16), LEVEL(float32_float16),
        LEVEL(bfloat16_bfloat16), LEVEL(bfloat16_float32), LEVEL(float64_float64),
    };
    return of[piece->pair](piece, weight, round);
}

TARGET static void LEVEL(swap_bytes)(char *restrict const left, char *restrict const right, int64_t bytes) {
    const int64_t whole = bytes - bytes % 64;
    for (int64_t i = 0; i < whole; i += 64) {
        char aside[64];
        __builtin_prefetch(left + i + AHEAD, 1);
        __builtin_prefetch(right + i + AHEAD, 1);
        memcpy(aside, left + i, 64);
        memcpy(left + i, right + i, 64);
        memcpy(right + i, aside, 64);
    }
    for (int64_t i = whole; i < bytes; i++) {
        const char aside = left[i];
        left[i] = right[i];
        right[i] = aside;
    }
}

#undef LERP_BLOCK
#undef LERP
#undef DRAW
