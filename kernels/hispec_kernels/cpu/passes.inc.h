/* See passes.c. STORE_T is the type of what the cache stores, WEIGHT_T that of weights; NAME(x) appends a
   name for the two.

   An operand is what a product multiplies weights with: `width` vectors of n values, laid out for the
   instructions at hand. One of three files has the products and the attention; each says

     operand, OPERAND_FLOATS    its type, and the floats it takes
     put_lanes                  16 values of one of its vectors
     KEY_AT, VALUE_AT           where the value d of position p lies among a KV head's keys and values
     product, gated, attend_any what they are for
     ROWS_SHARED                rows a thread takes at a time
     ROWS_ATTENDED              rows of one text that attention takes at a time */

#define STEP 32 /* values a turn of a dot product takes */

#if BF16
/* Puts 16 values among vectors interleaved in pairs: [t / 16][k / 2][t % 16][k % 2]. */
static inline void NAME(put_pairs)(uint16_t *x, int64_t n, int64_t t, int64_t k, vf values) {
  uint32_t *cell = (uint32_t *)(x + (t / TILE) * TILE * n + k * TILE) + t % TILE, pairs[LANES / 2];
  const vh rounded = bf16_lanes(values);
  memcpy(pairs, &rounded, sizeof pairs);
  for (int j = 0; j < LANES / 2; j++) cell[j * TILE] = pairs[j];
}

#if HAS_AMX || HAS_DOTS
typedef uint16_t NAME(operand);
#define OPERAND_FLOATS(width, n) (((width) + TILE - 1) / TILE * TILE * (n) / 2)
static inline void NAME(put_lanes)(NAME(operand) * x, int64_t n, int64_t t, int64_t k, vf values) {
  NAME(put_pairs)(x, n, t, k, values);
}
#else
typedef float NAME(operand);
#define OPERAND_FLOATS(width, n) ((width) * (n))
static inline void NAME(put_lanes)(NAME(operand) * x, int64_t n, int64_t t, int64_t k, vf values) {
  const vf rounded = (vf)(bf16_words(values) << 16);
  memcpy(x + t * n + k, &rounded, 64);
}
#endif
#endif

#if BF16 && HAS_AMX
#include "tiles.inc.h"
#elif BF16
#include "pairs.inc.h"
#else
#include "vectors.inc.h"
#endif

static inline float NAME(value)(const STORE_T *p) {
#if BF16
  const uint32_t bits = (uint32_t)*p << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
#else
  return *p;
#endif
}

static inline void NAME(store)(STORE_T *p, float x) {
#if BF16
  *p = to_bf16(x);
#else
  *p = x;
#endif
}

/* The key of a new position, D_h values, into a KV head's cache. */
static inline void NAME(remember_key)(STORE_T *keys, int64_t position, int64_t dim, const float *key) {
#if BF16 && !HAS_AMX
  for (int64_t d = 0; d < dim; d += LANES) {
    vf k;
    memcpy(&k, key + d, 64);
    NAME(put_pairs)(keys + (position & ~15) * dim, dim, position & 15, d, k);
  }
#else
  for (int64_t d = 0; d < dim; d++) NAME(store)(keys + KEY_AT(position, d, dim), key[d]);
#endif
}

/* Its value. */
static inline void NAME(remember_value)(STORE_T *values, int64_t position, int64_t dim,
                                        const float *value) {
#if BF16 && HAS_DOTS
  for (int64_t d = 0; d < dim; d += LANES) {
    vf v;
    memcpy(&v, value + d, 64);
    /* Every second half word of a line: another thread may be writing the others. */
    const vu words = position & 1 ? bf16_words(v) << 16 : bf16_words(v);
    _mm512_mask_storeu_epi16(values + VALUE_AT(position & ~1, d, dim),
                             position & 1 ? 0xaaaaaaaau : 0x55555555u, (__m512i)words);
  }
#else
  for (int64_t d = 0; d < dim; d++) NAME(store)(values + VALUE_AT(position, d, dim), value[d]);
#endif
}

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
    for (int64_t k = 0; k < n; k += LANES) {
      vf v, scale;
      memcpy(&v, row + k, 64);
      memcpy(&scale, weight + k, 64);
      NAME(put_lanes)(y, n, t, k, v * factor * scale);
    }
  }
}

/* Runs `count` blocks over `width` rows in the slots `slot`, `slot` + 1, ... or, where rows is not NULL,
   over the next token of each of `width` texts. Slots are positions, but for those of a tree: nodes,
   or NULL.

   x        (W, D) fp32, in and out
   taps     for each block where x goes before it besides, or NULL; NULL where none does
   cos, sin (S, D_h), all positions, the first half of sin negated
   scratch  (W + 16) * ((2 H + 2 H_kv) * D_h + I + threads * D) floats, 64-byte aligned */
void NAME(run_layers)(const layer_t *layers, int64_t count, const shape_t *shape, float *x,
                      float *const *taps, int64_t width, int64_t slot, const row_t *rows, const nodes_t *nodes,
                      const float *cos, const float *sin, float *scratch, int threads) {
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
#define FROM(n) LEAST(n, share(UNITS(n), id, team) * ROWS_SHARED)
#define UPTO(n) LEAST(n, share(UNITS(n), id + 1, team) * ROWS_SHARED)
#if BF16 && HAS_AMX
    tiles_on();
#endif
    for (int64_t i = 0; i < count; i++) {
      const layer_t *layer = layers + i;
      STORE_T *keys = layer->keys, *values = layer->values;
      if (taps && taps[i]) { /* x is not written before the first barrier */
        const int64_t from = share(width, id, team) * D, upto = share(width, id + 1, team) * D;
        memcpy(taps[i] + from, x + from, (upto - from) * sizeof(float));
      }
      NAME(normed)(x, layer->attention_norm, width, D, shape->eps, normed);
      NAME(product)(layer->qkv, layer->qkv_scale, layer->qkv_bias, FROM(QKV), UPTO(QKV), QKV, D, normed, width, qkv, 0,
                    (const WEIGHT_T *)layer->output + FROM(D) * HD);
#pragma omp barrier
      /* Heads' keys and values one after the other, not row by row: neighbours share cache lines. */
      const int64_t stores = 2 * HK * width;
      for (int64_t task = share(stores, id, team); task < share(stores, id + 1, team); task++) {
        const int64_t t = task % width, h = task / width / 2;
        const float *k = qkv + t * QKV + HD + h * dim;
        const int64_t place = rows ? rows[t].position : slot + t;
        const int64_t text = h * shape->kv_stride + (rows ? rows[t].offset : 0);
        if (task / width % 2) {
          NAME(remember_value)(values + text, place, dim, k + HK * dim);
        } else {
          const int64_t at = position_of(nodes, place) * dim;
          float turned[MAX_HEAD] __attribute__((aligned(64)));
          turn(k, cos + at, sin + at, dim, turned);
          NAME(remember_key)(keys + text, place, dim, turned);
        }
      }
#pragma omp barrier
      /* As few rows at a time as there are threads to share them out to. */
      int64_t parts = (width + ROWS_ATTENDED(G) - 1) / ROWS_ATTENDED(G);
      while (parts * HK % team && parts < width) parts++;
      const int64_t some = rows ? 1 : (width + parts - 1) / parts;
      for (int64_t task = id; task < (width + some - 1) / some * HK; task += team) {
        const int64_t t = task / HK * some, h = task % HK;
        const int64_t text = h * shape->kv_stride + (rows ? rows[t].offset : 0);
        NAME(attend_any)(qkv + t * QKV, QKV, cos, sin, keys + text, values + text,
                         rows ? rows[t].position : slot + t, nodes, LEAST(some, width - t), G, dim,
                         shape->scale, h, mixed, HD, t);
      }
#pragma omp barrier
      NAME(product)(layer->output, layer->output_scale, layer->output_bias, FROM(D), UPTO(D), D, HD, mixed, width, x, 1,
                    (const WEIGHT_T *)layer->gate_up + FROM(I) * D);
#pragma omp barrier
      NAME(normed)(x, layer->mlp_norm, width, D, shape->eps, normed);
      NAME(gated)(layer->gate_up, layer->gate_up_scale, layer->gate_up_bias, FROM(I), UPTO(I), I, D, normed, width, hidden,
                  (const WEIGHT_T *)layer->down + FROM(D) * I);
#pragma omp barrier
      const WEIGHT_T *then = i + 1 < count ? layer[1].qkv : layer->qkv;
      NAME(product)(layer->down, layer->down_scale, layer->down_bias, FROM(D), UPTO(D), D, I, hidden, width, x, 1,
                    then + FROM(QKV) * D);
#pragma omp barrier
    }
#if BF16 && HAS_AMX
    tiles_off();
#endif
  }
}

/* y = w norm(x) + bias, or w x + bias where norm is NULL.

   x       (W, n) fp32
   y       (W, rows) fp32
   scale   (rows padded to 16,) where weights are bytes
   scratch threads * (W + 16) * n floats */
void NAME(project)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t rows, int64_t n, const float *norm,
                   float eps, const float *x, int64_t width, float *y, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    NAME(operand) *operand = (NAME(operand) *)(scratch + id * OPERAND_FLOATS(width, n));
#if BF16 && HAS_AMX
    tiles_on();
#endif
    if (norm)
      NAME(normed)(x, norm, width, n, eps, operand);
    else
      for (int64_t t = 0; t < width; t++)
        for (int64_t k = 0; k < n; k += LANES) {
          vf v;
          memcpy(&v, x + t * n + k, 64);
          NAME(put_lanes)(operand, n, t, k, v);
        }
    NAME(product)(w, scale, bias, FROM(rows), UPTO(rows), rows, n, operand, width, y, 0, w + FROM(rows) * n);
#if BF16 && HAS_AMX
    tiles_off();
#endif
  }
}

/* The k best ids of each row after the vocabulary w, best first, and their odds: softmax of
   (w norm(x)) / temperature; logits where that is 0. ids are the columns' where they are not NULL.

   found, odds (W, k)
   logits      W * (rows + 1 + ceil(rows / 64)) floats, of which the first (W, rows) are the logits */
void NAME(project_best)(const WEIGHT_T *w, const float *scale, int64_t rows, int64_t n, const float *norm, float eps,
                        const float *x, int64_t width, int64_t k, float temperature, const int64_t *ids,
                        int64_t *found, float *odds, float *logits, float *scratch, int threads) {
  float *sums = logits + width * rows;
  NAME(project)(w, scale, NULL, rows, n, norm, eps, x, width, logits, scratch, threads);
  top_k(logits, width, rows, k, odds, found, sums + width, threads);
  if (temperature > 0.0f) log_sum_exp(logits, width, rows, temperature, sums, threads);
  for (int64_t t = 0; t < width; t++)
    for (int64_t i = t * k; i < (t + 1) * k; i++) {
      if (temperature > 0.0f) odds[i] = expf(odds[i] / temperature - sums[t]);
      if (ids) found[i] = ids[found[i]];
    }
}
#if !SEVEN
#include "cells.inc.h"
#endif
#include "draft.inc.h"
#undef FROM
#undef UPTO
#undef UNITS
#undef KEY_AT
#undef VALUE_AT
#undef STEP
#undef OPERAND_FLOATS
#undef ROWS_SHARED
#undef ROWS_ATTENDED
