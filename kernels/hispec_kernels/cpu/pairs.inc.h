/* Products and attention of bf16 in pairs. See passes.inc.h.

   Sixteen rows of a matrix lie interleaved in pairs, a "panel": [k / 2][row][k % 2]. What is multiplied
   with it is a pair of an operand at a time, so 16 sums grow side by side, none across lanes. Keys lie
   in panels of 16 positions, values in panels of 16 dimensions for each SPLIT positions: scores and
   weighted sums are products too. dots.h has them. */

#include "dots.h"

#define ROWS_SHARED TILE
#define ROWS_ATTENDED(group) (TILE / (group))
#define KEY_AT(p, d, dim) (((p) & ~15) * (dim) + ((d) >> 1) * 2 * TILE + ((p) & 15) * 2 + ((d) & 1))
#define VALUE_AT(p, d, dim)                                                                         \
  (((p) & ~(SPLIT - 1)) * (dim) + ((d) & ~15) * SPLIT + (((p) & (SPLIT - 1)) >> 1) * 2 * TILE +      \
   ((d) & 15) * 2 + ((p) & 1))

#if SEVEN
/* What the rows of some panels are in truth, for T operands: see dots.h. */
static inline void NAME(scaled)(float sums[TILE][PANELS * TILE], const float *whole, int64_t T,
                                const float *scale, int64_t at, int64_t panel) {
  vf s;
  memcpy(&s, scale + at, 64);
  for (int64_t t = 0; t < T; t++) {
    vf *cell = (vf *)(sums[t] + panel * TILE);
    *cell = (*cell - (128 + MIDDLE) * whole[t]) * s;
  }
}
#define PRODUCT panels_of_bytes
#else
#define PRODUCT panels
#endif

/* y[t][row] (+)= w[row] . x[t] + bias[row] for rows first..last-1 of `total` and all operands. What this
   thread reads afterwards begins at `then`. scale: of the rows, padded to panels, where weights are bytes. */
static void NAME(product)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                          int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                          int64_t width, float *y, int add, const WEIGHT_T *then) {
  float sums[TILE][PANELS * TILE] __attribute__((aligned(64)));
#if SEVEN
  float whole[width];
  for (int64_t from = 0; from < width && first < last; from += TILE)
    operand_sums(x + from * n, n, LEAST(TILE, width - from), whole + from);
#else
  (void)scale;
#endif
  for (int64_t row = first; row < last; row += PANELS * TILE) {
    const int64_t rows = last - row < PANELS * TILE ? last - row : PANELS * TILE;
    const int64_t count = (rows + TILE - 1) / TILE;
    const void *panel[PANELS], *next[PANELS];
    const WEIGHT_T *following = row + PANELS * TILE < last ? w + (row + PANELS * TILE) * n : then;
    for (int64_t p = 0; p < count; p++) {
      panel[p] = w + (row + p * TILE) * n;
      next[p] = following + p * TILE * n;
    }
    for (int64_t from = 0; from < width; from += TILE) {
      const int64_t some = width - from < TILE ? width - from : TILE;
      PRODUCT(panel, count, x + from * n, n, n, (int)some, from ? panel : next, sums[0], PANELS * TILE);
#if SEVEN
      for (int64_t p = 0; p < count; p++)
        NAME(scaled)(sums, whole + from, some, scale, row + p * TILE, p);
#endif
      for (int64_t t = 0; t < some; t++)
        put_sums(y + (from + t) * total + row, sums[t], bias ? bias + row : NULL, rows, add);
    }
  }
}

/* Operand hidden: silu(gate_i . x[t]) * (up_i . x[t]) for i in first..last-1 of `total`. What this
   thread reads afterwards begins at `then`. */
static void NAME(gated)(const WEIGHT_T *w, const float *scale, const float *bias, int64_t first,
                        int64_t last, int64_t total, int64_t n, const NAME(operand) * x,
                        int64_t width, NAME(operand) * hidden, const WEIGHT_T *then) {
  float sums[TILE][PANELS * TILE] __attribute__((aligned(64)));
#if SEVEN
  float whole[width];
  for (int64_t from = 0; from < width && first < last; from += TILE)
    operand_sums(x + from * n, n, LEAST(TILE, width - from), whole + from);
#else
  (void)scale;
#endif
  for (int64_t i = first; i < last; i += PANELS / 2 * TILE) {
    const int64_t pairs = i + TILE < last ? 2 : 1; /* panels of gates, then those of their ups */
    const int64_t more = i + PANELS / 2 * TILE < last;
    const void *panel[PANELS], *next[PANELS];
    for (int64_t p = 0; p < 2 * pairs; p++) {
      const WEIGHT_T *at = w + (p / pairs * total + i + p % pairs * TILE) * n;
      panel[p] = at;
      next[p] = more ? at + PANELS / 2 * TILE * n : then + p * TILE * n;
    }
    for (int64_t from = 0; from < width; from += TILE) {
      const int64_t some = width - from < TILE ? width - from : TILE;
      PRODUCT(panel, 2 * pairs, x + from * n, n, n, (int)some, from ? panel : next, sums[0],
              PANELS * TILE);
#if SEVEN
      for (int64_t p = 0; p < 2 * pairs; p++)
        NAME(scaled)(sums, whole + from, some, scale, p / pairs * total + i + p % pairs * TILE, p);
#endif
      for (int64_t t = 0; t < some; t++)
        for (int64_t p = 0; p < pairs; p++) {
          const int64_t at = i + p * TILE;
          vf gate = *(vf *)(sums[t] + p * TILE), up = *(vf *)(sums[t] + (pairs + p) * TILE), b;
          if (bias) {
            memcpy(&b, bias + at, 64);
            gate += b;
            memcpy(&b, bias + total + at, 64);
            up += b;
          }
          NAME(put_lanes)(hidden, total, from + t, at, silu(gate) * up);
        }
    }
  }
}

/* The values of positions base..base+count-1 as the node in a slot sees them, in panels like the
   cache's. What lies behind its own position is read with weight 0. */
static void NAME(gather)(const STORE_T *values, const nodes_t *nodes, int64_t slot, int64_t base,
                         int64_t count, int64_t dim, uint16_t *gathered) {
  const int64_t root = nodes->root, end = position_of(nodes, slot);
  const int32_t *path = path_of(nodes, slot);
  for (int64_t d = 0; d < dim; d += TILE)
    memcpy(gathered + d * SPLIT, values + base * dim + d * SPLIT, (count + 1) / 2 * 2 * TILE * 2);
  for (int64_t at = root > base ? root : base; path && at <= end && at < base + count; at++)
    for (int64_t d = 0; d < dim; d++)
      gathered[VALUE_AT(at - base, d, dim)] = values[VALUE_AT(root + path[at - root], d, dim)];
}

/* A query's scores of a block become its weights, relative to the highest score so far: an operand by
   itself. What was summed up before is to be multiplied with what is returned. */
static float NAME(weigh)(float *score, int64_t count, float *most, float *total, operand_t *weights) {
  wf highest = *most - (wf){0}, sums[PARTS];
  for (int64_t i = 0; i < count; i += WIDE) highest = larger_of(highest, *(wf *)(score + i));
  float top = *most, lanes[WIDE];
  memcpy(lanes, &highest, sizeof lanes);
  for (int i = 0; i < WIDE; i++) top = lanes[i] > top ? lanes[i] : top;
  const float keep = *most == -INFINITY ? 0.0f : exp_of(*most - top - (wf){0})[0];
  *most = top;
  for (int i = 0; i < PARTS; i++) sums[i] = (wf){0};
  for (int64_t i = 0; i < count; i += LANES)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      const int64_t at = i + part * WIDE;
      const wf e = exp_of(*(wf *)(score + at) - top);
      sums[part] += e;
#if HAS_DOTS
      const wh words = halves_of(e);
#else
      const wu bits = (wu)e;
      const wf words = (wf)((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
#endif
      memcpy(weights + at, &words, sizeof words);
    }
  vf sum;
  memcpy(&sum, sums, sizeof sum);
  *total = *total * keep + lanes_sum(sum);
  return keep;
}

/* Attention of one KV head's query heads for `rows` new rows of one text from `slot` on (TILE / G of
   them at most), each over the positions up to its own. Written to the operand mixed, of n values, as
   its vectors t, t + 1, ...

   Nodes of a tree. A score knows nothing of its neighbours: the tree's are computed by slot for all
   queries and then put in order of position, query by query. Values are added up in order of position,
   so those of a block with nodes are gathered for each branch. */
static void NAME(attend_any)(const float *qkv, int64_t ldq, const float *cos, const float *sin,
                             const STORE_T *keys, const STORE_T *values, int64_t slot,
                             const nodes_t *nodes, int64_t rows, int64_t group, int64_t dim,
                             float scale, int64_t head, NAME(operand) * mixed, int64_t n, int64_t t) {
  operand_t q[MAX_HEAD * TILE] __attribute__((aligned(64))); /* an operand: D_h values a query */
  operand_t p[TILE * SPLIT] __attribute__((aligned(64)));    /* SPLIT weights a query */
  float score[TILE][SPLIT] __attribute__((aligned(64)));
  float by_slot[TILE][2 * MAX_NODES] __attribute__((aligned(64))); /* scores from `tail` on */
  float part[TILE][MAX_HEAD] __attribute__((aligned(64)));
  float sum[TILE][MAX_HEAD] __attribute__((aligned(64)));
  uint16_t gathered[SPLIT * MAX_HEAD] __attribute__((aligned(64)));
  float most[TILE], weight[TILE], keep[TILE];
  int64_t own[TILE], branch[TILE]; /* each row's position, and the row at the end of its branch */
  int64_t last = 0;                /* position */
  const int queries = (int)(rows * group);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t position = own[r] = position_of(nodes, slot + r);
    last = position > last ? position : last;
    branch[r] = r;
    for (int64_t s = rows - 1; nodes && branch[r] == r && s > r; s--) {
      const int32_t *path = path_of(nodes, slot + s);
      if (slot + r < nodes->root /* on every branch */ ||
          (position <= position_of(nodes, slot + s) &&
           path[position - nodes->root] == slot + r - nodes->root))
        branch[r] = s;
    }
    for (int64_t g = 0; g < group; g++) {
      float turned[MAX_HEAD] __attribute__((aligned(64)));
      turn(qkv + r * ldq + (head * group + g) * dim, cos + position * dim, sin + position * dim, dim,
           turned);
      for (int64_t d = 0; d < dim; d += LANES)
        NAME(put_lanes)(q, dim, r * group + g, d, *(vf *)(turned + d) * scale);
      memset(sum[r * group + g], 0, dim * sizeof(float));
      most[r * group + g] = -INFINITY;
      weight[r * group + g] = 0.0f;
    }
  }
  const void *panel[MAX_HEAD / TILE], *next[MAX_HEAD / TILE]; /* more than SPLIT / TILE */
  /* From here on slots are not positions; whole panels, 48 slots at most. */
  const int64_t tail = nodes ? nodes->root / TILE * TILE : INT64_MAX;
  for (int64_t i = tail; i < slot + rows; i += TILE) {
    panel[0] = keys + i * dim;
    panels(panel, 1, q, dim, dim, queries, panel, by_slot[0] + (i - tail), 2 * MAX_NODES);
  }
  for (int64_t base = 0; base <= last; base += SPLIT) {
    const int64_t count = last + 1 - base < SPLIT ? last + 1 - base : SPLIT;
    const int64_t some = (count + LANES - 1) / LANES * LANES; /* more would be weighed with 0 */
    int64_t whole = 0; /* panels before the tail */
    for (; whole * TILE < count && base + whole * TILE < tail; whole++) {
      panel[whole] = keys + (base + whole * TILE) * dim;
      next[whole] = values + (base + whole * TILE) * dim;
    }
    panels(panel, whole, q, dim, dim, queries, next, score[0], SPLIT);
    for (int c = 0; c < queries; c++) {
      const int64_t r = c / group, seen = own[r] + 1 - base < SPLIT ? own[r] + 1 - base : SPLIT;
      if (whole * TILE < seen) {
        const int32_t *path = path_of(nodes, slot + r);
        const int64_t root = nodes->root, end = LEAST(seen, root - base);
        int64_t i = whole * TILE;
        for (; i < end; i++) score[c][i] = by_slot[c][base + i - tail];
        for (; i < seen; i++) score[c][i] = by_slot[c][root + path[base + i - root] - tail];
      }
      for (int64_t i = seen > 0 ? seen : 0; i < some; i++) score[c][i] = -INFINITY;
      keep[c] = NAME(weigh)(score[c], some, most + c, weight + c, p + c * SPLIT);
    }
    const int64_t length = (count + 1) / 2 * 2;
    if (!nodes || base + count <= nodes->root) {
      for (int64_t d = 0; d < dim; d += TILE) {
        panel[d / TILE] = values + base * dim + d * SPLIT;
        next[d / TILE] = keys + (base + SPLIT) * dim + d * SPLIT;
      }
      panels_by_row(panel, dim / TILE, p, SPLIT, length, queries, next, part[0], MAX_HEAD);
    } else {
      for (int64_t d = 0; d < dim; d += TILE) panel[d / TILE] = gathered + d * SPLIT;
      for (int64_t r = 0; r < rows; r++) {
        if (r == 0 || branch[r] != branch[r - 1])
          NAME(gather)(values, nodes, slot + branch[r], base, count, dim, gathered);
        panels_by_row(panel, dim / TILE, p + r * group * SPLIT, SPLIT, length, (int)group, panel,
                      part[r * group], MAX_HEAD);
      }
    }
    for (int c = 0; c < queries; c++)
      for (int64_t d = 0; d < dim; d += LANES) {
        vf *cell = (vf *)(sum[c] + d);
        *cell = *cell * keep[c] + *(vf *)(part[c] + d);
      }
  }
  for (int64_t c = 0; c < queries; c++)
    for (int64_t d = 0; d < dim; d += LANES)
      NAME(put_lanes)(mixed, n, t + c / group, (head * group + c % group) * dim + d,
                      *(vf *)(sum[c] + d) / weight[c]);
}
#undef PRODUCT
