// An experiment: which inactive tiles could be certified before q k^T is computed?
//
//   certified_tiles [--in FILE.h5] [--tokens 4096] [--heads 4] [--head-size 64]
//
// A 64 x 64 tile needs no scores when an upper bound of every <q_i, k_j> in it does not reach the threshold: bounds by tile, by rows and by parts
// (certified_tiles.h).
//
// Printed: the share of causal edges and tiles that are active (by all scores: the oracle), and the share of the inactive tiles each bound certifies.
// A certified tile with an active edge ends the program with an error.
//
// Without --in, synthetic unit vectors at edge sparsities 0.99 and 0.9966 a head. With --in, q and k (float32 [B, H, T, D]) as `tessera attention`
// takes them, divided by their lengths, and the threshold on the cosine tau [H] / scale [H] from the file; without those, the sparsities above.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "certified_tiles.h"
#include "data/hdf5_file.h"

namespace {

using namespace tessera::certified;
constexpr int kTile = 64;
/// The score that a share `sparsity` of the causal edges does not exceed, from a million of them.
float threshold_for(const Head& head, double sparsity) {
  std::mt19937 rng(7);
  Floats sample(1 << 20);
  for (float& s : sample) {
    const std::int64_t x = static_cast<std::int64_t>(rng() % head.tokens), y = static_cast<std::int64_t>(rng() % head.tokens);
    s = dot(&head.q[std::max(x, y) * head.size], &head.k[std::min(x, y) * head.size], head.size);
  }
  const auto at = sample.begin() + static_cast<std::ptrdiff_t>(sparsity * static_cast<double>(sample.size() - 1));
  std::nth_element(sample.begin(), at, sample.end());
  return *at;
}

/// Rows follow `direction(t)` with noise: 0 exactly, infinity not at all.
Head synthetic(std::int64_t tokens, std::int64_t size, unsigned seed, float noise, const std::function<std::int64_t(std::int64_t)>& direction) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Floats centres(16 * size);
  for (float& c : centres) c = normal(rng);
  Head head{tokens, size, Floats(tokens * size), Floats(tokens * size)};
  for (Floats* x : {&head.q, &head.k})
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t cluster = std::isinf(noise) ? 0 : direction(t + (x == &head.q ? 977 : 0));
      for (std::int64_t d = 0; d < size; ++d)
        (*x)[t * size + d] = std::isinf(noise) ? normal(rng) : centres[cluster * size + d] + noise * normal(rng);
    }
  normalize(head.q, size), normalize(head.k, size);
  return head;
}

void print(const std::string& name, const std::string& threshold, const Counts& c) {
  const double inactive = std::max<double>(1, static_cast<double>(c.tiles - c.active_tiles));
  const auto share = [](double x, double of) { return 100 * x / of; };
  std::printf("%-36s %-10s %8.3f %8.2f %9.2f %9.2f %9.2f\n", name.c_str(), threshold.c_str(), share(c.active_edges, c.edges),
              share(c.active_tiles, c.tiles), share(c.by_tile, inactive), share(c.by_rows, inactive), share(c.by_parts, inactive));
  std::fflush(stdout);
}

void run(int argc, char** argv) {
  std::int64_t tokens = 4096, heads = 4, size = 64;
  std::string in;
  for (int n = 1; n < argc; n += 2) {
    const std::string arg = argv[n];
    if (n + 1 == argc) throw std::invalid_argument("unknown option or missing value: " + arg);
    if (arg == "--in")
      in = argv[n + 1];
    else if (arg == "--tokens")
      tokens = std::stoll(argv[n + 1]);
    else if (arg == "--heads")
      heads = std::stoll(argv[n + 1]);
    else if (arg == "--head-size")
      size = std::stoll(argv[n + 1]);
    else
      throw std::invalid_argument("unknown option: " + arg);
  }
  if (tokens < 1 || heads < 1 || size < 1) throw std::invalid_argument("tokens, heads and the head size must be at least 1");
  std::printf("%-36s %-10s %8s %8s %29s\n", "", "", "active %", "", "inactive tiles certified, %");
  std::printf("%-36s %-10s %8s %8s %9s %9s %9s\n", "", "threshold", "edges", "tiles", "tile", "rows", "parts");
  const double sparsities[] = {0.99, 0.9966};
  const auto at_sparsities = [&](const std::string& name, const std::vector<Head>& all) {
    for (const double sparsity : sparsities) {
      Counts total;
      for (const Head& head : all) total += measure<kTile>(head, threshold_for(head, sparsity));
      print(name, "at " + std::to_string(sparsity).substr(0, 6), total);
    }
  };

  if (in.empty()) {
    const auto hash = [](std::int64_t x) { return static_cast<std::int64_t>(std::mt19937(static_cast<unsigned>(x))() % 10); };
    const struct {
      const char* name;
      float noise;
      std::function<std::int64_t(std::int64_t)> direction;
    } cases[] = {
        {"independent", INFINITY, {}},
        {"ten directions, one a tile, 0.5", 0.5f, [&](std::int64_t t) { return hash(t / kTile); }},
        {"ten directions, one a tile, 0.2", 0.2f, [&](std::int64_t t) { return hash(t / kTile); }},
        {"ten directions, 16 tokens each, 0.2", 0.2f, [&](std::int64_t t) { return hash(t / 16); }},
        {"ten directions, token by token, 0.2", 0.2f, hash},
    };
    for (const auto& c : cases) {
      std::vector<Head> all;
      for (std::int64_t h = 0; h < heads; ++h) all.push_back(synthetic(tokens, size, static_cast<unsigned>(h + 1), c.noise, c.direction));
      at_sparsities(c.name, all);
    }
    return;
  }

  const auto file = tessera::Hdf5File::open(in);
  const auto shape = file.info("q").shape;
  if (shape.size() != 4 || file.info("q").elements() == 0 || file.info("k").shape != shape)
    throw std::invalid_argument(in + ": expected q and k of one shape [B, H, T, D]");
  const std::int64_t B = static_cast<std::int64_t>(shape[0]), H = static_cast<std::int64_t>(shape[1]), T = static_cast<std::int64_t>(shape[2]),
                     D = static_cast<std::int64_t>(shape[3]);
  const Floats q = file.read<float>("q"), k = file.read<float>("k");
  const bool has_threshold = file.contains("tau") && file.contains("scale");
  Floats tau, scale;
  if (has_threshold) {
    tau = file.read<float>("tau"), scale = file.read<float>("scale");
    const auto positive = [](float c) { return c > 0; };
    if (static_cast<std::int64_t>(tau.size()) != H || static_cast<std::int64_t>(scale.size()) != H ||
        !std::all_of(scale.begin(), scale.end(), positive))
      throw std::invalid_argument(in + ": expected tau [H] and scale [H], scale above 0");
  }
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<Head> all;
    for (std::int64_t b = 0; b < B; ++b) {
      const auto part = [&](const Floats& x) { return Floats(x.begin() + (b * H + h) * T * D, x.begin() + (b * H + h + 1) * T * D); };
      all.push_back({T, D, part(q), part(k)});
      normalize(all.back().q, D), normalize(all.back().k, D);
    }
    const std::string name = "head " + std::to_string(h);
    if (!has_threshold) {
      at_sparsities(name, all);
      continue;
    }
    Counts total;
    for (const Head& head : all) total += measure<kTile>(head, tau[h] / scale[h]);
    print(name, std::to_string(tau[h] / scale[h]).substr(0, 6), total);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::invalid_argument& e) {
    return std::fprintf(stderr, "certified_tiles: %s\n", e.what()), 2;
  } catch (const std::exception& e) {
    return std::fprintf(stderr, "certified_tiles: %s\n", e.what()), 1;
  }
}
