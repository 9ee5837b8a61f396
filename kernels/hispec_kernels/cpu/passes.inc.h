/* See passes.c. STORE_T is the type weights and cache are stored in; NAME(x) appends it to a name.

   A vector of 32-bit words holds an even bf16 in its low half and an odd one in its high half. What
   is multiplied with such vectors is kept "split": of every 32 values the 16 even ones, then the 16
   odd ones; SPLIT_AT(k) is where value k lies.

   An operand is what a product multiplies weights with: `width` vectors of n values, laid out for the
   instructions at hand. With AMX, 16 vectors are interleaved in pairs of values as a tile wants them. */

#define AMX (BF16 && HAS_AMX)
#if BF16
#define SPLIT_AT(k) (((k) & ~31) + (((k) & 1) << 4) + (((k) & 31) >> 1))
#else
#define SPLIT_AT(k) (k)
#endif
#define STEP 32 /* values a turn of a dot product takes */

#if AMX
typedef uint16_t NAME(operand);
#define OPERAND_FLOATS(width, n) (((width) + TILE - 1) / TILE * TILE * (n) / 2)
static inline void NAME(put)(NAME(operand) * x, int64_t n, int64_t t, int64_t k, float value) {
  x[(t / TILE) * TILE * n + (k >> 1) * 2 * TILE + ((t % TILE) << 1) + (k & 1)] = to_bf16(value);
}
/* Where the value d of position p lies among a KV head's values. */
#define VALUE_AT(p, d, dim) ((((p) / 32) * (dim) + (d)) * 32 + (p) % 32)
#else
#define VALUE_AT(p, d, dim) ((p) * (dim) + (d))
typedef float NAME(operand);
#define OPERAND_FLOATS(width, n) ((width) * (n))
static inline void NAME(put)(NAME(operand) * x, int64_t n, int64_t t, int64_t k, float value) {
  x[t * n + SPLIT_AT(k)] = value;
}
#endif

static inline void NAME(load)(const STORE_T *p, vf *even, vf *odd) {
#if BF16
  vu u;
  memcpy(&u, p, 64);
  *even = (vf)(u << 16);
  *odd = (vf)(u & 0xffff0000u);
#else
  memcpy(even, p, 64);
  memcpy(odd, p + LANES, 64);
#endif
}

static inline void NAME(store)(STORE_T *p, float x) {
#if BF16
  *p = to_bf16(x);
#else
  *p = x;
#endif
}

#if AMX
#define ROWS_SHARED 32 /* rows a thread takes at a time */

#define AHEAD 16384 /* bytes: prefetching by hardware stops at pages, and tiles are read in order */

/* sums[p][q] (16 x 16): the 16 weight rows in tiles at w[p] times operands 16 q, 16 q + 1, ...;
   q is 0 alone if there are no more than 16. */
static inline void NAME(panels)(const STORE_T *const w[2], const NAME(operand) * x, int64_t n,
                                int64_t width, float sums[2][2][TILE * TILE]) {
  _tile_zero(0);
  _tile_zero(1);
  if (width <= TILE) {
    for (int64_t k = 0; k < n * TILE; k += STEP * TILE) {
      for (int r = 0; r < TILE; r++) {
        __builtin_prefetch((const char *)(w[0] + k) + AHEAD + 64 * r, 0, 2);
        __builtin_prefetch((const char *)(w[1] + k) + AHEAD + 64 * r, 0, 2);
      }
      _tile_loadd(6, x + k, 64);
      _tile_loadd(4, w[0] + k, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w[1] + k, 64);
      _tile_dpbf16ps(1, 5, 6);
    }
  } else {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < n * TILE; k += STEP * TILE) {
      _tile_loadd(6, x + k, 64);
      _tile_loadd(7, x + TILE * n + k, 64);
      _tile_loadd(4, w[0] + k, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, w[1] + k, 64);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, sums[0][1], 64);
    _tile_stored(3, sums[1][1], 64);
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[1][0], 64);
}

/* y[t][row] (+)= w[row] . x[t] + bias[row] for rows first..last-1 of `total` and all operands. */
static void NAME(product)(const STORE_T *w, const float *bias, int64_t first, int64_t last,
                          int64_t total, int64_t n, const NAME(operand) * x, int64_t width, float *y,
                          int add) {
  float sums[2][2][TILE * TILE] __attribute__((aligned(64)));
  for (int64_t row = first; row < last; row += 2 * TILE) {
    const int lone = row + TILE >= total; /* no second panel: run the first twice */
    const STORE_T *const panel[2] = {w + row * n, w + (lone ? row : row + TILE) * n};
    for (int64_t from = 0; from < width; from += 2 * TILE) {
      const int64_t some = width - from < 2 * TILE ? width - from : 2 * TILE;
      NAME(panels)(panel, x + from * n, n, some, sums);
      for (int p = 0; p < 2 - lone; p++) {
        const int64_t at = row + p * TILE, rows = last - at < TILE ? last - at : TILE;
        for (int64_t t = 0; t < some; t++) {
          float *out = y + (from + t) * total + at;
          const float *column = sums[p][t / TILE] + t % TILE;
          for (int64_t r = 0; r < rows; r++)
            out[r] = (add ? out[r] : 0.0f) + (column[r * TILE] + (bias ? bias[at + r] : 0.0f));
        }
      }
    }
  }
}

/* Operand hidden: silu(gate_i . x[t]) * (up_i . x[t]) for i in first..last-1 of `total`. */
static void NAME(gated)(const STORE_T *w, const float *bias, int64_t first, int64_t last,
                        int64_t total, int64_t n, const NAME(operand) * x, int64_t width,
                        NAME(operand) * hidden) {
  float sums[2][2][TILE * TILE] __attribute__((aligned(64)));
  for (int64_t i = first; i < last; i += TILE) {
    const STORE_T *const panel[2] = {w + i * n, w + (total + i) * n};
    for (int64_t from = 0; from < width; from += 2 * TILE) {
      const int64_t some = width - from < 2 * TILE ? width - from : 2 * TILE;
      NAME(panels)(panel, x + from * n, n, some, sums);
      for (int64_t r = 0; r < TILE; r += 2)
        for (int64_t t = 0; t < some; t += TILE) { /* a row of sums is 16 operands */
          vf gate[2], up[2];
          for (int j = 0; j < 2; j++) {
            gate[j] = *(vf *)(sums[0][t / TILE] + (r + j) * TILE);
            up[j] = *(vf *)(sums[1][t / TILE] + (r + j) * TILE);
            if (bias) {
              gate[j] += bias[i + r + j];
              up[j] += bias[total + i + r + j];
            }
          }
          const vu pair = bf16_pairs(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
          memcpy(hidden + (from + t) * total + (i + r) * TILE, &pair, 64);
        }
    }
  }
}
#else
#define ROWS_SHARED 4

/* out[r][t] = row r of the weights times operand t, for 4 rows and T operands. */
static inline __attribute__((always_inline)) void NAME(dots)(
    const STORE_T *const w[4], const float *x, int64_t ldx, int64_t n, const int T, float out[4][4]) {
  vf sum[4][4];
  for (int r = 0; r < 4; r++)
    for (int t = 0; t < T; t++) sum[r][t] = splat(0.0f);
  for (int64_t k = 0; k < n; k += STEP) {
    vf even[4], odd[4];
    for (int r = 0; r < 4; r++) {
      NAME(load)(w[r] + k, &even[r], &odd[r]);
      /* Hardware prefetch stops at pages; 4 rows ahead is where this thread reads next. */
      __builtin_prefetch((const char *)(w[r] + k + 4 * n), 0, 3);
#if !BF16
      __builtin_prefetch((const char *)(w[r] + k + 4 * n) + 64, 0, 3);
#endif
    }
    for (int t = 0; t < T; t++) {
      vf a, b;
      memcpy(&a, x + t * ldx + k, 64);
      memcpy(&b, x + t * ldx + k + LANES, 64);
      for (int r = 0; r < 4; r++) {
        sum[r][t] += even[r] * a;
        sum[r][t] += odd[r] * b;
      }
    }
  }
  for (int r = 0; r < 4; r++)
    for (int t = 0; t < T; t++) out[r][t] = lanes_sum(sum[r][t]);
}

/* Calls dots with T a constant, so that the sums stay in registers. */
static inline void NAME(dots_any)(const STORE_T *const w[4], const float *x, int64_t ldx, int64_t n,
                                  int T, float out[4][4]) {
  switch (T) {
    case 1: NAME(dots)(w, x, ldx, n, 1, out); break;
    case 2: NAME(dots)(w, x, ldx, n, 2, out); break;
    case 3: NAME(dots)(w, x, ldx, n, 3, out); break;
    default: NAME(dots)(w, x, ldx, n, 4, out);
  }
}

/* y[t][row] (+)= w[row] . x[t] + bias[row] for rows first..last-1 of `total` and all operands. */
static void NAME(product)(const STORE_T *w, const float *bias, int64_t first, int64_t last,
                          int64_t total, int64_t n, const NAME(operand) * x, int64_t width, float *y,
                          int add) {
  for (int64_t row = first; row < last; row += 4) {
    const STORE_T *rows[4];
    for (int r = 0; r < 4; r++) rows[r] = w + (row + r < last ? row + r : last - 1) * n;
    for (int64_t t = 0; t < width; t += 4) {
      const int T = width - t < 4 ? (int)(width - t) : 4;
      float out[4][4];
      NAME(dots_any)(rows, x + t * n, n, n, T, out);
      for (int r = 0; r < 4 && row + r < last; r++) {
        const float b = bias ? bias[row + r] : 0.0f;
        for (int u = 0; u < T; u++) {
          float *cell = y + (t + u) * total + row + r;
          *cell = (add ? *cell : 0.0f) + (out[r][u] + b);
        }
      }
    }
  }
}

/* Operand hidden: silu(gate_i . x[t]) * (up_i . x[t]) for i in first..last-1 of `total`. */
static void NAME(gated)(const STORE_T *w, const float *bias, int64_t first, int64_t last,
                        int64_t total, int64_t n, const NAME(operand) * x, int64_t width,
                        NAME(operand) * hidden) {
  for (int64_t i = first; i < last; i += 2) {
    const int64_t j = i + 1 < last ? i + 1 : i;
    const STORE_T *rows[4] = {w + i * n, w + j * n, w + (total + i) * n, w + (total + j) * n};
    for (int64_t t = 0; t < width; t += 4) {
      const int T = width - t < 4 ? (int)(width - t) : 4;
      float out[4][4];
      NAME(dots_any)(rows, x + t * n, n, n, T, out);
      for (int r = 0; r < 2 && i + r < last; r++) {
        const float bg = bias ? bias[i + r] : 0.0f, bu = bias ? bias[total + i + r] : 0.0f;
        for (int u = 0; u < T; u++)
          NAME(put)(hidden, total, t + u, i + r, silu(splat(out[r][u] + bg))[0] * (out[r + 2][u] + bu));
      }
    }
  }
}

#endif

/* Operand y: x[t][d] / rms(x[t]) * weight[d] */
static void NAME(normed)(const float *x, const float *weight, int64_t width, int64_t n, float eps,
                         NAME(operand) * y) {
  for (int64_t t = 0; t < width; t++) {
    const float *row = x + t * n;
    vf sum = splat(0.0f);
    for (int64_t k = 0; k < n; k += LANES) {
      vf v;
      memcpy(&v, row + k, 64);
      sum += v * v;
    }
    const float factor = 1.0f / sqrtf(lanes_sum(sum) / (float)n + eps);
#if AMX
    for (int64_t k = 0; k < n; k += LANES) {
      float scaled[LANES];
      for (int j = 0; j < LANES; j++) scaled[j] = row[k + j] * factor * weight[k + j];
      uint32_t *cell = (uint32_t *)(y + (t / TILE) * TILE * n + k * TILE) + t % TILE;
      for (int j = 0; j < LANES / 2; j++)
        cell[j * TILE] = to_bf16(scaled[2 * j]) | (uint32_t)to_bf16(scaled[2 * j + 1]) << 16;
    }
#else
    for (int64_t k = 0; k < n; k++) NAME(put)(y, n, t, k, row[k] * factor * weight[k]);
#endif
  }
}

/* Rotates head vectors of one new row: dst[d] = x[d] cos[d] + x[(d + D_h/2) % D_h] sin[d]. */
static inline float NAME(turned)(const float *x, const float *cos, const float *sin, int64_t d,
                                 int64_t dim) {
  const int64_t half = dim / 2;
  return x[d] * cos[d] + x[d < half ? d + half : d - half] * sin[d];
}

#if AMX
/* Attention of one KV head's query heads for `rows` new rows of one text from `position` on (TILE / G of
   them at most), each over the positions up to its own. Written to the operand mixed, of n values, as
   its vectors t, t + 1, ...

   A column of the score tiles is one query: 16 positions a tile, so a softmax over positions runs down
   the tiles with 16 queries in a vector and no sum across lanes. */
static void NAME(attend_any)(const float *qkv, int64_t ldq, const float *cos, const float *sin,
                             const STORE_T *keys, const STORE_T *values, int64_t position,
                             int64_t rows, int64_t group, int64_t dim, float scale, int64_t head,
                             NAME(operand) * mixed, int64_t n, int64_t t) {
  uint16_t q[MAX_HEAD * TILE] __attribute__((aligned(64)));    /* [d / 2][query][d % 2] */
  uint32_t p[SPLIT / 2 * TILE] __attribute__((aligned(64)));   /* [position / 2][query] pairs */
  float score[SPLIT * TILE] __attribute__((aligned(64)));      /* [position][query] */
  float part[TILE * TILE] __attribute__((aligned(64)));        /* [d][query] */
  float sum[MAX_HEAD * TILE] __attribute__((aligned(64)));     /* [d][query] */
  const int64_t last = position + rows - 1;
  vi own = {0}; /* each query's position */
  memset(q, 0, dim * TILE * sizeof(uint16_t));
  memset(sum, 0, dim * TILE * sizeof(float));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < group; g++) {
      const float *x = qkv + r * ldq + (head * group + g) * dim;
      const int64_t column = r * group + g, at = (position + r) * dim;
      own[column] = (int32_t)(position + r);
      for (int64_t d = 0; d < dim; d++)
        q[(d >> 1) * 2 * TILE + 2 * column + (d & 1)] =
            to_bf16(NAME(turned)(x, cos + at, sin + at, d, dim) * scale);
    }
  vf most = splat(-INFINITY), weight = splat(0.0f);
  for (int64_t base = 0; base <= last; base += SPLIT) {
    /* Whole tiles only; what lies behind a query's own position gets weight 0. */
    const int64_t count = last + 1 - base < SPLIT ? (last + 1 - base + 31) / 32 * 32 : SPLIT;
    for (int64_t i = 0; i < count; i += TILE) {
      _tile_zero(0);
      for (int64_t k = 0; k < dim; k += STEP) {
        _tile_loadd(4, keys + (base + i) * dim + k, dim * 2);
        _tile_loadd(6, q + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, score + i * TILE, 64);
    }
    vf top = most;
    for (int64_t i = 0; i < count; i++) {
      vf *row = (vf *)(score + i * TILE);
      const vi hidden = own < (int32_t)(base + i);
      *row = (vf)(((vi)*row & ~hidden) | ((vi)splat(-INFINITY) & hidden));
      top = larger(top, *row);
    }
    /* A query that sees none of these positions keeps -inf - -inf = nan out of its exponents. */
    const vi blind = top == -INFINITY;
    const vf anchor = (vf)((vi)top & ~blind);
    const vf keep = exp_nonpositive(most - anchor);
    most = top;
    vf total = splat(0.0f);
    for (int64_t i = 0; i < count; i += 2) {
      const vf even = exp_nonpositive(*(vf *)(score + i * TILE) - anchor);
      const vf odd = exp_nonpositive(*(vf *)(score + (i + 1) * TILE) - anchor);
      total += even;
      total += odd;
      *(vu *)(p + i / 2 * TILE) = bf16_pairs(even, odd);
    }
    weight = weight * keep + total;
    for (int64_t d = 0; d < dim; d += TILE) {
      _tile_zero(1);
      for (int64_t i = 0; i < count; i += STEP) {
        _tile_loadd(5, values + ((base + i) / 32 * dim + d) * 32, 64);
        _tile_loadd(7, p + i / 2 * TILE, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      _tile_stored(1, part, 64);
      for (int j = 0; j < TILE; j++) {
        vf *cell = (vf *)(sum + (d + j) * TILE);
        *cell = *cell * keep + *(vf *)(part + j * TILE);
      }
    }
  }
  for (int64_t d = 0; d < dim; d++) *(vf *)(sum + d * TILE) /= weight;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < group; g++)
      for (int64_t d = 0; d < dim; d++)
        NAME(put)(mixed, n, t + r, (head * group + g) * dim + d, sum[d * TILE + r * group + g]);
}
#else
/* Attention of new row t's query heads that share a KV head, over positions 0..position, written to
   the operand mixed (of n values) from value `offset` on. */
static inline __attribute__((always_inline)) void NAME(attend)(const float *qkv, const float *cos, const float *sin, const STORE_T *keys,
                         const STORE_T *values, int64_t position, const int64_t group, int64_t dim,
                         float scale, NAME(operand) * mixed, int64_t n, int64_t t, int64_t offset) {
  float q[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float score[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
  float sum[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float most[MAX_GROUP], weight[MAX_GROUP];
  for (int64_t g = 0; g < group; g++) {
    for (int64_t d = 0; d < dim; d++)
      q[g][SPLIT_AT(d)] = NAME(turned)(qkv + g * dim, cos, sin, d, dim) * scale;
    memset(sum[g], 0, dim * sizeof(float));
    most[g] = -INFINITY;
    weight[g] = 0.0f;
  }
  for (int64_t base = 0; base <= position; base += SPLIT) {
    const int64_t count = position + 1 - base < SPLIT ? position + 1 - base : SPLIT;
    for (int64_t p = 0; p < count; p++) {
      const STORE_T *key = keys + (base + p) * dim;
      vf dot[MAX_GROUP];
      for (int64_t g = 0; g < group; g++) dot[g] = splat(0.0f);
      for (int64_t k = 0; k < dim; k += STEP) {
        vf even, odd;
        NAME(load)(key + k, &even, &odd);
        for (int64_t g = 0; g < group; g++) {
          dot[g] += even * *(const vf *)(q[g] + k);
          dot[g] += odd * *(const vf *)(q[g] + k + LANES);
        }
      }
      for (int64_t g = 0; g < group; g++) score[g][p] = lanes_sum(dot[g]);
    }
    for (int64_t g = 0; g < group; g++) {
      for (int64_t p = count; p < SPLIT; p++) score[g][p] = -INFINITY;
      float top = most[g];
      for (int64_t p = 0; p < count; p++) top = score[g][p] > top ? score[g][p] : top;
      const float keep = most[g] == -INFINITY ? 0.0f : exp_nonpositive(splat(most[g] - top))[0];
      most[g] = top;
      vf total = splat(0.0f);
      for (int64_t p = 0; p < SPLIT; p += LANES) {
        vf e = exp_nonpositive(*(vf *)(score[g] + p) - top);
        *(vf *)(score[g] + p) = e;
        total += e;
      }
      weight[g] = weight[g] * keep + lanes_sum(total);
      for (int64_t d = 0; d < dim; d += LANES) *(vf *)(sum[g] + d) *= keep;
    }
    for (int64_t k = 0; k < dim; k += STEP) {
      vf a[MAX_GROUP], b[MAX_GROUP];
      for (int64_t g = 0; g < group; g++) {
        a[g] = *(vf *)(sum[g] + k);
        b[g] = *(vf *)(sum[g] + k + LANES);
      }
      for (int64_t p = 0; p < count; p++) {
        vf even, odd;
        NAME(load)(values + (base + p) * dim + k, &even, &odd);
        for (int64_t g = 0; g < group; g++) {
          a[g] += even * score[g][p];
          b[g] += odd * score[g][p];
        }
      }
      for (int64_t g = 0; g < group; g++) {
        *(vf *)(sum[g] + k) = a[g];
        *(vf *)(sum[g] + k + LANES) = b[g];
      }
    }
  }
  for (int64_t g = 0; g < group; g++)
    for (int64_t d = 0; d < dim; d++)
      NAME(put)(mixed, n, t, offset + g * dim + d, sum[g][SPLIT_AT(d)] / weight[g]);
}

/* Calls attend, which takes one row, with the group a constant where it is a common one, so that sums
   stay in registers. */
static void NAME(attend_any)(const float *qkv, int64_t ldq, const float *cos, const float *sin,
                             const STORE_T *keys, const STORE_T *values, int64_t position,
                             int64_t rows, int64_t group, int64_t dim, float scale, int64_t head,
                             NAME(operand) * mixed, int64_t n, int64_t t) {
  const float *x = qkv + head * group * dim;
  (void)ldq, (void)rows;
  switch (group) {
    case 1: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, 1, dim, scale, mixed, n, t,
                   head * group * dim); break;
    case 2: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, 2, dim, scale, mixed, n, t,
                   head * group * dim); break;
    case 3: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, 3, dim, scale, mixed, n, t,
                   head * group * dim); break;
    case 4: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, 4, dim, scale, mixed, n, t,
                   head * group * dim); break;
    case 8: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, 8, dim, scale, mixed, n, t,
                   head * group * dim); break;
    default: NAME(attend)(x, cos + position * dim, sin + position * dim, keys, values, position, group, dim, scale, mixed, n, t,
                   head * group * dim);
  }
}
#endif

/* Runs `count` blocks over `width` rows at `position`, `position` + 1, ... or, where rows is not NULL,
   over the next token of each of `width` texts.

   x        (W, D) fp32, in and out
   cos, sin (S, D_h), all positions, the first half of sin negated
   scratch  (W + 16) * ((2 H + 2 H_kv) * D_h + I + threads * D) floats, 64-byte aligned */
void NAME(run_layers)(const layer_t *layers, int64_t count, const shape_t *shape, float *x,
                      int64_t width, int64_t position, const row_t *rows, const float *cos,
                      const float *sin, float *scratch, int threads) {
  const int64_t D = shape->hidden, I = shape->intermediate, dim = shape->head_dim;
  const int64_t HK = shape->kv_heads, G = shape->heads / HK, HD = shape->heads * dim;
  const int64_t QKV = HD + 2 * HK * dim;
  float *qkv = scratch;
  NAME(operand) *mixed = (NAME(operand) *)(qkv + width * QKV);
  NAME(operand) *hidden = (NAME(operand) *)((float *)mixed + OPERAND_FLOATS(width, HD));
  float *norms = (float *)hidden + OPERAND_FLOATS(width, I);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    NAME(operand) *normed = (NAME(operand) *)(norms + id * OPERAND_FLOATS(width, D));
#define UNITS(n) (((n) + ROWS_SHARED - 1) / ROWS_SHARED)
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define FROM(n) LEAST(n, share(UNITS(n), id, team) * ROWS_SHARED)
#define UPTO(n) LEAST(n, share(UNITS(n), id + 1, team) * ROWS_SHARED)
#if AMX
    tiles_on();
#endif
    for (int64_t i = 0; i < count; i++) {
      const layer_t *layer = layers + i;
      STORE_T *keys = layer->keys, *values = layer->values;
      NAME(normed)(x, layer->attention_norm, width, D, shape->eps, normed);
      NAME(product)(layer->qkv, layer->qkv_bias, FROM(QKV), UPTO(QKV), QKV, D, normed, width, qkv, 0);
#pragma omp barrier
      for (int64_t task = share(width * HK, id, team); task < share(width * HK, id + 1, team); task++) {
        const int64_t t = task / HK, h = task % HK;
        const float *k = qkv + t * QKV + HD + h * dim, *v = k + HK * dim;
        const int64_t at = rows ? rows[t].position : position + t;
        const int64_t text = h * shape->kv_stride + (rows ? rows[t].offset : 0);
        for (int64_t d = 0; d < dim; d++) {
          NAME(store)(keys + text + at * dim + d,
                      NAME(turned)(k, cos + at * dim, sin + at * dim, d, dim));
          NAME(store)(values + text + VALUE_AT(at, d, dim), v[d]);
        }
      }
#pragma omp barrier
#if AMX
      const int64_t some = rows ? 1 : TILE / G; /* rows of one text whose queries fill a tile */
#else
      const int64_t some = 1;
#endif
      for (int64_t task = id; task < (width + some - 1) / some * HK; task += team) {
        const int64_t t = task / HK * some, h = task % HK;
        const int64_t text = h * shape->kv_stride + (rows ? rows[t].offset : 0);
        NAME(attend_any)(qkv + t * QKV, QKV, cos, sin, keys + text, values + text,
                         rows ? rows[t].position : position + t, LEAST(some, width - t), G, dim,
                         shape->scale, h, mixed, HD, t);
      }
#pragma omp barrier
      NAME(product)(layer->output, layer->output_bias, FROM(D), UPTO(D), D, HD, mixed, width, x, 1);
#pragma omp barrier
      NAME(normed)(x, layer->mlp_norm, width, D, shape->eps, normed);
      NAME(gated)(layer->gate_up, layer->gate_up_bias, FROM(I), UPTO(I), I, D, normed, width, hidden);
#pragma omp barrier
      NAME(product)(layer->down, layer->down_bias, FROM(D), UPTO(D), D, I, hidden, width, x, 1);
#pragma omp barrier
    }
#if AMX
    tiles_off();
#endif
  }
}

/* y = w norm(x) + bias, or w x + bias where norm is NULL.

   x       (W, n) fp32
   y       (W, rows) fp32
   scratch threads * (W + 16) * n floats */
void NAME(project)(const STORE_T *w, const float *bias, int64_t rows, int64_t n, const float *norm,
                   float eps, const float *x, int64_t width, float *y, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    NAME(operand) *operand = (NAME(operand) *)(scratch + id * OPERAND_FLOATS(width, n));
#if AMX
    tiles_on();
#endif
    if (norm)
      NAME(normed)(x, norm, width, n, eps, operand);
    else
      for (int64_t t = 0; t < width; t++)
        for (int64_t k = 0; k < n; k++) NAME(put)(operand, n, t, k, x[t * n + k]);
    NAME(product)(w, bias, FROM(rows), UPTO(rows), rows, n, operand, width, y, 0);
#if AMX
    tiles_off();
#endif
  }
}
#undef FROM
#undef UPTO
#undef UNITS
#undef LEAST
#undef AMX
#undef SPLIT_AT
#undef VALUE_AT
#undef STEP
#undef OPERAND_FLOATS
#undef ROWS_SHARED
