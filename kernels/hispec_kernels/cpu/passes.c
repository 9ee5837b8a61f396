/* Narrow passes through Llama blocks on a CPU: one call for any range of layers.

   A decoding step reads every weight once and multiplies it with a few rows, so its floor is the
   time to stream the weights. Called operator by operator, the step takes twice that: between two
   products the streamed weights have pushed interpreter and dispatcher out of the caches. Here one
   parallel region runs all layers, and threads meet at six barriers a block.

   Weights and cache are bf16 or fp32, everything in between is fp32. What only drafts may have weights
   of 7 bits beside a cache of bf16 (dots.h).

   Products with bf16 weights use AMX tiles where the processor has them: 16 weight rows times up to
   16 operands in one instruction, so that a pass over 8 rows costs little more than one over 1. Next
   best are dot products of bf16 pairs; elsewhere pairs are widened and multiplied as floats. Operands
   are rounded to bf16, as every bf16 library does.

   Exactness. Each output is one chain of multiply-adds in an order that its own operands fix: a dot
   product walks its row in tiles, in pairs or in 16 chains, one a lane, that are added as a fixed tree;
   attention walks positions in ascending order in blocks of 128, merged in order. Which other rows
   share the pass, how many, and how many threads there are changes nothing. Every width is in the
   width class. A node of a draft tree walks its own path in order of position, wherever its ancestors
   lie, and so has the bits of plain decoding.

   passes.inc.h holds the code, compiled once per storage type, with one of three files of products;
   cells.inc.h copies what a pass reads or has left, draft.inc.h is an exit's trained head.
*/
#include "lanes.h"
#include <math.h>
#include <omp.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_DOTS 1
#endif
#ifndef HAS_AMX
#define HAS_AMX 0
#endif
#ifndef HAS_DOTS
#define HAS_DOTS 0
#endif

#define SPLIT 128     /* positions a softmax partial covers; a cache's length is a multiple */
#define MAX_GROUP 16  /* query heads a KV head */
#define MAX_HEAD 256  /* D_h */
#define MAX_NODES 32  /* of a draft tree */

typedef struct {
  const void *qkv, *output, *gate_up, *down;             /* (out, in), as bf16_layout says; fp32 row-major */
  const float *attention_norm, *mlp_norm;                /* (D,) */
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;     /* or NULL */
  const float *qkv_scale, *output_scale, *gate_up_scale, *down_scale; /* of rows, where weights are bytes */
  void *keys, *values; /* (H_kv, S, D_h), within a head as KEY_AT and VALUE_AT say */
} layer_t;

typedef struct {
  int64_t hidden, intermediate, heads, kv_heads, head_dim;
  int64_t kv_stride; /* elements from one KV head to the next */
  float eps, scale;
} shape_t;

/* A row of a pass that takes rows from several texts: where it stands in its own text, and where that
   text's keys and values begin, in elements after the cache's. */
typedef struct {
  int64_t position, offset;
} row_t;

/* A draft tree in the slots from `root` on: node i in slot root + i, at position root + depths[i];
   paths[i][d] is its ancestor at depth d, itself at depths[i]. */
typedef struct {
  int64_t root;
  const int32_t *depths, *paths; /* (MAX_NODES,), (MAX_NODES, MAX_NODES) */
} nodes_t;

/* The position of a slot. */
static inline int64_t position_of(const nodes_t *nodes, int64_t slot) {
  return nodes && slot >= nodes->root ? nodes->root + nodes->depths[slot - nodes->root] : slot;
}

/* The path of the node in a slot; NULL where slots are positions. */
static inline const int32_t *path_of(const nodes_t *nodes, int64_t slot) {
  return nodes && slot >= nodes->root ? nodes->paths + (slot - nodes->root) * MAX_NODES : NULL;
}

static inline vf silu(vf g) {
  const vi negative = g < 0.0f;
  const vf e = exp_nonpositive((vf)((vi)g | (int32_t)0x80000000)); /* exp(-|g|) */
  const vf top = (vf)(((vi)e & negative) | ((vi)splat(1.0f) & ~negative));
  return g * top / (e + 1.0f);
}

/* bf16 bits of both, rounded to nearest even: low's in the low halves, high's in the high halves. */
static inline vu bf16_pairs(vf low, vf high) {
  const vu a = (vu)low, b = (vu)high;
  return ((a + 0x7fffu + ((a >> 16) & 1)) >> 16) | ((b + 0x7fffu + ((b >> 16) & 1)) & 0xffff0000u);
}

static inline uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

/* As words of 32 bits, and as bf16. */
static inline vu bf16_words(vf x) {
  const vu u = (vu)x;
  return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
static inline vh bf16_lanes(vf x) { return __builtin_convertvector(bf16_words(x), vh); }

/* The part of n items that thread `id` of `threads` takes. */
static inline int64_t share(int64_t n, int id, int threads) { return n * id / threads; }

/* out[d] = x[d] cos[d] + x[(d + D_h/2) % D_h] sin[d]: a head's vector turned to its position. */
static inline void turn(const float *x, const float *cos, const float *sin, int64_t dim, float *out) {
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; d += LANES) {
    vf a, b, c[2], s[2];
    memcpy(&a, x + d, 64);
    memcpy(&b, x + half + d, 64);
    for (int i = 0; i < 2; i++) {
      memcpy(&c[i], cos + i * half + d, 64);
      memcpy(&s[i], sin + i * half + d, 64);
    }
    const vf low = a * c[0] + b * s[0], high = b * c[1] + a * s[1];
    memcpy(out + d, &low, 64);
    memcpy(out + half + d, &high, 64);
  }
}

#ifndef TILE
#define TILE 16 /* rows and columns of an AMX tile, and of a panel */
#endif
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

#if HAS_AMX
typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tiles_t;

/* Tiles 0-3 are sums, 4-5 weights, 6-7 operands; all 16 rows of 64 bytes. */
static void tiles_on(void) {
  tiles_t config = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    config.rows[i] = TILE;
    config.bytes[i] = 64;
  }
  _tile_loadconfig(&config);
}
static void tiles_off(void) { _tile_release(); }

/* Asks the kernel for the tile registers; returns 0 if it refuses. */
int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
int amx_allowed(void) { return 1; } /* nothing to ask for */
#endif

/* How bf16 weights are to lie, rows padded to 16: 0 in tiles, [row / 16][k / 32][row % 16][k % 32], 1 in
   pairs, [row / 16][k / 2][row % 16][k % 2]. Bytes lie in pairs too, where these are read. */
int bf16_layout(void) { return HAS_AMX ? 0 : 1; }

#define NAME(x) x##_bf16
#define STORE_T uint16_t
#define WEIGHT_T uint16_t
#define CACHED(x) x##_bf16 /* what knows the cache alone */
#define BF16 1
#define SEVEN 0
#include "passes.inc.h"
#undef NAME
#undef WEIGHT_T
#undef SEVEN

#if !HAS_AMX
#define NAME(x) x##_bytes
#define WEIGHT_T uint8_t
#define SEVEN 1
#include "passes.inc.h"
#undef NAME
#undef WEIGHT_T
#undef SEVEN
#endif
#undef STORE_T
#undef CACHED
#undef BF16

#define NAME(x) x##_fp32
#define STORE_T float
#define WEIGHT_T float
#define CACHED(x) x##_fp32
#define BF16 0
#define SEVEN 0
#include "passes.inc.h"
