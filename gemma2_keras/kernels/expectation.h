// What a softmax over a large vocabulary says of many states, without a matrix of logits.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>

#include "team.h"
#include "vectors.h"

namespace {

// A tile of results fills the processor's registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVecs = 2;
#else
constexpr int kTileRows = 6, kTileVecs = 1;
#endif
constexpr int64_t kTileColumns = kTileVecs * kLanes;

// c = a b, or c += a b, where c is a tile with rows `stride` apart, a has n columns `a_step` apart and rows `a_row`
// apart, and b is (n, kTileColumns) in one piece.
template <bool Add>
inline void multiply_tile(const float* a, int64_t a_step, int64_t a_row, const float* b, int64_t n, float* c,
                          int64_t stride) {
  Vec sums[kTileRows][kTileVecs];
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) sums[i][j] = Add ? load(c + i * stride + j * kLanes) : Vec{};
  for (int64_t k = 0; k < n; k++, a += a_step, b += kTileColumns) {
    Vec right[kTileVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) right[j] = load(b + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; j++) sums[i][j] += right[j] * a[i * a_row];
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; j++) save(c + i * stride + j * kLanes, sums[i][j]);
}

// Letters: M states, D width, V vocabulary, L words of a block.
template <class T>
class Expectation {
 public:
  Expectation(const T* states, const T* table, int64_t M, int64_t D, int64_t V, float cap, int threads, bool expects)
      : table_(table), D_(D), V_(V), width_(round_up(D, kTileColumns)), tiles_(round_up(M, kTileRows) / kTileRows),
        cap_(cap), threads_(threads), expects_(expects), barrier_(threads), states_(tiles_ * kTileRows * D),
        most_(tiles_ * kTileRows, -INFINITY), total_(tiles_ * kTileRows), first_(tiles_ * kTileRows),
        expected_(expects ? tiles_ * kTileRows * width_ : 0) {
    for (int64_t r = 0; r < M; r++)
      for (int64_t d = 0; d < D; d++)
        states_[(r / kTileRows * D + d) * kTileRows + r % kTileRows] = to_float(states[r * D + d]);
    // As many words as keep both packings of a block in the second-level cache, and the scores of a tile in the first.
    L_ = std::min(std::max((int64_t(1) << 16) / D / kTileColumns, int64_t(1)), int64_t(8)) * kTileColumns;
    for (auto& packed : packed_) packed = {Floats(L_ * D), Floats(expects ? L_ * width_ : 0)};
  }

  void run() {
    const int64_t blocks = round_up(V_, L_) / L_;
    team(threads_, [&](int thread) {
      Floats scores(kTileRows * L_);
      pack(0, thread);
      barrier_.wait();
      for (int64_t block = 0; block < blocks; block++) {
        // The next block is packed beside this one, so that threads meet once for each.
        if (block + 1 < blocks) pack(block + 1, thread);
        for (int64_t tile; (tile = next_[block % 2].fetch_add(1)) < tiles_;) add(block, tile, scores.data());
        if (thread == 0) next_[(block + 1) % 2] = 0;
        barrier_.wait();
      }
    });
  }

  void results(int64_t M, float* normaliser, int32_t* first, float* expected) const {
    for (int64_t r = 0; r < M; r++) {
      normaliser[r] = most_[r] + std::log(total_[r]);
      first[r] = first_[r];
      for (int64_t d = 0; expects_ && d < D_; d++) expected[r * D_ + d] = expected_[r * width_ + d] / total_[r];
    }
  }

 private:
  struct Packed {
    Floats words;  // (L / kTileColumns, D, kTileColumns), for the logits
    Floats rows;   // (width / kTileColumns, L, kTileColumns), for the expected rows
  };

  static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

  // A thread's share of a block's words; beyond the last word there are zeros.
  void pack(int64_t block, int thread) {
    Packed& packed = packed_[block % 2];
    for (int64_t v = thread * kLanes; v < L_; v += threads_ * kLanes) {
      float* words = packed.words.data() + v / kTileColumns * D_ * kTileColumns + v % kTileColumns;
      for (int64_t d = 0; d < D_; d += kLanes)
        for (int64_t i = 0; i < kLanes; i++) {
          const int64_t word = block * L_ + v + i, count = std::min(D_ - d, int64_t(kLanes));
          const T* from = table_ + word * D_ + d;
          float* row = expects_ ? packed.rows.data() + (d / kTileColumns * L_ + v + i) * kTileColumns + d % kTileColumns
                                : nullptr;
          for (int64_t j = 0; j < count; j++) {
            const float value = word < V_ ? to_float(from[j]) : 0.0f;
            words[(d + j) * kTileColumns + i] = value;
            if (expects_) row[j] = value;
          }
        }
    }
  }

  // Adds a block's words to what is known of a tile of states.
  void add(int64_t block, int64_t tile, float* scores) {
    const Packed& packed = packed_[block % 2];
    const float* states = states_.data() + tile * kTileRows * D_;
    float* expected = expected_.data() + tile * kTileRows * width_;
    const int64_t count = std::min(V_ - block * L_, L_);
    for (int64_t v = 0; v < L_; v += kTileColumns)
      multiply_tile<false>(states, kTileRows, 1, packed.words.data() + v * D_, D_, scores + v, L_);
    for (int i = 0; i < kTileRows; i++) {
      const int64_t r = tile * kTileRows + i;
      float* row = scores + i * L_;
      // Logits in units of the cap, if there is one, whose square its derivative needs.
      const float unit = cap_ > 0 ? cap_ : 1.0f;
      if (cap_ > 0) map(row, L_, [&](Vec x, int64_t) { return hyperbolic_tangent(x / cap_); });
      for (int64_t v = count; v < L_; v++) row[v] = -INFINITY;
      Vec tops = load(row);
      for (int64_t v = kLanes; v < L_; v += kLanes) tops = choose(load(row + v) > tops, load(row + v), tops);
      float top = tops[0];
      for (int lane = 1; lane < kLanes; lane++) top = tops[lane] > top ? tops[lane] : top;
      if (top * unit > most_[r]) {
        const float shrink = std::exp(most_[r] - top * unit);
        total_[r] *= shrink;
        if (expects_) map(expected + i * width_, width_, [&](Vec x, int64_t) { return x * shrink; });
        most_[r] = top * unit;
        int64_t v = 0;
        while (row[v] < top) v++;
        first_[r] = int32_t(block * L_ + v);
      }
      Vec total = {};
      map(row, L_, [&](Vec x, int64_t) {
        const Vec share = choose(x == all(-INFINITY), all(0.0f), exponential(x * unit - most_[r]));
        total += share;
        return cap_ > 0 ? choose(x == all(-INFINITY), share, share * (1.0f - x * x)) : share;
      });
      total_[r] += sum(total);
    }
    for (int64_t d = 0; expects_ && d < width_; d += kTileColumns)
      multiply_tile<true>(scores, 1, L_, packed.rows.data() + d * L_, L_, expected + d, width_);
  }

  const T* table_;
  const int64_t D_, V_, width_, tiles_;
  const float cap_;
  const int threads_;
  const bool expects_;
  int64_t L_;
  Barrier barrier_;
  std::atomic<int64_t> next_[2] = {};
  Floats states_, most_, total_;
  std::vector<int32_t> first_;
  Floats expected_;
  Packed packed_[2];
};

// See `gemma2_expectation`.
template <class T>
void expectation(const T* states, const T* table, int64_t M, int64_t D, int64_t V, float cap, int threads,
                 float* normaliser, int32_t* first, float* expected) {
  Expectation<T> found(states, table, M, D, V, cap, threads, expected != nullptr);
  found.run();
  found.results(M, normaliser, first, expected);
}

}  // namespace
