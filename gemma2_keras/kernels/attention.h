// Attention of whole sequences and its gradient, without a matrix of scores.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// A block of queries of one key head of one row, with a running softmax over blocks of keys, so that no matrix of
// scores exists; blocks of keys that none of the queries may see are skipped.
constexpr int64_t kQueries = 16, kKeys = 64;

template <class C>
void attend_block(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, int64_t queries, int64_t S,
                  int64_t N, int64_t K, int64_t H, int64_t head, float scale, float cap, float* normaliser, int64_t T,
                  Floats& memory) {
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
  // A query that sees nothing averages over all, as a softmax over equal scores does.
  bool blind = false;
  for (int64_t r = 0; r < rows; r++) blind |= most[r] == -INFINITY;
  if (blind) {
    float* mean = query;
    std::memset(mean, 0, H * sizeof(float));
    for (int64_t s = 0; s < S; s++)
      for (int64_t h = 0; h < H; h++) mean[h] += to_float(v[(s * K + head) * H + h]);
    for (int64_t r = 0; r < rows; r++)
      if (most[r] == -INFINITY) std::memcpy(mixed + r * H, mean, H * sizeof(float));
  }
  for (int64_t t = 0; t < queries; t++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t r = t * G + g;
      const float factor = 1.0f / (total[r] > 0 ? total[r] : float(S));
      if (normaliser) normaliser[(head * G + g) * T + t] = most[r] + std::log(total[r]);
      for (int64_t h = 0; h < H; h++) store(out + (t * N + head * G + g) * H + h, mixed[r * H + h] * factor);
    }
}

template <class C>
void attend(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, int64_t B, int64_t T, int64_t S,
            int64_t N, int64_t K, int64_t H, float scale, float cap, int threads, float* normaliser) {
  const int64_t blocks = (T + kQueries - 1) / kQueries;
  std::atomic<int64_t> next{0};
  team(threads, [&](int) {
    Floats memory;
    // Late queries see most keys: they go first, so that threads end together.
    for (int64_t i; (i = next.fetch_add(1)) < B * K * blocks;) {
      const int64_t block = blocks - 1 - i / (B * K), b = i % (B * K) / K, head = i % K, from = block * kQueries;
      attend_block(q + (b * T + from) * N * H, k + b * S * K * H, v + b * S * K * H, out + (b * T + from) * N * H,
                   mask + (b * T + from) * S, T - from < kQueries ? T - from : kQueries, S, N, K, H, head, scale, cap,
                   normaliser ? normaliser + b * N * T + from : nullptr, T, memory);
    }
  });
}

// The gradients of one key head of one row: scores are made again, a block of queries and keys at a time.
template <class C>
class HeadGradient {
 public:
  HeadGradient(const uint8_t* mask, const float* normaliser, int64_t T, int64_t S, int64_t N, int64_t K, int64_t H,
               int64_t head, float scale, float cap)
      : mask_(mask), T_(T), S_(S), N_(N), K_(K), G_(N / K), H_(H), head_(head), width_(round_up(H, kTileColumns)),
        rows_(round_up(T * G_, kRows)), columns_(round_up(S, kKeys)), scale_(scale), cap_(cap),
        q_(rows_ * width_), out_gradient_(rows_ * width_), q_gradient_(rows_ * width_), k_(columns_ * width_),
        v_(columns_ * width_), k_gradient_(columns_ * width_), v_gradient_(columns_ * width_), normaliser_(rows_),
        delta_(rows_) {
    for (int64_t r = 0; r < T * G_; r++) normaliser_[r] = normaliser[(head * G_ + r % G_) * T + r / G_];
  }

  void run(const C* q, const C* k, const C* v, const C* out, const C* out_gradient, C* q_gradient, C* k_gradient,
           C* v_gradient) {
    for (int64_t r = 0; r < T_ * G_; r++) {
      const int64_t at = query(r);
      for (int64_t h = 0; h < H_; h++) {
        q_[r * width_ + h] = to_float(q[at + h]);
        out_gradient_[r * width_ + h] = to_float(out_gradient[at + h]);
        delta_[r] += to_float(out[at + h]) * to_float(out_gradient[at + h]);
      }
    }
    for (int64_t s = 0; s < S_; s++)
      for (int64_t h = 0; h < H_; h++) {
        k_[s * width_ + h] = to_float(k[(s * K_ + head_) * H_ + h]);
        v_[s * width_ + h] = to_float(v[(s * K_ + head_) * H_ + h]);
      }
    Floats turned_k(width_ * kKeys), turned_v(width_ * kKeys);
    for (int64_t s = 0; s < columns_; s += kKeys) {
      for (int64_t h = 0; h < width_; h++)
        for (int64_t i = 0; i < kKeys; i++) {
          turned_k[h * kKeys + i] = k_[(s + i) * width_ + h];
          turned_v[h * kKeys + i] = v_[(s + i) * width_ + h];
        }
      for (int64_t r = 0; r < rows_; r += kRows) add(r, s, turned_k.data(), turned_v.data());
    }
    for (int64_t r = 0; r < T_ * G_; r++)
      for (int64_t h = 0; h < H_; h++) store(q_gradient + query(r) + h, q_gradient_[r * width_ + h]);
    for (int64_t s = 0; s < S_; s++)
      for (int64_t h = 0; h < H_; h++) {
        store(k_gradient + (s * K_ + head_) * H_ + h, k_gradient_[s * width_ + h]);
        store(v_gradient + (s * K_ + head_) * H_ + h, v_gradient_[s * width_ + h]);
      }
  }

 private:
  static constexpr int64_t kRows = 32;
  typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

  // Whether a query sees nothing, and so averages over all keys.
  bool is_blind(int64_t r) const { return normaliser_[r] == -INFINITY; }

  // Where a query's numbers begin; rows are the queries in turn, each with all heads of the group.
  int64_t query(int64_t r) const { return (r / G_ * N_ + head_ * G_ + r % G_) * H_; }

  void add(int64_t r, int64_t s, const float* turned_k, const float* turned_v) {
    // (kRows, kKeys): which keys are seen, their weights, and the gradients of weights, then of scores.
    uint8_t seen[kRows * kKeys] = {}, any = 0;
    for (int64_t i = 0; i < kRows && r + i < T_ * G_; i++) {
      any |= is_blind(r + i);
      for (int64_t j = 0; j < kKeys && s + j < S_; j++)
        any |= seen[i * kKeys + j] = mask_[(r + i) / G_ * S_ + s + j] ? 255 : 0;
    }
    if (!any) return;
    alignas(64) float weights[kRows * kKeys], scores[kRows * kKeys];
    const float* q = q_.data() + r * width_;
    const float* out_gradient = out_gradient_.data() + r * width_;
    multiply<false>(q, width_, 1, turned_k, kKeys, H_, weights, kKeys, kRows, kKeys);
    multiply<false>(out_gradient, width_, 1, turned_v, kKeys, H_, scores, kKeys, kRows, kKeys);
    for (int64_t i = 0; i < kRows; i++)
      for (int64_t j = 0; j < kKeys; j += kLanes) {
        ByteVec bytes;
        std::memcpy(&bytes, seen + i * kKeys + j, sizeof bytes);
        const IntVec visible = __builtin_convertvector(bytes, IntVec) != 0;
        Vec x = load(weights + i * kKeys + j) * scale_, slope = all(scale_);
        if (cap_ > 0) {
          const Vec share = hyperbolic_tangent(x / cap_);
          x = share * cap_;
          slope = scale_ * (1.0f - share * share);
        }
        const Vec weight = exponential(x - normaliser_[r + i]);
        const float otherwise = is_blind(r + i) ? 1.0f / float(S_) : 0.0f;
        save(weights + i * kKeys + j, choose(visible, weight, all(otherwise)));
        const Vec gradient = (load(scores + i * kKeys + j) - delta_[r + i]) * weight * slope;
        save(scores + i * kKeys + j, choose(visible, gradient, all(0.0f)));
      }
    multiply<true>(scores, kKeys, 1, k_.data() + s * width_, width_, kKeys, q_gradient_.data() + r * width_, width_,
                   kRows, width_);
    multiply<true>(scores, 1, kKeys, q, width_, kRows, k_gradient_.data() + s * width_, width_, kKeys, width_);
    multiply<true>(weights, 1, kKeys, out_gradient, width_, kRows, v_gradient_.data() + s * width_, width_, kKeys,
                   width_);
  }

  const uint8_t* mask_;
  const int64_t T_, S_, N_, K_, G_, H_, head_, width_, rows_, columns_;
  const float scale_, cap_;
  Floats q_, out_gradient_, q_gradient_, k_, v_, k_gradient_, v_gradient_, normaliser_, delta_;
};

template <class C>
void attend_gradient(const C* q, const C* k, const C* v, const C* out, const C* out_gradient, C* q_gradient,
                     C* k_gradient, C* v_gradient, const uint8_t* mask, const float* normaliser, int64_t B, int64_t T,
                     int64_t S, int64_t N, int64_t K, int64_t H, float scale, float cap, int threads) {
  std::atomic<int64_t> next{0};
  team(threads, [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < B * K;) {
      const int64_t b = i / K, queries = b * T * N * H, keys = b * S * K * H;
      HeadGradient<C> head(mask + b * T * S, normaliser + b * N * T, T, S, N, K, H, i % K, scale, cap);
      head.run(q + queries, k + keys, v + keys, out + queries, out_gradient + queries, q_gradient + queries,
               k_gradient + keys, v_gradient + keys);
    }
  });
}

}  // namespace
