/* Narrow passes through Llama blocks on a CPU: one call for any range of layers.

   A decoding step reads every weight once and multiplies it with a few rows, so its floor is the
   time to stream the weights. Called operator by operator, the step takes twice that: between two
   products the streamed weights have pushed interpreter and dispatcher out of the caches. Here one
   parallel region runs all layers, and threads meet at five barriers a block.

   Weights and cache are bf16 or fp32, everything in between is fp32.

   Products with bf16 weights use AMX tiles where the processor has them: 16 weight rows times up to
   16 operands in one instruction, so that a pass over 8 rows costs little more than one over 1
   (operands are rounded to bf16 there, as every bf16 library does). Elsewhere they are fused
   multiply-adds on vectors.

   Exactness. Each output is one chain of multiply-adds in an order that its own operands fix: a dot
   product walks its row once, in tiles or in vectors of 16 lanes that are added as a fixed tree;
   attention walks positions in ascending order in blocks of 128, merged in order. Which other rows
   share the pass, how many, and how many threads there are changes nothing. Every width is in the
   width class.

   passes.inc.h holds the code, compiled once per storage type. Vectors are GCC's and Clang's own
   (16 floats, split by the compiler where registers are narrower), so any CPU they compile for works.
*/
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LANES 16
#define SPLIT 128     /* positions a softmax partial covers; a cache's length is a multiple */
#define MAX_GROUP 16  /* query heads a KV head */
#define MAX_HEAD 256  /* D_h */

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

typedef struct {
  const void *qkv, *output, *gate_up, *down;             /* (out, in), row-major or in tiles */
  const float *attention_norm, *mlp_norm;                /* (D,) */
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias; /* or NULL */
  void *keys, *values; /* (H_kv, S, D_h); with tiles, values as (H_kv, S / 32, D_h, 32) */
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

static inline float lanes_sum(vf v) {
  vf8 a, b;
  memcpy(&a, &v, 32);
  memcpy(&b, (const char *)&v + 32, 32);
  a += b;
  vf4 c, d;
  memcpy(&c, &a, 16);
  memcpy(&d, (const char *)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline vf splat(float x) { return x - (vf){0}; }

/* exp for arguments <= 0 (to 2 ulp; below -87 it is 0): Cephes' polynomial. */
static inline vf exp_nonpositive(vf x) {
  const vi dead = x < -87.0f;
  x = (vf)((vi)x & ~dead);
  const vf shifted = x * 1.44269504f + 12582912.0f; /* rounds to an integer in the low bits */
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi bits = (vi)p + (((vi)shifted) << 23);
  return (vf)(bits & ~dead);
}

static inline vf silu(vf g) {
  const vi negative = g < 0.0f;
  const vf e = exp_nonpositive((vf)((vi)g | (int32_t)0x80000000)); /* exp(-|g|) */
  const vf top = (vf)(((vi)e & negative) | ((vi)splat(1.0f) & ~negative));
  return g * top / (e + 1.0f);
}

static inline vf larger(vf a, vf b) {
  const vi first = a > b;
  return (vf)(((vi)a & first) | ((vi)b & ~first));
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

/* The part of n items that thread `id` of `threads` takes. */
static inline int64_t share(int64_t n, int id, int threads) { return n * id / threads; }

#define TILE 16 /* rows and columns of an AMX tile */

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
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

/* Whether bf16 weights are to lie in tiles: [row / 16][k / 32][row % 16][k % 32], rows padded to 16. */
int bf16_tiles(void) { return 1; }

/* Asks the kernel for the tile registers; returns 0 if it refuses. */
int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
#define HAS_AMX 0
int bf16_tiles(void) { return 0; }
int amx_allowed(void) { return 1; } /* nothing to ask for */
#endif

#define NAME(x) x##_bf16
#define STORE_T uint16_t
#define BF16 1
#include "passes.inc.h"
#undef NAME
#undef STORE_T
#undef BF16

#define NAME(x) x##_fp32
#define STORE_T float
#define BF16 0
#include "passes.inc.h"
