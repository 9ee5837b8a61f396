/* Copies between rows and the places where they lie: embeddings, keys and values. See passes.c.

   Little work, but done between passes, when their weights have pushed everything else out of the
   caches: operator by operator it takes ten times as long. */

/* out (T, n) = rows of w by number. Rows lie in panels of 16, `step` values of each together; `step` is n
   where they lie one behind the other. */
void NAME(embed)(const STORE_T *w, int64_t n, int64_t step, const int64_t *tokens, int64_t count,
                 float *out) {
  for (int64_t t = 0; t < count; t++) {
    const STORE_T *row = w + (tokens[t] & ~15) * n + (tokens[t] & 15) * step;
    for (int64_t k = 0; k < n; k += step)
      for (int64_t j = 0; j < step; j++) out[t * n + k + j] = NAME(value)(row + k * 16 + j);
  }
}

/* Puts keys and values of the positions from `position` on into a layer's cache.

   projected (T, 2 H_kv D_h): keys, not yet turned, then values */
void NAME(store_rows)(STORE_T *keys, STORE_T *values, const shape_t *shape, const float *projected,
                      int64_t count, int64_t position, const float *cos, const float *sin) {
  const int64_t dim = shape->head_dim, half = shape->kv_heads * dim;
  for (int64_t t = 0; t < count; t++)
    for (int64_t h = 0; h < shape->kv_heads; h++) {
      const float *key = projected + t * 2 * half + h * dim;
      const int64_t at = (position + t) * dim;
      float turned[MAX_HEAD] __attribute__((aligned(64)));
      turn(key, cos + at, sin + at, dim, turned);
      NAME(remember_key)(keys + h * shape->kv_stride, position + t, dim, turned);
      NAME(remember_value)(values + h * shape->kv_stride, position + t, dim, key + half);
    }
}

/* In every layer and head, targets[i] becomes what sources[i] was, for at most MAX_NODES slots. The cache
   is (layers, 2, H_kv, S, D_h). */
void NAME(move_slots)(STORE_T *cache, int64_t layers, const shape_t *shape, const int64_t *sources,
                      const int64_t *targets, int64_t count, int threads) {
  const int64_t dim = shape->head_dim, heads = shape->kv_heads;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < layers * heads; i++) {
    STORE_T *keys = cache + (i / heads * 2 * heads + i % heads) * shape->kv_stride;
    STORE_T *values = keys + heads * shape->kv_stride;
    STORE_T held[2][MAX_NODES][MAX_HEAD];
    for (int64_t j = 0; j < count; j++)
      for (int64_t d = 0; d < dim; d++) {
        held[0][j][d] = keys[KEY_AT(sources[j], d, dim)];
        held[1][j][d] = values[VALUE_AT(sources[j], d, dim)];
      }
    for (int64_t j = 0; j < count; j++)
      for (int64_t d = 0; d < dim; d++) {
        keys[KEY_AT(targets[j], d, dim)] = held[0][j][d];
        values[VALUE_AT(targets[j], d, dim)] = held[1][j][d];
      }
  }
}
