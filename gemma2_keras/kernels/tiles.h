// Products of matrices, a tile at a time.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// A tile of results stays in the processor's registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 1;
#endif
constexpr int64_t kTileColumns = kTileVecs * kLanes;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// c = a b, or c += a b, for a tile c whose rows are `c_row` apart; the n columns of a are `a_step` apart and its rows
// `a_row`, the n rows of b are `b_step` apart.
template <bool Add>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t n,
                          float* c, int64_t c_row) {
  Vec sums[kTileRows][kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) sums[i][j] = Add ? load(c + i * c_row + j * kLanes) : Vec{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < n; k++) {
    Vec right[kTileVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) right[j] = load(b + k * b_step + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; j++) sums[i][j] += right[j] * a[i * a_row + k * a_step];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) save(c + i * c_row + j * kLanes, sums[i][j]);
}

// The same for an (m, columns) matrix c, both multiples of the tile.
template <bool Add>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t n, float* c,
                     int64_t c_row, int64_t m, int64_t columns) {
  for (int64_t i = 0; i < m; i += kTileRows)
    for (int64_t j = 0; j < columns; j += kTileColumns)
      multiply_tile<Add>(a + i * a_row, a_row, a_step, b + j, b_step, n, c + i * c_row + j, c_row);
}

}  // namespace
