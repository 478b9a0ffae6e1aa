// Vectors of 32 bytes; included inside a variant's anonymous namespace, see `dot_tiles.h`.
struct V {
  static constexpr int kBytes = 32;
  static constexpr int kLanes = 8;
  static constexpr int kOffset8 = 0;
  static constexpr int kOffset4 = 8;
  using F = __m256;
  using I = __m256i;
  using W8 = __m256i;
  using X8 = __m256i;
  struct W4 {
    __m256i low, high;
  };

  static INLINE F ZeroF() { return _mm256_setzero_ps(); }
  static INLINE I ZeroI() { return _mm256_setzero_si256(); }
  static float NumberOf(F);
  static int32_t NumberOf(I);
  static INLINE __m128i LoadHalf(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static INLINE F LoadF32(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static INLINE F LoadBf16(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static INLINE F LoadS8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(LoadHalf(p))); }
  static INLINE I LoadI(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static INLINE F ToF(I x) { return _mm256_cvtepi32_ps(x); }
  static INLINE F Fma(F acc, F a, F b) { return _mm256_fmadd_ps(a, b, acc); }
  static INLINE F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static INLINE I Add(I a, I b) { return _mm256_add_epi32(a, b); }

  static INLINE W8 LoadW8(const uint8_t* p) { return LoadI(p); }
  static INLINE X8 LoadX8(const uint8_t* p) { return LoadI(p); }
  // vpmaddubsw adds pairs in 16 bits and saturates: |w| * (x with w's sign) stays below 2 * 128 * 127 < 2^15.
  static INLINE I Dot8(I acc, W8 w, X8 x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  static INLINE W4 LoadW4(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), raw = LoadI(p);
    return {_mm256_xor_si256(_mm256_and_si256(raw, mask), eight),
            _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(raw, 4), mask), eight)};
  }
  static INLINE I Dot4(I acc, const W4& w, X8 even, X8 odd) {
    // At most 4 * 15 * 127 in 16 bits.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, even), _mm256_maddubs_epi16(w.high, odd));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static INLINE F ScaleLanes(const uint16_t* p) {
    return _mm256_set_m128(_mm256_castps256_ps128(SplatBf16(p[1])), _mm256_castps256_ps128(SplatBf16(p[0])));
  }
  static INLINE F SplatBf16(uint16_t x) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)));
  }
  static INLINE void NibblesF(const uint8_t* p, F scale, F* even, F* odd) {
    const __m256i raw = _mm256_cvtepu8_epi32(LoadHalf(p));
    const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(raw, 28), 28);
    const __m256i high = _mm256_srai_epi32(_mm256_slli_epi32(raw, 24), 28);
    *even = _mm256_mul_ps(ToF(low), scale);
    *odd = _mm256_mul_ps(ToF(high), scale);
  }

  static INLINE void Reduce4(I a, I b, I c, I d, uint8_t* to) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
  static INLINE void Reduce4(F a, F b, F c, F d, uint8_t* to) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(reinterpret_cast<float*>(to),
                  _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};
