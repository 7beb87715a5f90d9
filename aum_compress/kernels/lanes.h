/* Vectors whose lanes are channels: their arithmetic, and the way between them and rows of time. */
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vec __attribute__((vector_size(4 * W), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* ---- vector functions -------------------------------------------------------------------------------------------- */

INLINE vec splat(float value) { return value - (vec){0}; }

/* The greater and the smaller of a limit and x; x where x is NaN. */
#if defined(__AVX512F__)
INLINE vec at_least(vec limit, vec x) { return (vec)_mm512_max_ps((__m512)limit, (__m512)x); }
INLINE vec at_most(vec limit, vec x) { return (vec)_mm512_min_ps((__m512)limit, (__m512)x); }
#elif defined(__AVX__)
INLINE vec at_least(vec limit, vec x) { return (vec)_mm256_max_ps((__m256)limit, (__m256)x); }
INLINE vec at_most(vec limit, vec x) { return (vec)_mm256_min_ps((__m256)limit, (__m256)x); }
#else
INLINE vec select(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
INLINE vec at_least(vec limit, vec x) { return select(x < limit, limit, x); }
INLINE vec at_most(vec limit, vec x) { return select(x > limit, limit, x); }
#endif

static const float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

/* 2^x, relative error below 2e-7: 2^round(x) goes into the exponent, a minimax polynomial gives 2^(x - round(x)).
 * The limits are whole numbers, where the polynomial is exactly 1: -127 then gives exactly 0 and 128 infinity. */
INLINE vec exp2_vec(vec x) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits */
    x = at_most(splat(128.0f), at_least(splat(-127.0f), x));
    vec shifted = x + magic;
    vec r = x - (shifted - magic);
    vec p = r * 1.5353362e-4f + 1.3398874e-3f;
    p = p * r + 9.6184373e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314720e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

INLINE vec sigmoid_vec(vec x) { return 1.0f / (1.0f + exp2_vec(x * -LOG2_E)); }

/* log(1 + e^x) as max(x, 0) + log1p(w), w = e^-|x|, with log1p(w) = 2 atanh(w / (2 + w)): the relative error stays
 * small for very negative x too. Above torch's threshold of 20 this already rounds to x. */
INLINE vec softplus_vec(vec x) {
    vec positive = at_least(splat(0.0f), x);
    vec minus_abs = (vec)((ivec)x | INT32_MIN);
    vec w = exp2_vec(minus_abs * LOG2_E);
    vec s = w / (2.0f + w), q = s * s;
    vec p = q * 1.2144779e-1f + 1.0715371e-1f;
    p = p * q + 1.4308298e-1f;
    p = p * q + 1.9999444e-1f;
    p = p * q + 3.3333338e-1f;
    p = p * q + 1.0f;
    return positive + 2.0f * s * p;
}

/* ---- moving between rows of time and lanes of channels ----------------------------------------------------------- */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

INLINE void transpose_quads(quad *a, quad *b, quad *c, quad *d) {
    quad ab_low = SHUFFLE(*a, *b, 0, 4, 1, 5), ab_high = SHUFFLE(*a, *b, 2, 6, 3, 7);
    quad cd_low = SHUFFLE(*c, *d, 0, 4, 1, 5), cd_high = SHUFFLE(*c, *d, 2, 6, 3, 7);
    *a = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    *b = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    *c = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    *d = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

/* to[j][i] = from[i][j] for i < rows, j < columns. */
INLINE void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t columns, float *to,
                      int64_t to_stride) {
    int64_t full_rows = rows & ~3, full_columns = columns & ~3;
    for (int64_t i = 0; i < full_rows; i += 4)
        for (int64_t j = 0; j < full_columns; j += 4) {
            const float *f = from + i * from_stride + j;
            float *t = to + j * to_stride + i;
            quad a = *(const quad *)f, b = *(const quad *)(f + from_stride);
            quad c = *(const quad *)(f + 2 * from_stride), d = *(const quad *)(f + 3 * from_stride);
            transpose_quads(&a, &b, &c, &d);
            *(quad *)t = a, *(quad *)(t + to_stride) = b;
            *(quad *)(t + 2 * to_stride) = c, *(quad *)(t + 3 * to_stride) = d;
        }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < full_rows ? full_columns : 0; j < columns; j++)
            to[j * to_stride + i] = from[i * from_stride + j];
}

/* W rows of `steps` values into `steps` vectors; lanes past `lanes` become 0, and 0 adds nothing to any gradient. */
INLINE void load_rows(const float *from, int64_t length, int64_t lanes, int64_t steps, vec *to) {
    if (lanes < W)
        memset(to, 0, steps * sizeof(vec));
    transpose(from, length, lanes, steps, (float *)to, W);
}

INLINE void store_rows(const vec *from, int64_t length, int64_t lanes, int64_t steps, float *to) {
    transpose((const float *)from, W, steps, lanes, to, length);
}

/* `steps` runs of W channels, `stride` apart, and back; lanes past `lanes` as above. */
INLINE void load_columns(const float *from, int64_t stride, int64_t lanes, int64_t steps, vec *to) {
    if (lanes < W)
        memset(to, 0, steps * sizeof(vec));
    for (int64_t t = 0; t < steps; t++)
        memcpy(to + t, from + t * stride, lanes < W ? lanes * sizeof(float) : sizeof(vec));
}

INLINE void store_columns(const vec *from, int64_t stride, int64_t lanes, int64_t steps, float *to) {
    for (int64_t t = 0; t < steps; t++)
        memcpy(to + t * stride, from + t, lanes < W ? lanes * sizeof(float) : sizeof(vec));
}

/* One value of each of `lanes` channels, `stride` apart; the lanes past them 0. */
INLINE vec load_lanes(const float *from, int64_t stride, int64_t lanes) {
    vec v = {0};
    for (int64_t i = 0; i < lanes; i++)
        v[i] = from[i * stride];
    return v;
}

INLINE void store_lanes(vec v, int64_t stride, int64_t lanes, float *to) {
    for (int64_t i = 0; i < lanes; i++)
        to[i * stride] = v[i];
}

/* Sum over lanes. */
INLINE float lane_sum(const vec *v) {
    const quad *part = (const quad *)v;
    quad s = part[0];
    for (int i = 1; i < W / 4; i++)
        s += part[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* The last first. */
INLINE void turn(vec *v, int64_t count) {
    for (int64_t i = 0, j = count - 1; i < j; i++, j--) {
        vec other = v[i];
        v[i] = v[j];
        v[j] = other;
    }
}

static void turn_rows(float *rows, int64_t count, int64_t width) {
    for (int64_t i = 0, j = count - 1; i < j; i++, j--)
        for (int64_t k = 0; k < width; k++) {
            float other = rows[i * width + k];
            rows[i * width + k] = rows[j * width + k];
            rows[j * width + k] = other;
        }
}
