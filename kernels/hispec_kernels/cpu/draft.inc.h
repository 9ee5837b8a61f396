/* A trained head from its exit's states to its best ids, in one call. See passes.c and, for the
   mathematics, hispec/model/exits.py.

   A draft token of an early exit is a dozen small products: called one by one they take longer than
   the weights take to stream. */

/* A head's weights; what it lacks is NULL. Widths are (out, in). */
typedef struct {
  const void *proj;         /* (D, D) */
  const void *shallow_kv;   /* (2 H_kv D_h, D): keys and values of final positions, from states here */
  const void *deep_kv;      /* likewise, from final states */
  const void *feature;      /* (maps D, D) */
  const void *vocabulary;   /* (columns, D) */
  const float *proj_scale, *shallow_scale, *deep_scale, *feature_scale, *vocabulary_scale;
  const float *proj_bias, *deep_norm, *feature_norm, *norm;
  const int64_t *ids; /* of the columns */
  int64_t maps, columns;
  layer_t block;
} NAME(head_t);

/* What a call works on. Slots first..end-1 are asked for, of which the block has not seen start..end-1;
   positions final..root-1 have become final since it was last asked. */
typedef struct {
  const float *states, *finals; /* (S, D) after the exit's layers and after all */
  float *feature;               /* (maps, D), the root's */
  int64_t root, final, start, first, end, new_root /* whether feature is another root's */;
} NAME(place_t);

/* found, odds (end - first, k)
   logits      as project_best needs
   room        max(W, T) D + T 4 H_kv D_h floats, for W = end - start and T = root - final
   scratch     as run_layers over W rows and project over max(W, T) need */
void NAME(draft)(const NAME(head_t) * head, const shape_t *shape, const NAME(place_t) * at,
                 const nodes_t *nodes, const nodes_t *tree, const float *cos, const float *sin,
                 int64_t k, float temperature, int64_t *found, float *odds, float *logits,
                 float *room, float *scratch, int threads) {
  const int64_t D = shape->hidden, KV = 2 * shape->kv_heads * shape->head_dim;
  const float eps = shape->eps;
  if (head->feature && at->new_root)
    NAME(project)(head->feature, head->feature_scale, NULL, head->maps * D, D, head->feature_norm, eps,
                  at->finals + (at->root - 1) * D, 1, at->feature, scratch, threads);
  const int64_t T = at->root - at->final;
  if (head->deep_kv && T > 0) {
    float *shallow = room, *kv = shallow + T * D, *more = kv + T * KV;
    const float *x = at->states + at->final * D;
    if (head->proj) {
      NAME(project)(head->proj, head->proj_scale, head->proj_bias, D, D, NULL, eps, x, T, shallow,
                    scratch, threads);
      x = shallow;
    }
    NAME(project)(head->shallow_kv, head->shallow_scale, NULL, KV, D, head->block.attention_norm, eps, x,
                  T, kv, scratch, threads);
    NAME(project)(head->deep_kv, head->deep_scale, NULL, KV, D, head->deep_norm, eps,
                  at->finals + at->final * D, T, more, scratch, threads);
    add_to(kv, more, T * KV);
    CACHED(store_rows)((STORE_T *)head->block.keys, (STORE_T *)head->block.values, shape, kv, T,
                       at->final, cos, sin);
  }
  const int64_t W = at->end - at->start;
  float *x = room;
  if (head->proj)
    NAME(project)(head->proj, head->proj_scale, head->proj_bias, D, D, NULL, eps,
                  at->states + at->start * D, W, x, scratch, threads);
  else
    memcpy(x, at->states + at->start * D, W * D * sizeof(float));
  if (head->feature)
    for (int64_t t = 0; t < W; t++) {
      const int64_t behind = position_of(nodes, at->start + t) - at->root;
      const int64_t map = behind < 0 ? 0 : LEAST(behind, head->maps - 1);
      add_to(x + t * D, at->feature + map * D, D);
    }
  if (head->block.qkv)
    NAME(run_layers)(&head->block, 1, shape, x, NULL, W, at->start, NULL, tree, cos, sin, scratch, threads);
  NAME(project_best)(head->vocabulary, head->vocabulary_scale, head->columns, D, head->norm, eps,
                     x + (at->first - at->start) * D, at->end - at->first, k, temperature, head->ids,
                     found, odds, logits, scratch, threads);
}
