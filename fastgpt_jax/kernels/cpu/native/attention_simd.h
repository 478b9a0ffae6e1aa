// Sixteen floats at a time, in as many registers as the chosen instructions need.
//
// Included by one file for each instruction set, after its target pragma; holds no inline function of the standard
// library, and all of it has internal linkage, so that no other file can come to run instructions that were meant here.
// The file says how wide its registers are by FASTGPT_WIDTH, and whether they multiply bfloat16 by FASTGPT_BF16: before
// GCC 13 its pragma leaves __AVX512F__ and the like undefined.
#include <cstdint>

#if FASTGPT_WIDTH > 4
#include <immintrin.h>
#endif

namespace fastgpt {
namespace {

constexpr int kWidth = FASTGPT_WIDTH;
constexpr int kParts = 16 / kWidth;

typedef float W __attribute__((vector_size(4 * kWidth)));
typedef int32_t I __attribute__((vector_size(4 * kWidth)));
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

typedef double Pair __attribute__((aligned(4), may_alias));  // Two floats that are moved as one.

#define FASTGPT_INLINE inline __attribute__((always_inline))
#define FASTGPT_PARTS _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)

struct V {
  W w[kParts];
};

FASTGPT_INLINE W Splat(float x) { return x - W{}; }

FASTGPT_INLINE V Set(float x) {
  V v;
  FASTGPT_PARTS v.w[p] = Splat(x);
  return v;
}

FASTGPT_INLINE V Load(const float* from) {
  V v;
  FASTGPT_PARTS v.w[p] = *reinterpret_cast<const Unaligned*>(from + p * kWidth);
  return v;
}

FASTGPT_INLINE void Store(float* to, V v) { FASTGPT_PARTS *reinterpret_cast<Unaligned*>(to + p * kWidth) = v.w[p]; }

FASTGPT_INLINE V operator+(V a, V b) {
  FASTGPT_PARTS a.w[p] += b.w[p];
  return a;
}

FASTGPT_INLINE V operator-(V a, V b) {
  FASTGPT_PARTS a.w[p] -= b.w[p];
  return a;
}

FASTGPT_INLINE V operator*(V a, V b) {
  FASTGPT_PARTS a.w[p] *= b.w[p];
  return a;
}

FASTGPT_INLINE V operator/(V a, V b) {
  FASTGPT_PARTS a.w[p] /= b.w[p];
  return a;
}

// a * b + c
FASTGPT_INLINE V MulAdd(V a, V b, V c) {
#if FASTGPT_WIDTH == 16
  c.w[0] = _mm512_fmadd_ps(a.w[0], b.w[0], c.w[0]);
#elif FASTGPT_WIDTH == 8
  FASTGPT_PARTS c.w[p] = _mm256_fmadd_ps(a.w[p], b.w[p], c.w[p]);
#else
  FASTGPT_PARTS c.w[p] += a.w[p] * b.w[p];
#endif
  return c;
}

FASTGPT_INLINE V Max(V a, V b) {
#if FASTGPT_WIDTH == 16
  a.w[0] = _mm512_max_ps(a.w[0], b.w[0]);
#elif FASTGPT_WIDTH == 8
  FASTGPT_PARTS a.w[p] = _mm256_max_ps(a.w[p], b.w[p]);
#else
  FASTGPT_PARTS a.w[p] = a.w[p] > b.w[p] ? a.w[p] : b.w[p];
#endif
  return a;
}

FASTGPT_INLINE V Abs(V a) {
  FASTGPT_PARTS a.w[p] = (W)((I)a.w[p] & 0x7fffffff);
  return a;
}

// Lanes of `a` where the bit is set, of `b` where it is not.
FASTGPT_INLINE V Select(uint32_t bits, V a, V b) {
#if FASTGPT_WIDTH == 16
  a.w[0] = _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.w[0], a.w[0]);
#else
  I bit;
  for (int i = 0; i < kWidth; ++i) bit[i] = 1 << i;
  FASTGPT_PARTS a.w[p] = ((bit << (p * kWidth)) & static_cast<int32_t>(bits)) != 0 ? a.w[p] : b.w[p];
#endif
  return a;
}

// Lane i becomes lane i ^ kBy.
template <int kBy>
FASTGPT_INLINE V Swap(V a) {
#if FASTGPT_WIDTH == 16
  if constexpr (kBy == 1) a.w[0] = _mm512_permute_ps(a.w[0], 0xb1);
  if constexpr (kBy == 2) a.w[0] = _mm512_permute_ps(a.w[0], 0x4e);
  if constexpr (kBy == 4) a.w[0] = _mm512_shuffle_f32x4(a.w[0], a.w[0], 0xb1);
  if constexpr (kBy == 8) a.w[0] = _mm512_shuffle_f32x4(a.w[0], a.w[0], 0x4e);
  return a;
#else
  V b;
  if constexpr (kBy >= kWidth) {
    FASTGPT_PARTS b.w[p] = a.w[p ^ (kBy / kWidth)];
  } else {
    I lanes;
    for (int i = 0; i < kWidth; ++i) lanes[i] = i ^ kBy;
    FASTGPT_PARTS b.w[p] = __builtin_shuffle(a.w[p], lanes);
  }
  return b;
#endif
}

// The lanes whose number has bit kBit.
template <int kBit>
constexpr uint32_t kLanesWith = kBit == 1 ? 0xaaaa : kBit == 2 ? 0xcccc : kBit == 4 ? 0xf0f0 : 0xff00;

// kCount floats, again and again.
template <int kCount>
FASTGPT_INLINE V Repeat(const float* from) {
#if FASTGPT_WIDTH == 16
  V v;
  if constexpr (kCount == 1) v.w[0] = _mm512_set1_ps(*from);
  if constexpr (kCount == 2) v.w[0] = (W)_mm512_set1_pd(*reinterpret_cast<const Pair*>(from));
  if constexpr (kCount == 4) v.w[0] = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
  if constexpr (kCount == 8) v.w[0] = _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
  if constexpr (kCount == 16) v.w[0] = _mm512_loadu_ps(from);
  return v;
#else
  if constexpr (kCount == 1) return Set(*from);
  if constexpr (kCount == 16) return Load(from);
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = from[i % kCount];
  return Load(lanes);
#endif
}

FASTGPT_INLINE float Greatest(V a) {
#if FASTGPT_WIDTH == 16
  return _mm512_reduce_max_ps(a.w[0]);
#else
  a = Max(a, Swap<8>(a));
  a = Max(a, Swap<4>(a));
  a = Max(a, Swap<2>(a));
  return Max(a, Swap<1>(a)).w[0][0];
#endif
}

FASTGPT_INLINE float Sum(V a) {
#if FASTGPT_WIDTH == 16
  return _mm512_reduce_add_ps(a.w[0]);
#else
  a = a + Swap<8>(a);
  a = a + Swap<4>(a);
  a = a + Swap<2>(a);
  return (a + Swap<1>(a)).w[0][0];
#endif
}

// 2^x within 3e-8 of it, relatively; 0 for what is too small, -inf among it.
FASTGPT_INLINE V Exp2(V x) {
  V whole;
#if FASTGPT_WIDTH == 16
  x = Max(x, Set(-200.0f));
  whole.w[0] = _mm512_roundscale_ps(x.w[0], 0);
#else
  const V least = Set(-126.0f);
  V kept = Max(x, least);
  const V magic = Set(12582912.0f);  // Whole numbers are all that is left of what is added to it.
  V shifted = kept + magic;
  whole = shifted - magic;
#endif
#if FASTGPT_WIDTH == 16
  const V f = x - whole;
#else
  const V f = kept - whole;
#endif
  V y = Set(0.00015353362f);
  y = MulAdd(y, f, Set(0.0013398875f));
  y = MulAdd(y, f, Set(0.00961843692f));
  y = MulAdd(y, f, Set(0.0555033237f));
  y = MulAdd(y, f, Set(0.240226477f));
  y = MulAdd(y, f, Set(0.693147182f));
  y = MulAdd(y, f, Set(1.0f));
#if FASTGPT_WIDTH == 16
  y.w[0] = _mm512_scalef_ps(y.w[0], whole.w[0]);
#else
  FASTGPT_PARTS {
    const W scaled = (W)((I)y.w[p] + ((I)shifted.w[p] << 23));
    y.w[p] = x.w[p] < least.w[p] ? W{} : scaled;
  }
#endif
  return y;
}

FASTGPT_INLINE V Tanh(V x) {
  const V square = x * x;
  V y = Set(-0.00571704283f);
  y = MulAdd(y, square, Set(0.0206505861f));
  y = MulAdd(y, square, Set(-0.0537434965f));
  y = MulAdd(y, square, Set(0.133314908f));
  y = MulAdd(y, square, Set(-0.333332837f));
  const V small = MulAdd(x * square, y, x);
  const V size = Abs(x);
  const V shrunk = Exp2(size * Set(-2.88539008f));  // e^(-2 |x|)
  const V large = (Set(1.0f) - shrunk) / (Set(1.0f) + shrunk);
#if FASTGPT_WIDTH == 16
  const __mmask16 is_small = _mm512_cmp_ps_mask(size.w[0], _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  V found = Select(is_small, small, large);
  const __mmask16 is_negative = _mm512_movepi32_mask((__m512i)x.w[0]);
  found.w[0] = _mm512_mask_sub_ps(found.w[0], is_negative & ~is_small, _mm512_setzero_ps(), found.w[0]);
  return found;
#else
  V found;
  FASTGPT_PARTS {
    const W with_sign = x.w[p] < W{} ? -large.w[p] : large.w[p];
    found.w[p] = size.w[p] < Splat(0.625f) ? small.w[p] : with_sign;
  }
  return found;
#endif
}

}  // namespace
}  // namespace fastgpt
