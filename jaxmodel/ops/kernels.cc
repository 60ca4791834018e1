// Products of few rows of activations with weights that are stored as codes: y = x W^T.
//
// XLA unpacks codes into memory first, or into registers in a loop that it does not block. Here a
// register of codes is unpacked once and meets several rows. Compiled on the machine that runs it,
// with -march=native (see kernels.py); a processor without AVX2 has no kernels, and XLA's form runs.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define WIDE 1
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDE 0
#else
#error "the kernels need AVX2 and FMA"
#endif

// ------------------------------------------------------------------------------------- vectors

#if WIDE
constexpr int W = 16;        // floats in a register
constexpr int SUMS = 16;     // registers that hold sums
constexpr int SINGLE = 8;    // the same, for a single row: enough to hide the latency
using Floats = __m512;
static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats zero() { return _mm512_setzero_ps(); }
static inline Floats splat(float v) { return _mm512_set1_ps(v); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats size_of(Floats a) { return _mm512_abs_ps(a); }
static inline __m256 half(Floats v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
using Words = __m512i;
static inline Words bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Floats signed_bytes(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The values of the 16 codes of four bits, for one output: a look-up looks at the lowest four bits
// alone, so codes of fewer bits need no mask where the table repeats itself.
struct Table {
  Floats values;
  template <int BITS>
  static Table of(float scale, float offset) {
    alignas(64) float value[16];
    for (int i = 0; i < 16; ++i) value[i] = static_cast<float>(i & ((1 << BITS) - 1));
    return {fma(load(value), splat(scale), splat(offset))};
  }
  template <int BITS, int PART>
  Floats at(Words codes) const {
    return _mm512_permutexvar_ps(PART ? _mm512_srli_epi32(codes, PART * BITS) : codes, values);
  }
};
#else
constexpr int W = 8;
constexpr int SUMS = 8;
constexpr int SINGLE = 4;
using Floats = __m256;
static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Floats zero() { return _mm256_setzero_ps(); }
static inline Floats splat(float v) { return _mm256_set1_ps(v); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats size_of(Floats a) { return _mm256_andnot_ps(splat(-0.0f), a); }
static inline __m256 half(Floats v) { return v; }
using Words = __m256i;
static inline Words bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline Floats signed_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
struct Table {
  Floats scale, offset;
  template <int BITS>
  static Table of(float scale, float offset) { return {splat(scale), splat(offset)}; }
  template <int BITS, int PART>
  Floats at(Words codes) const {
    Words code = PART ? _mm256_srli_epi32(codes, PART * BITS) : codes;
    if (PART * BITS + BITS < 8) code = _mm256_and_si256(code, _mm256_set1_epi32((1 << BITS) - 1));
    return fma(_mm256_cvtepi32_ps(code), scale, offset);
  }
};
#endif

static inline void totals(Floats a, Floats b, Floats c, Floats d, float* out) {
  __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
  __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

// ------------------------------------------------------------------------------------- threads

// Run work(begin, end) over parts of [0, n), with the threads of XLA's pool and this one. This one
// takes parts as long as there are some, so it does not depend on the others.
template <typename Work>
static void in_parts(ffi::ThreadPool pool, int64_t n, int64_t unit, int64_t cost, Work work) {
  const int64_t threads = pool.num_threads();
  if (threads < 2 || cost < 100000) return work(0, n);
  struct State {
    Work work;
    int64_t n, size, parts;
    std::atomic<int64_t> next{0}, done{0};
    State(Work w) : work(w) {}
    void run() {
      for (int64_t part; (part = next.fetch_add(1)) < parts;) {
        work(part * size, std::min(n, (part + 1) * size));
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>(work);
  const int64_t wanted = std::min<int64_t>(4 * threads, std::max<int64_t>(threads, cost / 100000));
  state->n = n;
  state->size = ((n + wanted - 1) / wanted + unit - 1) / unit * unit;
  state->parts = (n + state->size - 1) / state->size;
  for (int64_t i = 1; i < std::min(threads, state->parts); ++i) {
    pool.Schedule(std::function<void()>([state] { state->run(); }));
  }
  state->run();
  while (state->done.load(std::memory_order_acquire) < state->parts) std::this_thread::yield();
}

// ------------------------------------------------------------------ codes of 1, 2 and 4 bits

// As in `RowPacked`: byte [o, i] holds the codes of the rows o, o + out / P, ..., P = 8 / bits.
struct Job {
  const float* x;
  const uint8_t* codes;
  const void *scale, *minimum;
  float* y;
  int64_t rows, out, in, stride, groups;
  bool one_scale;  // for all outputs
  bool halves;     // scale and minimum are float16

  float number(const void* p, int64_t output, int64_t group) const {
    const int64_t i = (one_scale ? 0 : output) * groups + group;
    return halves ? _cvtsh_ss(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
  }
};

// w = code * a + b
template <int BITS>
static inline void factors(const Job& j, int64_t output, int64_t group, float* a, float* b) {
  const float s = j.number(j.scale, output, group);
  *a = !j.minimum && BITS == 1 ? 2 * s : s;
  *b = j.minimum ? j.number(j.minimum, output, group) : -s * (BITS == 1 ? 1.0f : static_cast<float>(1 << (BITS - 1)));
}

template <int BITS, int PART, int P, int R, int N>
static inline void meet(const Table (&table)[R][P], const Words (&codes)[R], const Floats (&x)[N],
                        Floats (&sum)[R][P][N]) {
  if constexpr (PART < P) {
    for (int r = 0; r < R; ++r) {
      const Floats w = table[r][PART].template at<BITS, PART>(codes[r]);
      for (int n = 0; n < N; ++n) sum[r][PART][n] = fma(w, x[n], sum[r][PART][n]);
    }
    meet<BITS, PART + 1, P, R, N>(table, codes, x, sum);
  }
}

// R rows of bytes, which are R * P outputs, with N rows of x
template <int BITS, int R, int N>
static inline void packed_tile(const Job& j, int64_t row, int64_t o) {
  constexpr int P = 8 / BITS;
  const int64_t per = j.out / P, width = j.stride / j.groups;
  Floats sum[R][P][N];
  float rest[R][P][N] = {};
  for (auto& a : sum) for (auto& b : a) for (auto& c : b) c = zero();
  for (int64_t g = 0; g < j.groups; ++g) {
    Table table[R][P];
    float a[R][P], b[R][P];
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        factors<BITS>(j, p * per + o + r, g, &a[r][p], &b[r][p]);
        table[r][p] = Table::template of<BITS>(a[r][p], b[r][p]);
      }
    }
    int64_t i = g * width;
    const int64_t end = std::min(j.in, i + width);
    for (; i + W <= end; i += W) {
      Words codes[R];
      Floats x[N];
      for (int r = 0; r < R; ++r) codes[r] = bytes(j.codes + (o + r) * j.stride + i);
      for (int n = 0; n < N; ++n) x[n] = load(j.x + (row + n) * j.in + i);
      meet<BITS, 0, P, R, N>(table, codes, x, sum);
    }
    for (; i < end; ++i) {
      for (int r = 0; r < R; ++r) {
        const unsigned byte = j.codes[(o + r) * j.stride + i];
        for (int p = 0; p < P; ++p) {
          const float code = static_cast<float>((byte >> (p * BITS)) & ((1u << BITS) - 1));
          for (int n = 0; n < N; ++n) {
            rest[r][p][n] += (code * a[r][p] + b[r][p]) * j.x[(row + n) * j.in + i];
          }
        }
      }
    }
  }
  const Floats* sums = &sum[0][0][0];
  const float* rests = &rest[0][0][0];
  for (int k = 0; k < R * P * N; k += 4) {
    float found[4];
    const int last = R * P * N - 1;
    totals(sums[k], sums[std::min(k + 1, last)], sums[std::min(k + 2, last)],
           sums[std::min(k + 3, last)], found);
    for (int m = 0; m < 4 && k + m <= last; ++m) {
      const int n = (k + m) % N, p = (k + m) / N % P, r = (k + m) / N / P;
      j.y[(row + n) * j.out + p * per + o + r] = found[m] + rests[k + m];
    }
  }
}

template <int BITS, int N>
static void packed_rows(const Job& j, int64_t row, int64_t begin, int64_t end) {
  constexpr int P = 8 / BITS, OUTPUTS = (N == 1 ? SINGLE : SUMS / N), R = OUTPUTS > P ? OUTPUTS / P : 1;
  int64_t o = begin;
  for (; o + R <= end; o += R) packed_tile<BITS, R, N>(j, row, o);
  for (; o < end; ++o) packed_tile<BITS, 1, N>(j, row, o);
}

template <int BITS>
static void packed(const Job& j, int64_t begin, int64_t end) {
  constexpr int MOST = SUMS * BITS / 8;  // rows of x beside the outputs of one byte
  int64_t row = 0;
  if constexpr (MOST >= 8)
    for (; row + 8 <= j.rows; row += 8) packed_rows<BITS, 8>(j, row, begin, end);
  if constexpr (MOST >= 4)
    for (; row + 4 <= j.rows; row += 4) packed_rows<BITS, 4>(j, row, begin, end);
  if constexpr (MOST >= 2)
    for (; row + 2 <= j.rows; row += 2) packed_rows<BITS, 2>(j, row, begin, end);
  for (; row < j.rows; ++row) packed_rows<BITS, 1>(j, row, begin, end);
}

// ------------------------------------------------------- codes of 8 bits, activations in float

template <int R, int N>
static inline void bytes_tile(const Job& j, int64_t row, int64_t o) {
  const int64_t width = j.stride / j.groups;
  const int8_t* codes = reinterpret_cast<const int8_t*>(j.codes) + o * j.stride;
  Floats sum[R][N];
  float rest[R][N] = {};
  for (auto& a : sum) for (auto& b : a) b = zero();
  for (int64_t g = 0; g < j.groups; ++g) {
    float scale[R];
    Floats wide[R];
    for (int r = 0; r < R; ++r) {
      scale[r] = j.number(j.scale, o + r, g);
      wide[r] = splat(scale[r]);
    }
    int64_t i = g * width;
    const int64_t end = std::min(j.in, i + width);
    for (; i + W <= end; i += W) {
      Floats x[N];
      for (int n = 0; n < N; ++n) x[n] = load(j.x + (row + n) * j.in + i);
      for (int r = 0; r < R; ++r) {
        const Floats w = mul(signed_bytes(codes + r * j.stride + i), wide[r]);
        for (int n = 0; n < N; ++n) sum[r][n] = fma(w, x[n], sum[r][n]);
      }
    }
    for (; i < end; ++i) {
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
          rest[r][n] += codes[r * j.stride + i] * scale[r] * j.x[(row + n) * j.in + i];
        }
      }
    }
  }
  const Floats* sums = &sum[0][0];
  for (int k = 0; k < R * N; k += 4) {
    float found[4];
    const int last = R * N - 1;
    totals(sums[k], sums[std::min(k + 1, last)], sums[std::min(k + 2, last)],
           sums[std::min(k + 3, last)], found);
    for (int m = 0; m < 4 && k + m <= last; ++m) {
      const int n = (k + m) % N, r = (k + m) / N;
      j.y[(row + n) * j.out + o + r] = found[m] + rest[r][n];
    }
  }
}

template <int N>
static void bytes_rows(const Job& j, int64_t row, int64_t begin, int64_t end) {
  constexpr int R = N == 1 ? SINGLE : SUMS / N;
  int64_t o = begin;
  for (; o + R <= end; o += R) bytes_tile<R, N>(j, row, o);
  for (; o < end; ++o) bytes_tile<1, N>(j, row, o);
}

static void all_bytes(const Job& j, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= j.rows; row += 4) bytes_rows<4>(j, row, begin, end);
  for (; row + 2 <= j.rows; row += 2) bytes_rows<2>(j, row, begin, end);
  for (; row < j.rows; ++row) bytes_rows<1>(j, row, begin, end);
}

#include "kernels_rounded.h"

// --------------------------------------------------------------------------------- entry points

using In = ffi::Buffer<ffi::F32>;

static Job job_of(const In& x, const void* codes, int64_t stride, const ffi::AnyBuffer& scale,
                  const void* minimum, ffi::ResultBuffer<ffi::F32>& y) {
  const int64_t in = x.dimensions().back(), out = y->dimensions().back();
  return Job{x.typed_data(), static_cast<const uint8_t*>(codes), scale.untyped_data(), minimum,
             y->typed_data(), static_cast<int64_t>(x.element_count()) / in, out, in, stride,
             scale.dimensions().back(), scale.dimensions()[0] == 1,
             scale.element_type() == ffi::F16};
}

static ffi::Error Packed(ffi::ThreadPool pool, In x, ffi::Buffer<ffi::U8> codes,
                         ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                         ffi::ResultBuffer<ffi::F32> y, int64_t bits) {
  const void* low = minimum.element_count() ? minimum.untyped_data() : nullptr;
  const Job j = job_of(x, codes.typed_data(), codes.dimensions().back(), scale, low, y);
  const int64_t n = codes.dimensions()[0], cost = n * j.stride * j.rows;
  switch (bits) {
    case 1: in_parts(pool, n, 8, cost * 4, [=](int64_t b, int64_t e) { packed<1>(j, b, e); }); break;
    case 2: in_parts(pool, n, 8, cost * 2, [=](int64_t b, int64_t e) { packed<2>(j, b, e); }); break;
    case 4: in_parts(pool, n, 8, cost, [=](int64_t b, int64_t e) { packed<4>(j, b, e); }); break;
    default: return ffi::Error::InvalidArgument("bits: allowed are 1, 2 and 4");
  }
  return ffi::Error::Success();
}

static ffi::Error Bytes(ffi::ThreadPool pool, In x, ffi::Buffer<ffi::S8> codes,
                        ffi::AnyBuffer scale, ffi::ResultBuffer<ffi::F32> y) {
  const Job j = job_of(x, codes.typed_data(), codes.dimensions().back(), scale, nullptr, y);
  in_parts(pool, j.out, 8, j.out * j.in * j.rows / 2,
           [=](int64_t b, int64_t e) { all_bytes(j, b, e); });
  return ffi::Error::Success();
}

static ffi::Error RoundedBytes(ffi::ThreadPool pool, In x, ffi::Buffer<ffi::S8> codes, In scale,
                               In limit, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t in = x.dimensions().back(), rows = static_cast<int64_t>(x.element_count()) / in;
  const int64_t padded = (in + K - 1) / K * K;
  std::vector<Code> q(rows * padded);
  std::vector<float> scales(rows);
  const float* top = limit.element_count() ? limit.typed_data() : nullptr;
  const float* from = x.typed_data();
  in_parts(pool, rows, 1, rows * in, [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; ++r) {
      round_row(from + r * in, top, in, padded, q.data() + r * padded, &scales[r]);
    }
  });
  const Rounded j{q.data(), scales.data(), codes.typed_data(), scale.typed_data(), y->typed_data(),
                  rows, y->dimensions().back(), in, codes.dimensions().back(), padded,
                  scale.dimensions()[0] == 1};
  const int64_t cost = j.out * in * rows / 4;
  if (rows > 4) {
    in_parts(pool, j.out, LANES, cost, [=](int64_t b, int64_t e) { rounded_turned(j, b, e); });
  } else {
    in_parts(pool, j.out, 4, cost, [=](int64_t b, int64_t e) { rounded(j, b, e); });
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodel_packed, Packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodel_bytes, Bytes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodel_rounded, RoundedBytes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
