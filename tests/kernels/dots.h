/* The dot products of pairs (AVX512-BF16) in plain C, so that the code for them is checked on processors
   without them. What is too small to be normal is not flushed to zero. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512BF16__ 1
#define __AVX512BW__ 1
#define DOT_PAIRS(sum, panel, pair) ((sum) = emulated_dots(sum, panel, pair))
#define _mm512_set1_epi16(x) ((__m512i)((emulated_words){0} + (uint16_t)(x)))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_cvtepu8_epi16(x) ((__m512i)__builtin_convertvector((emulated_bytes)(x), emulated_words))
#define _mm512_mask_storeu_epi16(to, mask, x) emulated_store(to, mask, x)

typedef uint8_t emulated_bytes __attribute__((vector_size(32)));
typedef uint16_t emulated_words __attribute__((vector_size(64)));
typedef uint32_t emulated_pairs __attribute__((vector_size(64)));
typedef float emulated_floats __attribute__((vector_size(64)));

static inline emulated_floats emulated_dots(emulated_floats sum, emulated_pairs panel, const void *pair) {
  uint32_t both;
  memcpy(&both, pair, 4);
  const emulated_pairs other = (emulated_pairs){0} + both;
  sum += (emulated_floats)(panel & 0xffff0000u) * (emulated_floats)(other & 0xffff0000u);
  return sum + (emulated_floats)(panel << 16) * (emulated_floats)(other << 16);
}

static inline void emulated_store(uint16_t *to, uint32_t mask, __m512i x) {
  const emulated_words words = (emulated_words)x;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) to[i] = words[i];
}
