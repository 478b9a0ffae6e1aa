// The kernels of `pointwise.h` over vectors of 16 floats, which the compiler spells in the instructions of whoever
// includes this, inside an anonymous namespace: see `variant.h`.

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
constexpr int64_t kLanes = 16;

INLINE F Splat(float x) { return F{} + x; }

// `count` numbers, the rest zeros.
INLINE F Load(const float* p, int64_t count) {
  F x{};
  if (count >= kLanes) {
    __builtin_memcpy(&x, p, 64);
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  }
  return x;
}

INLINE F Load(const uint16_t* p, int64_t count) {
  H raw{};
  if (count >= kLanes) {
    __builtin_memcpy(&raw, p, 32);
  } else {
    for (int64_t i = 0; i < count; ++i) raw[i] = p[i];
  }
  return (F)(__builtin_convertvector(raw, U) << 16);
}

INLINE void Store(float* p, F x, int64_t count) {
  if (count >= kLanes) {
    __builtin_memcpy(p, &x, 64);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
  }
}

// To the nearest bfloat16, to the even one of two; a NaN stays one.
INLINE H ToBf16(F x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U is_nan = (U)(x != x);
  return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), H);
}

INLINE void Store(uint16_t* p, F x, int64_t count) {
  const H half = ToBf16(x);
  if (count >= kLanes) {
    __builtin_memcpy(p, &half, 32);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = half[i];
  }
}

// What was stored as a T.
INLINE F Rounded(float*, F x) { return x; }
INLINE F Rounded(uint16_t*, F x) { return (F)(__builtin_convertvector(ToBf16(x), U) << 16); }

INLINE float Sum(F x) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

INLINE F Min(F x, float bound) { return x < bound ? x : Splat(bound); }
INLINE F Max(F x, float bound) { return x > bound ? x : Splat(bound); }

// To two units in the last place; NaN gives NaN, what would overflow the largest power of two that is none.
INLINE F Exp(F x) {
  const F held = Max(Min(x, 88.3762626647949f), -87.3365478515625f);
  const F scaled = held * 1.44269504088896341f;
  const F rounding = Splat(12582912.0f);  // 1.5 * 2^23: adding it leaves a whole number in the low bits.
  const F shifted = scaled + rounding;
  const F n = shifted - rounding;
  const F r = (held - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I power = ((I)shifted - (I)rounding + 127) << 23;
  return x != x ? x : p * (F)power;
}

INLINE F Sigmoid(F x) { return 1.0f / (1.0f + Exp(-x)); }

// `1 + erf(x / sqrt(2))` to 2e-7 (Abramowitz and Stegun, 7.1.26).
INLINE F OnePlusErf(F x) {
  const F z = x * 0.70710678118654752f;
  const F size = z < 0.0f ? -z : z;
  const F t = 1.0f / (1.0f + 0.3275911f * size);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const F rest = p * t * Exp(-z * z);
  return z < 0.0f ? rest : 2.0f - rest;
}

INLINE F Activate(Activation activation, F x) {
  switch (activation) {
    case Activation::kSilu:
      return x * Sigmoid(x);
    case Activation::kGeluTanh:
      return x * Sigmoid(1.5957691216057308f * (x + 0.044715f * (x * x * x)));
    case Activation::kGeluErf:
      return 0.5f * x * OnePlusErf(x);
    case Activation::kRelu:
      return x < 0.0f ? Splat(0) : x;
  }
  return x;
}

// The statement with `name` as the type that numbers are stored in.
#define WITH_TYPE(type, name, ...)             \
  if ((type) == Float::kF32) {                 \
    using name = float;                        \
    __VA_ARGS__                                \
  } else {                                     \
    using name = uint16_t;                     \
    __VA_ARGS__                                \
  }

// ---------------------------------------------------------------------------------------- norms
template <typename X, typename W, typename Y>
void NormRow(const NormArgs& a, int64_t row) {
  const int64_t D = a.width;
  const X* x = static_cast<const X*>(a.x.data) + row * D;
  const X* y = a.y.data == nullptr ? nullptr : static_cast<const X*>(a.y.data) + row * D;
  X* total = a.y.data == nullptr ? nullptr : static_cast<X*>(a.total.data) + row * D;
  Y* norm = static_cast<Y*>(a.norm.data) + row * D;
  const W* weight = static_cast<const W*>(a.weight.data);
  const W* bias = static_cast<const W*>(a.bias.data);

  auto read = [&](int64_t i) -> F {  // The number whose norm is taken; a sum is written on the way and read after.
    return total == nullptr ? Load(x + i, D - i) : Load(total + i, D - i);
  };
  F squares{}, sums{};
  for (int64_t i = 0; i < D; i += kLanes) {
    F v = Load(x + i, D - i);
    if (y != nullptr) {
      v = Rounded(total, v + Load(y + i, D - i));
      Store(total + i, v, D - i);
    }
    sums += v;
    squares += v * v;
  }
  float mean = 0, square = Sum(squares);
  if (a.has_mean) {
    mean = Sum(sums) / static_cast<float>(D);
    F around{};
    for (int64_t i = 0; i < D; i += kLanes) {
      F v = read(i) - mean;
      if (D - i < kLanes) {
        for (int64_t j = D - i; j < kLanes; ++j) v[j] = 0;
      }
      around += v * v;
    }
    square = Sum(around);
  }
  const float inverse = 1.0f / (__builtin_sqrtf(square / static_cast<float>(D) + a.eps) + a.outer_eps);
  for (int64_t i = 0; i < D; i += kLanes) {
    F v = (read(i) - mean) * inverse;
    if (weight != nullptr) v *= Load(weight + i, D - i);
    if (bias != nullptr) v += Load(bias + i, D - i);
    Store(norm + i, v, D - i);
  }
}

void Norm(const NormArgs& a, int64_t begin, int64_t end) {
  const Float type = a.weight.data != nullptr ? a.weight.type : a.bias.type;
  WITH_TYPE(a.x.type, X, WITH_TYPE(type, W, WITH_TYPE(a.norm.type, Y, {
    for (int64_t row = begin; row < end; ++row) NormRow<X, W, Y>(a, row);
  })))
}

// ---------------------------------------------------------------------------------------- gates
void Gated(const GatedArgs& a, int64_t begin, int64_t end) {
  WITH_TYPE(a.gate.type, X, WITH_TYPE(a.up.type, W, WITH_TYPE(a.out.type, Y, {
    for (int64_t i = begin; i < end; i += kLanes) {
      const F gate = Load(static_cast<const X*>(a.gate.data) + i, end - i);
      const F up = Load(static_cast<const W*>(a.up.data) + i, end - i);
      Store(static_cast<Y*>(a.out.data) + i, Activate(a.activation, gate) * up, end - i);
    }
  })))
}

// ---------------------------------------------------------------------------------------- rotations
template <typename X, typename W, typename Y>
void RotateHalves(const RopeArgs& a, const X* x, const W* cos, const W* sin, Y* out) {
  const int64_t pairs = a.width / 2, second = a.table_width == a.width ? pairs : 0;
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t count = pairs - i;
    const F p = Load(x + i, count), q = Load(x + pairs + i, count);
    const F c = Load(cos + i, count), s = Load(sin + i, count);
    const F c2 = second ? Load(cos + second + i, count) : c, s2 = second ? Load(sin + second + i, count) : s;
    Store(out + i, p * c - q * s, count);
    Store(out + pairs + i, q * c2 + p * s2, count);
  }
}

INLINE float One(const float* p) { return *p; }
INLINE float One(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
INLINE void PutOne(float* p, float x) { *p = x; }
INLINE void PutOne(uint16_t* p, float x) { Store(p, Splat(x), 1); }

template <typename X, typename W, typename Y>
void RotateNeighbours(const RopeArgs& a, const X* x, const W* cos, const W* sin, Y* out) {
  const bool is_full = a.table_width == a.width;
  for (int64_t i = 0; i < a.width; i += 2) {
    const int64_t first = is_full ? i : i / 2, second = is_full ? i + 1 : i / 2;
    const float p = One(x + i), q = One(x + i + 1);
    PutOne(out + i, p * One(cos + first) - q * One(sin + first));
    PutOne(out + i + 1, q * One(cos + second) + p * One(sin + second));
  }
}

void Rope(const RopeArgs& a, int64_t begin, int64_t end) {
  WITH_TYPE(a.x.type, X, WITH_TYPE(a.cos.type, W, WITH_TYPE(a.out.type, Y, {
    for (int64_t row = begin; row < end; ++row) {
      const X* x = static_cast<const X*>(a.x.data) + row * a.width;
      const W* cos = static_cast<const W*>(a.cos.data) + a.table[row] * a.table_width;
      const W* sin = static_cast<const W*>(a.sin.data) + a.table[row] * a.table_width;
      Y* out = static_cast<Y*>(a.out.data) + row * a.width;
      if (a.is_interleaved) {
        RotateNeighbours(a, x, cos, sin, out);
      } else {
        RotateHalves(a, x, cos, sin, out);
      }
    }
  })))
}

constexpr PointwiseKernels kKernels = {Norm, Gated, Rope};
