#include "decode_attention.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>

#include "exponential.h"
#include "rows.h"
#include "vector_widths.h"
#include "vectors.h"

namespace realign {
namespace {

constexpr int64_t kProductsPerThread = 1 << 17;  // below this a second thread costs more than it saves
constexpr int kBlock = 64;                       // tokens whose scores are held; cut from a row's first token on
constexpr int kGroup = 4;                        // tokens whose products are summed together
constexpr int kMaxHeads = 2;                     // query heads that share a load of keys or values

int64_t pad(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// A thread's memory: what runs along the blocks for each query head of one key head, and the block as floats. Numbers
// of a head are padded with zeros to whole vectors.
struct Workspace {
  int64_t padded;
  float* query;  // scaled
  float* acc;    // sum of p v
  float* block;  // [kBlock, padded]
  float* max;
  float* total;  // sum of p

  Workspace(int64_t num_heads, int64_t dim) : padded(pad(dim)) {
    memory_.reset(new float[(2 * num_heads + kBlock) * padded + 2 * num_heads]);
    query = memory_.get();
    acc = query + num_heads * padded;
    block = acc + num_heads * padded;
    max = block + kBlock * padded;
    total = max + num_heads;
    std::fill(query, max, 0.0f);
  }

  void clear(int64_t num_heads) {
    std::fill(acc, acc + num_heads * padded, 0.0f);
    std::fill(max, max + num_heads, -FLT_MAX);  // no infinity: a score of -inf may come first
    std::fill(total, total + num_heads, 0.0f);
  }

 private:
  std::unique_ptr<float[]> memory_;
};

// Tokens of one key head as they are stored; `stride` numbers from one to the next.
struct Stored {
  const char* first;
  Dtype dtype;
  int64_t stride, dim;
};

// The tokens of a block as floats, whole vectors each.
struct Block {
  const float* first;
  int64_t stride, count, dim;
};

// Reads tokens where they lie if they are whole vectors of floats, else makes them so.
REALIGN_INLINE Block read_block(const Stored& stored, int64_t start, int64_t count, const Workspace& work) {
  const char* first = stored.first + start * stored.stride * size_of(stored.dtype);
  if (stored.dtype == Dtype::float32 && work.padded == stored.dim) {
    return {reinterpret_cast<const float*>(first), stored.stride, count, work.padded};
  }
  for (int64_t t = 0; t < count; ++t) {
    float* out = work.block + t * work.padded;
    const auto* words = reinterpret_cast<const float*>(first) + t * stored.stride;
    const auto* halves = reinterpret_cast<const uint16_t*>(first) + t * stored.stride;
    if (stored.dtype == Dtype::float32) {
      for (int64_t d = 0; d < stored.dim; ++d) out[d] = words[d];
    } else if (stored.dtype == Dtype::bfloat16) {
      for (int64_t d = 0; d < stored.dim; ++d) out[d] = bfloat16_to_float(halves[d]);
    } else {
      for (int64_t d = 0; d < stored.dim; ++d) out[d] = float16_to_float(halves[d]);
    }
  }
  return {work.block, work.padded, count, work.padded};
}

using Eights = float __attribute__((vector_size(32), aligned(4), may_alias));
using Fours = float __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __clang__
#define REALIGN_CHOOSE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
using EightIndexes = int32_t __attribute__((vector_size(32)));
#define REALIGN_CHOOSE(a, b, ...) __builtin_shuffle(a, b, EightIndexes{__VA_ARGS__})
#endif

REALIGN_INLINE void add_halves(const Floats& vector, Eights& out) {
  const auto* halves = reinterpret_cast<const Eights*>(&vector);
  out = halves[0] + halves[1];
}

// out[t] = the sum of the sixteen lanes of vector t: halves, then as a tree. A choice is one instruction of AVX2.
REALIGN_INLINE void sum_lanes(const Floats* vectors, float* out) {
  Eights a, b, c, d;
  add_halves(vectors[0], a);
  add_halves(vectors[1], b);
  add_halves(vectors[2], c);
  add_halves(vectors[3], d);
  const Eights ab = REALIGN_CHOOSE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + REALIGN_CHOOSE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  const Eights cd = REALIGN_CHOOSE(c, d, 0, 1, 8, 9, 4, 5, 12, 13) + REALIGN_CHOOSE(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
  const Eights all =
      REALIGN_CHOOSE(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) + REALIGN_CHOOSE(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  const auto* halves = reinterpret_cast<const Fours*>(&all);
  *reinterpret_cast<Fours*>(out) = halves[0] + halves[1];
}

// scores[h][t] = query[h] . key[t]; -inf behind the last token.
template <int kHeads>
REALIGN_INLINE void score(const Block& keys, const float* query, float* scores) {
  for (int64_t first = 0; first < keys.count; first += kGroup) {
    const float* key[kGroup];
    for (int t = 0; t < kGroup; ++t) key[t] = keys.first + std::min(first + t, keys.count - 1) * keys.stride;
    Floats products[kHeads][kGroup] = {};
    for (int64_t d = 0; d < keys.dim; d += kLanes) {
      for (int t = 0; t < kGroup; ++t) {
        const auto& numbers = *reinterpret_cast<const Floats*>(key[t] + d);
        for (int h = 0; h < kHeads; ++h) {
          products[h][t] += numbers * *reinterpret_cast<const Floats*>(query + h * keys.dim + d);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) sum_lanes(products[h], scores + h * kBlock + first);
  }
  for (int h = 0; h < kHeads; ++h) std::fill(scores + h * kBlock + keys.count, scores + (h + 1) * kBlock, -HUGE_VALF);
}

// Scores of a block to weights exp(score - max). Returns what all weights before it are to be multiplied by.
REALIGN_INLINE float weigh(float* scores, float& max, float& total) {
  auto* vectors = reinterpret_cast<Floats*>(scores);
  Floats most = vectors[0];
  for (int i = 1; i < kBlock / kLanes; ++i) most = vectors[i] > most ? vectors[i] : most;
  float lanes[kLanes];
  *reinterpret_cast<Floats*>(lanes) = most;
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
  }
  const float highest = lanes[0] > max ? lanes[0] : max;
#pragma omp simd
  for (int t = 0; t < kBlock; ++t) scores[t] = exp_of_minus(highest - scores[t]);
  Floats sums = vectors[0];
  for (int i = 1; i < kBlock / kLanes; ++i) sums += vectors[i];
  *reinterpret_cast<Floats*>(lanes) = sums;
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  const float factor = exp_of_minus(highest - max);
  max = highest;
  total = total * factor + lanes[0];
  return factor;
}

// acc[h] = acc[h] * factor[h] + the sum of weights[h][t] value[t], for kVectors vectors of each head. Tokens of even
// and of odd place are summed apart: no addition waits for the last.
template <int kHeads, int kVectors>
REALIGN_INLINE void add_values(const Block& values, const float* weights, const float* factors, float* acc) {
  Floats even[kHeads][kVectors] = {}, odd[kHeads][kVectors] = {};
  int64_t t = 0;
  for (; t + 2 <= values.count; t += 2) {
    const auto* first = reinterpret_cast<const Floats*>(values.first + t * values.stride);
    const auto* second = reinterpret_cast<const Floats*>(values.first + (t + 1) * values.stride);
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) even[h][v] += first[v] * weights[h * kBlock + t];
      for (int v = 0; v < kVectors; ++v) odd[h][v] += second[v] * weights[h * kBlock + t + 1];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      if (t < values.count) {
        even[h][v] += reinterpret_cast<const Floats*>(values.first + t * values.stride)[v] * weights[h * kBlock + t];
      }
      auto& own = *reinterpret_cast<Floats*>(acc + h * values.dim + v * kLanes);
      own = own * factors[h] + (even[h][v] + odd[h][v]);
    }
  }
}

template <int kHeads>
REALIGN_INLINE void add_all_values(Block values, const float* weights, const float* factors, float* acc) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= values.dim; d += 2 * kLanes, values.first += 2 * kLanes) {
    add_values<kHeads, 2>(values, weights, factors, acc + d);
  }
  if (d < values.dim) add_values<kHeads, 1>(values, weights, factors, acc + d);
}

REALIGN_VECTOR_WIDTHS
void attend_blocks(const Stored& keys, const Stored& values, int64_t count, int64_t num_heads, const Workspace& work) {
  std::unique_ptr<float[]> scores(new float[num_heads * kBlock]), factors(new float[num_heads]);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t num_tokens = std::min<int64_t>(kBlock, count - start);
    const Block key = read_block(keys, start, num_tokens, work);
    int64_t head = 0;
    for (; head + kMaxHeads <= num_heads; head += kMaxHeads) {
      score<kMaxHeads>(key, work.query + head * work.padded, &scores[head * kBlock]);
    }
    if (head < num_heads) score<1>(key, work.query + head * work.padded, &scores[head * kBlock]);
    for (head = 0; head < num_heads; ++head) {
      factors[head] = weigh(&scores[head * kBlock], work.max[head], work.total[head]);
    }
    const Block value = read_block(values, start, num_tokens, work);
    for (head = 0; head + kMaxHeads <= num_heads; head += kMaxHeads) {
      add_all_values<kMaxHeads>(value, &scores[head * kBlock], &factors[head], work.acc + head * work.padded);
    }
    if (head < num_heads) {
      add_all_values<1>(value, &scores[head * kBlock], &factors[head], work.acc + head * work.padded);
    }
  }
}

int64_t length_of(const DecodeAttentionParams& params, int64_t row) {
  return params.has_long_lengths ? static_cast<const int64_t*>(params.length)[row]
                                 : static_cast<const int32_t*>(params.length)[row];
}

Stored stored_of(const void* array, const std::array<int64_t, 4>& stride, int64_t row, int64_t head,
                 const DecodeAttentionParams& params) {
  const int64_t place = row * stride[0] + head * stride[1], size = size_of(params.dtype);
  return {static_cast<const char*>(array) + place * size, params.dtype, stride[2], params.key_shape[3]};
}

void read_query(const DecodeAttentionParams& params, int64_t row, int64_t head, float* out) {
  const int64_t dim = params.key_shape[3], place = row * params.query_stride[0] + head * params.query_stride[1];
  widen(static_cast<const char*>(params.query) + place * size_of(params.dtype), params.dtype, out, dim);
  multiply(out, 1.0f / std::sqrt(float(dim)), out, dim);
}

// acc / total and max + log(total); 0 and -inf where there was no token.
void write_head(const DecodeAttentionParams& params, int64_t place, float* acc, float max, float total) {
  const int64_t dim = params.key_shape[3];
  if (total != 0) multiply(acc, 1.0f / total, acc, dim);
  narrow(acc, params.dtype, static_cast<char*>(params.out) + place * dim * size_of(params.dtype), dim);
  params.lse[place] = float(max + std::log(double(total)));
}

// The query heads of one key head of a row.
void attend(const DecodeAttentionParams& params, int64_t row, int64_t key_head, Workspace& work) {
  const int64_t num_heads = params.query_shape[1] / params.key_shape[1], first = key_head * num_heads;
  work.clear(num_heads);
  for (int64_t head = 0; head < num_heads; ++head) {
    read_query(params, row, first + head, work.query + head * work.padded);
  }
  const Stored keys = stored_of(params.key, params.key_stride, row, key_head, params);
  const Stored values = stored_of(params.value, params.value_stride, row, key_head, params);
  attend_blocks(keys, values, length_of(params, row), num_heads, work);
  for (int64_t head = 0; head < num_heads; ++head) {
    const int64_t place = row * params.query_shape[1] + first + head;
    write_head(params, place, work.acc + head * work.padded, work.max[head], work.total[head]);
  }
}

int threads_of(const DecodeAttentionParams& params) {
  int64_t num_tokens = 0;
  for (int64_t row = 0; row < params.query_shape[0]; ++row) num_tokens += length_of(params, row);
  const int64_t num_products = 2 * num_tokens * params.query_shape[1] * params.query_shape[2];
  return int(std::min<int64_t>(params.num_threads, 1 + num_products / kProductsPerThread));
}

}  // namespace

void decode_attention(const DecodeAttentionParams& params) {
  const int num_threads = threads_of(params);
  const int64_t num_key_heads = params.key_shape[1];
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Workspace work(params.query_shape[1] / num_key_heads, params.query_shape[2]);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < params.query_shape[0] * num_key_heads; ++task) {
      attend(params, task / num_key_heads, task % num_key_heads, work);
    }
  }
}

}  // namespace realign
