/* Dot products of bf16 pairs: panels of 16 rows times up to 16 operands. See pairs.inc.h.

   Weights of a head that only drafts may be whole numbers of 7 bits, a byte each, with a scale a row: half
   the bytes to stream. A byte u becomes the bf16 128 + u by setting the bits of an exponent above it;
   what that adds to a sum, 128 times the operands', is taken off again afterwards. */
#pragma once
#include "lanes.h"

#define TILE 16  /* rows of a panel, and operands of a product */
#define PANELS 4 /* taken together, at most */
#define MIDDLE 64 /* the byte of a weight of zero */

typedef int32_t __attribute__((may_alias)) pair_t;

/* sum += the panel's pairs x one pair. The intrinsic would load the pair in an instruction of its own. */
static inline vf dot_pairs(vf sum, vu panel, const uint16_t *pair) {
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(panel), "m"(*(const pair_t *)pair));
  return sum;
}

/* The pairs of a panel at w, of bf16 or of bytes. */
static inline vu pairs_at(const char *w, const int bytes) {
  vu pairs;
  if (bytes == 2) {
    memcpy(&pairs, w, 64);
    return pairs;
  }
  return (vu)_mm512_or_si512(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)w)),
                             _mm512_set1_epi16(0x4300));
}

/* out[t * ldo + 16 p] (16 rows): P panels, of n values a row, times T operands. Each is one chain over
   k. On the way the P panels that are read next are fetched into the second-level cache; they lie
   together, or the halves of them do. Panels are read side by side, but memory is read in the order in
   which it lies: hardware does not prefetch past a page, and eight streams of them reach 85 % of the
   bandwidth that one or two do. */
static inline __attribute__((always_inline)) void dots(const void *const *w, const int bytes,
                                                       const uint16_t *x, int64_t n, const int P,
                                                       const int T, const void *const *next,
                                                       float *out, int64_t ldo) {
  const int half = P > 1 ? P / 2 : 1, line = 2 * TILE * bytes;
  vf sum[PANELS][TILE];
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) sum[p][t] = splat(0.0f);
  for (int64_t k = 0; k < n / 2; k++) {
    vu panel[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      panel[p] = pairs_at((const char *)w[p] + k * line, bytes);
      const int64_t ahead = k * half + p % half;
      if (line == 64 || ahead % 2 == 0) /* two lines of 32 bytes are one of the cache's */
        __builtin_prefetch((const char *)next[p / half * half] + ahead * line, 0, 2);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sum[p][t] = dot_pairs(sum[p][t], panel[p], x + k * 2 * TILE + 2 * t);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) memcpy(out + t * ldo + p * TILE, &sum[p][t], 64);
}

/* As dots, for any count of panels and up to 16 operands: as many panels at once as the registers can
   hold sums of. One function for each size of weights. */
#define SOME(T, P) \
  for (; p + P <= count; p += P) dots(w + p, bytes, x, n, P, T, next + p, out + p * TILE, ldo);
#define FOUR(T) case T: SOME(T, 4) SOME(T, 2) SOME(T, 1) break;
#define TWO(T) case T: SOME(T, 2) SOME(T, 1) break;
#define ONE(T) case T: SOME(T, 1) break;
#define PRODUCTS(name, bytes_)                                                                      \
  static void name(const void *const *w, int64_t count, const uint16_t *x, int64_t n, int T,        \
                   const void *const *next, float *out, int64_t ldo) {                              \
    const int bytes = bytes_;                                                                       \
    int64_t p = 0;                                                                                  \
    switch (T) {                                                                                    \
      FOUR(1) FOUR(2) FOUR(3) FOUR(4) FOUR(5) FOUR(6)                                               \
      TWO(7) TWO(8) TWO(9) TWO(10) TWO(11) TWO(12) TWO(13) TWO(14)                                  \
      ONE(15) ONE(16)                                                                               \
    }                                                                                               \
  }
PRODUCTS(panels, 2)
PRODUCTS(panels_of_bytes, 1)
#undef SOME
#undef FOUR
#undef TWO
#undef ONE
#undef PRODUCTS

/* sums[t]: of the values of each operand, as a panel of ones. */
static inline void operand_sums(const uint16_t *x, int64_t n, int64_t T, float *sums) {
  const vu ones = (vu)_mm512_set1_epi16(0x3f80);
  for (int64_t t = 0; t < T; t++) {
    vf sum = splat(0.0f);
    for (int64_t k = 0; k < n * TILE; k += 2 * TILE) sum = dot_pairs(sum, ones, x + k + 2 * t);
    sums[t] = sum[0];
  }
}
