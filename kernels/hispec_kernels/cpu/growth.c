/* Small trees of what may come next, grown from counts of n-grams or from recycled logits.

   The Python of hispec/sources (growth.py, back_off.py, history.py, recycle.py) says what is grown and
   why; this grows the same trees to the last bit. Between two passes the caches are full of weights, and
   a tree is dozens of lookups: interpreted they take a hundredth of a small model's pass. */
#include <stdint.h>
#include <string.h>

#define LONGEST 5 /* tokens in a key */
#define MOST 3    /* successors looked at after a key */
#define WIDTH 8   /* successors kept of a token, and the most of any suffix */
#define NODES 32  /* the largest tree */
#define WAYS 4    /* rows among which a pair is looked for */
#define LEAST 0.03
#define FACTOR 0x9E3779B97F4A7C15u

/* The last ids before a node, oldest first, as far as they matter. */
typedef struct {
  int64_t ids[LONGEST + 1];
  int64_t length;
} suffix_t;

/* What may follow, best first, and the part of the suffix that was known. */
typedef struct {
  int64_t ids[WIDTH], grades[WIDTH], count;
  suffix_t known;
} found_t;

typedef void (*successors_t)(const void *source, const suffix_t *suffix, found_t *found);

typedef struct {
  double loss; /* minus a chance, or minus the most one can be */
  int64_t number, rank; /* a row and a rank in it; or a node and -1 */
} entry_t;

static inline int precedes(entry_t a, entry_t b) {
  if (a.loss != b.loss) return a.loss < b.loss;
  return a.number != b.number ? a.number < b.number : a.rank < b.rank;
}

/* out (3, NODES): the nodes' tokens, grades and parents. Returns how many there are. */
static int64_t grow(successors_t successors, const void *source, const int64_t *ids, int64_t length,
                    int64_t budget, const double *priors, double highest, int64_t depth, int64_t *out) {
  int64_t *tokens = out, *grades = out + NODES, *parents = out + 2 * NODES;
  double chances[NODES];
  suffix_t behind[NODES];
  int64_t levels[NODES], above[NODES + 1];
  double chance_above[NODES + 1];
  found_t rows[NODES + 1];
  entry_t open[2 * NODES + 2];
  int64_t count = 0, num_rows = 0, num_open = 0;
  if (length > LONGEST) ids += length - LONGEST, length = LONGEST;
  suffix_t root = {.length = length};
  memcpy(root.ids, ids, length * sizeof *ids);

  const suffix_t *look = &root; /* behind which what follows is to be looked up */
  int64_t parent = -1;
  double chance = 1.0;
  for (;;) {
    if (look) {
      found_t *row = rows + num_rows;
      row->count = 0;
      successors(source, look, row);
      look = NULL;
      if (row->count) {
        open[num_open++] = (entry_t){-chance * priors[row->grades[0]], num_rows, 0};
        above[num_rows] = parent;
        chance_above[num_rows++] = chance;
      }
    }
    if (!num_open || count >= budget) return count;
    int64_t best = 0; /* a few dozen entries: looking at all is as fast as a heap */
    for (int64_t i = 1; i < num_open; i++)
      if (precedes(open[i], open[best])) best = i;
    const entry_t entry = open[best];
    if (-entry.loss < LEAST) return count;
    if (entry.rank < 0) {
      open[best] = open[--num_open];
      parent = entry.number, chance = chances[entry.number], look = behind + entry.number;
      continue;
    }
    const found_t *row = rows + entry.number;
    const int64_t next = entry.rank + 1;
    if (next < row->count)
      open[best] = (entry_t){-chance_above[entry.number] * priors[row->grades[next]], entry.number, next};
    else
      open[best] = open[--num_open];
    const int64_t over = above[entry.number];
    levels[count] = over < 0 ? 1 : levels[over] + 1;
    if (levels[count] < depth) open[num_open++] = (entry_t){entry.loss * highest, count, -1};
    tokens[count] = row->ids[entry.rank];
    grades[count] = row->grades[entry.rank];
    parents[count] = over;
    chances[count] = -entry.loss;
    behind[count] = row->known;
    behind[count].ids[behind[count].length++] = tokens[count];
    count++;
  }
}

/* ------------------------------------------------------------------ counts of n-grams */

/* ngrams.py's Counts: K rows of M successors. */
typedef struct {
  const uint64_t *keys, *starts;
  const uint32_t *totals, *tokens, *counts;
  const uint64_t *buckets;
  uint64_t rows, size, shift;
} counts_t;

typedef struct {
  int64_t ids[2 * MOST], times[2 * MOST], count;
  int64_t total, different;
} row_t;

/* Whether a table knows the key. Its columns fit each other (Counts.whole), but what a damaged file says
   in them may be anything, so no number of it is trusted to be a row's. */
static int row_of(const counts_t *table, uint64_t key, row_t *row) {
  const uint64_t bucket = key >> table->shift;
  uint64_t low = table->buckets[bucket], end = table->buckets[bucket + 1];
  if (end > table->rows) end = table->rows;
  const uint64_t last = end;
  while (low < end) {
    const uint64_t middle = low + (end - low) / 2;
    if (table->keys[middle] < key)
      low = middle + 1;
    else
      end = middle;
  }
  if (low >= last || table->keys[low] != key) return 0;
  const uint64_t first = table->starts[low], past = table->starts[low + 1];
  if (past > table->size || first >= past) return 0;
  row->different = past - first;
  row->count = row->different < MOST ? row->different : MOST;
  row->total = table->totals[low];
  for (int64_t i = 0; i < row->count; i++) {
    row->ids[i] = table->tokens[first + i];
    row->times[i] = table->counts[first + i];
  }
  return 1;
}

/* sum += more: the likeliest successors of both. */
static void add_row(row_t *sum, const row_t *more) {
  for (int64_t i = 0; i < more->count; i++) {
    int64_t j = 0;
    while (j < sum->count && sum->ids[j] != more->ids[i]) j++;
    if (j == sum->count) {
      sum->ids[sum->count] = more->ids[i];
      sum->times[sum->count++] = 0;
    }
    sum->times[j] += more->times[i];
  }
  for (int64_t i = 1; i < sum->count; i++) { /* the most frequent first, then the lowest id */
    const int64_t id = sum->ids[i], times = sum->times[i];
    int64_t j = i;
    for (; j && (sum->times[j - 1] < times || (sum->times[j - 1] == times && sum->ids[j - 1] > id)); j--) {
      sum->ids[j] = sum->ids[j - 1];
      sum->times[j] = sum->times[j - 1];
    }
    sum->ids[j] = id;
    sum->times[j] = times;
  }
  sum->total += more->total;
  if (sum->different < more->different) sum->different = more->different;
  if (sum->different < sum->count) sum->different = sum->count;
  if (sum->count > MOST) sum->count = MOST;
}

typedef struct {
  const counts_t *tables;
  int64_t count, vocab_size;
  const double *shares; /* between the classes of shares */
  int64_t num_shares;
} source_t;

/* back_off.py's: what followed the longest suffix that a table knows. */
static void back_off(const void *of, const suffix_t *suffix, found_t *found) {
  const source_t *source = of;
  uint64_t keys[LONGEST], key = 0;
  const int64_t longest = suffix->length < LONGEST ? suffix->length : LONGEST;
  const int64_t *end = suffix->ids + suffix->length;
  for (int64_t i = 0; i < longest; i++) {
    key = (key ^ ((uint64_t)end[-1 - i] + 1)) * FACTOR;
    keys[i] = key ^= key >> 32;
  }
  /* None of this is in a cache: all lookups wait for memory at once, not one after the other. */
  for (int64_t i = 0; i < source->count; i++)
    for (int64_t j = 0; j < longest; j++)
      __builtin_prefetch(source->tables[i].buckets + (keys[j] >> source->tables[i].shift));
  for (int64_t i = 0; i < source->count; i++)
    for (int64_t j = 0; j < longest; j++) {
      const uint64_t row = source->tables[i].buckets[keys[j] >> source->tables[i].shift];
      __builtin_prefetch(source->tables[i].keys + row);
      __builtin_prefetch(source->tables[i].starts + row);
    }
  for (int64_t length = longest; length; length--) {
    row_t sum, more;
    int known = 0;
    for (int64_t i = 0; i < source->count; i++) {
      if (!row_of(source->tables + i, keys[length - 1], known ? &more : &sum)) continue;
      if (known) add_row(&sum, &more);
      known = 1;
    }
    if (!known) continue;
    const int64_t mass = sum.total + sum.different;
    for (int64_t i = 0; i < sum.count; i++) {
      if (sum.ids[i] >= source->vocab_size) return; /* a damaged file's */
      const double share = (double)sum.times[i] / (double)mass;
      int64_t class = 0;
      while (class < source->num_shares && !(share < source->shares[class])) class++;
      found->ids[i] = sum.ids[i];
      found->grades[i] = (length - 1) * (source->num_shares + 1) + class;
    }
    found->count = sum.count;
    found->known.length = length;
    memcpy(found->known.ids, end - length, length * sizeof *end);
    return;
  }
}

int64_t grow_counts(const source_t *source, const int64_t *ids, int64_t length, int64_t budget,
                    const double *priors, double highest, int64_t depth, int64_t *out) {
  return grow(back_off, source, ids, length, budget, priors, highest, depth, out);
}

/* ------------------------------------------------------------------ recycled logits */

typedef struct {
  int32_t *singles; /* (V, WIDTH), filled up with -1 */
  int32_t *pairs;   /* (sets WAYS, WIDTH) */
  int64_t *owners;  /* (sets WAYS,) before * V + token, -1 where a row is free */
  uint8_t *turns;   /* (sets,) the row that goes next */
  int64_t vocab_size, sets;
} recycled_t;

static int64_t set_of(const recycled_t *tables, int64_t pair) {
  return ((uint64_t)pair * FACTOR >> 32) % (uint64_t)tables->sets;
}

/* The pair's row, or -1. */
static int64_t row_of_pair(const recycled_t *tables, int64_t pair) {
  const int64_t first = set_of(tables, pair) * WAYS;
  for (int64_t row = first; row < first + WAYS; row++)
    if (tables->owners[row] == pair) return row;
  return -1;
}

static void recycled(const void *of, const suffix_t *suffix, found_t *found) {
  const recycled_t *tables = of;
  const int64_t *last = suffix->ids + suffix->length - 1;
  if ((uint64_t)*last >= (uint64_t)tables->vocab_size) return;
  const int64_t pair = suffix->length > 1 ? row_of_pair(tables, last[-1] * tables->vocab_size + *last) : -1;
  const int32_t *row = pair < 0 ? tables->singles + *last * WIDTH : tables->pairs + pair * WIDTH;
  for (found->count = 0; found->count < WIDTH && row[found->count] >= 0; found->count++) {
    found->ids[found->count] = row[found->count];
    found->grades[found->count] = (pair < 0 ? WIDTH : 0) + found->count;
  }
  found->known = (suffix_t){{*last}, 1};
}

int64_t grow_recycled(const recycled_t *tables, const int64_t *ids, int64_t length, int64_t budget,
                      const double *priors, double highest, int64_t depth, int64_t *out) {
  return grow(recycled, tables, ids, length, budget, priors, highest, depth, out);
}

/* shown (count, WIDTH + 2): the likeliest ids after a token, `width` of them; the token; and the one
   before it, where that is known. */
void keep_recycled(const recycled_t *tables, const int64_t *shown, int64_t count, int64_t width, int paired) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t *at = shown + i * (WIDTH + 2), token = at[WIDTH];
    __builtin_prefetch(tables->singles + token * WIDTH, 1);
    if (!paired) continue;
    const int64_t set = set_of(tables, at[WIDTH + 1] * tables->vocab_size + token);
    __builtin_prefetch(tables->owners + set * WAYS);
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t *at = shown + i * (WIDTH + 2), token = at[WIDTH];
    if ((uint64_t)token >= (uint64_t)tables->vocab_size) continue;
    int32_t ids[WIDTH];
    for (int64_t j = 0; j < WIDTH; j++) ids[j] = j < width ? at[j] : -1;
    memcpy(tables->singles + token * WIDTH, ids, sizeof ids);
    if (!paired) continue;
    const int64_t pair = at[WIDTH + 1] * tables->vocab_size + token;
    int64_t row = row_of_pair(tables, pair);
    if (row < 0) {
      const int64_t set = set_of(tables, pair);
      row = set * WAYS + tables->turns[set];
      tables->turns[set] = (tables->turns[set] + 1) % WAYS;
      tables->owners[row] = pair;
    }
    memcpy(tables->pairs + row * WIDTH, ids, sizeof ids);
  }
}
