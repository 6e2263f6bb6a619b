// Decoding, prefill attention and the loss of Gemma 2 on a CPU, at the speed of its memory and of its products: what
// Python calls.
//
// Letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head size, D width, F feed-forward
// width, V vocabulary. The reference of everything here is the portable engine and `ops/`.

#include "attention.h"
#include "decode.h"
#include "elementwise.h"
#include "expectation.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" {

// Runs up to `steps` tokens of each row that is not finished; with `made` it chooses the likeliest token each time and
// goes on with it, otherwise it runs one step. Returns the number of steps run, or -1 if a row's logits were no numbers.
//   tokens    (B,) the token to run; the last one chosen, on return
//   lengths   (B,) tokens in the cache before; advanced
//   finished  (B,) rows to leave alone; set when a stop token was chosen or nothing is left to make
//   left      (B,) tokens that a row may still get
//   logits    (B, V) of the last step, or null
//   made      (B, steps) tokens chosen, or null
int64_t gemma2_decode(const Model* m, int64_t batch, int64_t steps, int threads, int32_t* tokens, int32_t* lengths,
                      uint8_t* finished, int32_t* left, const int32_t* stops, int64_t stop_count, float* logits,
                      int32_t* made) {
  auto run = m->weights_bfloat16 ? (m->cache_bfloat16 ? decode<Bfloat16, Bfloat16> : decode<Bfloat16, float>)
                                 : (m->cache_bfloat16 ? decode<float, Bfloat16> : decode<float, float>);
  return run(*m, batch, made ? steps : 1, threads, tokens, lengths, finished, left, stops, stop_count, logits, made);
}

// (B, V) logits of (B, D) states that went through the last norm.
void gemma2_logits(const Model* m, int64_t batch, int threads, const float* states, float* logits) {
  Shared shared(*m, batch, threads);
  auto run = m->weights_bfloat16 ? run_logits<Bfloat16> : run_logits<float>;
  team(threads, [&](int) {
    Floats best(batch);
    std::vector<int32_t> best_token(batch);
    run(shared, states, logits, best.data(), best_token.data());
  });
}

// Attention of (B, T, N, H) queries over (B, S, K, H) keys and values that the (B, T, S) mask lets them see, and the
// (B, N, T) logs of the sums of the exponentials of their scores, or null.
void gemma2_attend(int64_t bfloat16, const void* q, const void* k, const void* v, void* out, const uint8_t* mask,
                   float* normaliser, int64_t B, int64_t T, int64_t S, int64_t N, int64_t K, int64_t H, double scale,
                   double cap, int threads) {
  const auto run = [&](auto element) {
    using C = decltype(element);
    attend(static_cast<const C*>(q), static_cast<const C*>(k), static_cast<const C*>(v), static_cast<C*>(out), mask, B,
           T, S, N, K, H, float(scale), float(cap), threads, normaliser);
  };
  bfloat16 ? run(Bfloat16{}) : run(float{});
}

// The gradients of attention with respect to queries, keys and values, from that of its result.
void gemma2_attend_gradient(int64_t bfloat16, const void* q, const void* k, const void* v, const void* out,
                            const void* out_gradient, void* q_gradient, void* k_gradient, void* v_gradient,
                            const uint8_t* mask, const float* normaliser, int64_t B, int64_t T, int64_t S, int64_t N,
                            int64_t K, int64_t H, double scale, double cap, int threads) {
  const auto run = [&](auto element) {
    using C = decltype(element);
    attend_gradient(static_cast<const C*>(q), static_cast<const C*>(k), static_cast<const C*>(v),
                    static_cast<const C*>(out), static_cast<const C*>(out_gradient), static_cast<C*>(q_gradient),
                    static_cast<C*>(k_gradient), static_cast<C*>(v_gradient), mask, normaliser, B, T, S, N, K, H,
                    float(scale), float(cap), threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(float{});
}

// What the softmax of `soft_cap(states table^T, cap)` says of each state, with float32 products; a cap of 0 is none.
//   states      (M, D), table (V, D)
//   normaliser  (M,) log of the sum of the exponentials of a state's logits
//   first       (M,) the likeliest word
//   expected    (M, D) the mean of the table's rows by their probability, each times the derivative of its logit's soft
//               cap: the gradient of `normaliser` with respect to the states; or null
void gemma2_expectation(int64_t bfloat16, const void* states, const void* table, int64_t M, int64_t D, int64_t V,
                        double cap, int threads, float* normaliser, int32_t* first, float* expected) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    expectation(static_cast<const T*>(states), static_cast<const T*>(table), M, D, V, float(cap), threads, normaliser,
                first, expected);
  };
  bfloat16 ? run(Bfloat16{}) : run(float{});
}

// Offers the threads of an OpenMP library: its `GOMP_parallel`.
void gemma2_share_threads(void* start) { start_threads = reinterpret_cast<StartThreads>(start); }

// The rows of (rows, D) at unit mean square, times 1 + weight.
void gemma2_rms_norm(int64_t bfloat16, int64_t weight_bfloat16, const void* x, const void* weight, void* y,
                     int64_t rows, int64_t D, double epsilon, int threads) {
  const auto run = [&](auto element, auto factor) {
    using C = decltype(element);
    using W = decltype(factor);
    rms_norm(static_cast<const C*>(x), static_cast<const W*>(weight), static_cast<C*>(y), rows, D, float(epsilon),
             threads);
  };
  const auto chosen = [&](auto element) { weight_bfloat16 ? run(element, Bfloat16{}) : run(element, float{}); };
  bfloat16 ? chosen(Bfloat16{}) : chosen(float{});
}

// gelu(gate) * up of n numbers.
void gemma2_gated_gelu(int64_t bfloat16, const void* gate, const void* up, void* y, int64_t n, int threads) {
  const auto run = [&](auto element) {
    using C = decltype(element);
    gated_gelu(static_cast<const C*>(gate), static_cast<const C*>(up), static_cast<C*>(y), n, threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(float{});
}

// (rows, heads, H) numbers turned by the float32 (rows, H / 2) cosines and sines.
void gemma2_rotate(int64_t bfloat16, const void* x, const float* cosine, const float* sine, void* y, int64_t rows,
                   int64_t heads, int64_t H, int threads) {
  const auto run = [&](auto element) {
    using C = decltype(element);
    rotate(static_cast<const C*>(x), cosine, sine, static_cast<C*>(y), rows, heads, H, threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(float{});
}

// Asks for huge pages under a buffer, which spares a tenth of the time to stream it; without effect where there are
// none. The contents stay as they are.
void gemma2_use_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 1 << 21;
  uintptr_t from = (uintptr_t(start) + page - 1) & ~(page - 1), to = (uintptr_t(start) + bytes) & ~(page - 1);
  if (from >= to) return;
  if (madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE)) return;
  madvise(reinterpret_cast<void*>(from), to - from, 25);  // MADV_COLLAPSE, since Linux 6.1
#endif
}

}  // extern "C"
