// CPU kernels that XLA calls within its programs; compiled with the headers that come with JAX.

#include "expectation.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// As `gemma2_expectation` of `native.cpp`; without room for the expected rows they are not made.
ffi::Error expectation_of(ffi::AnyBuffer states, ffi::AnyBuffer table, ffi::ResultBuffer<ffi::F32> normaliser,
                          ffi::ResultBuffer<ffi::S32> first, ffi::ResultBuffer<ffi::F32> expected, double cap,
                          int64_t threads) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    expectation(static_cast<const T*>(states.untyped_data()), static_cast<const T*>(table.untyped_data()),
                states.dimensions()[0], states.dimensions()[1], table.dimensions()[0], float(cap), int(threads),
                normaliser->typed_data(), first->typed_data(),
                expected->element_count() ? expected->typed_data() : nullptr);
  };
  if (table.element_type() == ffi::BF16)
    run(Bfloat16{});
  else
    run(float{});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma2_expectation, expectation_of,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<double>("cap")
                                  .Attr<int64_t>("threads"));
