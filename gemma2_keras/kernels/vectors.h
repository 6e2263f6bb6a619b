// Vectors of sixteen float32, in the compiler's own vector types: they become whatever the processor has.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

// A bfloat16 is the upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* to, float x) { *to = x; }
inline void store(Bfloat16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; a NaN keeps its upper bits.
  to->bits = (x == x) ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t((bits >> 16) | 0x40);
}

// Memory in which no vector straddles two cache lines.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec load(const Bfloat16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  BitVec bits = __builtin_convertvector(half, BitVec) << 16;
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline void save(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline void save(Bfloat16* p, Vec x) {
  BitVec bits, number;
  const IntVec is_number = x == x;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&number, &is_number, sizeof number);
  // As `store` does it.
  bits = (((bits + 0x7fff + ((bits >> 16) & 1)) & number) | ((bits | 0x400000) & ~number)) >> 16;
  const HalfVec half = __builtin_convertvector(bits, HalfVec);
  std::memcpy(p, &half, sizeof half);
}

inline Vec all(float x) { return x - Vec{}; }
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
inline Half halved(Vec x) {
  Half parts[2];
  std::memcpy(parts, &x, sizeof x);
  return parts[0] + parts[1];
}
inline float sum(Vec x) {
  Half half = halved(x);
  Quarter parts[2];
  std::memcpy(parts, &half, sizeof half);
  Quarter four = parts[0] + parts[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
// The same of eight vectors at once; the additions are those of `sum`.
inline void sums(const Vec* x, float* y) {
  Half a[8];
  for (int i = 0; i < 8; i++) a[i] = halved(x[i]);
  for (int i = 0; i < 4; i++)
    a[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)
    a[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  Half b = __builtin_shufflevector(a[0], a[1], 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(a[0], a[1], 1, 9, 3, 11, 5, 13, 7, 15);
  std::memcpy(y, &b, sizeof b);
}
inline Vec choose(IntVec mask, Vec yes, Vec no) {
  IntVec a, b;
  std::memcpy(&a, &yes, sizeof a);
  std::memcpy(&b, &no, sizeof b);
  IntVec c = (a & mask) | (b & ~mask);
  Vec x;
  std::memcpy(&x, &c, sizeof x);
  return x;
}

// e^x to 2 units in the last place; arguments are clamped to where the result is a normal number.
inline Vec exponential(Vec x) {
  x = choose(x < all(-87.0f), all(-87.0f), choose(x > all(88.0f), all(88.0f), x));
  // Added to 1.5 * 2^23, a number is rounded to a whole one, which then stands in the last bits.
  const Vec turns = x * 1.44269504f + 12582912.0f;
  const Vec whole = turns - 12582912.0f;
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  BitVec exponent;
  std::memcpy(&exponent, &turns, sizeof turns);
  exponent = (exponent + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// tanh x to 3 units in the last place: the quotient of polynomials that Eigen uses, whose limit is where it is 1.
inline Vec hyperbolic_tangent(Vec x) {
  const Vec limit = all(7.90531110763549805f);
  x = choose(x > limit, limit, choose(x < -limit, -limit, x));
  const Vec z = x * x;
  Vec p = z * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-8f;
  p = p * z + 1.48572235717979e-5f;
  p = p * z + 6.37261928875436e-4f;
  p = (p * z + 4.89352455891786e-3f) * x;
  Vec q = z * 1.19825839466702e-6f + 1.18534705686654e-4f;
  q = q * z + 2.26843463243900e-3f;
  return p / (q * z + 4.89352518554385e-3f);
}

// GELU in its tanh form: (1 + tanh u) / 2 is 1 / (1 + e^-2u), in which nothing cancels.
inline Vec gelu(Vec x) { return x / (exponential((x + x * x * x * 0.044715f) * -1.5957691216057308f) + 1.0f); }

inline Vec soft_cap(Vec x, float cap) { return cap > 0 ? hyperbolic_tangent(x / cap) * cap : x; }

// Applies `f` to whole vectors and to a padded rest.
template <class F>
void map(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) save(x + i, f(load(x + i), i));
  if (i < n) {
    float rest[kLanes] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    save(rest, f(load(rest), i));
    std::memcpy(x + i, rest, (n - i) * sizeof(float));
  }
}

// Products with one row of a weight: `y[b] = w . x[b]` for Rows rows of x, `stride` floats apart. The order of the
// additions is the same for any number of rows, so that a row's result does not depend on the batch around it.
template <int Rows, class W>
inline void dot(const W* w, const float* x, int64_t stride, int64_t n, float* y) {
  Vec total[Rows] = {}, odd[Rows] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Vec even_weight = load(w + i), odd_weight = load(w + i + kLanes);
    for (int b = 0; b < Rows; b++) {
      total[b] += even_weight * load(x + b * stride + i);
      odd[b] += odd_weight * load(x + b * stride + i + kLanes);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    Vec weight = load(w + i);
    for (int b = 0; b < Rows; b++) total[b] += weight * load(x + b * stride + i);
  }
  for (int b = 0; b < Rows; b++) total[b] += odd[b];
  if (i < n) {
    float rest[kLanes] = {}, other[kLanes] = {};
    for (int64_t j = i; j < n; j++) rest[j - i] = to_float(w[j]);
    Vec weight = load(rest);
    for (int b = 0; b < Rows; b++) {
      std::memcpy(other, x + b * stride + i, (n - i) * sizeof(float));
      total[b] += weight * load(other);
    }
  }
  if (Rows == 8)
    sums(total, y);
  else
    for (int b = 0; b < Rows; b++) y[b] = sum(total[b]);
}

template <class W>
void dots(const W* w, const float* x, int64_t rows, int64_t n, float* y) {
  for (; rows >= 8; rows -= 8, x += 8 * n, y += 8) dot<8>(w, x, n, n, y);
  if (rows >= 4) dot<4>(w, x, n, n, y), rows -= 4, x += 4 * n, y += 4;
  if (rows >= 2) dot<2>(w, x, n, n, y), rows -= 2, x += 2 * n, y += 2;
  if (rows) dot<1>(w, x, n, n, y);
}

}  // namespace
