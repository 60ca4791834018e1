// Products of activations that are rounded to 8 bits with weights of 8 bits; a part of kernels.cc.
//
// The sums are whole numbers, so the result is that of XLA to the bit, whatever the order.

#pragma once

#if WIDE && defined(__AVX512VNNI__)
// Unsigned times signed, so x has 128 added, and 128 times the sum of the weights is taken off.
using Code = uint8_t;
constexpr int K = 64;  // codes in a register
constexpr int SHIFT = 128;
using Ints = __m512i;
static inline Ints weights(const int8_t* p) { return _mm512_loadu_si512(p); }
static inline Ints weights(const int8_t* p, int64_t left) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, p);
}
static inline Ints inputs(const Code* p) { return _mm512_loadu_si512(p); }
static inline Ints none() { return _mm512_setzero_si512(); }
static inline Ints add_dot(Ints sum, Ints x, Ints w) { return _mm512_dpbusd_epi32(sum, x, w); }
static inline Ints ones() { return _mm512_set1_epi8(1); }
static inline __m256i half(Ints v) {
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#else
using Ints = __m256i;
static inline Ints none() { return _mm256_setzero_si256(); }
static inline __m256i half(Ints v) { return v; }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
using Code = uint8_t;
constexpr int K = 32;
constexpr int SHIFT = 128;
static inline Ints weights(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline Ints add_dot(Ints sum, Ints x, Ints w) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, x, w);
#else
  return _mm256_dpbusd_epi32(sum, x, w);
#endif
}
static inline Ints ones() { return _mm256_set1_epi8(1); }
#else
// AVX2 alone: its product of bytes saturates, so both sides are widened to 16 bits.
using Code = int16_t;
constexpr int K = 16;
constexpr int SHIFT = 0;
static inline Ints weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Ints add_dot(Ints sum, Ints x, Ints w) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
}
static inline Ints ones() { return _mm256_set1_epi16(1); }
#endif
static inline Ints inputs(const Code* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline Ints weights(const int8_t* p, int64_t left) {
  alignas(32) int8_t copy[K] = {};
  std::copy(p, p + left, copy);
  return weights(copy);
}
#endif

static inline __m128i totals(Ints a, Ints b, Ints c, Ints d) {
  __m256i ab = _mm256_hadd_epi32(half(a), half(b)), cd = _mm256_hadd_epi32(half(c), half(d));
  __m256i all = _mm256_hadd_epi32(ab, cd);
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

struct Rounded {
  const Code* x;        // [rows, padded]
  const float* scale;   // of each row
  const int8_t* codes;  // [out, stride]
  const float* factor;  // of each output, or of all
  float* y;
  int64_t rows, out, in, stride, padded;
  bool one_scale;
};

// Round a row as `quantize_rows` does: to the nearest, ties to even, of x / scale.
static void round_row(const float* x, const float* limit, int64_t n, int64_t padded, Code* q,
                      float* scale) {
  float top = 0;
  if (limit) {
    top = *limit;
  } else {
    Floats most = zero(), bad = zero();  // 0 * x is NaN where x is not finite
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const Floats v = load(x + i);
      most = greater(most, size_of(v));
      bad = fma(v, zero(), bad);
    }
    float mosts[W], bads[W], worst = 0;
    std::memcpy(mosts, &most, sizeof mosts);
    std::memcpy(bads, &bad, sizeof bads);
    for (int k = 0; k < W; ++k) top = std::max(top, mosts[k]), worst += bads[k];
    for (; i < n; ++i) top = std::max(top, std::fabs(x[i])), worst += 0 * x[i];
    top += worst;
  }
  const float s = (top > 1e-12f || top != top ? top : 1e-12f) / 127.0f;
  *scale = s;
  for (int64_t i = 0; i < n; ++i) {
    float v = std::nearbyintf(x[i] / s);
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    q[i] = static_cast<Code>(static_cast<int>(v) + SHIFT);
  }
  for (int64_t i = n; i < padded; ++i) q[i] = 0;
}

// four outputs with N rows of x
template <int N>
static inline void rounded_tile(const Rounded& j, int64_t row, const int8_t* const (&w)[4],
                                __m128i shift, __m128 factor, int64_t o, int count) {
  Ints sum[N][4];
  for (auto& a : sum) for (auto& b : a) b = none();
  const Code* x = j.x + row * j.padded;
  int64_t i = 0;
  for (; i + K <= j.in; i += K) {
    Ints q[4];
    for (int r = 0; r < 4; ++r) q[r] = weights(w[r] + i);
    for (int n = 0; n < N; ++n) {
      const Ints v = inputs(x + n * j.padded + i);
      for (int r = 0; r < 4; ++r) sum[n][r] = add_dot(sum[n][r], v, q[r]);
    }
  }
  if (i < j.in) {
    Ints q[4];
    for (int r = 0; r < 4; ++r) q[r] = weights(w[r] + i, j.in - i);
    for (int n = 0; n < N; ++n) {
      const Ints v = inputs(x + n * j.padded + i);
      for (int r = 0; r < 4; ++r) sum[n][r] = add_dot(sum[n][r], v, q[r]);
    }
  }
  for (int n = 0; n < N; ++n) {
    const __m128i dot = _mm_sub_epi32(totals(sum[n][0], sum[n][1], sum[n][2], sum[n][3]), shift);
    const __m128 found = _mm_mul_ps(
        _mm_mul_ps(_mm_cvtepi32_ps(dot), _mm_set1_ps(j.scale[row + n])), factor);
    float* y = j.y + (row + n) * j.out + o;
    if (count == 4) {
      _mm_storeu_ps(y, found);
    } else {
      float four[4];
      _mm_storeu_ps(four, found);
      std::copy(four, four + count, y);
    }
  }
}

static void rounded(const Rounded& j, int64_t begin, int64_t end) {
  constexpr int MOST = WIDE ? 4 : 2;
  for (int64_t o = begin; o < end; o += 4) {
    const int count = static_cast<int>(std::min<int64_t>(4, end - o));
    const int8_t* w[4];
    float factor[4];
    for (int r = 0; r < 4; ++r) {  // outputs that are not there are the last one again
      const int64_t at = o + std::min(r, count - 1);
      w[r] = j.codes + at * j.stride;
      factor[r] = j.factor[j.one_scale ? 0 : at];
    }
    __m128i shift = _mm_setzero_si128();
    if (SHIFT) {
      Ints sum[4];
      for (auto& s : sum) s = none();
      int64_t i = 0;
      for (; i + K <= j.in; i += K)
        for (int r = 0; r < 4; ++r) sum[r] = add_dot(sum[r], ones(), weights(w[r] + i));
      if (i < j.in)
        for (int r = 0; r < 4; ++r) sum[r] = add_dot(sum[r], ones(), weights(w[r] + i, j.in - i));
      shift = _mm_slli_epi32(totals(sum[0], sum[1], sum[2], sum[3]), 7);
    }
    const __m128 f = _mm_loadu_ps(factor);
    int64_t row = 0;
    for (; row + MOST <= j.rows; row += MOST) rounded_tile<MOST>(j, row, w, shift, f, o, count);
    if constexpr (MOST > 2)
      for (; row + 2 <= j.rows; row += 2) rounded_tile<2>(j, row, w, shift, f, o, count);
    for (; row < j.rows; ++row) rounded_tile<1>(j, row, w, shift, f, o, count);
  }
}

#if WIDE && defined(__AVX512VNNI__)
constexpr int LANES = 16;
constexpr int TILE = 16;  // rows of x whose sums are in registers
static inline Ints splat_word(int32_t v) { return _mm512_set1_epi32(v); }
static inline Ints shifted(Ints a) { return _mm512_slli_epi32(a, 7); }
// y = (sum - shift) * scale * factor
static inline void finish(Ints sum, Ints shift, float scale, const float* factor, float* y) {
  const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift));
  _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_mul_ps(dot, _mm512_set1_ps(scale)),
                                    _mm512_loadu_ps(factor)));
}

// rows of words become columns
static inline void transpose(Ints (&r)[LANES]) {
  Ints t[LANES];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const Ints a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    const Ints b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const Ints c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const Ints d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#else
constexpr int LANES = 8;
constexpr int TILE = WIDE ? 16 : 8;
static inline Ints splat_word(int32_t v) { return _mm256_set1_epi32(v); }
static inline Ints shifted(Ints a) { return _mm256_slli_epi32(a, 7); }
static inline void finish(Ints sum, Ints shift, float scale, const float* factor, float* y) {
  const __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, shift));
  _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_mul_ps(dot, _mm256_set1_ps(scale)),
                                    _mm256_loadu_ps(factor)));
}

static inline void transpose(Ints (&r)[LANES]) {
  Ints t[LANES];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// LANES outputs with N rows of x: a lane for each output, so nothing is added up across lanes
template <int N>
static inline void turned_tile(const Rounded& j, int64_t row, const Ints* turned, Ints shift,
                               const float* factor, int64_t o, int count) {
  constexpr int64_t CODES = 4 / sizeof(Code);  // in a word
  Ints sum[N];
  for (auto& s : sum) s = none();
  const Code* x = j.x + row * j.padded;
  for (int64_t i = 0; i < j.padded; i += CODES) {
    const Ints w = *turned++;
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      int32_t word;
      std::memcpy(&word, x + n * j.padded + i, 4);
      sum[n] = add_dot(sum[n], splat_word(word), w);
    }
  }
  float* y = j.y + row * j.out + o;
  if (count == LANES) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {  // unrolled, or the sums are not in registers
      finish(sum[n], shift, j.scale[row + n], factor, y + n * j.out);
    }
  } else {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      float found[LANES];
      finish(sum[n], shift, j.scale[row + n], factor, found);
      std::memcpy(y + n * j.out, found, count * sizeof(float));
    }
  }
}

// For many rows of x: the weights of LANES outputs are put in the order in which lanes take them.
static void rounded_turned(const Rounded& j, int64_t begin, int64_t end) {
  constexpr size_t LINE = sizeof(Ints);
  std::vector<char> room((j.padded / K * LANES + 1) * LINE);
  Ints* turned = reinterpret_cast<Ints*>(
      (reinterpret_cast<uintptr_t>(room.data()) + LINE - 1) / LINE * LINE);
  for (int64_t o = begin; o < end; o += LANES) {
    const int count = static_cast<int>(std::min<int64_t>(LANES, end - o));
    float factor[LANES];
    const int8_t* w[LANES];
    for (int r = 0; r < LANES; ++r) {  // outputs that are not there are the last one again
      const int64_t at = o + std::min(r, count - 1);
      w[r] = j.codes + at * j.stride;
      factor[r] = j.factor[j.one_scale ? 0 : at];
    }
    Ints total = none();
    Ints* to = turned;
    for (int64_t i = 0; i < j.in; i += K) {
      Ints r[LANES];
      for (int k = 0; k < LANES; ++k) {
        r[k] = i + K <= j.in ? weights(w[k] + i) : weights(w[k] + i, j.in - i);
      }
      transpose(r);
      for (int k = 0; k < LANES; ++k) {
        *to++ = r[k];
        if (SHIFT) total = add_dot(total, ones(), r[k]);
      }
    }
    const Ints shift = shifted(total);
    int64_t row = 0;
    for (; row + TILE <= j.rows; row += TILE)
      turned_tile<TILE>(j, row, turned, shift, factor, o, count);
    if constexpr (TILE > 8)
      for (; row + 8 <= j.rows; row += 8) turned_tile<8>(j, row, turned, shift, factor, o, count);
    for (; row + 4 <= j.rows; row += 4) turned_tile<4>(j, row, turned, shift, factor, o, count);
    for (; row < j.rows; ++row) turned_tile<1>(j, row, turned, shift, factor, o, count);
  }
}
