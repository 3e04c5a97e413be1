#include "data/loader.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <thread>
#include <utility>

namespace tessera {
namespace {

/// The tokens of a sequence that a batch holds, as stretches of neighbours.
struct Places {
  struct Stretch {
    std::size_t first, count;
  };
  std::int64_t context;
  std::vector<std::int32_t> all;
  std::vector<Stretch> stretches;

  Places(std::int64_t tokens, std::span<const std::int32_t> places) : context(tokens), all(places.begin(), places.end()) {
    if (all.empty()) {
      all.resize(static_cast<std::size_t>(context));
      std::iota(all.begin(), all.end(), 0);
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i] < 0 || all[i] >= context || (i > 0 && all[i] <= all[i - 1]))
        throw std::invalid_argument(fmt::format("place {} of a sequence of {} tokens: places must lie in it and ascend", all[i], context));
      if (i == 0 || all[i] != all[i - 1] + 1) stretches.push_back({static_cast<std::size_t>(all[i]), 0});
      ++stretches.back().count;
    }
  }
};

HostBatch make_batch(std::int64_t batch, const Places& places) {
  const std::size_t tokens = places.all.size(), size = static_cast<std::size_t>(batch) * tokens;
  HostBatch out{batch, std::ssize(places.all), {}, {}, {}, {}, 0, {}};
  for (auto* row : {&out.token, &out.target, &out.position, &out.document_start}) row->resize(size);
  for (std::size_t i = 0; i < size; ++i) out.position[i] = places.all[i % tokens];
  return out;
}

/// Fills row `row` with the places of the sequence that starts at token `first`: tokens, the next ones as targets, and where each token's document
/// starts. Where the split ends within the sequence, targets are -1 and tokens repeat the last one.
void fill(HostBatch& out, std::int64_t row, TokenReader& reader, std::uint64_t first, const Places& places, std::vector<std::int32_t>& scratch) {
  const std::size_t have = std::min<std::uint64_t>(static_cast<std::uint64_t>(places.context) + 1, reader.size() - first);
  std::size_t offset = static_cast<std::size_t>(row * out.tokens);
  for (const auto& [begin, count] : places.stretches) {
    const std::span tokens = std::span(out.token).subspan(offset, count), targets = std::span(out.target).subspan(offset, count),
                    starts = std::span(out.document_start).subspan(offset, count);
    offset += count;
    // Of the stretch and the token after it, those that are there; beyond the end the last one stands for all.
    const std::size_t from = std::min(begin, have - 1), real = std::min(count + 1, have - from), known = begin < have ? std::min(real, count) : 0;
    scratch.resize(count + 1);
    const std::span read = std::span(scratch);
    reader.read(first + from, read.first(real));
    std::ranges::fill(read.subspan(real), read[real - 1]);
    std::ranges::copy(read.first(count), tokens.begin());
    std::ranges::copy(read.subspan(1), targets.begin());
    const std::size_t labelled = known == 0 ? 0 : real - 1;
    std::ranges::fill(targets.subspan(labelled), -1);
    out.target_tokens += labelled;

    const std::size_t placed = std::max<std::size_t>(known, 1);
    reader.read_document_starts(first + from, starts.first(placed));
    for (std::int32_t& start : starts.first(placed)) start = std::max(start + static_cast<std::int32_t>(from), 0);
    std::ranges::fill(starts.subspan(placed), starts[placed - 1]);
  }
}

/// The same of a sequence that is made up.
void fill(HostBatch& out, std::int64_t row, const SyntheticSource& source, std::uint64_t number, const Places& places, SyntheticSequence& scratch) {
  source.make(number, scratch);
  out.distance.resize(out.token.size());
  auto at = static_cast<std::size_t>(row * out.tokens);
  for (const std::int32_t place : places.all) {
    const auto t = static_cast<std::size_t>(place);
    out.token[at] = scratch.token[t];
    out.target[at] = scratch.target[t];
    out.distance[at] = scratch.distance[t];
    out.document_start[at++] = 0;
    out.target_tokens += scratch.target[t] >= 0;
  }
}

}  // namespace

HostBatch read_sequences(const SyntheticSource& source, std::uint64_t first_sequence, std::int64_t count, std::span<const std::int32_t> places) {
  const Places held(source.context(), places);
  HostBatch out = make_batch(count, held);
  SyntheticSequence scratch;
  for (std::int64_t row = 0; row < count; ++row) fill(out, row, source, first_sequence + static_cast<std::uint64_t>(row), held, scratch);
  return out;
}

HostBatch read_sequences(TokenReader& reader, std::uint64_t first_sequence, std::int64_t count, std::int64_t context,
                         std::span<const std::int32_t> places) {
  if (count < 1 || context < 1) throw std::invalid_argument("read_sequences: count and context must be at least 1");
  const std::uint64_t first = first_sequence * static_cast<std::uint64_t>(context);
  const std::uint64_t last = first + static_cast<std::uint64_t>((count - 1) * context);  // where the last sequence starts
  if (last >= reader.size())
    throw std::out_of_range(fmt::format("read_sequences: sequence {} of {} tokens starts beyond the end of the split, {} tokens",
                                        first_sequence + static_cast<std::uint64_t>(count - 1), context, reader.size()));
  const Places held(context, places);
  HostBatch out = make_batch(count, held);
  std::vector<std::int32_t> scratch;
  for (std::int64_t row = 0; row < count; ++row) fill(out, row, reader, first + static_cast<std::uint64_t>(row * context), held, scratch);
  return out;
}

struct Loader::Impl {
  /// A dataset: its tokens, and the order in which its sequences come.
  struct Part {
    TokenReader reader;
    Sampler sampler;
  };

  LoaderOptions options;
  Places places;
  Mixture mixture;
  std::vector<Part> parts;
  std::optional<SyntheticSource> synthetic;  // instead of parts

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<HostBatch> ready, spare;  // spare: used ones, for their memory
  HostBatch current;
  std::exception_ptr error;
  bool stop = false;
  double waited = 0;
  std::thread thread;

  Impl(std::span<const double> weights, const LoaderOptions& o)
      : options(o), places(o.context, o.places), mixture(weights, static_cast<std::uint64_t>(o.sequences_per_step), o.seed) {}

  void add(const DatasetInfo& info, const SplitInfo& split) {
    const std::size_t open_files = std::max<std::size_t>(1, static_cast<std::size_t>(options.open_files) / mixture.parts());
    const std::uint64_t seed = parts.empty() ? options.seed : options.seed + scramble(parts.size());  // orders of their own
    TokenReader reader(info, split, open_files);
    const Sampler sampler(reader.size(), static_cast<std::uint64_t>(options.context), static_cast<std::uint64_t>(options.sequences_per_step), seed);
    parts.push_back({std::move(reader), sampler});
  }

  void start() {
    thread = std::thread([this] { read_ahead(); });
  }

  void fill_row(HostBatch& batch, std::int64_t row, std::uint64_t step, std::int64_t index) {
    if (synthetic) {
      const std::uint64_t number = step * static_cast<std::uint64_t>(options.sequences_per_step) + static_cast<std::uint64_t>(index);
      return fill(batch, row, *synthetic, number, places, made);
    }
    const Mixture::Turn turn = mixture.turn(step, static_cast<std::uint64_t>(index));
    Part& part = parts[turn.part];
    fill(batch, row, part.reader, part.sampler.first_token(turn.number), places, scratch);
  }
  std::vector<std::int32_t> scratch;  // of the thread
  SyntheticSequence made;

  void read_ahead() {
    const std::int64_t of_rank = options.sequences_per_step / options.ranks;
    try {
      for (std::uint64_t step = options.first_step;; ++step) {
        for (std::int64_t done = 0; done < of_rank; done += options.micro_batch) {
          HostBatch batch = take_spare();
          if (batch.batch == 0) return;
          batch.target_tokens = 0;
          for (std::int64_t row = 0; row < options.micro_batch; ++row) fill_row(batch, row, step, options.rank * of_rank + done + row);
          const std::lock_guard lock(mutex);
          ready.push_back(std::move(batch));
          changed.notify_all();
        }
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      changed.notify_all();
    }
  }

  /// Waits until there is room. An empty batch: time to stop.
  HostBatch take_spare() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return stop || ready.size() < static_cast<std::size_t>(options.prefetch); });
    if (stop) return {};
    if (spare.empty()) return make_batch(options.micro_batch, places);
    HostBatch out = std::move(spare.front());
    spare.pop_front();
    return out;
  }
};

namespace {

void check(const LoaderOptions& o) {
  if (o.context < 1 || o.micro_batch < 1 || o.sequences_per_step < 1 || o.ranks < 1 || o.rank < 0 || o.rank >= o.ranks || o.prefetch < 1 ||
      o.open_files < 1)
    throw std::invalid_argument(
        "Loader: context, micro_batch, sequences_per_step, ranks, prefetch and open_files must be at least 1, and 0 <= rank < ranks");
  if (o.sequences_per_step % (o.micro_batch * o.ranks) != 0)
    throw std::invalid_argument(
        fmt::format("{} sequences a step cannot be divided into micro-batches of {} on {} ranks; make tokens_per_step a "
                    "multiple of context x micro_batch x ranks",
                    o.sequences_per_step, o.micro_batch, o.ranks));
}

}  // namespace

Loader::Loader(const DatasetInfo& info, const SplitInfo& split, const LoaderOptions& o) {
  check(o);
  impl_ = std::make_unique<Impl>(std::vector{1.0}, o);
  impl_->add(info, split);
  impl_->start();
}

Loader::Loader(std::span<const MixPart> mix, const LoaderOptions& o) {
  check(o);
  std::vector<double> weights;
  for (const MixPart& part : mix) weights.push_back(part.weight);
  impl_ = std::make_unique<Impl>(weights, o);
  for (const MixPart& part : mix) {
    try {
      impl_->add(part.data, part.data.train);
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument(fmt::format("{}: {}", part.data.directory, e.what()));
    }
  }
  impl_->start();
}

Loader::Loader(const SyntheticTask& task, const LoaderOptions& o) {
  check(o);
  impl_ = std::make_unique<Impl>(std::vector{1.0}, o);
  impl_->synthetic.emplace(task, o.context, SyntheticSource::Split::train, o.seed);
  impl_->start();
}

Loader::~Loader() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->changed.notify_all();
  impl_->thread.join();
}

const HostBatch& Loader::next() {
  Impl& my = *impl_;
  std::unique_lock lock(my.mutex);
  const auto begin = std::chrono::steady_clock::now();
  my.changed.wait(lock, [&] { return !my.ready.empty() || my.error; });
  my.waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (my.ready.empty()) std::rethrow_exception(my.error);  // after everything that was read in order
  if (my.current.batch > 0) my.spare.push_back(std::move(my.current));
  my.current = std::move(my.ready.front());
  my.ready.pop_front();
  my.changed.notify_all();
  return my.current;
}

double Loader::take_wait_seconds() {
  const std::lock_guard lock(impl_->mutex);
  return std::exchange(impl_->waited, 0.0);
}

}  // namespace tessera
