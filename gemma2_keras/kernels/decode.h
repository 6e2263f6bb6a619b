// One token of each row through the whole model.
//
// A team of threads meets at barriers, so that nothing but the weights costs time. Weights are read where the framework
// keeps them, [out, in], each row one long stream: the order that memory serves fastest. Activations are float32
// whatever the weights are.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "vectors.h"

extern "C" {

// y = factors * (x W^T + scale * (x A^T) B^T); W is (out, in) of the model's dtype, A (rank, in), B (out, rank) and
// factors (out,) float32. Without factors they are 1.
struct Linear {
  const void* weight;
  const float* a;
  const float* b;
  const float* factors;
  int64_t out, in, rank;
  double scale;
};

struct Layer {
  const float* norms[4];  // (D,) each: before and after attention, before and after the feed-forward
  Linear q, k, v, o, gate, up, down;
  void* keys;     // (B, slots, K, H); the token at position p of its row lies at slot p % slots
  void* values;   // likewise
  int64_t slots;
  int64_t window;  // positions seen; 0 sees all
};

struct Model {
  int64_t layers, width, heads, key_heads, head_dim, hidden, vocabulary;
  int64_t weights_bfloat16, cache_bfloat16;
  double scale, cap, final_cap, epsilon, embedding_scale;
  const float* frequencies;  // (H / 2,)
  const void* embedding;     // (V, D)
  const float* final_norm;   // (D,)
  const Layer* layer;
};

}  // extern "C"

namespace {

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(x + i) * load(x + i);
  float squares = sum(total);
  for (; i < n; i++) squares += x[i] * x[i];
  float factor = 1.0f / std::sqrt(squares / n + epsilon);
  for (int64_t j = 0; j < n; j++) y[j] = x[j] * factor * (1.0f + weight[j]);
}

// What the team shares during a call.
struct Shared {
  const Model& model;
  int64_t batch;
  int threads;
  Barrier barrier;
  std::vector<Ranges> ranges;  // one for each stage of a step
  Floats projected, mixed, branch, active, logits;
  Shared(const Model& m, int64_t b, int t)
      : model(m),
        batch(b),
        threads(t),
        barrier(t),
        ranges(m.layers * 5 + 1),
        projected(b * (m.heads + 2 * m.key_heads) * m.head_dim),
        mixed(b * m.heads * m.head_dim),
        branch(b * m.width),
        active(b * m.hidden) {}
};

// Rows [begin, end) of a projection, each value given to `put(row of the weight, row of the batch, value)`.
template <class W, class Put>
void project(const Linear& linear, const float* x, int64_t batch, int64_t begin, int64_t end, float* thin, Put put) {
  const W* weight = static_cast<const W*>(linear.weight);
  for (int64_t r = 0; r < linear.rank; r++) dots(linear.a + r * linear.in, x, batch, linear.in, thin + r * batch);
  float y[64];
  for (int64_t out = begin; out < end; out++)
    for (int64_t first = 0; first < batch; first += 64) {
      const float factor = linear.factors ? linear.factors[out] : 1.0f;
      int64_t rows = batch - first < 64 ? batch - first : 64;
      dots(weight + out * linear.in, x + first * linear.in, rows, linear.in, y);
      for (int64_t b = 0; b < rows; b++) {
        float delta = 0;
        for (int64_t r = 0; r < linear.rank; r++)
          delta += thin[r * batch + first + b] * linear.b[out * linear.rank + r];
        put(out, first + b, (y[b] + delta * float(linear.scale)) * factor);
      }
    }
}

void rotate(float* x, const float* frequencies, int64_t half, int64_t position) {
  for (int64_t i = 0; i < half; i++) {
    float angle = float(position) * frequencies[i], c = std::cos(angle), s = std::sin(angle);
    float first = x[i], second = x[i + half];
    x[i] = first * c - second * s;
    x[i + half] = second * c + first * s;
  }
}

// One row's query heads of one key head over the valid part of the cache; writes this step's key and value first.
template <class C>
void attend_one(const Model& m, const Layer& layer, int64_t b, int64_t k, int64_t position, float* projected,
                float* mixed, Floats& scores) {
  const int64_t H = m.head_dim, G = m.heads / m.key_heads, slots = layer.slots, stride = m.key_heads * H;
  float* query = projected + k * G * H;
  float* key = projected + m.heads * H + k * H;
  float* value = projected + (m.heads + m.key_heads) * H + k * H;
  for (int64_t g = 0; g < G; g++) rotate(query + g * H, m.frequencies, H / 2, position);
  rotate(key, m.frequencies, H / 2, position);
  C* keys = static_cast<C*>(layer.keys) + (b * slots * m.key_heads + k) * H;
  C* values = static_cast<C*>(layer.values) + (b * slots * m.key_heads + k) * H;
  const int64_t slot = position % slots;
  for (int64_t h = 0; h < H; h++) {
    store(keys + slot * stride + h, key[h]);
    store(values + slot * stride + h, value[h]);
  }
  int64_t seen = position + 1 < slots ? position + 1 : slots;
  if (layer.window && seen > layer.window) seen = layer.window;
  const int64_t oldest = position + 1 - seen;
  if (int64_t(scores.size()) < G * seen) scores.resize(G * seen);
  for (int64_t s = 0; s < seen; s++) {
    const C* at = keys + ((oldest + s) % slots) * stride;
    float found[64];
    for (int64_t first = 0; first < G; first += 64) {
      int64_t count = G - first < 64 ? G - first : 64;
      dots(at, query + first * H, count, H, found);
      for (int64_t g = 0; g < count; g++) scores[(first + g) * seen + s] = found[g] * float(m.scale);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    float* row = scores.data() + g * seen;
    map(row, seen, [&](Vec x, int64_t) { return soft_cap(x, float(m.cap)); });
    float most = row[0];
    for (int64_t s = 1; s < seen; s++) most = row[s] > most ? row[s] : most;
    map(row, seen, [&](Vec x, int64_t) { return exponential(x - most); });
    float total = 0;
    for (int64_t s = 0; s < seen; s++) total += row[s];
    for (int64_t s = 0; s < seen; s++) row[s] /= total;
  }
  float* out = mixed + k * G * H;
  std::memset(out, 0, G * H * sizeof(float));
  for (int64_t s = 0; s < seen; s++) {
    const C* at = values + ((oldest + s) % slots) * stride;
    for (int64_t g = 0; g < G; g++) {
      const float weight = scores[g * seen + s];
      float* to = out + g * H;
      int64_t h = 0;
      for (; h + kLanes <= H; h += kLanes) save(to + h, load(to + h) + load(at + h) * weight);
      for (; h < H; h++) to[h] += to_float(at[h]) * weight;
    }
  }
}

// Buffers of one thread. The residual stream is kept by each thread for itself: computing it again is cheaper than
// meeting to share it.
struct Private {
  Floats x, normed, thin, scores;
  Private(const Model& m, int64_t batch) : x(batch * m.width), normed(batch * m.width) {
    int64_t rank = 0;
    for (int64_t i = 0; i < m.layers; i++)
      for (const Linear* l : {&m.layer[i].q, &m.layer[i].k, &m.layer[i].v, &m.layer[i].o, &m.layer[i].gate,
                              &m.layer[i].up, &m.layer[i].down})
        rank = l->rank > rank ? l->rank : rank;
    thin.resize(2 * rank * batch);
  }
};

template <class W, class C>
void run_layers(Shared& shared, Private& own, const int32_t* tokens, const int32_t* lengths, const uint8_t* finished) {
  const Model& m = shared.model;
  const int64_t B = shared.batch, D = m.width, H = m.head_dim;
  const int64_t query = m.heads * H, key = m.key_heads * H, all_heads = query + 2 * key;
  float *x = own.x.data(), *normed = own.normed.data(), *thin = own.thin.data();
  Ranges* ranges = shared.ranges.data();
  int64_t begin, end;
  const float epsilon = float(m.epsilon);
  for (int64_t b = 0; b < B; b++) {
    const W* row = static_cast<const W*>(m.embedding) + tokens[b] * D;
    for (int64_t d = 0; d < D; d++) x[b * D + d] = to_float(row[d]) * float(m.embedding_scale);
  }
  auto norm = [&](const float* weight) {
    for (int64_t b = 0; b < B; b++) rms_norm(x + b * D, weight, epsilon, D, normed + b * D);
  };
  auto add_branch = [&](const float* weight) {
    for (int64_t b = 0; b < B; b++) {
      rms_norm(shared.branch.data() + b * D, weight, epsilon, D, normed + b * D);
      for (int64_t d = 0; d < D; d++) x[b * D + d] += normed[b * D + d];
    }
  };
  for (int64_t l = 0; l < m.layers; l++) {
    const Layer& layer = m.layer[l];
    norm(layer.norms[0]);
    // q, k and v as one range of rows.
    while (ranges->take(all_heads, shared.threads, 16, &begin, &end)) {
      const Linear* parts[3] = {&layer.q, &layer.k, &layer.v};
      int64_t start = 0;
      for (const Linear* part : parts) {
        int64_t from = begin > start ? begin - start : 0, to = end - start < part->out ? end - start : part->out;
        if (from < to)
          project<W>(*part, normed, B, from, to, thin, [&](int64_t out, int64_t b, float y) {
            shared.projected[b * all_heads + start + out] = y;
          });
        start += part->out;
      }
    }
    shared.barrier.wait();
    ranges++;
    while (ranges->take(B * m.key_heads, shared.threads, 1, &begin, &end))
      for (int64_t i = begin; i < end; i++) {
        int64_t b = i / m.key_heads, k = i % m.key_heads;
        float* mixed = shared.mixed.data() + b * query;
        if (finished[b])
          std::memset(mixed + k * query / m.key_heads, 0, query / m.key_heads * sizeof(float));
        else
          attend_one<C>(m, layer, b, k, lengths[b], shared.projected.data() + b * all_heads, mixed, own.scores);
      }
    shared.barrier.wait();
    ranges++;
    while (ranges->take(D, shared.threads, 16, &begin, &end))
      project<W>(layer.o, shared.mixed.data(), B, begin, end, thin,
                 [&](int64_t out, int64_t b, float y) { shared.branch[b * D + out] = y; });
    shared.barrier.wait();
    ranges++;
    add_branch(layer.norms[1]);
    norm(layer.norms[2]);
    while (ranges->take(m.hidden, shared.threads, 16, &begin, &end)) {
      project<W>(layer.gate, normed, B, begin, end, thin,
                 [&](int64_t out, int64_t b, float y) { shared.active[b * m.hidden + out] = y; });
      for (int64_t b = 0; b < B; b++)
        map(shared.active.data() + b * m.hidden + begin, end - begin, [](Vec y, int64_t) { return gelu(y); });
      project<W>(layer.up, normed, B, begin, end, thin,
                 [&](int64_t out, int64_t b, float y) { shared.active[b * m.hidden + out] *= y; });
    }
    shared.barrier.wait();
    ranges++;
    while (ranges->take(D, shared.threads, 16, &begin, &end))
      project<W>(layer.down, shared.active.data(), B, begin, end, thin,
                 [&](int64_t out, int64_t b, float y) { shared.branch[b * D + out] = y; });
    shared.barrier.wait();
    ranges++;
    add_branch(layer.norms[3]);
  }
  norm(m.final_norm);
}

// (B, V) soft-capped logits of normed states, and for each row the best of what this thread made.
template <class W>
void run_logits(Shared& shared, const float* normed, float* logits, float* best, int32_t* best_token) {
  const Model& m = shared.model;
  for (int64_t b = 0; b < shared.batch; b++) best[b] = -INFINITY, best_token[b] = INT32_MAX;
  Linear table = {m.embedding, nullptr, nullptr, nullptr, m.vocabulary, m.width, 0, 0.0};
  int64_t begin, end;
  while (shared.ranges.back().take(m.vocabulary, shared.threads, 64, &begin, &end)) {
    project<W>(table, normed, shared.batch, begin, end, nullptr,
               [&](int64_t out, int64_t b, float y) { logits[b * m.vocabulary + out] = y; });
    for (int64_t b = 0; b < shared.batch; b++) {
      float* row = logits + b * m.vocabulary;
      map(row + begin, end - begin, [&](Vec x, int64_t) { return soft_cap(x, float(m.final_cap)); });
      for (int64_t v = begin; v < end; v++)
        if (row[v] > best[b]) best[b] = row[v], best_token[b] = int32_t(v);
    }
  }
}

template <class W, class C>
int64_t decode(const Model& m, int64_t batch, int64_t steps, int threads, int32_t* tokens, int32_t* lengths,
               uint8_t* finished, int32_t* left, const int32_t* stops, int64_t stop_count, float* logits,
               int32_t* made) {
  Shared shared(m, batch, threads);
  Floats own_logits;
  if (!logits) own_logits.resize(batch * m.vocabulary), logits = own_logits.data();
  Floats best(threads * batch);
  std::vector<int32_t> best_token(threads * batch);
  int64_t done = 0;
  bool more = true, numbers = true;
  team(threads, [&](int id) {
    Private own(m, batch);
    for (int64_t step = 0; step < steps && more; step++) {
      run_layers<W, C>(shared, own, tokens, lengths, finished);
      run_logits<W>(shared, own.normed.data(), logits, &best[id * batch], &best_token[id * batch]);
      shared.barrier.wait();
      if (id == 0) {
        more = false;
        for (int64_t b = 0; b < batch; b++) {
          // Of equal logits the lowest token, as an argmax has it.
          int winner = 0;
          for (int t = 1; t < threads; t++) {
            float a = best[t * batch + b], c = best[winner * batch + b];
            if (a > c || (a == c && best_token[t * batch + b] < best_token[winner * batch + b])) winner = t;
          }
          if (!finished[b]) {
            lengths[b]++;
            int32_t token = best_token[winner * batch + b];
            if (token >= m.vocabulary) {
              // No logit is a number: there is nothing to choose.
              token = 0;
              numbers = false;
            }
            if (made) {
              made[b * steps + step] = tokens[b] = token;
              for (int64_t s = 0; s < stop_count; s++) finished[b] |= token == stops[s];
              finished[b] |= --left[b] <= 0;
            }
          }
          more |= !finished[b];
        }
        for (auto& range : shared.ranges) range.reset();
        done = step + 1;
        more &= numbers;
      }
      shared.barrier.wait();
    }
  });
  return numbers || !made ? done : -1;
}

}  // namespace
