#include "model/sequence_balance.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <tuple>
#include <utility>

namespace tessera {
namespace {

std::vector<std::int64_t> loads_of(const Blocks& blocks, const std::vector<std::int64_t>& rows) {
  std::vector<std::int64_t> loads;
  for (const auto& mine : blocks)
    loads.push_back(
        std::accumulate(mine.begin(), mine.end(), std::int64_t{0}, [&](auto sum, auto b) { return sum + rows[static_cast<std::size_t>(b)]; }));
  return loads;
}

/// Neighbouring blocks, cut so that every rank has between `least` and `least` + `spread` tiles; empty where there is no such cut.
Blocks runs_between(std::int64_t least, std::int64_t spread, int ranks, const std::vector<std::int64_t>& rows) {
  std::vector<std::int64_t> before = {0};  // tiles of the rows before
  for (auto tiles : rows) before.push_back(before.back() + tiles);
  const std::size_t ends = before.size();
  // from[r][e]: where run r may begin that ends before row e, behind r runs that keep the bounds; the last of such, or -1.
  std::vector<std::vector<std::int32_t>> from(static_cast<std::size_t>(ranks), std::vector<std::int32_t>(ends, -1));
  std::vector<bool> reached(ends);
  reached[0] = true;
  for (auto& run : from) {
    std::vector<bool> next(ends);
    std::int32_t latest = -1;  // reached begin that leaves the run at least `least` tiles
    for (std::size_t e = 1, begin = 0; e < ends; ++e) {
      for (; begin < e && before[e] - before[begin] >= least; ++begin)
        if (reached[begin]) latest = static_cast<std::int32_t>(begin);
      if (latest < 0 || before[e] - before[static_cast<std::size_t>(latest)] > least + spread) continue;
      run[e] = latest;
      next[e] = true;
    }
    reached = std::move(next);
  }
  if (!reached.back()) return {};
  Blocks runs(static_cast<std::size_t>(ranks));
  auto end = static_cast<std::int32_t>(rows.size());
  for (int r = ranks - 1; r >= 0; --r) {
    const auto begin = from[static_cast<std::size_t>(r)][static_cast<std::size_t>(end)];
    auto& run = runs[static_cast<std::size_t>(r)];
    run.resize(static_cast<std::size_t>(end - begin));
    std::iota(run.begin(), run.end(), begin);
    end = begin;
  }
  return runs;
}

/// Neighbouring blocks, cut so that the tiles of two ranks differ by at most those of the largest row; empty where there is no such cut.
Blocks runs_by_tiles(int ranks, const std::vector<std::int64_t>& rows) {
  const std::int64_t largest = *std::max_element(rows.begin(), rows.end());
  const std::int64_t even = std::accumulate(rows.begin(), rows.end(), std::int64_t{0}) / ranks;
  // Every cut has its smallest share within a row below the even one: tried at the middle first.
  constexpr int kTries = 16;
  for (int n = 0; n <= kTries; ++n) {
    const int sixteenths = kTries / 2 + (n % 2 == 0 ? n / 2 : -(n + 1) / 2);
    const auto runs = runs_between(std::max<std::int64_t>(0, even - largest * sixteenths / kTries), largest, ranks, rows);
    if (!runs.empty()) return runs;
  }
  return {};
}

/// Longest processing time first (Graham, 1969): the row with most tiles goes to the rank with fewest, so no two ranks ever differ by more than the
/// largest row. Of equal ranks, the one with fewest blocks, then one that has a neighbouring block, then the first. Rows without tiles even out
/// blocks.
Blocks greedy(int ranks, const std::vector<std::int64_t>& rows) {
  std::vector<std::int32_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return rows[static_cast<std::size_t>(a)] > rows[static_cast<std::size_t>(b)]; });

  Blocks blocks(static_cast<std::size_t>(ranks));
  std::vector<std::int64_t> loads(static_cast<std::size_t>(ranks));
  std::vector<std::int32_t> owner(rows.size(), -1);
  for (const auto b : order) {
    const std::int64_t tiles = rows[static_cast<std::size_t>(b)];
    const auto neighbour = [&](int rank) {
      return (b > 0 && owner[static_cast<std::size_t>(b) - 1] == rank) ||
             (b + 1 < std::ssize(rows) && owner[static_cast<std::size_t>(b) + 1] == rank);
    };
    const auto key = [&](int rank) {
      const auto r = static_cast<std::size_t>(rank);
      return std::tuple(tiles == 0 ? 0 : loads[r], blocks[r].size(), !neighbour(rank));
    };
    int best = 0;
    for (int r = 1; r < ranks; ++r)
      if (key(r) < key(best)) best = r;
    blocks[static_cast<std::size_t>(best)].push_back(b);
    loads[static_cast<std::size_t>(best)] += tiles;
    owner[static_cast<std::size_t>(b)] = best;
  }
  for (auto& mine : blocks) std::sort(mine.begin(), mine.end());
  return blocks;
}

/// The difference between the most and the fewest tiles of a rank.
std::int64_t spread_of(const Blocks& blocks, const std::vector<std::int64_t>& rows) {
  const auto loads = loads_of(blocks, rows);
  const auto [low, high] = std::minmax_element(loads.begin(), loads.end());
  return *high - *low;
}

/// Moves rows from the rank with most tiles to the one with fewest until they differ by at most the largest row. Of the rows that bring the two
/// nearer it takes one beside a row of the receiver, else one at the border of a run, else any; then the one nearest to half the difference. There
/// always is one: where every row of the first is at least the difference, this is no more than the largest row.
Blocks repaired(Blocks blocks, const std::vector<std::int64_t>& rows) {
  const std::int64_t largest = *std::max_element(rows.begin(), rows.end());
  auto loads = loads_of(blocks, rows);
  std::vector<int> owner(rows.size());
  for (std::size_t r = 0; r < blocks.size(); ++r)
    for (auto b : blocks[r]) owner[static_cast<std::size_t>(b)] = static_cast<int>(r);

  while (true) {
    const auto from = std::max_element(loads.begin(), loads.end()) - loads.begin(), to = std::min_element(loads.begin(), loads.end()) - loads.begin();
    const std::int64_t difference = loads[static_cast<std::size_t>(from)] - loads[static_cast<std::size_t>(to)];
    if (difference <= largest) break;
    const auto key = [&](std::int32_t b) {
      bool beside = false, border = false;
      for (const std::int64_t n : {b - 1, b + 1}) {
        if (n < 0 || n >= std::ssize(rows)) continue;
        beside = beside || owner[static_cast<std::size_t>(n)] == to;
        border = border || owner[static_cast<std::size_t>(n)] != from;
      }
      const std::int64_t tiles = rows[static_cast<std::size_t>(b)];
      return std::tuple(tiles == 0 || tiles >= difference, !beside, !border, std::abs(2 * tiles - difference));
    };
    auto& mine = blocks[static_cast<std::size_t>(from)];
    const auto best = std::min_element(mine.begin(), mine.end(), [&](auto a, auto b) { return key(a) < key(b); });
    const auto b = static_cast<std::size_t>(*best);
    owner[b] = static_cast<int>(to);
    loads[static_cast<std::size_t>(from)] -= rows[b];
    loads[static_cast<std::size_t>(to)] += rows[b];
    blocks[static_cast<std::size_t>(to)].push_back(*best);
    mine.erase(best);
  }
  for (auto& mine : blocks) std::sort(mine.begin(), mine.end());
  return blocks;
}

}  // namespace

Blocks even_parts(std::int64_t blocks, int parts) {
  Blocks result(static_cast<std::size_t>(parts));
  std::int32_t next = 0;
  for (int p = 0; p < parts; ++p) {
    auto& part = result[static_cast<std::size_t>(p)];
    part.resize(static_cast<std::size_t>(blocks / parts + (p < blocks % parts ? 1 : 0)));
    std::iota(part.begin(), part.end(), next);
    next += static_cast<std::int32_t>(part.size());
  }
  return result;
}

Blocks zigzag_parts(std::int64_t blocks, int ranks) {
  auto parts = even_parts(blocks, 2 * ranks);
  for (int r = 0; r < ranks; ++r) {
    auto& first = parts[static_cast<std::size_t>(r)];
    const auto& second = parts[static_cast<std::size_t>(2 * ranks - 1 - r)];
    first.insert(first.end(), second.begin(), second.end());
  }
  parts.resize(static_cast<std::size_t>(ranks));
  return parts;
}

std::vector<Blocks> balanced_blocks(int ranks, const std::vector<std::int64_t>& rows) {
  const std::int64_t largest = *std::max_element(rows.begin(), rows.end());
  const std::size_t share = (rows.size() + static_cast<std::size_t>(ranks) - 1) / static_cast<std::size_t>(ranks);
  std::vector<Blocks> result;
  const auto add = [&](Blocks blocks) {
    const auto most = std::max_element(blocks.begin(), blocks.end(), [](auto& a, auto& b) { return a.size() < b.size(); });
    if (most != blocks.end() && most->size() <= share + share / 8) result.push_back(std::move(blocks));
  };
  if (Blocks even = even_parts(std::ssize(rows), ranks); spread_of(even, rows) <= largest) add(std::move(even));
  add(runs_by_tiles(ranks, rows));
  if (std::ssize(rows) >= 2 * ranks) add(repaired(zigzag_parts(std::ssize(rows), ranks), rows));
  result.push_back(greedy(ranks, rows));
  return result;
}

}  // namespace tessera
