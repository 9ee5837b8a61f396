/* Vectors of 16 words, GCC's and Clang's own: any CPU they compile for has them. */
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

static inline float lanes_sum(vf v) {
  vf8 a, b;
  memcpy(&a, &v, 32);
  memcpy(&b, (const char *)&v + 32, 32);
  a += b;
  vf4 c, d;
  memcpy(&c, &a, 16);
  memcpy(&d, (const char *)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline vf splat(float x) { return x - (vf){0}; }

/* Vectors as wide as registers are: the compiler would keep wider ones in memory. */
#if defined(__AVX512F__)
#define WIDE 16
#elif defined(__AVX2__)
#define WIDE 8
#else
#define WIDE 4
#endif
#define PARTS (LANES / WIDE)
typedef float wf __attribute__((vector_size(4 * WIDE)));
typedef uint32_t wu __attribute__((vector_size(4 * WIDE)));
typedef int32_t wi __attribute__((vector_size(4 * WIDE)));
typedef uint16_t wh __attribute__((vector_size(2 * WIDE)));

/* a b + c, rounded once wherever the processor can: left to itself a compiler may round the product too
   where it has one sum alone to add to, and the row would have other bits than in company. */
static inline wf fused(wf a, wf b, wf c) {
#if defined(__AVX512F__)
  return (wf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (wf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (wf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/* y += x, of n values, a multiple of 16 */
static inline void add_to(float *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    vf a, b;
    memcpy(&a, y + i, 64);
    memcpy(&b, x + i, 64);
    a += b;
    memcpy(y + i, &a, 64);
  }
}

/* y (+)= sums + bias */
static inline void put_sums(float *y, const float *sums, const float *bias, int64_t rows, int add) {
  int64_t r = 0;
  for (; r + LANES <= rows; r += LANES) {
    vf sum, b = splat(0.0f), before = splat(0.0f);
    memcpy(&sum, sums + r, 64);
    if (bias) memcpy(&b, bias + r, 64);
    if (add) memcpy(&before, y + r, 64);
    sum = before + (sum + b);
    memcpy(y + r, &sum, 64);
  }
  for (; r < rows; r++) y[r] = (add ? y[r] : 0.0f) + (sums[r] + (bias ? bias[r] : 0.0f));
}

/* As bf16, rounded to nearest even. */
static inline wh halves_of(wf x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  return (wh)_mm512_cvtneps_pbh((__m512)x);
#else
  const wu bits = (wu)x;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, wh);
#endif
}

/* What compares lanes is written for vectors as wide as registers: of wider ones the compiler compares
   lane by lane. */
static inline wf larger_of(wf a, wf b) {
  const wi first = a > b;
  return (wf)(((wi)a & first) | ((wi)b & ~first));
}

/* exp for arguments <= 0, to 2 ulp, by Cephes' polynomial; 0 below -87, or where AVX512 scales, -104. */
static inline wf exp_of(wf x) {
#if defined(__AVX512F__)
  x = (wf)_mm512_max_ps((__m512)(-128.0f - (wf){0}), (__m512)x); /* what is no number stays */
  const wf n = (wf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8 /* to nearest, silently */);
#else
  const wi dead = x < -87.0f;
  x = (wf)((wi)x & ~dead);
  const wf shifted = x * 1.44269504f + 12582912.0f; /* rounds to an integer in the low bits */
  const wf n = shifted - 12582912.0f;
#endif
  wf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  wf p = 1.9875691500e-4f - (wf){0};
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (wf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const wi bits = (wi)p + (((wi)shifted) << 23);
  return (wf)(bits & ~dead);
#endif
}

static inline vf larger(vf a, vf b) {
  wf of_a[PARTS], of_b[PARTS];
  memcpy(of_a, &a, sizeof a);
  memcpy(of_b, &b, sizeof b);
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) of_a[i] = larger_of(of_a[i], of_b[i]);
  memcpy(&a, of_a, sizeof a);
  return a;
}

static inline vf exp_nonpositive(vf x) {
  wf parts[PARTS];
  memcpy(parts, &x, sizeof x);
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) parts[i] = exp_of(parts[i]);
  memcpy(&x, parts, sizeof x);
  return x;
}

/* picks.c's */
void top_k(const float *x, int64_t rows, int64_t n, int64_t k, float *values, int64_t *columns,
           float *scratch, int threads);
void log_sum_exp(const float *x, int64_t rows, int64_t n, float temperature, float *out, int threads);
