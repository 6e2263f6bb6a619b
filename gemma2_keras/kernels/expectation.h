// What a softmax over a large vocabulary says of many states, without a matrix of logits.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "team.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// Letters: M states, D width, V vocabulary, L words of a block. States are taken kTileColumns at a time, a panel, with a
// lane of a vector for each.
template <class T>
class Expectation {
 public:
  Expectation(const T* states, const T* table, int64_t M, int64_t D, int64_t V, float cap, int threads, bool expects)
      : table_(table), D_(D), V_(V), width_(round_up(D, kTileColumns)), stride_(width_ + kLanes),
        panels_(round_up(M, kTileColumns) / kTileColumns), cap_(cap), threads_(threads), expects_(expects),
        barrier_(threads), states_(panels_ * kTileColumns * D), most_(panels_ * kTileColumns, -INFINITY),
        total_(panels_ * kTileColumns), first_(panels_ * kTileColumns),
        expected_(expects ? panels_ * kTileColumns * width_ : 0) {
    for (int64_t m = 0; m < M; m++)
      for (int64_t d = 0; d < D; d++)
        states_[(m / kTileColumns * D + d) * kTileColumns + m % kTileColumns] = to_float(states[m * D + d]);
    // As many words as fit a quarter of the second-level cache.
    L_ = std::min(std::max((int64_t(1) << 16) / D / kTileRows, int64_t(1)), int64_t(16)) * kTileRows;
    for (auto& rows : rows_) rows.resize(L_ * stride_);
  }

  void run() {
    const int64_t blocks = round_up(V_, L_) / L_;
    team(threads_, [&](int thread) {
      Floats scores(L_ * kTileColumns);
      copy(0, thread);
      barrier_.wait();
      for (int64_t block = 0; block < blocks; block++) {
        // The next block is copied beside this one, so that threads meet once for each.
        if (block + 1 < blocks) copy(block + 1, thread);
        for (int64_t panel; (panel = next_[block % 2].fetch_add(1)) < panels_;) add(block, panel, scores.data());
        if (thread == 0) next_[(block + 1) % 2] = 0;
        barrier_.wait();
      }
    });
  }

  void results(int64_t M, float* normaliser, int32_t* first, float* expected) const {
    for (int64_t m = 0; m < M; m++) {
      normaliser[m] = most_[m] + std::log(total_[m]);
      first[m] = first_[m];
      for (int64_t d = 0; expects_ && d < D_; d++) expected[m * D_ + d] = expected_[m * width_ + d] / total_[m];
    }
  }

 private:
  // A thread's share of a block's words, as float32, in rows that do not all begin in one set of the cache.
  void copy(int64_t block, int thread) {
    for (int64_t v = thread; v < L_; v += threads_) {
      float* row = rows_[block % 2].data() + v * stride_;
      const T* from = table_ + std::min(block * L_ + v, V_ - 1) * D_;
      for (int64_t d = 0; d < D_; d++) row[d] = to_float(from[d]);
    }
  }

  // Adds a block's words to what is known of a panel of states.
  void add(int64_t block, int64_t panel, float* scores) {
    const float* rows = rows_[block % 2].data();
    const float* states = states_.data() + panel * kTileColumns * D_;
    float* expected = expected_.data() + panel * kTileColumns * width_;
    const int64_t count = std::min(V_ - block * L_, L_);
    multiply<false>(rows, stride_, 1, states, kTileColumns, D_, scores, kTileColumns, L_, kTileColumns);
    std::fill(scores + count * kTileColumns, scores + L_ * kTileColumns, 0.0f);
    for (int j = 0; j < kTileVecs; j++) {
      const int64_t m = panel * kTileColumns + j * kLanes;
      // Logits are kept in units of the cap, if there is one, whose square its derivative needs.
      const float unit = cap_ > 0 ? cap_ : 1.0f;
      Vec most = load(&most_[m]), total = load(&total_[m]), top = all(-INFINITY);
      IntVec first = {};
      for (int64_t v = 0; v < count; v++) {
        float* at = scores + v * kTileColumns + j * kLanes;
        Vec x = load(at);
        if (cap_ > 0) save(at, x = hyperbolic_tangent(x * (1.0f / cap_)));
        const IntVec higher = x > top;
        top = choose(higher, x, top);
        first = (first & ~higher) | (int32_t(v) & higher);
      }
      const Vec highest = top * unit;
      const IntVec higher = highest > most;
      for (int lane = 0; lane < kLanes; lane++) {
        if (!higher[lane]) continue;
        const float shrink = std::exp(most[lane] - highest[lane]);
        total[lane] *= shrink;
        float* sum = expected + (j * kLanes + lane) * width_;
        if (expects_) map(sum, width_, [&](Vec x, int64_t) { return x * shrink; });
        first_[m + lane] = int32_t(block * L_) + first[lane];
      }
      most = choose(higher, highest, most);
      for (int64_t v = 0; v < count; v++) {
        float* at = scores + v * kTileColumns + j * kLanes;
        const Vec x = load(at), share = exponential(x * unit - most);
        total += share;
        save(at, cap_ > 0 ? share * (1.0f - x * x) : share);
      }
      save(&most_[m], most);
      save(&total_[m], total);
    }
    if (expects_)
      multiply<true>(scores, 1, kTileColumns, rows, stride_, L_, expected, width_, kTileColumns, width_);
  }

  const T* table_;
  const int64_t D_, V_, width_, stride_, panels_;
  const float cap_;
  const int threads_;
  const bool expects_;
  int64_t L_;
  Barrier barrier_;
  std::atomic<int64_t> next_[2] = {};
  Floats states_, most_, total_;
  std::vector<int32_t> first_;
  Floats expected_, rows_[2];
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
