// Attention of whole sequences and its gradient, without a matrix of scores.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t kKeys = 64;

// Some queries with all heads of one key head's group, rows in turn, over blocks of keys with a running softmax: no
// matrix of scores exists, and blocks of keys that none of the queries may see are skipped.
template <class C>
class QueryBlock {
 public:
  QueryBlock(int64_t T, int64_t S, int64_t N, int64_t K, int64_t H, float scale, float cap)
      : T_(T), S_(S), N_(N), K_(K), G_(N / K), H_(H), queries_(queries(G_)),
        rows_(round_up(queries_ * G_, kTileColumns)), width_(round_up(H, kTileColumns)), stride_(width_ + kLanes),
        scale_(scale), cap_(cap), q_(H * rows_), k_(kKeys * stride_), v_(kKeys * stride_), scores_(kKeys * rows_),
        mixed_(rows_ * width_), most_(rows_), total_(rows_) {}

  // How many queries make a block: their rows are the lanes of a tile.
  static int64_t queries(int64_t group) { return std::max(kTileColumns / group, int64_t(1)); }

  // The first `count` queries, as many as a block has or fewer, of key head `head`.
  void run(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, float* normaliser, int64_t head,
           int64_t count) {
    std::fill(q_.begin(), q_.end(), 0.0f);
    for (int64_t r = 0; r < count * G_; r++)
      for (int64_t h = 0; h < H_; h++) q_[h * rows_ + r] = to_float(q[row(r, head) + h]) * scale_;
    std::fill(mixed_.begin(), mixed_.end(), 0.0f);
    std::fill(most_.begin(), most_.end(), -INFINITY);
    std::fill(total_.begin(), total_.end(), 0.0f);
    for (int64_t from = 0; from < S_; from += kKeys) {
      const int64_t keys = std::min(S_ - from, kKeys);
      uint8_t any = 0, every = 1;
      for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < keys; s++) {
          const uint8_t sees = mask[t * S_ + from + s];
          any |= sees;
          every &= sees;
        }
      if (!any) continue;
      copy(k + (from * K_ + head) * H_, keys, k_.data());
      copy(v + (from * K_ + head) * H_, keys, v_.data());
      add(keys, every ? nullptr : mask + from, count);
    }
    for (int64_t r = 0; r < count * G_; r++) {
      // A query that sees nothing averages over all, as a softmax over equal scores does.
      if (most_[r] == -INFINITY) average(v + head * H_, &mixed_[r * width_]);
      const float factor = 1.0f / (total_[r] > 0 ? total_[r] : float(S_));
      if (normaliser) normaliser[(head * G_ + r % G_) * T_ + r / G_] = most_[r] + std::log(total_[r]);
      for (int64_t h = 0; h < H_; h++) store(out + row(r, head) + h, mixed_[r * width_ + h] * factor);
    }
  }

 private:
  // Where a row's numbers begin.
  int64_t row(int64_t r, int64_t head) const { return (r / G_ * N_ + head * G_ + r % G_) * H_; }

  // Keys or values of one head as float32, in rows that do not all begin in one set of the cache.
  void copy(const C* from, int64_t keys, float* to) const {
    for (int64_t s = 0; s < kKeys; s++)
      for (int64_t h = 0; h < H_; h++) to[s * stride_ + h] = s < keys ? to_float(from[s * K_ * H_ + h]) : 0.0f;
  }

  void average(const C* values, float* mean) const {
    std::fill(mean, mean + H_, 0.0f);
    for (int64_t s = 0; s < S_; s++)
      for (int64_t h = 0; h < H_; h++) mean[h] += to_float(values[s * K_ * H_ + h]);
  }

  // Adds a block of keys; `mask` is that of the first query at the first key, or null if all see all of them.
  void add(int64_t keys, const uint8_t* mask, int64_t count) {
    float* scores = scores_.data();
    multiply<false>(k_.data(), stride_, 1, q_.data(), rows_, H_, scores, rows_, kKeys, rows_);
    std::fill(scores + keys * rows_, scores + kKeys * rows_, 0.0f);
    for (int64_t first = 0; first < rows_; first += kLanes) {
      const Vec before = load(&most_[first]);
      Vec most = before;
      for (int64_t s = 0; s < keys; s++) {
        float* at = scores + s * rows_ + first;
        Vec x = soft_cap(load(at), cap_);
        if (mask) x = choose(visible(mask + s, first, count), x, all(-INFINITY));
        save(at, x);
        most = choose(x > most, x, most);
      }
      const Vec base = choose(most == all(-INFINITY), all(0.0f), most);
      Vec total = {};
      for (int64_t s = 0; s < keys; s++) {
        float* at = scores + s * rows_ + first;
        const Vec x = load(at);
        Vec share = exponential(x - base);
        if (mask) share = choose(x == all(-INFINITY), all(0.0f), share);
        total += share;
        save(at, share);
      }
      for (int lane = 0; lane < kLanes; lane++) {
        if (before[lane] == most[lane]) continue;
        const float shrink = std::exp(before[lane] - most[lane]);
        total_[first + lane] *= shrink;
        map(&mixed_[(first + lane) * width_], width_, [&](Vec x, int64_t) { return x * shrink; });
      }
      save(&most_[first], most);
      save(&total_[first], load(&total_[first]) + total);
    }
    multiply<true>(scores, 1, rows_, v_.data(), stride_, kKeys, mixed_.data(), width_, rows_, width_);
  }

  // Which of the rows of a vector see a key; rows beyond the last one see what it sees.
  IntVec visible(const uint8_t* mask, int64_t first, int64_t count) const {
    IntVec sees;
    for (int64_t lane = 0; lane < kLanes; lane++) sees[lane] = mask[std::min((first + lane) / G_, count - 1) * S_];
    return sees != 0;
  }

  const int64_t T_, S_, N_, K_, G_, H_, queries_, rows_, width_, stride_;
  const float scale_, cap_;
  Floats q_, k_, v_, scores_, mixed_, most_, total_;
};

template <class C>
void attend(const C* q, const C* k, const C* v, C* out, const uint8_t* mask, int64_t B, int64_t T, int64_t S,
            int64_t N, int64_t K, int64_t H, float scale, float cap, int threads, float* normaliser) {
  const int64_t queries = QueryBlock<C>::queries(N / K), blocks = (T + queries - 1) / queries;
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int) {
    QueryBlock<C> block(T, S, N, K, H, scale, cap);
    // Late queries see most keys: they go first, so that threads end together.
    for (int64_t i; (i = next.fetch_add(1)) < B * K * blocks;) {
      const int64_t b = i % (B * K) / K, from = (blocks - 1 - i / (B * K)) * queries;
      block.run(q + (b * T + from) * N * H, k + b * S * K * H, v + b * S * K * H, out + (b * T + from) * N * H,
                mask + (b * T + from) * S, normaliser ? normaliser + b * N * T + from : nullptr, i % K,
                std::min(T - from, queries));
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
  in_parallel(threads, [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < B * K;) {
      const int64_t b = i / K, queries = b * T * N * H, keys = b * S * K * H;
      HeadGradient<C> head(mask + b * T * S, normaliser + b * N * T, T, S, N, K, H, i % K, scale, cap);
      head.run(q + queries, k + keys, v + keys, out + queries, out_gradient + queries, q_gradient + queries,
               k_gradient + keys, v_gradient + keys);
    }
  });
}

}  // namespace
