/* See passes.c. STORE_T is the type weights and cache are stored in; NAME(x) appends it to a name.

   Operands of bf16 products are kept "split": of every 32 values the 16 even ones, then the 16 odd
   ones, because a vector of 32-bit words holds an even bf16 in its low half and an odd one in its
   high half. AT(k) is where value k lies. */

#if BF16
#define AT(k) (((k) & ~31) + (((k) & 1) << 4) + (((k) & 31) >> 1))
#else
#define AT(k) (k)
#endif
#define STEP 32 /* values a turn of a dot product takes */

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

/* y[t][row] (+)= w[row] . x[t] + bias[row] for rows first..last-1 and all operands. */
static void NAME(product)(const STORE_T *w, const float *bias, int64_t first, int64_t last, int64_t n,
                          const float *x, int64_t width, float *y, int64_t ldy, int add) {
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
          float *cell = y + (t + u) * ldy + row + r;
          *cell = (add ? *cell : 0.0f) + (out[r][u] + b);
        }
      }
    }
  }
}

/* hidden[t][AT(i)] = silu(gate_i . x[t]) * (up_i . x[t]) for i in first..last-1. */
static void NAME(gated)(const STORE_T *w, const float *bias, int64_t first, int64_t last,
                        int64_t total, int64_t n, const float *x, int64_t width, float *hidden) {
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
          hidden[(t + u) * total + AT(i + r)] = silu(out[r][u] + bg) * (out[r + 2][u] + bu);
      }
    }
  }
}

/* y[t][AT(d)] = x[t][d] / rms(x[t]) * weight[d] */
static void NAME(normed)(const float *x, const float *weight, int64_t width, int64_t n, float eps,
                         float *y) {
  for (int64_t t = 0; t < width; t++) {
    const float *row = x + t * n;
    vf sum = splat(0.0f);
    for (int64_t k = 0; k < n; k += LANES) {
      vf v;
      memcpy(&v, row + k, 64);
      sum += v * v;
    }
    const float factor = 1.0f / sqrtf(lanes_sum(sum) / (float)n + eps);
    for (int64_t k = 0; k < n; k++) y[t * n + AT(k)] = row[k] * factor * weight[k];
  }
}

/* Rotates head vectors of one new row: dst[d] = x[d] cos[d] + x[(d + D_h/2) % D_h] sin[d]. */
static inline float NAME(turned)(const float *x, const float *cos, const float *sin, int64_t d,
                                 int64_t dim) {
  const int64_t half = dim / 2;
  return x[d] * cos[d] + x[d < half ? d + half : d - half] * sin[d];
}

/* Attention of one new row's query heads that share a KV head, over positions 0..position. */
static void NAME(attend)(const float *qkv, const float *cos, const float *sin, const STORE_T *keys,
                         const STORE_T *values, int64_t position, int64_t group, int64_t dim,
                         float scale, float *mixed) {
  float q[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float score[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
  float sum[MAX_GROUP][MAX_HEAD] __attribute__((aligned(64)));
  float most[MAX_GROUP], weight[MAX_GROUP];
  for (int64_t g = 0; g < group; g++) {
    for (int64_t d = 0; d < dim; d++)
      q[g][AT(d)] = NAME(turned)(qkv + g * dim, cos, sin, d, dim) * scale;
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
  /* sum lies split by head; heads follow one another, and D_h is a multiple of 32. */
  for (int64_t g = 0; g < group; g++)
    for (int64_t d = 0; d < dim; d += LANES)
      *(vf *)(mixed + g * dim + d) = *(vf *)(sum[g] + d) / weight[g];
}

/* Runs `count` blocks over `width` rows at `position`, `position` + 1, ...

   x        (W, D) fp32, in and out
   cos, sin (W, D_h), the first half of sin negated
   scratch  W * ((H + 2 H_kv + H) * D_h + I) + threads * W * D floats, 64-byte aligned */
void NAME(run_layers)(const layer_t *layers, int64_t count, const shape_t *shape, float *x,
                      int64_t width, int64_t position, const float *cos, const float *sin,
                      float *scratch, int threads) {
  const int64_t D = shape->hidden, I = shape->intermediate, dim = shape->head_dim;
  const int64_t HK = shape->kv_heads, G = shape->heads / HK, HD = shape->heads * dim;
  const int64_t QKV = HD + 2 * HK * dim;
  float *qkv = scratch, *mixed = qkv + width * QKV, *hidden = mixed + width * HD;
  float *norms = hidden + width * I;
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    float *normed = norms + id * width * D;
#define FROM(n) share((n) / 4, id, team) * 4
#define UPTO(n) (id + 1 == team ? (n) : share((n) / 4, id + 1, team) * 4)
    for (int64_t i = 0; i < count; i++) {
      const layer_t *layer = layers + i;
      STORE_T *keys = layer->keys, *values = layer->values;
      NAME(normed)(x, layer->attention_norm, width, D, shape->eps, normed);
      NAME(product)(layer->qkv, layer->qkv_bias, FROM(QKV), UPTO(QKV), D, normed, width, qkv, QKV, 0);
#pragma omp barrier
      for (int64_t task = share(width * HK, id, team); task < share(width * HK, id + 1, team); task++) {
        const int64_t t = task / HK, h = task % HK;
        const float *k = qkv + t * QKV + HD + h * dim, *v = k + HK * dim;
        const int64_t cell = h * shape->kv_stride + (position + t) * dim;
        for (int64_t d = 0; d < dim; d++) {
          NAME(store)(keys + cell + d, NAME(turned)(k, cos + t * dim, sin + t * dim, d, dim));
          NAME(store)(values + cell + d, v[d]);
        }
      }
#pragma omp barrier
      for (int64_t task = id; task < width * HK; task += team) {
        const int64_t t = task / HK, h = task % HK;
        NAME(attend)(qkv + t * QKV + h * G * dim, cos + t * dim, sin + t * dim,
                     keys + h * shape->kv_stride, values + h * shape->kv_stride, position + t, G, dim,
                     shape->scale, mixed + t * HD + h * G * dim);
      }
#pragma omp barrier
      NAME(product)(layer->output, layer->output_bias, FROM(D), UPTO(D), HD, mixed, width, x, D, 1);
#pragma omp barrier
      NAME(normed)(x, layer->mlp_norm, width, D, shape->eps, normed);
      NAME(gated)(layer->gate_up, layer->gate_up_bias, FROM(I), UPTO(I), I, D, normed, width, hidden);
#pragma omp barrier
      NAME(product)(layer->down, layer->down_bias, FROM(D), UPTO(D), I, hidden, width, x, D, 1);
#pragma omp barrier
    }
  }
}

/* y = w norm(x) + bias, or w x + bias where norm is NULL.

   x       (W, n) fp32
   y       (W, rows) fp32
   scratch threads * W * n floats */
void NAME(project)(const STORE_T *w, const float *bias, int64_t rows, int64_t n, const float *norm,
                   float eps, const float *x, int64_t width, float *y, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    float *operand = scratch + id * width * n;
    if (norm)
      NAME(normed)(x, norm, width, n, eps, operand);
    else
      for (int64_t t = 0; t < width; t++)
        for (int64_t k = 0; k < n; k++) operand[t * n + AT(k)] = x[t * n + k];
    NAME(product)(w, bias, FROM(rows), UPTO(rows), n, operand, width, y, rows, 0);
  }
}
#undef FROM
#undef UPTO
#undef AT
#undef STEP
