/* The loops of cpu.c, once for each set of instructions: LEVEL names them, TARGET is their attribute. */

/* average += weight * (online - average), or what is the same from the other end. What is not finite in `online` counts
 * as the average itself, which so keeps its bits. */
#define LERP_BLOCK(SIZE, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                               \
    for (int64_t j = 0; j < (SIZE); j++) {                                                                             \
        const WIDE a = AVERAGE_OF(average[i + j]), x = ONLINE_OF(online[i + j]);                                       \
        const int fine = FINITE(x);                                                                                    \
        const WIDE target = fine ? x : a;                                                                              \
        bad[j] |= !fine;                                                                                               \
        const WIDE moved = all ? target : FMA(factor, target - a, small ? a : target);                                 \
        KEEP;                                                                                                          \
    }

#define LERP(NAME, WIDE, AVERAGE, ONLINE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, BEFORE, KEEP)                            \
    TARGET static int64_t LEVEL(NAME)(const struct piece *piece, double exact, uint32_t round) {                       \
        AVERAGE *restrict const average = (AVERAGE *)piece->average;                                                   \
        const ONLINE *restrict const online = (const ONLINE *)piece->online;                                           \
        const WIDE weight = (WIDE)exact;                                                                               \
        const int small = weight < (WIDE)0.5, all = weight == 1;                                                       \
        const WIDE factor = small ? weight : weight - 1;                                                               \
        const uint32_t key = hash((uint32_t)piece->seed ^ round) ^ hash((uint32_t)(piece->first >> 33));               \
        const uint32_t counter = (uint32_t)(piece->first / 2);                                                         \
        const int64_t whole = piece->count - piece->count % BLOCK;                                                     \
        uint32_t bad[BLOCK] = {0}, any = 0; /* one for each place: no sum over a block within the loop */              \
        int64_t i = 0;                                                                                                 \
        (void)key, (void)counter;                                                                                      \
        for (; i < whole; i += BLOCK) {                                                                                \
            for (size_t j = 0; j < sizeof(AVERAGE) * BLOCK; j += 64)                                                   \
                __builtin_prefetch((const char *)(average + i) + AHEAD + j, 1);                                        \
            for (size_t j = 0; j < sizeof(ONLINE) * BLOCK; j += 64)                                                    \
                __builtin_prefetch((const char *)(online + i) + AHEAD + j, 0);                                         \
            BEFORE;                                                                                                    \
            LERP_BLOCK(BLOCK, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                                          \
        }                                                                                                              \
        BEFORE;                                                                                                        \
        LERP_BLOCK(piece->count - whole, WIDE, ONLINE_OF, AVERAGE_OF, FINITE, FMA, KEEP)                               \
        for (int64_t j = 0; j < BLOCK; j++)                                                                            \
            any |= bad[j];                                                                                             \
        return any;                                                                                                    \
    }

/* Each 32 bits of chance serve two elements, half a block apart. */
#define DRAW                                                                                                           \
    uint32_t chance[BLOCK];                                                                                            \
    for (int64_t j = 0; j < BLOCK / 2; j++) {                                                                          \
        const uint32_t drawn = hash((counter + (uint32_t)(i / 2) + (uint32_t)j) ^ key);                                \
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

#undef LERP_BLOCK
#undef LERP
#undef DRAW
