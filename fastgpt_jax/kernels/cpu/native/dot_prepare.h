// Activations into the order in which the kernels read them; included like `dot_tiles.h`, before it, with the same `V`.
//
// Rounding is that of the portable program, so that integer sums are the same to the bit: scale = max|x| / 127 in
// float32 (1 for a token of zeros) and number = x / scale, rounded to nearest, half to even. XLA compiles both quotients
// as products with a reciprocal, and so does this: ties, which bfloat16 has many of, would fall otherwise.

template <class Body>
INLINE void ForEachToken(const DotCall& call, int64_t tile_begin, int64_t tile_end, int token_step_bytes, Body&& body) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t begin = call.TileBegin(tile), size = call.TileBegin(tile + 1) - begin;
    for (int64_t t = 0; t < size; ++t) {
      body(begin + t, call.tokens + begin * call.token_bytes + t * token_step_bytes, size * token_step_bytes);
    }
  }
}

// Numbers [at, at + kSize) of a token as floats, zeros past its end.
template <int kSize>
INLINE void LoadNumbers(const DotCall& call, int64_t token, int64_t at, float (&numbers)[kSize]) {
  const int64_t left = call.depth - at;
  const int64_t first = token * call.depth + at;
  if (call.is_x_bf16) {
    uint16_t raw[kSize];
    const auto* x = static_cast<const uint16_t*>(call.x) + first;
    if (left < kSize) __builtin_memset(raw, 0, sizeof raw);
    __builtin_memcpy(raw, x, left < kSize ? left * sizeof *x : sizeof raw);
    uint32_t bits[kSize];
    for (int i = 0; i < kSize; ++i) bits[i] = static_cast<uint32_t>(raw[i]) << 16;
    __builtin_memcpy(numbers, bits, sizeof numbers);
  } else {
    const auto* x = static_cast<const float*>(call.x) + first;
    if (left < kSize) __builtin_memset(numbers, 0, sizeof numbers);
    __builtin_memcpy(numbers, x, left < kSize ? left * sizeof *x : sizeof numbers);
  }
}

INLINE float ScaleOfToken(const DotCall& call, int64_t token) {
  constexpr int kChunk = 64;
  int32_t largest[kChunk] = {};  // Floats without a sign are in the order of their bits.
  for (int64_t k = 0; k < call.depth; k += kChunk) {
    float numbers[kChunk];
    int32_t bits[kChunk];
    LoadNumbers(call, token, k, numbers);
    __builtin_memcpy(bits, numbers, sizeof bits);
    for (int i = 0; i < kChunk; ++i) {
      const int32_t size = bits[i] & 0x7fffffff;
      largest[i] = size > largest[i] ? size : largest[i];
    }
  }
  int32_t most = 0;
  for (int i = 0; i < kChunk; ++i) most = largest[i] > most ? largest[i] : most;
  float value;
  __builtin_memcpy(&value, &most, 4);
  const float scale = value * (1.0f / 127.0f);
  return scale > 0.0f ? scale : 1.0f;
}

template <int kSize>
INLINE void RoundNumbers(const float (&numbers)[kSize], float reciprocal, int8_t (&rounded)[kSize]) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's last place is 1, so that adding rounds.
  int32_t whole[kSize];
  for (int i = 0; i < kSize; ++i) {
    const float number = numbers[i] * reciprocal + kToInteger;
    __builtin_memcpy(&whole[i], &number, 4);
  }
  for (int i = 0; i < kSize; ++i) rounded[i] = static_cast<int8_t>(whole[i]);  // The low byte of the mantissa.
}

void PrepareInt8(const DotCall& call, int64_t tile_begin, int64_t tile_end) {
  constexpr int kSize = V::kBytes;
  ForEachToken(call, tile_begin, tile_end, kSize, [&](int64_t token, uint8_t* to, int64_t stride) {
    const float scale = ScaleOfToken(call, token), reciprocal = 1.0f / scale;
    int32_t sums[kSize] = {};
    for (int64_t k = 0; k < call.depth; k += kSize, to += stride) {
      float numbers[kSize];
      int8_t rounded[kSize];
      LoadNumbers(call, token, k, numbers);
      RoundNumbers(numbers, reciprocal, rounded);
      for (int i = 0; i < kSize; ++i) sums[i] += rounded[i];
      __builtin_memcpy(to, rounded, kSize);
    }
    int32_t sum = 0;
    for (int i = 0; i < kSize; ++i) sum += sums[i];
    call.token_scale[token] = scale;
    call.token_offset[token] = V::kOffset8 * sum;
  });
}

void PrepareInt4(const DotCall& call, int64_t tile_begin, int64_t tile_end) {
  constexpr int kSize = V::kBytes;
  ForEachToken(call, tile_begin, tile_end, 3 * kSize, [&](int64_t token, uint8_t* to, int64_t stride) {
    const float scale = ScaleOfToken(call, token), reciprocal = 1.0f / scale;
    for (int64_t k = 0; k < call.depth; k += 2 * kSize, to += stride) {
      float numbers[2 * kSize];
      int8_t rounded[2 * kSize], parted[2 * kSize];
      LoadNumbers(call, token, k, numbers);
      RoundNumbers(numbers, reciprocal, rounded);
      int32_t start[kSize / 4];
      for (int i = 0; i < kSize; ++i) {
        parted[i] = rounded[2 * i];
        parted[kSize + i] = rounded[2 * i + 1];
      }
      for (int i = 0; i < kSize / 4; ++i) {
        int32_t sum = 0;
        for (int j = 0; j < 8; ++j) sum += rounded[8 * i + j];
        start[i] = -V::kOffset4 * sum;
      }
      __builtin_memcpy(to, parted, sizeof parted);
      __builtin_memcpy(to + sizeof parted, start, sizeof start);
    }
    call.token_scale[token] = scale;
  });
}

void PrepareF32(const DotCall& call, int64_t tile_begin, int64_t tile_end) {
  ForEachToken(call, tile_begin, tile_end, V::kBytes, [&](int64_t token, uint8_t* to, int64_t stride) {
    for (int64_t k = 0; k < call.depth; k += V::kLanes, to += stride) {
      float numbers[V::kLanes];
      LoadNumbers(call, token, k, numbers);
      __builtin_memcpy(to, numbers, sizeof numbers);
    }
  });
}

void PrepareEvenOddF32(const DotCall& call, int64_t tile_begin, int64_t tile_end) {
  ForEachToken(call, tile_begin, tile_end, 2 * V::kBytes, [&](int64_t token, uint8_t* to, int64_t stride) {
    for (int64_t k = 0; k < call.depth; k += 2 * V::kLanes, to += stride) {
      float numbers[2 * V::kLanes], parted[2 * V::kLanes];
      LoadNumbers(call, token, k, numbers);
      for (int i = 0; i < V::kLanes; ++i) {
        parted[i] = numbers[2 * i];
        parted[V::kLanes + i] = numbers[2 * i + 1];
      }
      __builtin_memcpy(to, parted, sizeof parted);
    }
  });
}

// bf16 as they are, 32 a step.
void PrepareBf16(const DotCall& call, int64_t tile_begin, int64_t tile_end) {
  constexpr int kSize = V::kBytes / 2;
  ForEachToken(call, tile_begin, tile_end, V::kBytes, [&](int64_t token, uint8_t* to, int64_t stride) {
    for (int64_t k = 0; k < call.depth; k += kSize, to += stride) {
      const int64_t left = call.depth - k;
      const auto* x = static_cast<const uint16_t*>(call.x) + token * call.depth + k;
      if (left < kSize) __builtin_memset(to, 0, V::kBytes);
      __builtin_memcpy(to, x, left < kSize ? left * sizeof *x : V::kBytes);
    }
  });
}
