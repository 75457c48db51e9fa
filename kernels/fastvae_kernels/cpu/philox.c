/* The noise of fastvae_kernels/philox.py, which defines it, for eager PyTorch on a CPU.

   To be compiled with -ffp-contract=off and without -ffast-math: every float operation rounds as
   PyTorch's does, so that both give the same bits; of the C library there is only the square root,
   which is the processor's own and exactly rounded. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Lanes of 64 bits, of which the lower 32 count. `times` multiplies those to a whole lane, which is
   one instruction that compilers do not find by themselves. */
#if defined(__AVX512F__)
#include <immintrin.h>
typedef uint64_t lanes __attribute__((vector_size(64)));
#define times(x, y) ((lanes)_mm512_mul_epu32((__m512i)(x), (__m512i)(y)))
#elif defined(__AVX2__)
#include <immintrin.h>
typedef uint64_t lanes __attribute__((vector_size(32)));
#define times(x, y) ((lanes)_mm256_mul_epu32((__m256i)(x), (__m256i)(y)))
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef uint64_t lanes __attribute__((vector_size(16)));
#define times(x, y) ((lanes)_mm_mul_epu32((__m128i)(x), (__m128i)(y)))
#elif defined(__aarch64__)
#include <arm_neon.h>
typedef uint64_t lanes __attribute__((vector_size(16)));
#define times(x, y) ((lanes)vmull_u32(vmovn_u64((uint64x2_t)(x)), vmovn_u64((uint64x2_t)(y))))
#else
typedef uint64_t lanes __attribute__((vector_size(16)));
#define times(x, y) (((x) & 0xFFFFFFFFu) * ((y) & 0xFFFFFFFFu))
#endif

enum { BLOCK = 64, LANES = sizeof(lanes) / sizeof(uint64_t) }; /* calls of Philox at once */

/* Before a loop over blocks: fewer calls than these are done before other threads would begin. */
#define PARALLEL _Pragma("omp parallel for schedule(static) if (calls >= 8192)")

/* The four outputs of the calls `call` … `call + BLOCK - 1`: Philox4x32-10, counter words
   (call, call >> 32, sample, 0), key (seed, seed >> 32). */
static inline void philox(uint64_t call, uint32_t sample, uint64_t seed, uint64_t out[4][BLOCK])
{
    const lanes zero = {0}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
    for (int i = 0; i < BLOCK; i += LANES) {
        lanes c0, c1, c2 = zero + sample, c3 = zero;
        for (int j = 0; j < LANES; j++)
            c0[j] = call + (uint64_t)(i + j);
        c1 = c0 >> 32;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            lanes product_0 = times(c0, m0), product_1 = times(c2, m1);
            c0 = (product_1 >> 32) ^ c1 ^ (zero + k0);
            c1 = product_1;
            c2 = (product_0 >> 32) ^ c3 ^ (zero + k1);
            c3 = product_0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        memcpy(out[0] + i, &c0, sizeof(lanes));
        memcpy(out[1] + i, &c1, sizeof(lanes));
        memcpy(out[2] + i, &c2, sizeof(lanes));
        memcpy(out[3] + i, &c3, sizeof(lanes));
    }
}

/* The columns of the calls `first` … `first + count - 1` of a tensor [rows, columns]: all four
   values of a call, save that the last of a row gives what the row still takes. */
static inline void place(
    float *out, int64_t columns, int64_t first, int64_t count, const float values[4 * BLOCK])
{
    int64_t groups = (columns + 3) / 4;
    for (int64_t done = 0, taken; done < count; done += taken) {
        int64_t row = (first + done) / groups, group = (first + done) % groups;
        taken = groups - group < count - done ? groups - group : count - done;
        int64_t left = columns - 4 * group, size = 4 * taken < left ? 4 * taken : left;
        memcpy(out + row * columns + 4 * group, values + 4 * done, (size_t)size * sizeof(float));
    }
}

/* out [rows, columns]: uniform on [0, 1), multiples of 2^-24. */
void fastvae_uniforms(
    float *out, int64_t rows, int64_t columns, const int64_t *seed, const int64_t *offset)
{
    int64_t groups = (columns + 3) / 4, calls = rows * groups;
    uint64_t call = (uint64_t)*offset * (uint64_t)groups;
    PARALLEL
    for (int64_t first = 0; first < calls; first += BLOCK) {
        uint64_t bits[4][BLOCK];
        float values[4 * BLOCK];
        philox(call + (uint64_t)first, 0, (uint64_t)*seed, bits);
        for (int i = 0; i < BLOCK; i++)
            for (int j = 0; j < 4; j++)
                values[4 * i + j] = (float)(int32_t)((uint32_t)bits[j][i] >> 8) * 0x1p-24f;
        place(out, columns, first, calls - first < BLOCK ? calls - first : BLOCK, values);
    }
}

/* -2 log u for u in [2^-33, 1]: see minus_two_log there. */
static inline float minus_two_log(float u)
{
    int32_t bits, exponent, rest;
    memcpy(&bits, &u, sizeof bits);
    exponent = (bits - 0x3F000001) & -0x800000;
    rest = bits - exponent;
    float f;
    memcpy(&f, &rest, sizeof f);
    f -= 1.0f;
    float p = (float)-3.4207415560421777 + f * (float)-2.9005491030225063;
    p = (float)-2.531022811192533 + f * p;
    p = (float)-0.4091462804950039 + f * p;
    p = (float)-0.5381794749464244 + f * p;
    p = (float)0.48604524617449674 + f * p;
    p = (float)-0.6673407538735351 + f * p;
    p = (float)0.9999889339542509 + f * p;
    const float scale = (float)(-2.0 * 0.69314718055994530942 * 0x1p-23);
    return ((float)exponent * scale + f * -2.0f) + (f * f) * p;
}

/* Two normals from two outputs of Philox: see _box_muller there. */
static inline void box_muller(uint32_t radius_bits, uint32_t angle_bits, float out[2])
{
    const float scale = (float)(0.78539816339744830962 * 0x1p-29);
    float radius = sqrtf(minus_two_log((float)radius_bits * 0x1p-32f + 0x1p-33f));
    float t = (float)(int32_t)(angle_bits & 0x1FFFFFFF) * scale, s = t * t;
    float sin = (float)0.008332178146135858 + s * (float)-0.0001951729898102546;
    sin = (float)-0.1666665494370104 + s * sin;
    sin = t + t * s * sin;
    float cos = (float)(-1.0 / 720) + s * (float)(1.0 / 40320);
    cos = (float)(1.0 / 24) + s * cos;
    cos = -0.5f + s * cos;
    cos = 1.0f + s * cos;
    float x = radius * (angle_bits & 0x20000000 ? sin : cos);
    float y = radius * (angle_bits & 0x20000000 ? cos : sin);
    out[0] = angle_bits & 0x40000000 ? -x : x;
    out[1] = angle_bits & 0x80000000 ? -y : y;
}

/* out [samples, rows, columns]: standard normals. */
void fastvae_normals(
    float *out, int64_t samples, int64_t rows, int64_t columns,
    const int64_t *seed, const int64_t *offset)
{
    int64_t groups = (columns + 3) / 4, calls = rows * groups;
    uint64_t call = (uint64_t)*offset * (uint64_t)groups;
    for (int64_t sample = 0; sample < samples; sample++, out += rows * columns) {
        PARALLEL
        for (int64_t first = 0; first < calls; first += BLOCK) {
            uint64_t bits[4][BLOCK];
            float values[4 * BLOCK];
            philox(call + (uint64_t)first, (uint32_t)sample, (uint64_t)*seed, bits);
            for (int i = 0; i < BLOCK; i++) {
                box_muller((uint32_t)bits[0][i], (uint32_t)bits[1][i], values + 4 * i);
                box_muller((uint32_t)bits[2][i], (uint32_t)bits[3][i], values + 4 * i + 2);
            }
            place(out, columns, first, calls - first < BLOCK ? calls - first : BLOCK, values);
        }
    }
}
