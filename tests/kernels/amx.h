/* AMX in plain C, so that the code for tiles is checked on processors without them. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(emulated[tile], 0, 1024)
#define _tile_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated_dot(c, a, b)
#define syscall(...) 0L /* the kernel grants the registers */

static _Thread_local uint32_t emulated[8][16][16];

static inline void emulated_load(int tile, const void *base, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(emulated[tile][row], (const char *)base + row * stride, 64);
}

static inline void emulated_store(int tile, void *base, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy((char *)base + row * stride, emulated[tile][row], 64);
}

static inline float emulated_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline void emulated_dot(int c, int a, int b) {
  for (int row = 0; row < 16; row++)
    for (int pair = 0; pair < 16; pair++)
      for (int column = 0; column < 16; column++) {
        const uint32_t x = emulated[a][row][pair], y = emulated[b][pair][column];
        float sum = emulated_float(emulated[c][row][column]);
        sum += emulated_float(x << 16) * emulated_float(y << 16);
        sum += emulated_float(x & 0xffff0000u) * emulated_float(y & 0xffff0000u);
        memcpy(&emulated[c][row][column], &sum, 4);
      }
}
