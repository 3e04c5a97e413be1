#include "data/prepare.h"

#include <fmt/core.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <thread>

#include "data/dedup.h"
#include "data/holdout.h"
#include "data/output_folder.h"
#include "data/prepare_inputs.h"
#include "data/prepare_journal.h"
#include "data/prepare_pipeline.h"
#include "data/shard_writer.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

constexpr std::size_t kListedProblems = 20;

/// What to say of files that stand in the input more than once, under whatever names; empty when none does.
std::string repeated_files(const std::vector<std::string>& files) {
  std::map<std::pair<dev_t, ino_t>, const std::string*> seen;
  std::size_t repeats = 0;
  std::string first;
  for (const std::string& file : files) {
    struct stat found;
    if (::stat(file.c_str(), &found) != 0 || !S_ISREG(found.st_mode)) continue;
    const auto [known, is_new] = seen.emplace(std::pair(found.st_dev, found.st_ino), &file);
    if (!is_new && repeats++ == 0) first = file == *known->second ? file : fmt::format("{} (also {})", file, *known->second);
  }
  if (repeats == 0) return "";
  return fmt::format("{} stands in the input more than once{}; its documents are in the dataset as often", first,
                     repeats > 1 ? fmt::format(", as do others ({} repeats)", repeats) : "");
}

/// Cross-entropy in nats a token: -sum_i o_i ln m_i, with o the frequencies of `observed` and m those of `model` after adding `plus` to each count.
double unigram_loss(const std::vector<std::uint64_t>& observed, const std::vector<std::uint64_t>& model, double plus) {
  double observed_total = 0, model_total = 0, sum = 0;
  for (std::size_t i = 0; i < model.size(); ++i) {
    observed_total += static_cast<double>(observed[i]);
    model_total += static_cast<double>(model[i]) + plus;
  }
  for (std::size_t i = 0; i < model.size(); ++i)
    if (observed[i]) sum -= static_cast<double>(observed[i]) / observed_total * std::log((static_cast<double>(model[i]) + plus) / model_total);
  return sum;
}

/// What was left out, or is odd. What lies behind a place in the input is known apart, as a run that resumes there counts it again.
class Tally {
 public:
  void add(InputProblem problem) {
    documents_ += problem.documents;
    files_ += problem.files;
    if (first_.size() < kListedProblems) first_.push_back(problem);
    problem.what.clear();
    recent_.push_back(std::move(problem));
  }
  std::uint64_t documents() const { return documents_; }
  std::uint64_t files() const { return files_; }
  const std::vector<InputProblem>& first() const { return first_; }

  Json state_before(const InputPosition& place) {
    std::erase_if(recent_, [&](const InputProblem& problem) { return problem.at < place; });
    std::uint64_t documents = documents_, files = files_;
    for (const InputProblem& problem : recent_) documents -= problem.documents, files -= problem.files;
    Json first = Json::array();
    for (const InputProblem& problem : first_)
      if (problem.at < place) first.push_back({problem.at.file, problem.at.entry, problem.what});
    return {{"documents", documents}, {"files", files}, {"first", first}};
  }
  void restore(const Json& state) {
    documents_ = state.at("documents");
    files_ = state.at("files");
    for (const Json& problem : state.at("first")) first_.push_back({{problem.at(0), problem.at(1), 0}, problem.at(2), 0, 0});
  }

 private:
  std::uint64_t documents_ = 0, files_ = 0;
  std::vector<InputProblem> first_, recent_;
};

/// One run: the stages behind the pipeline, and what has been counted.
class Run {
 public:
  Run(const Tokenizer& tokenizer, const PrepareOptions& options, std::vector<std::string> files, OutputFolder& output)
      : tokenizer_(tokenizer),
        options_(options),
        files_(std::move(files)),
        output_(output),
        train_(tokenizer, output.staging(), "train", options.shard_tokens, files_),
        validation_(tokenizer, output.staging(), "validation", options.shard_tokens, files_),
        holdout_(options.validation_fraction, train_, validation_,
                 [this] { return fewer_documents(files_, pipeline_options(tokenizer_, options_, {}).reader, kFewDocuments); }),
        dedup_(output.staging() + "/keys", [this](TokenizedBatch batch) { holdout_.add(std::move(batch)); }),
        resumable_(std::find(files_.begin(), files_.end(), "-") == files_.end()),
        journal_(output.staging() + "/journal.json", settings_of(tokenizer, options, files_), options.journal_seconds) {}

  /// Takes up what an interrupted run left, or clears it away.
  void begin() {
    if (options_.resume && !resumable_)
      throw std::invalid_argument("--resume: standard input cannot be read again; put the text into a file, or leave --resume away");
    if (options_.resume && output_.has("journal.json")) {
      output_.keep();  // whatever happens now, it stays
      const Json state = journal_.load();
      kept_ = true;
      restore(state);
      note(fmt::format("resumed after {} tokens in {} finished shards and the beginnings of others", done(),
                       train_.info().shards.size() + validation_.info().shards.size()));
      return;
    }
    if (options_.resume) note("there was nothing to resume: the run began at the beginning");
    if (!options_.resume && output_.has("journal.json"))
      note("what an interrupted run had left in the output folder was cleared away; --resume would have gone on with it");
    output_.clear();
  }

  void go(const std::function<void(const PrepareProgress&)>& progress, const std::function<double()>& seconds) {
    PreparePipeline pipeline(files_, tokenizer_, pipeline_options(tokenizer_, options_, start_));
    PrepareProgress now;
    now.total_input_bytes = pipeline.total_bytes();
    double shown = 0;
    while (auto batch = pipeline.next()) {
      for (const TokenizedPiece& piece : batch->pieces) {
        now.text_bytes += piece.text_bytes;
        if (!piece.utf8) not_utf8_.add({piece.at, {}, 1, 0});
      }
      now.tokens += batch->tokens.size();
      for (InputProblem& problem : batch->problems) bad_.add(std::move(problem));
      if (now.input_bytes == 0 && kept_) now.resumed_bytes = batch->input_bytes;
      now.input_bytes = batch->input_bytes;
      const InputPosition end = batch->end;
      if (options_.dedup) {
        dedup_.add(std::move(*batch));
      } else {
        holdout_.add(std::move(*batch));
      }
      record_if_due(end);
      now.seconds = seconds();
      if (progress && now.seconds - shown > 0.2) progress(now), shown = now.seconds;
    }
    if (options_.dedup) dedup_.finish();
    holdout_.finish();
    summary_.text_bytes = now.text_bytes;
    summary_.tokens = now.tokens;
  }

  PrepareSummary finish() {
    DatasetInfo& info = summary_.dataset;
    info.train = train_.finish();
    info.validation = validation_.finish();
    if (info.train.tokens + info.validation.tokens == 0)
      throw std::invalid_argument(fmt::format("{}: the input is empty: no text in {} file{}{}", options_.inputs.front(), files_.size(),
                                              files_.size() == 1 ? "" : "s",
                                              bad_.documents() ? fmt::format(", {} bad lines left out", bad_.documents()) : ""));
    if (info.train.tokens == 0) throw std::invalid_argument("no text was left to train on; lower --validation-fraction");
    info.directory = options_.output;
    info.tokenizer_name = tokenizer_.name();
    info.tokenizer_hash = tokenizer_.hash();
    info.vocabulary = tokenizer_.vocabulary();
    info.end_of_text = tokenizer_.end_of_text();
    info.sources = train_.sources();
    for (std::size_t i = 0; i < info.sources.size(); ++i) {
      info.sources[i].documents += validation_.sources()[i].documents;
      info.sources[i].text_bytes += validation_.sources()[i].text_bytes;
      info.sources[i].tokens += validation_.sources()[i].tokens;
    }
    info.preparation = {options_.validation_fraction,
                        holdout_.by_pieces() ? "pieces" : "documents",
                        options_.dedup,
                        dedup_.duplicates(),
                        dedup_.duplicate_bytes(),
                        bad_.documents(),
                        bad_.files()};
    info.unigram_entropy = unigram_loss(train_.token_counts(), train_.token_counts(), 0);
    info.validation_unigram_loss = unigram_loss(validation_.token_counts(), train_.token_counts(), 1);
    tokenizer_.save(output_.staging() + "/tokenizer.json");
    output_.commit(dataset_manifest(info));
    summary_.skipped_lines = bad_.documents();
    for (const InputProblem& problem : bad_.first()) summary_.problems.push_back(problem.what);
    add_notices();
    return std::move(summary_);
  }

  /// What to say behind an error: how to go on.
  std::string advice() const { return !kept_ ? "" : ". What was done so far is kept: the same command with --resume goes on with it"; }

 private:
  std::uint64_t done() const {
    std::uint64_t tokens = 0;
    for (const SplitWriter* split : {&train_, &validation_})
      for (const SourceInfo& source : split->sources()) tokens += source.tokens;
    return tokens;
  }
  void note(std::string line) { summary_.notices.push_back(std::move(line)); }

  void record_if_due(const InputPosition& end) {
    const std::size_t shards = train_.info().shards.size() + validation_.info().shards.size();
    if (!resumable_ || !holdout_.decided() || !journal_.due(shards > recorded_shards_)) return;
    const InputPosition position = options_.dedup ? dedup_.held().value_or(end) : end;
    Json state = {{"position", to_json(position)},     {"train", train_.state()}, {"validation", validation_.state()},
                  {"holdout", holdout_.state()},       {"dedup", dedup_.state()}, {"not_utf8", not_utf8_.state_before(position)},
                  {"bad", bad_.state_before(position)}};
    journal_.record(std::move(state));
    recorded_shards_ = shards;
    train_.remove_finished_spools();
    validation_.remove_finished_spools();
    output_.keep();
    kept_ = true;
  }

  void restore(const Json& state) {
    start_ = position_from(state.at("position"));
    train_.restore(state.at("train"));
    validation_.restore(state.at("validation"));
    holdout_.restore(state.at("holdout"));
    dedup_.restore(state.at("dedup"));
    not_utf8_.restore(state.at("not_utf8"));
    bad_.restore(state.at("bad"));
    recorded_shards_ = train_.info().shards.size() + validation_.info().shards.size();
  }

  void add_notices() {
    const DatasetInfo& info = summary_.dataset;
    if (std::string repeated = repeated_files(files_); !repeated.empty() && !options_.dedup) note(std::move(repeated));
    if (holdout_.by_pieces() && info.validation.tokens > 0)
      note(fmt::format("fewer than {} documents: pieces of up to {} KiB were held out for validation instead of whole documents", kFewDocuments,
                       kPieceBytes >> 10));
    if (options_.validation_fraction > 0 && info.validation.tokens == 0) note("the validation split is empty: the text is too short, or all alike");
    if (not_utf8_.documents())
      note(fmt::format("bytes that are not UTF-8 were kept as they are, in {} of the pieces of up to {} KiB, first in {}: is it text?",
                       not_utf8_.documents(), kPieceBytes >> 10, files_[not_utf8_.first().front().at.file]));
    if (bad_.documents()) note(fmt::format("{} bad line{} left out", bad_.documents(), bad_.documents() == 1 ? " was" : "s were"));
    if (bad_.files())
      note(fmt::format("{} damaged file{} left out from where the damage begins", bad_.files(), bad_.files() == 1 ? " was" : "s were"));
    if (dedup_.duplicates())
      note(fmt::format("{} document{} ({} bytes) whose text had come before {} left out", dedup_.duplicates(), dedup_.duplicates() == 1 ? "" : "s",
                       dedup_.duplicate_bytes(), dedup_.duplicates() == 1 ? "was" : "were"));
  }

  const Tokenizer& tokenizer_;
  const PrepareOptions& options_;
  const std::vector<std::string> files_;
  OutputFolder& output_;
  SplitWriter train_, validation_;
  Holdout holdout_;
  Deduplicator dedup_;
  const bool resumable_;
  PrepareJournal journal_;
  InputPosition start_;
  PrepareSummary summary_;
  Tally not_utf8_, bad_;
  std::size_t recorded_shards_ = 0;
  bool kept_ = false;
};

/// The interrupted run had finished but for moving its parts into place.
PrepareSummary recovered_dataset(const PrepareOptions& options) {
  PrepareSummary summary;
  summary.dataset = read_dataset(options.output);
  summary.notices = {"the interrupted run was complete but for its last step, which is done now"};
  return summary;
}

}  // namespace

PrepareSummary prepare_dataset(const Tokenizer& tokenizer, const PrepareOptions& options,
                               const std::function<void(const PrepareProgress&)>& progress) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  check(options);
  std::vector<std::string> files = input_files(options);
  try {
    OutputFolder output(options.output, options.overwrite);
    if (output.recovered() && options.resume) return recovered_dataset(options);
    if (output.recovered() && !options.overwrite)
      throw std::invalid_argument(
          fmt::format("{}: holds a dataset: that of an interrupted run, which was complete but for its last step and is in "
                      "place now; choose another folder, or replace it with --overwrite",
                      options.output));
    Run run(tokenizer, options, std::move(files), output);
    run.begin();
    try {
      run.go(progress, seconds);
      PrepareSummary summary = run.finish();
      summary.seconds = seconds();
      return summary;
    } catch (const fs::filesystem_error& e) {
      throw std::runtime_error(fmt::format("{}: {}{}", e.path1().string(), e.code().message(), run.advice()));
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument(e.what() + run.advice());
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(e.what() + run.advice());
    }
  } catch (const fs::filesystem_error& e) {
    throw std::runtime_error(fmt::format("{}: {}", e.path1().string(), e.code().message()));
  }
}

}  // namespace tessera
