// Vectors of 64 bytes; included inside a variant's anonymous namespace, see `dot_tiles.h`.
struct V {
  static constexpr int kBytes = 64;
  static constexpr int kLanes = 16;
  static constexpr int kOffset8 = 128;
  static constexpr int kOffset4 = 8;
  using F = __m512;
  using I = __m512i;
  using W8 = __m512i;
  using X8 = __m512i;
  struct W4 {
    __m512i low, high;
  };

  static INLINE F ZeroF() { return _mm512_setzero_ps(); }
  static INLINE I ZeroI() { return _mm512_setzero_si512(); }
  static float NumberOf(F);
  static int32_t NumberOf(I);
  static INLINE F LoadF32(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static INLINE F LoadBf16(const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static INLINE F LoadS8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static INLINE I LoadI(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static INLINE F ToF(I x) { return _mm512_cvtepi32_ps(x); }
  static INLINE F Fma(F acc, F a, F b) { return _mm512_fmadd_ps(a, b, acc); }

  static INLINE F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static INLINE I Add(I a, I b) { return _mm512_add_epi32(a, b); }

  // vpdpbusd multiplies bytes without a sign by bytes with one.
  static INLINE W8 LoadW8(const uint8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static INLINE X8 LoadX8(const uint8_t* p) { return _mm512_loadu_si512(p); }
  // Written out because g++ 12 copies the sums of the builtin about, and then has too few registers for a tile.
  static INLINE I Dot8(I acc, W8 w, X8 x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }

  static INLINE W4 LoadW4(const uint8_t* p) {
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), raw = _mm512_loadu_si512(p);
    return {_mm512_ternarylogic_epi32(eight, raw, mask, kXorAnd),
            _mm512_ternarylogic_epi32(eight, _mm512_srli_epi16(raw, 4), mask, kXorAnd)};
  }
  static INLINE I Dot4(I acc, const W4& w, X8 even, X8 odd) {
    return Dot8(Dot8(acc, w.low, even), w.high, odd);
  }
  static INLINE F ScaleLanes(const uint16_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, 8);
    // The i-th of four in the upper half of every number of the i-th quarter.
    const __m512i to = _mm512_set_epi32(0x07068080, 0x07068080, 0x07068080, 0x07068080, 0x05048080, 0x05048080,
                                        0x05048080, 0x05048080, 0x03028080, 0x03028080, 0x03028080, 0x03028080,
                                        0x01008080, 0x01008080, 0x01008080, 0x01008080);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(four), to));
  }
  static INLINE F SplatBf16(uint16_t x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)));
  }
  static INLINE void NibblesF(const uint8_t* p, F scale, F* even, F* odd) {
    const __m512 table = _mm512_mul_ps(
        scale, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    const __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    *even = _mm512_permutexvar_ps(raw, table);  // Looks at four bits only.
    *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), table);
  }

  static INLINE void Reduce4(I a, I b, I c, I d, uint8_t* to) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  static INLINE void Reduce4(F a, F b, F c, F d, uint8_t* to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(reinterpret_cast<float*>(to),
                  _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};
