/* Products and attention of bf16 in AMX tiles. See passes.inc.h. */

#define KEY_AT(p, d, dim) ((p) * (dim) + (d))
#define VALUE_AT(p, d, dim) ((((p) / 32) * (dim) + (d)) * 32 + (p) % 32)

#define ROWS_SHARED (2 * TILE)
#define ROWS_ATTENDED(group) (TILE / (group)) /* rows a thread takes at a time */

#define AHEAD 16384 /* bytes: prefetching by hardware stops at pages, and tiles are read in order */

/* sums[p][q] (16 x 16): the 16 weight rows in tiles at w[p] times operands 16 q, 16 q + 1, ...;
   q is 0 alone if there are no more than 16. */
static inline void NAME(panels)(const STORE_T *const w[2], const NAME(operand) * x, int64_t n,
                                int64_t width, float sums[2][2][TILE * TILE]) {
  _tile_zero(0);
  _tile_zero(1);
  if (width <= TILE) {
    for (int64_t k = 0; k < n * TILE; k += STEP * TILE) {
#pragma GCC unroll 16
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
static void NAME(product)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                          int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                          int64_t width, float *y, int add, const WEIGHT_T *then) {
  (void)scale, (void)then;
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
static void NAME(gated)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                        int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                        int64_t width, NAME(operand) * hidden, const WEIGHT_T *then) {
  (void)scale, (void)then;
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
/* score (16 positions x 16 queries) = keys from `key` on times the queries q. */
static inline void NAME(scores)(const STORE_T *key, const uint16_t *q, int64_t dim, float *score) {
  _tile_zero(0);
  for (int64_t k = 0; k < dim; k += STEP) {
    _tile_loadd(4, key + k, dim * 2);
    _tile_loadd(6, q + k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, score, 64);
}

/* The values of the positions from `tail`, a multiple of 32, to `last` as the node in a slot sees
   them, in tiles like the cache's. What lies behind its own position is read with weight 0. */
static void NAME(gather)(const STORE_T *values, const nodes_t *nodes, int64_t slot, int64_t tail,
                         int64_t last, int64_t dim, uint16_t *gathered) {
  const int64_t end = position_of(nodes, slot), root = nodes->root;
  const int32_t *path = path_of(nodes, slot);
  memcpy(gathered, values + tail * dim, (last / 32 - tail / 32 + 1) * 32 * dim * sizeof(uint16_t));
  for (int64_t at = root; path && at <= end; at++)
    for (int64_t d = 0; d < dim; d++)
      gathered[VALUE_AT(at - tail, d, dim)] = values[VALUE_AT(root + path[at - root], d, dim)];
}

/* Attention of one KV head's query heads for `rows` new rows of one text from `slot` on (TILE / G of
   them at most), each over the positions up to its own. Written to the operand mixed, of n values, as
   its vectors t, t + 1, ...

   A column of the score tiles is one query: 16 positions a tile, so a softmax over positions runs down
   the tiles with 16 queries in a vector and no sum across lanes.

   Nodes of a tree. A score knows nothing of its neighbours: the tree's are computed by slot for all
   queries and then put in order of position, query by query. Values are added up in order of position,
   so from the tile that holds the root on they are gathered for each branch, and a branch's sums are
   taken for the queries on it. */
static void NAME(attend_any)(const float *qkv, int64_t ldq, const float *cos, const float *sin,
                             const STORE_T *keys, const STORE_T *values, int64_t slot,
                             const nodes_t *nodes, int64_t rows, int64_t group, int64_t dim,
                             float scale, int64_t head, NAME(operand) * mixed, int64_t n, int64_t t) {
  uint16_t q[MAX_HEAD * TILE] __attribute__((aligned(64)));    /* [d / 2][query][d % 2] */
  uint32_t p[SPLIT / 2 * TILE] __attribute__((aligned(64)));   /* [position / 2][query] pairs */
  float score[SPLIT * TILE] __attribute__((aligned(64)));      /* [position][query] */
  float part[TILE * TILE] __attribute__((aligned(64)));        /* [d][query] */
  float sum[MAX_HEAD * TILE] __attribute__((aligned(64)));     /* [d][query] */
  float by_slot[2 * MAX_NODES * TILE] __attribute__((aligned(64)));         /* scores from `tail` on */
  uint16_t gathered[2 * MAX_NODES * MAX_HEAD] __attribute__((aligned(64))); /* values, likewise */
  int64_t last = 0; /* position */
  vi own = {0};     /* each query's position */
  vi branch = {0};  /* the row at the end of the branch each query is on */
  memset(q, 0, dim * TILE * sizeof(uint16_t));
  memset(sum, 0, dim * TILE * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    const int64_t position = position_of(nodes, slot + r);
    last = position > last ? position : last;
    int64_t end = r;
    for (int64_t s = rows - 1; nodes && end == r && s > r; s--) {
      /* Rows before the tree are on every branch. */
      const int32_t *path = path_of(nodes, slot + s);
      if (slot + r < nodes->root ||
          (position <= position_of(nodes, slot + s) &&
           path[position - nodes->root] == slot + r - nodes->root))
        end = s;
    }
    for (int64_t g = 0; g < group; g++) {
      float turned[MAX_HEAD] __attribute__((aligned(64)));
      turn(qkv + r * ldq + (head * group + g) * dim, cos + position * dim, sin + position * dim, dim,
           turned);
      const int64_t column = r * group + g;
      own[column] = (int32_t)position;
      branch[column] = (int32_t)end;
      for (int64_t d = 0; d < dim; d++)
        q[(d >> 1) * 2 * TILE + 2 * column + (d & 1)] = to_bf16(turned[d] * scale);
    }
  }
  /* From here on slots are not positions; whole tiles, 64 slots at most. */
  const int64_t tail = nodes ? nodes->root / 32 * 32 : INT64_MAX;
  for (int64_t i = tail; i < slot + rows; i += TILE)
    NAME(scores)(keys + i * dim, q, dim, by_slot + (i - tail) * TILE);
  vf most = splat(-INFINITY), weight = splat(0.0f);
  for (int64_t base = 0; base <= last; base += SPLIT) {
    /* Whole tiles only; what lies behind a query's own position gets weight 0. */
    const int64_t count = last + 1 - base < SPLIT ? (last + 1 - base + 31) / 32 * 32 : SPLIT;
    for (int64_t i = 0; i < count && base + i < tail; i += TILE)
      NAME(scores)(keys + (base + i) * dim, q, dim, score + i * TILE);
    for (int64_t i = base < tail ? tail - base : 0; i < count; i++)
      for (int64_t c = 0; c < rows * group; c++) {
        const int32_t *path = path_of(nodes, slot + c / group);
        const int64_t at = base + i, root = nodes->root;
        if (at <= own[c])
          score[i * TILE + c] = by_slot[((at < root ? at : root + path[at - root]) - tail) * TILE + c];
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
    const int split = base + count > tail; /* by branch */
    for (int64_t end = split ? 0 : rows - 1; end < rows; end++) {
      const vi mine = split ? branch == (int32_t)end : ~(vi){0};
      if (split) {
        if (branch[end * group] != end) continue;
        NAME(gather)(values, nodes, slot + end, tail, last, dim, gathered);
      }
      for (int64_t d = 0; d < dim; d += TILE) {
        _tile_zero(1);
        for (int64_t i = 0; i < count; i += STEP) {
          const int64_t at = base + i;
          if (at < tail)
            _tile_loadd(5, values + (at / 32 * dim + d) * 32, 64);
          else
            _tile_loadd(5, gathered + ((at - tail) / 32 * dim + d) * 32, 64);
          _tile_loadd(7, p + i / 2 * TILE, 64);
          _tile_dpbf16ps(1, 5, 7);
        }
        _tile_stored(1, part, 64);
        for (int j = 0; j < TILE; j++) {
          vf *cell = (vf *)(sum + (d + j) * TILE);
          const vf next = *cell * keep + *(vf *)(part + j * TILE);
          *cell = (vf)(((vi)*cell & ~mine) | ((vi)next & mine));
        }
      }
    }
  }
  for (int64_t d = 0; d < dim; d++) *(vf *)(sum + d * TILE) /= weight;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < group; g++)
      for (int64_t d = 0; d < dim; d += LANES) {
        vf out;
        for (int j = 0; j < LANES; j++) out[j] = sum[(d + j) * TILE + r * group + g];
        NAME(put_lanes)(mixed, n, t + r, (head * group + g) * dim + d, out);
      }
}
