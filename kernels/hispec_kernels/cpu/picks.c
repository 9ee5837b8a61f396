/* What is done with logits on a CPU: the k largest of a row, its sum, and Gumbel noise.

   A row of a vocabulary is 200 KB: one pass finds the largest of every block, and the k-th largest of
   those bounds the k-th largest of all from below, so that few blocks are looked at again. Each value is
   computed by itself: company and threads change no bits. */
#include "lanes.h"
#include <math.h>
#include <omp.h>

#define BLOCK 64   /* columns of one maximum */
#define PART 1024 /* columns a thread takes at a time */

typedef struct {
  float *values; /* the best so far, descending */
  int64_t *columns;
  int64_t count, k;
} best_t;

/* Takes a value if it is among the k best. Columns come in ascending order, so that equal ones keep it. */
static inline void offer(best_t *best, float value, int64_t column) {
  int64_t i = best->count;
  if (i == best->k) {
    if (!(value > best->values[i - 1])) return;
    i--;
  } else {
    best->count++;
  }
  for (; i > 0 && value > best->values[i - 1]; i--) {
    best->values[i] = best->values[i - 1];
    best->columns[i] = best->columns[i - 1];
  }
  best->values[i] = value;
  best->columns[i] = column;
}

/* values, columns (rows, k): the k largest of each row of x (rows, n), descending, of equal ones the
   lowest column first. scratch: rows * ceil(n / 64) floats. */
void top_k(const float *x, int64_t rows, int64_t n, int64_t k, float *values, int64_t *columns,
           float *scratch, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < rows * blocks; i++) {
      const int64_t row = i / blocks, first = i % blocks * BLOCK;
      const float *at = x + row * n + first;
      float largest = at[0];
      if (n - first >= BLOCK) {
        vf v[BLOCK / LANES];
        memcpy(v, at, sizeof v);
        v[0] = larger(larger(v[0], v[1]), larger(v[2], v[3]));
        for (int j = 0; j < LANES; j++) largest = v[0][j] > largest ? v[0][j] : largest;
      } else {
        for (int64_t j = 1; j < n - first; j++) largest = at[j] > largest ? at[j] : largest;
      }
      scratch[i] = largest;
    }
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const float *at = x + row * n, *largest = scratch + row * blocks;
      best_t best = {values + row * k, columns + row * k, 0, k};
      float bound = -INFINITY;
      if (k <= blocks) {
        for (int64_t i = 0; i < blocks; i++) offer(&best, largest[i], i);
        bound = best.values[k - 1];
        best.count = 0;
      }
      for (int64_t i = 0; i < blocks; i++)
        if (largest[i] >= bound)
          for (int64_t j = i * BLOCK; j < n && j < (i + 1) * BLOCK; j++)
            if (at[j] >= bound) offer(&best, at[j], j);
      for (int64_t i = best.count; i < k; i++) { /* what is not a number is passed over */
        values[row * k + i] = -INFINITY;
        columns[row * k + i] = 0;
      }
    }
  }
}

/* out (rows,) = log of the sum of exp(x / temperature) over each row of x (rows, n). */
void log_sum_exp(const float *x, int64_t rows, int64_t n, float temperature, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    const float *at = x + row * n;
    const int64_t whole = n / LANES * LANES;
    vf highest = splat(-INFINITY), sums = splat(0.0f);
    for (int64_t i = 0; i < whole; i += LANES) {
      vf v;
      memcpy(&v, at + i, 64);
      highest = larger(highest, v);
    }
    float top = -INFINITY;
    for (int j = 0; j < LANES; j++) top = highest[j] > top ? highest[j] : top;
    for (int64_t i = whole; i < n; i++) top = at[i] > top ? at[i] : top;
    for (int64_t i = 0; i < whole; i += LANES) {
      vf v;
      memcpy(&v, at + i, 64);
      sums += exp_nonpositive((v - top) / temperature);
    }
    float sum = lanes_sum(sums);
    for (int64_t i = whole; i < n; i++) sum += expf((at[i] - top) / temperature);
    out[row] = top == -INFINITY ? top : top / temperature + logf(sum);
  }
}

/* noise.py's mix. */
static inline vu mix(vu x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

/* log of normal numbers > 0 (to 1 ulp): Cephes' polynomial. */
static inline vf log_positive(vf x) {
  vi exponent = ((vi)x >> 23) - 126;
  vf m = (vf)(((vi)x & 0x007fffff) | 0x3f000000); /* [0.5, 1) */
  const vi low = m < 0.707106781f;
  exponent += low; /* -1 where it holds */
  m = m - 1.0f + (vf)((vi)m & low);
  const vf e = __builtin_convertvector(exponent, vf), z = m * m;
  vf y = splat(7.0376836292e-2f);
  y = y * m + -1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m + -1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m + -1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m + -2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z;
  y = y + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

/* memcpy, but a whole vector without a call. */
static inline void copy(void *to, const void *from, int64_t count, int64_t size) {
  if (count == LANES)
    memcpy(to, from, LANES * size);
  else
    memcpy(to, from, count * size);
}

/* out (rows, n) = the noise of noise.py at a position a row and a token a column; added to
   logits / temperature where logits, (rows, n), are not NULL. tokens is (n,), or (rows, n) where
   `stride` is n, or NULL where they are the columns. */
void gumbel(const float *logits, float temperature, uint64_t seed, const int64_t *positions,
            const int64_t *tokens, int64_t stride, int64_t rows, int64_t n, float *out, int threads) {
  const int64_t parts = (n + PART - 1) / PART;
  const vu zero = {0}, lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vu seeded = mix(mix(zero + (uint32_t)seed) + (uint32_t)(seed >> 32));
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < rows * parts; i++) {
    const int64_t row = i / parts, from = i % parts * PART, to = from + PART < n ? from + PART : n;
    const vu state = mix(seeded + (uint32_t)positions[row]);
    for (int64_t first = from; first < to; first += LANES) {
      const int64_t some = to - first < LANES ? to - first : LANES;
      vu token = lane + (uint32_t)first;
      if (tokens) {
        int64_t words[LANES] = {0};
        copy(words, tokens + row * stride + first, some, sizeof(int64_t));
        for (int j = 0; j < LANES; j++) token[j] = (uint32_t)words[j];
      }
      const vu bits = mix(state ^ mix(token * 0x9E3779B9u + 0x7F4A7C15u));
      const vf uniform = (__builtin_convertvector(bits >> 9, vf) + 0.5f) * 0x1p-23f;
      vf noise = -log_positive(-log_positive(uniform));
      if (logits) {
        vf logit = {0};
        copy(&logit, logits + row * n + first, some, sizeof(float));
        noise = logit / temperature + noise;
      }
      copy(out + row * n + first, &noise, some, sizeof(float));
    }
  }
}
