// Vectors of 16 bytes that any processor has or the compiler makes up; included inside a variant's anonymous namespace,
// see `dot_tiles.h`. A processor's own products of bytes come in through FASTGPT_DOT8(acc, w, x).
struct V {
  static constexpr int kBytes = 16;
  static constexpr int kLanes = 4;
  static constexpr int kOffset8 = 0;
  static constexpr int kOffset4 = 0;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef int8_t B __attribute__((vector_size(16)));
  using W8 = B;
  using X8 = B;
  struct W4 {
    B low, high;
  };

  template <class T>
  static INLINE T Load(const uint8_t* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
  }
  static INLINE F ZeroF() { return F{}; }
  static INLINE I ZeroI() { return I{}; }
  static float NumberOf(F);
  static int32_t NumberOf(I);
  static INLINE F LoadF32(const uint8_t* p) { return Load<F>(p); }
  static INLINE F LoadBf16(const uint8_t* p) {
    typedef uint16_t Four __attribute__((vector_size(8)));
    typedef uint32_t U __attribute__((vector_size(16)));
    return reinterpret_cast<F>(__builtin_convertvector(Load<Four>(p), U) << 16);
  }
  static INLINE F LoadS8(const uint8_t* p) {
    typedef int8_t Four __attribute__((vector_size(4)));
    return __builtin_convertvector(Load<Four>(p), F);
  }
  static INLINE I LoadI(const uint8_t* p) { return Load<I>(p); }
  static INLINE F ToF(I x) { return __builtin_convertvector(x, F); }
  static INLINE F Fma(F acc, F a, F b) { return acc + a * b; }
  static INLINE F Add(F a, F b) { return a + b; }
  static INLINE I Add(I a, I b) { return a + b; }

  static INLINE W8 LoadW8(const uint8_t* p) { return Load<B>(p); }
  static INLINE X8 LoadX8(const uint8_t* p) { return Load<B>(p); }
  static INLINE I Dot8(I acc, W8 w, X8 x) {
#if defined(FASTGPT_DOT8)
    return FASTGPT_DOT8(acc, w, x);
#else
    // The sum of the four products of each lane: even and odd bytes as 16-bit numbers, then pairs of those.
    typedef int16_t S __attribute__((vector_size(16)));
    const S we = reinterpret_cast<S>(w) << 8 >> 8, wo = reinterpret_cast<S>(w) >> 8;
    const S xe = reinterpret_cast<S>(x) << 8 >> 8, xo = reinterpret_cast<S>(x) >> 8;
    const S even = we * xe, odd = wo * xo;
    const I e = reinterpret_cast<I>(even), o = reinterpret_cast<I>(odd);
    return acc + (e << 16 >> 16) + (e >> 16) + (o << 16 >> 16) + (o >> 16);
#endif
  }

  static INLINE W4 LoadW4(const uint8_t* p) {
    const B raw = Load<B>(p);
    return {raw << 4 >> 4, raw >> 4};
  }
  static INLINE I Dot4(I acc, const W4& w, X8 even, X8 odd) { return Dot8(Dot8(acc, w.low, even), w.high, odd); }
  static INLINE F ScaleLanes(const uint16_t* p) { return SplatBf16(*p); }
  static INLINE F SplatBf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return F{value, value, value, value};
  }
  static INLINE void NibblesF(const uint8_t* p, F scale, F* even, F* odd) {
    typedef int8_t Four __attribute__((vector_size(4)));
    const I raw = __builtin_convertvector(Load<Four>(p), I);
    *even = ToF(raw << 28 >> 28) * scale;
    *odd = ToF(raw << 24 >> 28) * scale;
  }

  template <class T>
  static INLINE void Reduce4(T a, T b, T c, T d, uint8_t* to) {
    const T sums = {a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3],
                    d[0] + d[1] + d[2] + d[3]};
    __builtin_memcpy(to, &sums, sizeof sums);
  }
};
