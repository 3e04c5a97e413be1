#pragma once
// Loops over OpenMP threads whose results do not depend on how many there are.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tessera::cpu {

/// Calls body(first, last) for consecutive ranges that cover [0, count), in parallel. Elements must be independent of each other.
template <class Body>
void parallel_ranges(std::int64_t count, std::int64_t grain, Body&& body) {
  const std::int64_t ranges = (count + grain - 1) / grain;
#pragma omp parallel for schedule(static) if (ranges > 1)
  for (std::int64_t r = 0; r < ranges; ++r) body(r * grain, std::min(count, (r + 1) * grain));
}

/// Adds to each of out[0 .. columns) a sum over rows. row(n, sums) adds what row n gives to sums[0 .. columns), and may do its other
/// work on row n as well. Rows are cut into at most 64 chunks by their number alone; sums run in order within a chunk, then
/// over the chunks in order, in double.
template <class Row>
void add_column_sums(std::int64_t rows, std::int64_t columns, Row&& row, const std::vector<float*>& out) {
  const std::int64_t chunk_rows = std::max<std::int64_t>(16, (rows + 63) / 64);
  const std::int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const std::int64_t width = columns * static_cast<std::int64_t>(out.size());
  std::vector<float> sums(static_cast<std::size_t>(chunks * width));
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (std::int64_t n = chunk * chunk_rows; n < std::min(rows, (chunk + 1) * chunk_rows); ++n) row(n, sums.data() + chunk * width);
  }
  parallel_ranges(width, 256, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      double total = 0;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[static_cast<std::size_t>(chunk * width + i)];
      float& to = out[static_cast<std::size_t>(i / columns)][i % columns];
      to = static_cast<float>(to + total);
    }
  });
}

}  // namespace tessera::cpu
