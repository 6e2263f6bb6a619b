// CPU kernels that XLA calls within its programs, each as in `native.cpp`; compiled with the headers that come with JAX.

#include "attention.h"
#include "expectation.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

template <class Run>
ffi::Error run_for(const ffi::AnyBuffer& numbers, const Run& run) {
  numbers.element_type() == ffi::BF16 ? run(Bfloat16{}) : run(float{});
  return ffi::Error::Success();
}

template <class T>
const T* of(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <class T>
T* of(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

// Without room for the expected rows they are not made.
ffi::Error expectation_of(ffi::AnyBuffer states, ffi::AnyBuffer table, ffi::ResultBuffer<ffi::F32> normaliser,
                          ffi::ResultBuffer<ffi::S32> first, ffi::ResultBuffer<ffi::F32> expected, double cap,
                          int64_t threads) {
  return run_for(table, [&](auto element) {
    using T = decltype(element);
    expectation(of<T>(states), of<T>(table), states.dimensions()[0], states.dimensions()[1], table.dimensions()[0],
                float(cap), int(threads), normaliser->typed_data(), first->typed_data(),
                expected->element_count() ? expected->typed_data() : nullptr);
  });
}

// Without room for the normalisers they are not made.
ffi::Error attention_of(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::PRED> mask,
                        ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> normaliser, double scale,
                        double cap, int64_t threads) {
  const auto n = q.dimensions(), m = k.dimensions();
  return run_for(q, [&](auto element) {
    using C = decltype(element);
    attend(of<C>(q), of<C>(k), of<C>(v), of<C>(out), reinterpret_cast<const uint8_t*>(mask.typed_data()), n[0], n[1],
           m[1], n[2], m[2], n[3], float(scale), float(cap), int(threads),
           normaliser->element_count() ? normaliser->typed_data() : nullptr);
  });
}

ffi::Error attention_gradient_of(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer out,
                                 ffi::AnyBuffer out_gradient, ffi::Buffer<ffi::PRED> mask,
                                 ffi::Buffer<ffi::F32> normaliser, ffi::Result<ffi::AnyBuffer> q_gradient,
                                 ffi::Result<ffi::AnyBuffer> k_gradient, ffi::Result<ffi::AnyBuffer> v_gradient,
                                 double scale, double cap, int64_t threads) {
  const auto n = q.dimensions(), m = k.dimensions();
  return run_for(q, [&](auto element) {
    using C = decltype(element);
    attend_gradient(of<C>(q), of<C>(k), of<C>(v), of<C>(out), of<C>(out_gradient), of<C>(q_gradient),
                    of<C>(k_gradient), of<C>(v_gradient), reinterpret_cast<const uint8_t*>(mask.typed_data()),
                    normaliser.typed_data(), n[0], n[1], m[1], n[2], m[2], n[3], float(scale), float(cap),
                    int(threads));
  });
}

using Numbers = ffi::AnyBuffer;
using Floats32 = ffi::Buffer<ffi::F32>;
using Bools = ffi::Buffer<ffi::PRED>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma2_expectation, expectation_of,
                              ffi::Ffi::Bind()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Ret<Floats32>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats32>()
                                  .Attr<double>("cap")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma2_attention, attention_of,
                              ffi::Ffi::Bind()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Bools>()
                                  .Ret<Numbers>()
                                  .Ret<Floats32>()
                                  .Attr<double>("scale")
                                  .Attr<double>("cap")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma2_attention_gradient, attention_gradient_of,
                              ffi::Ffi::Bind()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Bools>()
                                  .Arg<Floats32>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Attr<double>("scale")
                                  .Attr<double>("cap")
                                  .Attr<int64_t>("threads"));
