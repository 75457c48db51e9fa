/* The noise of fastvae_kernels/philox.py, which defines it, for eager PyTorch on a CPU.

   To be compiled with -ffp-contract=off and without -ffast-math: every float operation rounds as
   PyTorch's does, so that both give the same bits. The logarithm and the root between the two
   halves of Box-Muller are PyTorch's own, whose last bit is not that of the C library. */

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

/* u and angle [samples, calls, 2]: what the two Box-Muller pairs of each call begin with. */
void fastvae_normals_begin(
    float *u, uint32_t *angle, int64_t samples, int64_t rows, int64_t columns,
    const int64_t *seed, const int64_t *offset)
{
    int64_t groups = (columns + 3) / 4, calls = rows * groups;
    uint64_t call = (uint64_t)*offset * (uint64_t)groups;
    for (int64_t sample = 0; sample < samples; sample++) {
        PARALLEL
        for (int64_t first = 0; first < calls; first += BLOCK) {
            int count = calls - first < BLOCK ? (int)(calls - first) : BLOCK;
            uint64_t bits[4][BLOCK];
            philox(call + (uint64_t)first, (uint32_t)sample, (uint64_t)*seed, bits);
            for (int i = 0; i < count; i++) {
                int64_t at = 2 * (first + i);
                u[at] = (float)(uint32_t)bits[0][i] * 0x1p-32f + 0x1p-33f;
                u[at + 1] = (float)(uint32_t)bits[2][i] * 0x1p-32f + 0x1p-33f;
                angle[at] = (uint32_t)bits[1][i];
                angle[at + 1] = (uint32_t)bits[3][i];
            }
        }
        u += 2 * calls, angle += 2 * calls;
    }
}

/* out [samples, rows, columns] from radius = sqrt(-2 log u) and angle: see _box_muller there. */
void fastvae_normals_end(
    float *out, const float *radius, const uint32_t *angle, int64_t samples, int64_t rows,
    int64_t columns)
{
    const float scale = (float)(0.78539816339744830962 * 0x1p-29);
    int64_t groups = (columns + 3) / 4, calls = samples * rows * groups;
    PARALLEL
    for (int64_t first = 0; first < calls; first += BLOCK) {
        int count = calls - first < BLOCK ? (int)(calls - first) : BLOCK;
        float values[4 * BLOCK];
        for (int i = 0; i < 2 * count; i++) {
            uint32_t bits = angle[2 * first + i];
            float t = (float)(int32_t)(bits & 0x1FFFFFFF) * scale, s = t * t;
            float sin = (float)(-1.0 / 5040) + s * (float)(1.0 / 362880);
            sin = (float)(1.0 / 120) + s * sin;
            sin = (float)(-1.0 / 6) + s * sin;
            sin = t + t * s * sin;
            float cos = (float)(-1.0 / 720) + s * (float)(1.0 / 40320);
            cos = (float)(1.0 / 24) + s * cos;
            cos = -0.5f + s * cos;
            cos = 1.0f + s * cos;
            float x = radius[2 * first + i] * (bits & 0x20000000 ? sin : cos);
            float y = radius[2 * first + i] * (bits & 0x20000000 ? cos : sin);
            values[2 * i] = bits & 0x40000000 ? -x : x;
            values[2 * i + 1] = bits & 0x80000000 ? -y : y;
        }
        place(out, columns, first, count, values);
    }
}
