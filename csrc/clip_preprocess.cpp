#include "clip_preprocess.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"
#include "vector_widths.h"

namespace realign {
namespace {

constexpr int kPrecisionBits = 22;  // of a tap's fraction
constexpr int kLines = 64;          // rows filtered together: neighbours in memory, so that they fill vectors
constexpr int kBlock = 16;          // side of the blocks of bytes that are transposed
constexpr int kRun = 64;            // numbers of a row filtered together
constexpr int64_t kBandRows = 16;   // rows of a result that are worth a thread

typedef uint8_t Bytes __attribute__((vector_size(kBlock)));

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// One axis, with its arrays found.
struct Axis {
  explicit Axis(const AxisRecord& record)
      : offset(record.offset),
        count(record.count),
        num_taps(record.num_taps),
        starts(reinterpret_cast<const int32_t*>(record.address)),
        lengths(starts + count),
        taps(starts + 2 * count) {}

  // First pixel that is read for the results [first, last], and one past the last.
  int64_t begin(int64_t first) const { return starts[first]; }
  int64_t end(int64_t last) const { return starts[last] + lengths[last]; }

  int64_t offset, count, num_taps;
  const int32_t *starts, *lengths, *taps;
};

// Where the pixels of a picture's lines are, counted in bytes from the first pixel that is read.
struct LineLayout {
  int64_t pixel_step;
  int64_t channel_step;
  int64_t num_bytes;
};

struct Scratch {
  std::vector<float> wide;            // a row as float
  std::vector<uint8_t> cut;           // kLines rows of floats, cut to 8 bits
  std::vector<uint8_t> lines;         // kLines rows of pixels, transposed
  std::vector<uint8_t> columns;       // the same, filtered
  std::vector<uint8_t> intermediate;  // rows of filtered columns, channel after channel
  std::vector<uint8_t> row;           // a row of the result
};

inline __attribute__((always_inline)) Bytes interleave_low(const Bytes& a, const Bytes& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

inline __attribute__((always_inline)) Bytes interleave_high(const Bytes& a, const Bytes& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_shuffle(a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// out[j * out_stride + i] = lines[i][j] for one block. Interleaving line i with line i + 8 four times transposes.
inline __attribute__((always_inline)) void transpose_block(const uint8_t* const* lines, int64_t from, uint8_t* out,
                                                           int64_t out_stride) {
  Bytes block[kBlock], next[kBlock];
  for (int i = 0; i < kBlock; ++i) std::memcpy(&block[i], lines[i] + from, kBlock);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kBlock / 2; ++i) {
      next[2 * i] = interleave_low(block[i], block[i + kBlock / 2]);
      next[2 * i + 1] = interleave_high(block[i], block[i + kBlock / 2]);
    }
    for (int i = 0; i < kBlock; ++i) block[i] = next[i];
  }
  for (int i = 0; i < kBlock; ++i) std::memcpy(out + i * out_stride, &block[i], kBlock);
}

// out[j * out_stride + i] = lines[i][j] for 16 lines of num_bytes. Nothing past a line's end is read; out has room for
// whole blocks.
REALIGN_VECTOR_WIDTHS
void transpose(const uint8_t* const* lines, int64_t num_bytes, uint8_t* out, int64_t out_stride) {
  int64_t from = 0;
  for (; from + kBlock <= num_bytes; from += kBlock) transpose_block(lines, from, out + from * out_stride, out_stride);
  if (from == num_bytes) return;
  uint8_t ends[kBlock][kBlock] = {};
  const uint8_t* end_lines[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    std::memcpy(ends[i], lines[i] + from, num_bytes - from);
    end_lines[i] = ends[i];
  }
  transpose_block(end_lines, 0, out + from * out_stride, out_stride);
}

// Sums of pixels times taps, to 8 bits.
template <int count>
inline __attribute__((always_inline)) void round_and_clip(const int32_t* sums, uint8_t* out) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const int32_t level = sums[i] >> kPrecisionBits;
    const int32_t positive = level < 0 ? 0 : level;
    out[i] = uint8_t(positive > 255 ? 255 : positive);
  }
}

template <int count>
inline __attribute__((always_inline)) void multiply_add(const uint8_t* pixels, int32_t tap, int32_t* sums) {
#pragma omp simd
  for (int i = 0; i < count; ++i) sums[i] += tap * int32_t(pixels[i]);
}

// Filter kLines transposed lines: out[(channel * out_columns + column) * kLines + line]. `lines` begins at the pixel
// axis.starts[0].
REALIGN_VECTOR_WIDTHS
void filter_columns(const Axis& axis, const LineLayout& layout, const uint8_t* lines, uint8_t* out,
                    int64_t out_columns) {
  const int64_t pixel_step = layout.pixel_step * kLines, channel_step = layout.channel_step * kLines;
  for (int64_t column = 0; column < axis.count; ++column) {
    const uint8_t* pixel = lines + (axis.starts[column] - axis.starts[0]) * pixel_step;
    const int32_t* taps = axis.taps + column * axis.num_taps;
    int32_t red[kLines], green[kLines], blue[kLines];
    for (int i = 0; i < kLines; ++i) red[i] = green[i] = blue[i] = 1 << (kPrecisionBits - 1);
    for (int32_t k = 0; k < axis.lengths[column]; ++k, pixel += pixel_step) {
      multiply_add<kLines>(pixel, taps[k], red);
      multiply_add<kLines>(pixel + channel_step, taps[k], green);
      multiply_add<kLines>(pixel + 2 * channel_step, taps[k], blue);
    }
    round_and_clip<kLines>(red, out + column * kLines);
    round_and_clip<kLines>(green, out + (out_columns + column) * kLines);
    round_and_clip<kLines>(blue, out + (2 * out_columns + column) * kLines);
  }
}

// One row of the result, from `num_taps` rows of the intermediate; num_bytes is a multiple of kRun.
REALIGN_VECTOR_WIDTHS
void filter_row(const uint8_t* rows, int64_t row_bytes, const int32_t* taps, int32_t num_taps, uint8_t* out) {
  for (int64_t from = 0; from < row_bytes; from += kRun) {
    int32_t sums[kRun];
    for (int i = 0; i < kRun; ++i) sums[i] = 1 << (kPrecisionBits - 1);
    for (int32_t k = 0; k < num_taps; ++k) multiply_add<kRun>(rows + k * row_bytes + from, taps[k], sums);
    round_and_clip<kRun>(sums, out + from);
  }
}

// Pixels in [-1, 1] to 8 bits: cut, not rounded; NaN is 0.
REALIGN_VECTOR_WIDTHS
void cut_to_bytes(const float* pixels, int64_t count, uint8_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float unit = pixels[i] * 0.5f + 0.5f;
    const float positive = unit > 0 ? unit : 0;
    out[i] = uint8_t(int32_t((positive < 1 ? positive : 1) * 255));
  }
}

// The call's arrays, and what one thread does with them.
class Resizer {
 public:
  explicit Resizer(const ClipPreprocessParams& params) : params_(params) {}

  // Rows [first, end) of the covered part of one picture's result.
  void resize(const PictureRecord& picture, int64_t first, int64_t end, uint8_t* out, Scratch& scratch) const {
    const Axis columns(picture.columns), rows(picture.rows);
    // Channels begin at multiples of a block, rows at multiples of a run: whole vectors everywhere.
    const int64_t channel_bytes = round_up(columns.count, kBlock);
    const int64_t row_bytes = round_up(3 * channel_bytes, kRun);
    const int64_t begin = rows.begin(first), num_rows = rows.end(end - 1) - begin;
    scratch.intermediate.resize(round_up(num_rows, kLines) * row_bytes);
    scratch.row.resize(row_bytes);
    for (int64_t row = 0; row < num_rows; row += kLines) {
      uint8_t* to = scratch.intermediate.data() + row * row_bytes;
      filter_lines(picture, columns, begin + row, std::min<int64_t>(kLines, num_rows - row), to, row_bytes, scratch);
    }
    for (int64_t row = first; row < end; ++row) {
      const uint8_t* from = scratch.intermediate.data() + (rows.starts[row] - begin) * row_bytes;
      filter_row(from, row_bytes, rows.taps + row * rows.num_taps, rows.lengths[row], scratch.row.data());
      store_row(picture, rows.offset + row, columns, channel_bytes, scratch.row.data(), out);
    }
  }

  // What the picture does not cover.
  void pad(const PictureRecord& picture, uint8_t* out) const {
    const AxisRecord& y = picture.is_transposed ? picture.columns : picture.rows;
    const AxisRecord& x = picture.is_transposed ? picture.rows : picture.columns;
    if (y.count == params_.height && x.count == params_.width) return;
    for (int64_t channel = 0; channel < 3; ++channel) {
      for (int64_t row = 0; row < params_.height; ++row) {
        const bool is_covered = row >= y.offset && row < y.offset + y.count;
        for (int64_t column = 0; column < params_.width; ++column) {
          if (is_covered && column == x.offset) column += x.count;
          if (column < params_.width) store(out, channel, row * params_.width + column, uint8_t(params_.fill));
        }
      }
    }
  }

 private:
  // num_lines rows of the picture, filtered along the columns, to rows of row_bytes.
  void filter_lines(const PictureRecord& picture, const Axis& columns, int64_t row, int64_t num_lines, uint8_t* to,
                    int64_t row_bytes, Scratch& scratch) const {
    const int64_t channel_bytes = round_up(columns.count, kBlock);
    const uint8_t* lines[kLines];
    const LineLayout layout = find_lines(picture, columns, row, num_lines, lines, scratch);
    scratch.lines.resize(round_up(layout.num_bytes, kBlock) * kLines);
    scratch.columns.resize(row_bytes * kLines);
    for (int line = 0; line < kLines; line += kBlock) {
      transpose(lines + line, layout.num_bytes, scratch.lines.data() + line, kLines);
    }
    filter_columns(columns, layout, scratch.lines.data(), scratch.columns.data(), channel_bytes);
    for (int64_t from = 0; from < row_bytes; from += kBlock) {
      const uint8_t* block[kBlock];
      for (int i = 0; i < kBlock; ++i) block[i] = scratch.columns.data() + (from + i) * kLines;
      transpose(block, kLines, to + from, row_bytes);
    }
  }

  // Addresses of the 8-bit pixels of kLines rows, from the first column that is read; the last row stands in for those
  // past the end.
  LineLayout find_lines(const PictureRecord& picture, const Axis& columns, int64_t row, int64_t num_lines,
                        const uint8_t** lines, Scratch& scratch) const {
    const int64_t begin = columns.begin(0), num_pixels = columns.end(columns.count - 1) - begin;
    if (params_.type != PictureType::uint8) scratch.cut.resize(kLines * 3 * num_pixels);
    for (int64_t line = 0; line < kLines; ++line) {
      const int64_t from = (row + std::min(line, num_lines - 1)) * picture.row_stride;
      if (params_.type == PictureType::uint8) {
        lines[line] = reinterpret_cast<const uint8_t*>(picture.address) + from + 3 * begin;
      } else {
        uint8_t* cut = scratch.cut.data() + std::min(line, num_lines - 1) * 3 * num_pixels;
        if (line < num_lines) cut_line(picture, from + begin, num_pixels, cut, scratch);
        lines[line] = cut;
      }
    }
    if (params_.type == PictureType::uint8) return {3, 1, 3 * num_pixels};
    return {1, num_pixels, 3 * num_pixels};
  }

  // A row of float planes, to 8 bits, channel after channel.
  void cut_line(const PictureRecord& picture, int64_t from, int64_t num_pixels, uint8_t* out, Scratch& scratch) const {
    const Dtype dtype = Dtype(int(params_.type));
    const char* address = reinterpret_cast<const char*>(picture.address);
    scratch.wide.resize(num_pixels);
    for (int64_t channel = 0; channel < 3; ++channel, from += picture.channel_stride) {
      const char* plane = address + from * size_of(dtype);
      const float* pixels = reinterpret_cast<const float*>(plane);
      if (dtype != Dtype::float32) {
        widen(plane, dtype, scratch.wide.data(), num_pixels);
        pixels = scratch.wide.data();
      }
      cut_to_bytes(pixels, num_pixels, out + channel * num_pixels);
    }
  }

  void store_row(const PictureRecord& picture, int64_t row, const Axis& columns, int64_t channel_bytes,
                 const uint8_t* pixels, uint8_t* out) const {
    const int64_t row_step = picture.is_transposed ? 1 : params_.width;
    const int64_t column_step = picture.is_transposed ? params_.width : 1;
    const int64_t to = row * row_step + columns.offset * column_step;
    for (int64_t channel = 0; channel < 3; ++channel) {
      const uint8_t* from = pixels + channel * channel_bytes;
      for (int64_t i = 0; i < columns.count; ++i) store(out, channel, to + i * column_step, from[i]);
    }
  }

  void store(uint8_t* out, int64_t channel, int64_t pixel, uint8_t level) const {
    const int64_t to = channel * params_.height * params_.width + pixel, from = channel * 256 + level;
    if (params_.level_bytes == 4) {
      reinterpret_cast<uint32_t*>(out)[to] = static_cast<const uint32_t*>(params_.levels)[from];
    } else {
      reinterpret_cast<uint16_t*>(out)[to] = static_cast<const uint16_t*>(params_.levels)[from];
    }
  }

  const ClipPreprocessParams& params_;
};

}  // namespace

void clip_preprocess(const ClipPreprocessParams& params) {
  if (params.num_pictures == 0) return;
  // A band reads a few rows that its neighbours read too: no more bands than keep the threads busy.
  const int64_t num_bands = params.num_threads == 1 ? 1 : 1 + 2 * params.num_threads / params.num_pictures;
  const int64_t picture_bytes = 3 * params.height * params.width * params.level_bytes;
  const Resizer resizer(params);
#pragma omp parallel num_threads(params.num_threads) if (params.num_threads > 1)
  {
    Scratch scratch;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < params.num_pictures; ++i) {
      for (int64_t band = 0; band < num_bands; ++band) {
        const PictureRecord& picture = params.pictures[i];
        uint8_t* out = static_cast<uint8_t*>(params.out) + i * picture_bytes;
        const int64_t band_rows = std::max(kBandRows, (picture.rows.count + num_bands - 1) / num_bands);
        const int64_t first = band * band_rows, end = std::min(first + band_rows, picture.rows.count);
        if (first < end) resizer.resize(picture, first, end, out, scratch);
        if (band == 0) resizer.pad(picture, out);
      }
    }
  }
}

}  // namespace realign
