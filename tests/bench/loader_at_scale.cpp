// The loader over a corpus of a size that matters: every position of an epoch once, whatever the number of ranks, also after a resume on another one.
//
//   tessera_bench_loader write DIR TOKENS FILES    numbered tokens (tests/data/numbered.h) as llm.c's .bin files, for
//                                                  tessera prepare --input DIR --tokenizer bytes --validation-fraction 0 --output DATA
//   tessera_bench_loader check DATA RANKS...       one epoch of DATA, begun on the first number of simulated ranks and gone on with, after as many
//                                                  steps each, on the next ones; all tokens, targets and document starts are compared
//   tessera_bench_loader speed DATA RANKS...       the same batches without looking into them
//   tessera_bench_loader seek DATA TIMES           DATA's shards TIMES over as one corpus: starts at its first, middle and last steps, each compared
//                                                  with the sampler
//
// Prints tokens/s, the time to the first batch after each start, and the peak of resident memory.

#include <fmt/core.h>
#include <sys/resource.h>

#include <chrono>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "data/loader.h"
#include "tests/data/numbered.h"

namespace tessera {
namespace {

using namespace test;
using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kEndOfText = 256;
constexpr std::int64_t kContext = 1024;
constexpr std::uint64_t kPerStep = 512;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double peak_mib() {
  rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

std::vector<std::unique_ptr<Loader>> start(const DatasetInfo& info, int ranks, std::uint64_t first_step) {
  std::vector<std::unique_ptr<Loader>> loaders;
  for (int rank = 0; rank < ranks; ++rank) {
    LoaderOptions o;
    o.context = kContext;
    o.micro_batch = static_cast<std::int64_t>(std::min<std::uint64_t>(8, kPerStep / static_cast<std::uint64_t>(ranks)));
    o.sequences_per_step = static_cast<std::int64_t>(kPerStep);
    o.rank = rank;
    o.ranks = ranks;
    o.seed = 7;
    o.first_step = first_step;
    o.prefetch = 2;
    o.open_files = std::max(8, 256 / ranks);  // all are in this process
    loaders.push_back(std::make_unique<Loader>(info, info.train, o));
  }
  return loaders;
}

void run(const std::string& folder, const std::vector<int>& ranks, bool check) {
  const DatasetInfo info = read_dataset(folder);
  const std::uint64_t sequences = (info.train.tokens - 1) / kContext, steps = (sequences + kPerStep - 1) / kPerStep;
  fmt::print("{} tokens in {} shards: {} sequences of {} an epoch, {} steps\n", info.train.tokens, info.train.shards.size(), sequences, kContext,
             steps);
  Coverage coverage(sequences);
  std::uint64_t number = 0;  // of the run
  for (std::size_t part = 0; part < ranks.size(); ++part) {
    const std::uint64_t first = steps * part / ranks.size(), last = steps * (part + 1) / ranks.size();
    const Clock::time_point begin = Clock::now();
    const auto loaders = start(info, ranks[part], first);
    double first_batch = 0;
    std::uint64_t tokens = 0;
    for (std::uint64_t step = first; step < last; ++step)
      for (const auto& loader : loaders)
        for (std::uint64_t done = 0; done < kPerStep / static_cast<std::uint64_t>(ranks[part]);) {
          const HostBatch& batch = loader->next();
          if (first_batch == 0) first_batch = seconds_since(begin);
          tokens += batch.token.size();
          done += static_cast<std::uint64_t>(batch.batch);
          for (std::int64_t row = 0; check && row < batch.batch && number < sequences; ++row, ++number) {
            const auto of_row = [&](const std::vector<std::int32_t>& all) {
              return std::span(all).subspan(static_cast<std::size_t>(row * kContext), kContext);
            };
            const std::uint64_t place = place_of(of_row(batch.token), kEndOfText);
            if (place % kContext != 0) throw std::runtime_error(fmt::format("a sequence begins at token {}", place));
            check_sequence(place, kEndOfText, of_row(batch.token), of_row(batch.target), of_row(batch.document_start));
            coverage.add(place / kContext);
          }
        }
    const double seconds = seconds_since(begin);
    fmt::print("{:3} rank{} steps {} to {}: first batch after {:.1f} ms, {:.1f} s, {:.1f} M tokens/s{}; peak memory {:.0f} MiB\n", ranks[part],
               ranks[part] == 1 ? ", " : "s,", first, last, 1e3 * first_batch, seconds, static_cast<double>(tokens) / seconds * 1e-6,
               check ? " with every token compared" : "", peak_mib());
  }
  if (!check) return;
  if (!coverage.complete()) throw std::runtime_error(fmt::format("{} of {} sequences came", coverage.count(), sequences));
  fmt::print("every sequence of the epoch came once, each token, target and document start as written\n");
}

void seek(const std::string& folder, std::uint64_t times) {
  DatasetInfo info = read_dataset(folder);
  const std::uint64_t period = info.train.tokens;
  const std::vector<ShardInfo> once = info.train.shards;
  for (std::uint64_t i = 1; i < times; ++i) info.train.shards.insert(info.train.shards.end(), once.begin(), once.end());
  info.train.tokens *= times;
  const Sampler sampler(info.train.tokens, kContext, kPerStep, 7);
  const std::uint64_t steps = sampler.sequences() / kPerStep;
  fmt::print("{} tokens in {} shards: {} sequences of {} an epoch, {} steps\n", info.train.tokens, info.train.shards.size(), sampler.sequences(),
             kContext, steps);
  for (const std::uint64_t first : {std::uint64_t{0}, steps / 2, steps - 2, 1000 * steps}) {
    const Clock::time_point begin = Clock::now();
    const auto loaders = start(info, 1, first);
    double first_batch = 0;
    std::uint64_t furthest = 0;
    for (std::uint64_t number = 0; number < 2 * kPerStep;) {
      const HostBatch& batch = loaders[0]->next();
      if (first_batch == 0) first_batch = seconds_since(begin);
      for (std::int64_t row = 0; row < batch.batch; ++row, ++number) {
        const auto of_row = [&](const std::vector<std::int32_t>& all) {
          return std::span(all).subspan(static_cast<std::size_t>(row * kContext), kContext);
        };
        const std::uint64_t wanted = sampler.first_token(first * kPerStep + number);
        furthest = std::max(furthest, wanted);
        if (wanted % period + kContext >= period) continue;  // over the seam
        const std::uint64_t place = place_of(of_row(batch.token), kEndOfText);
        if (place != wanted % period) throw std::runtime_error(fmt::format("step {}: token {} came, expected {}", first, place, wanted % period));
        check_sequence(place, kEndOfText, of_row(batch.token), of_row(batch.target), of_row(batch.document_start));
      }
    }
    fmt::print("from step {:>9}: first batch after {:.1f} ms, two steps after {:.0f} ms; the furthest token was {}; peak memory {:.0f} MiB\n", first,
               1e3 * first_batch, 1e3 * seconds_since(begin), furthest, peak_mib());
  }
}

}  // namespace
}  // namespace tessera

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 4 && arguments[0] == "write") {
    tessera::test::write_numbered(arguments[1], std::stoull(arguments[2]), std::stoull(arguments[3]), tessera::kEndOfText);
  } else if (arguments.size() >= 3 && (arguments[0] == "check" || arguments[0] == "speed")) {
    std::vector<int> ranks;
    for (std::size_t i = 2; i < arguments.size(); ++i) ranks.push_back(std::stoi(arguments[i]));
    tessera::run(arguments[1], ranks, arguments[0] == "check");
  } else if (arguments.size() == 3 && arguments[0] == "seek") {
    tessera::seek(arguments[1], std::stoull(arguments[2]));
  } else {
    fmt::print(stderr, "write DIR TOKENS FILES | check DATA RANKS... | speed DATA RANKS... | seek DATA TIMES\n");
    return 2;
  }
  return 0;
} catch (const std::exception& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 1;
}
