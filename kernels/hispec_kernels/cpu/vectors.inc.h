/* Products and attention of fp32, in 16 lanes. See passes.inc.h. */

#define KEY_AT(p, d, dim) ((p) * (dim) + (d))
#define VALUE_AT(p, d, dim) ((p) * (dim) + (d))

typedef float NAME(operand);
#define OPERAND_FLOATS(width, n) ((width) * (n))
static inline void NAME(put_lanes)(NAME(operand) * x, int64_t n, int64_t t, int64_t k, vf values) {
  memcpy(x + t * n + k, &values, 64);
}

#define ROWS_SHARED 4
#define ROWS_ATTENDED(group) 1

/* Operands multiplied at once: as many as the registers can hold 4 rows' sums of. */
#define SOME (WIDE == 16 ? 4 : 2)

/* out[r][t] = row r of the weights times operand t, for 4 rows and T operands. Each is the sum of 16
   chains over k, whatever registers hold of them at a time. */
static inline __attribute__((always_inline)) void NAME(dots)(
    const STORE_T *const w[4], const float *x, int64_t ldx, int64_t n, const int T, float out[4][SOME]) {
  vf sums[4][SOME];
#pragma GCC unroll 4
  for (int part = 0; part < PARTS; part++) {
    wf sum[4][SOME];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sum[r][t] = (wf){0};
    for (int64_t k = part * WIDE; k < n; k += LANES) {
      wf row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        memcpy(&row[r], w[r] + k, sizeof(wf));
        /* Hardware prefetch stops at pages; 4 rows ahead is where this thread reads next. */
        if (part == 0) __builtin_prefetch(w[r] + k + 4 * n, 0, 3);
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        wf a;
        memcpy(&a, x + t * ldx + k, sizeof(wf));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) sum[r][t] = fused(row[r], a, sum[r][t]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) memcpy((float *)&sums[r][t] + part * WIDE, &sum[r][t], sizeof(wf));
  }
  for (int r = 0; r < 4; r++)
    for (int t = 0; t < T; t++) out[r][t] = lanes_sum(sums[r][t]);
}

/* Calls dots with T a constant, so that the sums stay in registers. */
static inline void NAME(dots_any)(const STORE_T *const w[4], const float *x, int64_t ldx, int64_t n,
                                  int T, float out[4][SOME]) {
  switch (T) {
    case 1: NAME(dots)(w, x, ldx, n, 1, out); break;
#if WIDE == 16
    case 2: NAME(dots)(w, x, ldx, n, 2, out); break;
    case 3: NAME(dots)(w, x, ldx, n, 3, out); break;
#endif
    default: NAME(dots)(w, x, ldx, n, SOME, out);
  }
}

/* y[t][row] (+)= w[row] . x[t] + bias[row] for rows first..last-1 of `total` and all operands. */
static void NAME(product)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                          int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                          int64_t width, float *y, int add, const WEIGHT_T *then) {
  (void)scale, (void)then;
  for (int64_t row = first; row < last; row += 4) {
    const STORE_T *rows[4];
    for (int r = 0; r < 4; r++) rows[r] = w + (row + r < last ? row + r : last - 1) * n;
    for (int64_t t = 0; t < width; t += SOME) {
      const int T = width - t < SOME ? (int)(width - t) : SOME;
      float out[4][SOME];
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
static void NAME(gated)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                        int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                        int64_t width, NAME(operand) * hidden, const WEIGHT_T *then) {
  (void)scale, (void)then;
  for (int64_t i = first; i < last; i += 2) {
    const int64_t j = i + 1 < last ? i + 1 : i;
    const STORE_T *rows[4] = {w + i * n, w + j * n, w + (total + i) * n, w + (total + j) * n};
    for (int64_t t = 0; t < width; t += SOME) {
      const int T = width - t < SOME ? (int)(width - t) : SOME;
      float out[4][SOME];
      NAME(dots_any)(rows, x + t * n, n, n, T, out);
      for (int r = 0; r < 2 && i + r < last; r++) {
        const float bg = bias ? bias[i + r] : 0.0f, bu = bias ? bias[total + i + r] : 0.0f;
        for (int u = 0; u < T; u++)
          hidden[(t + u) * total + i + r] = silu(splat(out[r][u] + bg))[0] * (out[r + 2][u] + bu);
      }
    }
  }
}

/* Attention of new row t's query heads that share a KV head, over positions 0..position, written to
   the operand mixed (of n values) from value `offset` on. From position `root` on they lie in the
   slots root + path[0], root + path[1], ...; before it, and without a path, in slots of their number. */
static inline __attribute__((always_inline)) void NAME(attend)(
    const float *qkv, const float *cos, const float *sin, const STORE_T *keys, const STORE_T *values,
    int64_t position, int64_t root, const int32_t *path, const int64_t group, int64_t dim, float scale,
    NAME(operand) * mixed, int64_t n, int64_t t, int64_t offset) {
  float q[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float score[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
  float sum[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float most[MAX_GROUP], weight[MAX_GROUP];
  for (int64_t g = 0; g < group; g++) {
    float turned[MAX_HEAD] __attribute__((aligned(64)));
    turn(qkv + g * dim, cos, sin, dim, turned);
    for (int64_t d = 0; d < dim; d++) q[g][d] = turned[d] * scale;
    memset(sum[g], 0, dim * sizeof(float));
    most[g] = -INFINITY;
    weight[g] = 0.0f;
  }
  for (int64_t base = 0; base <= position; base += SPLIT) {
    const int64_t count = position + 1 - base < SPLIT ? position + 1 - base : SPLIT;
    int64_t at[SPLIT]; /* where each position's key and value begin */
    for (int64_t p = 0; p < count; p++)
      at[p] = (path && base + p >= root ? root + path[base + p - root] : base + p) * dim;
    for (int64_t p = 0; p < count; p++) {
      const STORE_T *key = keys + at[p];
      vf dot[MAX_GROUP];
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) {
        wf sums[MAX_GROUP], k;
#pragma GCC unroll 16
        for (int64_t g = 0; g < group; g++) sums[g] = (wf){0};
        for (int64_t d = part * WIDE; d < dim; d += LANES) {
          memcpy(&k, key + d, sizeof k);
#pragma GCC unroll 16
          for (int64_t g = 0; g < group; g++) sums[g] = fused(k, *(const wf *)(q[g] + d), sums[g]);
        }
#pragma GCC unroll 16
        for (int64_t g = 0; g < group; g++)
          memcpy((float *)&dot[g] + part * WIDE, &sums[g], sizeof(wf));
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
    for (int64_t d = 0; d < dim; d += 2 * WIDE) {
      wf a[MAX_GROUP], b[MAX_GROUP];
#pragma GCC unroll 16
      for (int64_t g = 0; g < group; g++) {
        memcpy(&a[g], sum[g] + d, sizeof(wf));
        memcpy(&b[g], sum[g] + d + WIDE, sizeof(wf));
      }
      for (int64_t p = 0; p < count; p++) {
        wf low, high;
        memcpy(&low, values + at[p] + d, sizeof(wf));
        memcpy(&high, values + at[p] + d + WIDE, sizeof(wf));
#pragma GCC unroll 16
        for (int64_t g = 0; g < group; g++) {
          const wf share = score[g][p] - (wf){0};
          a[g] = fused(low, share, a[g]);
          b[g] = fused(high, share, b[g]);
        }
      }
#pragma GCC unroll 16
      for (int64_t g = 0; g < group; g++) {
        memcpy(sum[g] + d, &a[g], sizeof(wf));
        memcpy(sum[g] + d + WIDE, &b[g], sizeof(wf));
      }
    }
  }
  for (int64_t g = 0; g < group; g++)
    for (int64_t d = 0; d < dim; d++)
      mixed[t * n + offset + g * dim + d] = sum[g][d] / weight[g];
}

/* Calls attend, which takes one row, with the group a constant where it is a common one, so that sums
   stay in registers. */
static void NAME(attend_any)(const float *qkv, int64_t ldq, const float *cos, const float *sin,
                             const STORE_T *keys, const STORE_T *values, int64_t slot,
                             const nodes_t *nodes, int64_t rows, int64_t group, int64_t dim,
                             float scale, int64_t head, NAME(operand) * mixed, int64_t n, int64_t t) {
  const int64_t position = position_of(nodes, slot), root = nodes ? nodes->root : 0;
  const int32_t *path = path_of(nodes, slot);
  (void)ldq, (void)rows;
#define ATTEND(G)                                                                                   \
  NAME(attend)(qkv + head * group * dim, cos + position * dim, sin + position * dim, keys, values,  \
               position, root, path, G, dim, scale, mixed, n, t, head * group * dim)
  switch (group) {
    case 1: ATTEND(1); break;
    case 2: ATTEND(2); break;
    case 3: ATTEND(3); break;
    case 4: ATTEND(4); break;
    case 8: ATTEND(8); break;
    default: ATTEND(group);
  }
#undef ATTEND
}
#undef SOME
