// Attention of whole prompts, without a matrix of scores.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "vectors.h"

namespace {

// A block of queries of one key head of one row, with a running softmax over blocks of keys, so that no matrix of
// scores exists; blocks of keys that none of the queries may see are skipped.
constexpr int64_t kQueries = 16, kKeys = 64;

template <class C>
void attend_block(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, int64_t queries, int64_t S,
                  int64_t N, int64_t K, int64_t H, int64_t head, float scale, float cap, Floats& memory) {
  const int64_t G = N / K, rows = queries * G;
  const int64_t needed = H * kKeys + rows * (2 * H + kKeys + 2) + kKeys;
  if (int64_t(memory.size()) < needed) memory.resize(needed);
  float* keys = memory.data();           // (H, kKeys), transposed
  float* query = keys + H * kKeys;       // (rows, H), scaled
  float* mixed = query + rows * H;       // (rows, H)
  float* scores = mixed + rows * H;      // (rows, kKeys)
  float* most = scores + rows * kKeys;   // (rows,)
  float* total = most + rows;            // (rows,)
  for (int64_t t = 0; t < queries; t++)
    for (int64_t g = 0; g < G; g++)
      for (int64_t h = 0; h < H; h++) query[(t * G + g) * H + h] = to_float(q[(t * N + head * G + g) * H + h]) * scale;
  std::memset(mixed, 0, rows * H * sizeof(float));
  for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY, total[r] = 0;
  for (int64_t from = 0; from < S; from += kKeys) {
    const int64_t count = S - from < kKeys ? S - from : kKeys;
    uint8_t seen = 0;
    for (int64_t t = 0; t < queries; t++)
      for (int64_t s = 0; s < count; s++) seen |= mask[t * S + from + s];
    if (!seen) continue;
    for (int64_t s = 0; s < kKeys; s++)
      for (int64_t h = 0; h < H; h++)
        keys[h * kKeys + s] = s < count ? to_float(k[((from + s) * K + head) * H + h]) : 0.0f;
    constexpr int kVectors = kKeys / kLanes, kTile = 4;
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t tile = rows - r < kTile ? rows - r : kTile;
      Vec sums[kTile][kVectors] = {};
      for (int64_t h = 0; h < H; h++)
        for (int i = 0; i < kTile; i++) {
          const float factor = query[(r + (i < tile ? i : 0)) * H + h];
          for (int j = 0; j < kVectors; j++) sums[i][j] += load(keys + h * kKeys + j * kLanes) * factor;
        }
      for (int64_t i = 0; i < tile; i++)
        for (int j = 0; j < kVectors; j++) save(scores + (r + i) * kKeys + j * kLanes, sums[i][j]);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* row = scores + r * kKeys;
      const uint8_t* visible = mask + r / G * S + from;
      float top = most[r];
      map(row, kKeys, [&](Vec x, int64_t) { return soft_cap(x, cap); });
      for (int64_t s = 0; s < kKeys; s++) {
        if (s >= count || !visible[s]) row[s] = -INFINITY;
        top = row[s] > top ? row[s] : top;
      }
      if (top == -INFINITY) {
        std::memset(row, 0, kKeys * sizeof(float));
        continue;
      }
      const float shrink = most[r] == -INFINITY ? 0.0f : std::exp(most[r] - top);
      map(row, kKeys, [&](Vec x, int64_t) { return choose(x == all(-INFINITY), all(0.0f), exponential(x - top)); });
      float added = 0;
      for (int64_t s = 0; s < kKeys; s++) added += row[s];
      total[r] = total[r] * shrink + added;
      most[r] = top;
      if (shrink != 1.0f) map(mixed + r * H, H, [&](Vec x, int64_t) { return x * shrink; });
    }
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t tile = rows - r < kTile ? rows - r : kTile;
      int64_t h = 0;
      for (; h + kLanes <= H; h += kLanes) {
        Vec sums[kTile];
        for (int64_t i = 0; i < kTile; i++) sums[i] = load(mixed + (r + (i < tile ? i : 0)) * H + h);
        for (int64_t s = 0; s < count; s++) {
          Vec value = load(v + ((from + s) * K + head) * H + h);
          for (int64_t i = 0; i < kTile; i++) sums[i] += value * scores[(r + (i < tile ? i : 0)) * kKeys + s];
        }
        for (int64_t i = 0; i < tile; i++) save(mixed + (r + i) * H + h, sums[i]);
      }
      for (; h < H; h++)
        for (int64_t i = 0; i < tile; i++)
          for (int64_t s = 0; s < count; s++)
            mixed[(r + i) * H + h] += to_float(v[((from + s) * K + head) * H + h]) * scores[(r + i) * kKeys + s];
    }
  }
  for (int64_t t = 0; t < queries; t++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t r = t * G + g;
      const float factor = total[r] > 0 ? 1.0f / total[r] : 0.0f;
      for (int64_t h = 0; h < H; h++) store(out + (t * N + head * G + g) * H + h, mixed[r * H + h] * factor);
    }
}

template <class C>
void attend(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, int64_t B, int64_t T, int64_t S,
            int64_t N, int64_t K, int64_t H, float scale, float cap, int threads) {
  const int64_t blocks = (T + kQueries - 1) / kQueries;
  std::atomic<int64_t> next{0};
  team(threads, [&](int) {
    Floats memory;
    // Late queries see most keys: they go first, so that threads end together.
    for (int64_t i; (i = next.fetch_add(1)) < B * K * blocks;) {
      const int64_t block = blocks - 1 - i / (B * K), b = i % (B * K) / K, head = i % K, from = block * kQueries;
      attend_block(q + (b * T + from) * N * H, k + b * S * K * H, v + b * S * K * H, out + (b * T + from) * N * H,
                   mask + (b * T + from) * S, T - from < kQueries ? T - from : kQueries, S, N, K, H, head, scale, cap,
                   memory);
    }
  });
}

}  // namespace
