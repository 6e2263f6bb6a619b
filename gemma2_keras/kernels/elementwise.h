// What stands between the products of a block: norms, the gated activation, rotary positions; each in one pass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "vectors.h"

namespace {

// Calls `work(begin, end)` for parts of [0, n), on several threads if there is enough to do for each.
template <class Work>
void in_parts(int64_t n, int64_t numbers, int threads, const Work& work) {
  constexpr int64_t kEach = 1 << 16;
  const int64_t parts = std::max(std::min({int64_t(threads), numbers / kEach, n}), int64_t(1));
  in_parallel(int(parts), [&](int part) { work(n * part / parts, n * (part + 1) / parts); });
}

// Saves n results of `f`, a vector at a time, to which it hands a function that loads the same numbers of any array.
template <class C, class F>
inline void each(int64_t n, C* to, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) save(to + i, f([&](const auto* x) { return load(x + i); }));
  if (i == n) return;
  C rest[kLanes];
  save(rest, f([&](const auto* x) {
         auto some = *x;
         decltype(some) padded[kLanes] = {};
         std::copy(x + i, x + n, padded);
         return load(padded);
       }));
  std::copy(rest, rest + (n - i), to + i);
}

template <class C, class W>
void rms_norm(const C* x, const W* weight, C* y, int64_t rows, int64_t D, float epsilon, int threads) {
  in_parts(rows, rows * D, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const C* row = x + r * D;
      Vec squares = {};
      float last = 0;
      int64_t i = 0;
      for (; i + kLanes <= D; i += kLanes) squares += load(row + i) * load(row + i);
      for (; i < D; i++) last += to_float(row[i]) * to_float(row[i]);
      const float factor = 1.0f / std::sqrt((sum(squares) + last) / float(D) + epsilon);
      each(D, y + r * D, [&](const auto& at) { return at(row) * factor * (at(weight) + 1.0f); });
    }
  });
}

template <class C>
void gated_gelu(const C* gate, const C* up, C* y, int64_t n, int threads) {
  in_parts(n, n, threads, [&](int64_t begin, int64_t end) {
    each(end - begin, y + begin, [&](const auto& at) { return gelu(at(gate + begin)) * at(up + begin); });
  });
}

// (rows, heads, H) numbers, of which those of a row are turned by its (H / 2) cosines and sines.
template <class C>
void rotate(const C* x, const float* cosine, const float* sine, C* y, int64_t rows, int64_t heads, int64_t H,
            int threads) {
  const int64_t half = H / 2;
  in_parts(rows, rows * heads * H, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t head = 0; head < heads; head++) {
        const C *first = x + (r * heads + head) * H, *second = first + half;
        C* to = y + (r * heads + head) * H;
        const float *c = cosine + r * half, *s = sine + r * half;
        each(half, to, [&](const auto& at) { return at(first) * at(c) - at(second) * at(s); });
        each(half, to + half, [&](const auto& at) { return at(second) * at(c) + at(first) * at(s); });
      }
  });
}

}  // namespace
