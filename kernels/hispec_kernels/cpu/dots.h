/* Products of bf16 with bf16: panels of 16 rows, their values in pairs, times up to 16 operands. See
   pairs.inc.h.

   Where the processor has dot products of pairs (AVX512-BF16), one instruction takes a pair of each row
   times a pair of an operand, and operands lie in pairs like weights. Elsewhere the halves of the pairs
   become floats, and multiply-adds take operands as floats that were rounded to bf16: a panel read once
   is multiplied with all of them, so that a pass over 8 rows waits for memory as long as one over 1.

   Weights of a head that only drafts may be whole numbers of 7 bits, a byte each, with a scale a row: half
   the bytes to stream. A byte u becomes the bf16 128 + u by setting the bits of an exponent above it;
   what that adds to a sum, 128 times the operands', is taken off again afterwards. */
#pragma once
#include "lanes.h"

#define TILE 16  /* rows of a panel, and operands of a product */
#define PANELS 4 /* taken together, at most */
#define MIDDLE 64 /* the byte of a weight of zero */

typedef int32_t __attribute__((may_alias)) pair_t;

/* The two functions `dots` below, for one kind of processor each, do this:

   out[t * ldo + 16 p] (16 rows): P panels, of n values a row, times T operands. Each is one chain over
   k. On the way the P panels that are read next are fetched into the second-level cache, every `turns`th
   line beginning with number `turn`: the others are other calls' over the same panels. */

/* Fetches what lies at k in the panels that are read next; they lie together, or the halves of them
   do. Panels are read side by side, but memory is read in the order in which it lies: hardware does not
   prefetch past a page, and eight streams of them reach 85 % of the bandwidth that one or two do. */
static inline __attribute__((always_inline)) void fetch(const void *const *next, const int bytes,
                                                        int64_t k, const int P, const int p) {
  const int half = P > 1 ? P / 2 : 1, line = 2 * TILE * bytes;
  const int64_t ahead = k * half + p % half;
  if (line == 64 || ahead % 2 == 0) /* two lines of 32 bytes are one of the cache's */
    __builtin_prefetch((const char *)next[p / half * half] + ahead * line, 0, 2);
}

#if HAS_DOTS
typedef uint16_t operand_t; /* [t / 16][k / 2][t % 16][k % 2] */
#define OPERAND_AT(x, t, ldx) ((x) + 2 * (t))
#define MOST 16 /* operands multiplied at once */
#define FITS(P, T) (P * T + P <= 30) /* into the registers */

/* sum += the panel's pairs x one pair. The intrinsic would load the pair in an instruction of its own.
   Tests define it in C. */
#ifndef DOT_PAIRS
#define DOT_PAIRS(sum, panel, pair) \
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(panel), "m"(*(const pair_t *)(pair)))
#endif
static inline vf dot_pairs(vf sum, vu panel, const uint16_t *pair) {
  DOT_PAIRS(sum, panel, pair);
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

static inline __attribute__((always_inline)) void dots(const void *const *w, const int bytes,
                                                       const operand_t *x, int64_t ldx, int64_t n,
                                                       const int P, const int T, const int by_row,
                                                       const void *const *next, int64_t turn,
                                                       int64_t turns, float *out, int64_t ldo) {
  vf sum[PANELS][TILE];
  const int pair = by_row ? 2 : 2 * TILE, operand = by_row ? SPLIT : 2;
  (void)ldx, (void)turn, (void)turns; /* there is one */
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) sum[p][t] = splat(0.0f);
  for (int64_t k = 0; k < n / 2; k++) {
    vu panel[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      panel[p] = pairs_at((const char *)w[p] + k * 2 * TILE * bytes, bytes);
      fetch(next, bytes, k, P, p);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
        sum[p][t] = dot_pairs(sum[p][t], panel[p], x + k * pair + t * operand);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) memcpy(out + t * ldo + p * TILE, &sum[p][t], 64);
}

#else
typedef float operand_t; /* [t][k], each value a bf16 */
#define OPERAND_AT(x, t, ldx) ((x) + (t) * (ldx))

#if WIDE == 16
#define MOST 16
#define FITS(P, T) (P * T + 2 * P <= 30)
#else
#define MOST 6
#define FITS(P, T) (T == 1 || P * T + P <= 7) /* a panel's 16 lanes take two of 16, or four of 32 */
#endif

/* The even or the odd values of some rows' pairs at w, of bf16 or of bytes. */
static inline wf values_at(const char *w, const int bytes, const int odd) {
  wu pairs;
  if (bytes == 2) {
    memcpy(&pairs, w, sizeof pairs);
    return (wf)(odd ? pairs & 0xffff0000u : pairs << 16);
  }
  wh both; /* two bytes a row */
  memcpy(&both, w, sizeof both);
  pairs = __builtin_convertvector(both, wu);
  return (wf)((odd ? pairs >> 8 << 16 : (pairs & 0xffu) << 16) | 0x43000000u);
}

static inline __attribute__((always_inline)) void dots(const void *const *w, const int bytes,
                                                       const operand_t *x, int64_t ldx, int64_t n,
                                                       const int P, const int T, const int by_row,
                                                       const void *const *next, int64_t turn,
                                                       int64_t turns, float *out, int64_t ldo) {
  wf sum[PANELS * PARTS][MOST];
  (void)by_row; /* they always are */
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int p = 0; p < P * PARTS; p++) sum[p][t] = (wf){0};
  for (int64_t k = 0; k < n / 2; k++) {
    if (turn-- == 0) {
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) fetch(next, bytes, k, P, p);
      turn = turns - 1;
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      wf part[PANELS * PARTS];
#pragma GCC unroll 16
      for (int p = 0; p < P * PARTS; p++)
        part[p] = values_at((const char *)w[p / PARTS] + (k * PARTS + p % PARTS) * 2 * WIDE * bytes,
                            bytes, odd);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) {
        const wf splatted = x[t * ldx + 2 * k + odd] - (wf){0};
#pragma GCC unroll 16
        for (int p = 0; p < P * PARTS; p++) sum[p][t] = fused(part[p], splatted, sum[p][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int p = 0; p < P * PARTS; p++) memcpy(out + t * ldo + p * WIDE, &sum[p][t], sizeof(wf));
}
#endif

/* dots by itself, where it fits: inside of anything else the compiler keeps what it needs in memory. */
#define LEAF(name, T, P, bytes, by_row)                                                             \
  static __attribute__((noinline)) void name##_##T##_##P(                                           \
      const void *const *w, const operand_t *x, int64_t ldx, int64_t n, const void *const *next,    \
      float *out, int64_t ldo) {                                                                    \
    if (FITS(P, T)) dots(w, bytes, x, ldx, n, P, T, by_row, next, 0, 1, out, ldo);                  \
  }                                                                                                 \
  static __attribute__((noinline)) void name##_##T##_##P##_in_turn(                                 \
      const void *const *w, const operand_t *x, int64_t ldx, int64_t n, const void *const *next,    \
      int64_t turn, int64_t turns, float *out, int64_t ldo) {                                       \
    if (FITS(P, T) && MOST < TILE)                                                                  \
      dots(w, bytes, x, ldx, n, P, T, by_row, next, turn, turns, out, ldo);                         \
  }
/* As dots, for any count of panels: as many at once as the registers can hold sums of. */
#define SOME(name, T, P)                                                                            \
  if (FITS(P, T))                                                                                   \
    for (; p + P <= count; p += P) {                                                                \
      if (turns == 1)                                                                               \
        name##_##T##_##P(w + p, x, ldx, n, next + p, out + p * TILE, ldo);                          \
      else                                                                                          \
        name##_##T##_##P##_in_turn(w + p, x, ldx, n, next + p, turn, turns, out + p * TILE, ldo);   \
    }
#define OPERANDS(name, T, ...)                                                                      \
  LEAF(name, T, 4, __VA_ARGS__) LEAF(name, T, 2, __VA_ARGS__) LEAF(name, T, 1, __VA_ARGS__)         \
  static inline void name##_##T(const void *const *w, int64_t count, const operand_t *x,            \
                                int64_t ldx, int64_t n, const void *const *next, int64_t turn,      \
                                int64_t turns, float *out, int64_t ldo) {                           \
    int64_t p = 0;                                                                                  \
    SOME(name, T, 4) SOME(name, T, 2) SOME(name, T, 1)                                              \
  }
/* And for up to 16 operands: where the registers cannot hold the sums of one panel, some operands after
   the others, which take turns at fetching. One function for each size of weights; and one whose
   operands lie one after the other, of SPLIT values each. */
#define CASE(name, T)                                                                               \
  case T: name##_##T(w, count, x, ldx, n, next, turn, turns, out, ldo); break;
#define PRODUCTS(name, ...)                                                                         \
  OPERANDS(name, 1, __VA_ARGS__) OPERANDS(name, 2, __VA_ARGS__) OPERANDS(name, 3, __VA_ARGS__)      \
  OPERANDS(name, 4, __VA_ARGS__) OPERANDS(name, 5, __VA_ARGS__) OPERANDS(name, 6, __VA_ARGS__)      \
  MORE_OPERANDS(name, __VA_ARGS__)                                                                  \
  static void name(const void *const *w, int64_t count, const operand_t *x, int64_t ldx, int64_t n, \
                   int T, const void *const *next, float *out, int64_t ldo) {                       \
    const int turns = T <= MOST ? 1 : (T + MOST - 2) / (MOST - 1); /* a turn takes registers, too */ \
    for (int turn = 0; turn < turns; turn++) {                                                      \
      const int some = (T - turn - 1) / turns + 1; /* turns differ by one at most */                \
      switch (some) {                                                                               \
        CASE(name, 1) CASE(name, 2) CASE(name, 3) CASE(name, 4) CASE(name, 5) CASE(name, 6)         \
        MORE_CASES(name)                                                                            \
      }                                                                                             \
      x = OPERAND_AT(x, some, ldx);                                                                 \
      out += some * ldo;                                                                            \
    }                                                                                               \
  }
#if MOST > 6
#define MORE_OPERANDS(name, ...)                                                                    \
  OPERANDS(name, 7, __VA_ARGS__) OPERANDS(name, 8, __VA_ARGS__) OPERANDS(name, 9, __VA_ARGS__)      \
  OPERANDS(name, 10, __VA_ARGS__) OPERANDS(name, 11, __VA_ARGS__) OPERANDS(name, 12, __VA_ARGS__)   \
  OPERANDS(name, 13, __VA_ARGS__) OPERANDS(name, 14, __VA_ARGS__) OPERANDS(name, 15, __VA_ARGS__)   \
  OPERANDS(name, 16, __VA_ARGS__)
#define MORE_CASES(name)                                                                            \
  CASE(name, 7) CASE(name, 8) CASE(name, 9) CASE(name, 10) CASE(name, 11) CASE(name, 12)            \
  CASE(name, 13) CASE(name, 14) CASE(name, 15) CASE(name, 16)
#else
#define MORE_OPERANDS(name, ...)
#define MORE_CASES(name)
#endif
PRODUCTS(panels, 2, 0)
PRODUCTS(panels_of_bytes, 1, 0)
PRODUCTS(panels_by_row, 2, 1)
#undef LEAF
#undef SOME
#undef OPERANDS
#undef MORE_OPERANDS
#undef CASE
#undef MORE_CASES
#undef PRODUCTS

/* sums[t]: of the values of each operand, as a panel of ones. */
static inline void operand_sums(const operand_t *x, int64_t n, int64_t T, float *sums) {
  for (int64_t t = 0; t < T; t++) {
#if HAS_DOTS
    const vu ones = (vu)_mm512_set1_epi16(0x3f80);
    vf sum = splat(0.0f);
    for (int64_t k = 0; k < n * TILE; k += 2 * TILE) sum = dot_pairs(sum, ones, x + k + 2 * t);
    sums[t] = sum[0];
#else
    float sum = 0.0f;
    for (int64_t k = 0; k < n; k++) sum += x[t * n + k];
    sums[t] = sum;
#endif
  }
}
