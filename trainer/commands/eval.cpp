// tessera eval: the loss of a checkpoint on a split of prepared data or on its synthetic task, alone or under mpirun; CORE is in eval_core.cpp.

#include <fmt/core.h>

#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "data/files.h"
#include "trainer/collective.h"
#include "trainer/commands/commands.h"
#include "trainer/commands/eval_core.h"
#include "trainer/evaluate.h"
#include "trainer/host_threads.h"
#include "trainer/open_checkpoint.h"
#include "trainer/open_data.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string checkpoint, data, split = "validation", output;
  std::int64_t batches = 0;
  OpenCheckpoint::Options open;
  EvalCoreOptions core;
  bool json = false;
};

/// What there is to say of text. unigram_loss: nats a token of a guess from the training tokens' frequencies alone, the first thing a model must
/// beat.
Json of_text(const Evaluation& e, const DatasetInfo& data, const std::string& split) {
  return {{"perplexity", e.perplexity()},
          {"bits_per_byte", e.bits_per_byte},
          {"unigram_loss", split == "train" ? data.unigram_entropy : data.validation_unigram_loss},
          {"tokens", e.tokens},
          {"bytes", e.bytes}};
}

/// And of a task. chance: accuracy of any guess that does not look.
Json of_task(const Evaluation& e, const SyntheticTask& task) {
  return {{"accuracy", e.accuracy()},
          {"chance", 1.0 / static_cast<double>(possible_answers(task))},
          {"tokens", e.tokens},
          {"accuracy_by_distance", accuracy_by_distance(*e.answers)}};
}

Json to_json(const Evaluation& e, const OpenCheckpoint& c, const std::string& data, const std::string& split, const Json& more) {
  const AttentionConfig& a = c.config.model.attention;
  const AttentionCounts counts(c.config.model, e.counters, e.sequences, e.sequence_tokens);
  const AttentionShares all = counts.all();
  Json layers = Json::array();
  for (int l = 0; l < c.config.model.layers; ++l) {
    const AttentionShares s = counts.layer(l);
    layers.push_back({{"layer", l}, {"edge_sparsity", s.edge_sparsity}, {"tile_skip_rate", s.tile_skip_rate}, {"empty_row_share", s.empty_rows}});
  }
  Json out = {{"checkpoint", c.info.directory}, {"step", c.info.position.step}, {"data", data}, {"split", split}, {"loss", e.loss}};
  out.update(more);
  out.update({{"sequences", e.sequences},
              {"sequence_tokens", e.sequence_tokens},
              {"edge_sparsity", all.edge_sparsity},
              {"tile_skip_rate", all.tile_skip_rate},
              {"tile", {a.tile_query, a.tile_key}},
              {"empty_row_share", all.empty_rows},
              {"device", c.ops->device_name()},
              {"visit", a.visit == Visit::all ? "all" : "active"},
              {"losses_compared", e.compared},
              {"layers", layers},
              {"seconds", e.seconds}});
  return out;
}

void print(const Json& r) {
  fmt::print("checkpoint      {} (step {})\n", r["checkpoint"].get<std::string>(), r["step"].get<std::int64_t>());
  const bool text = !r.contains("accuracy");
  fmt::print("data            {}, {}: {} {} in {} sequences, {}\n", r["data"].get<std::string>(), r["split"].get<std::string>(),
             r["tokens"].get<std::int64_t>(), text ? "tokens" : "answers", r["sequences"].get<std::int64_t>(),
             text ? fmt::format("{} bytes of text", r["bytes"].get<std::int64_t>()) : fmt::format("{} tokens each", r["sequence_tokens"].dump()));
  fmt::print("loss            {:.6f} nats {}\n", r["loss"].get<double>(), text ? "a token" : "an answer");
  if (text) {
    fmt::print("perplexity      {:.4f}\n", r["perplexity"].get<double>());
    fmt::print("bits per byte   {:.6f}\n", r["bits_per_byte"].get<double>());
    fmt::print("unigram guess   {:.6f} nats a token, from the frequencies of the training tokens alone\n", r["unigram_loss"].get<double>());
  } else {
    fmt::print("accuracy        {:.6f}; by chance {:.6f}\n", r["accuracy"].get<double>(), r["chance"].get<double>());
    for (const Json& row : r["accuracy_by_distance"])
      fmt::print("  {:<13} {:.6f} of {} answers\n", distance_text(row["from"], row["to"]), row["accuracy"].get<double>(), row["answers"].dump());
  }
  const auto shares = [](const std::string& name, const Json& s) {
    fmt::print("{:<15} edge sparsity {:.4f}, tile skip rate {:.4f}, empty rows {:.4f}\n", name, s["edge_sparsity"].get<double>(),
               s["tile_skip_rate"].get<double>(), s["empty_row_share"].get<double>());
  };
  shares("all layers", r);
  for (const Json& layer : r["layers"]) shares(fmt::format("  layer {}", layer["layer"].get<int>()), layer);
  fmt::print("tiles           {} queries x {} keys\n", r["tile"][0].get<int>(), r["tile"][1].get<int>());
  if (const auto compared = r["losses_compared"].get<std::uint64_t>(); compared > 0)
    fmt::print("skipping        changed nothing: {} losses, computed with every tile and with the active ones only, are equal to the bit\n",
               compared);
}

/// Of several datasets: each, and the loss on their mixture.
Json mixture(std::vector<Json> each, const Evaluation& all, const TrainingData& data, const std::string& split) {
  for (std::size_t i = 0; i < each.size(); ++i) each[i]["share"] = data.share(i);
  return {{"checkpoint", each[0]["checkpoint"]},
          {"step", each[0]["step"]},
          {"data", data.names()},
          {"split", split},
          {"loss", all.loss},
          {"perplexity", all.perplexity()},
          {"bits_per_byte", all.bits_per_byte},
          {"tokens", all.tokens},
          {"bytes", all.bytes},
          {"seconds", all.seconds},
          {"datasets", each}};
}

void eval(const Options& o, Communicator& comm) {
  std::vector<Evaluator> evaluators;
  OpenCheckpoint::Options options = o.open;
  options.threads = threads_for_rank(comm, o.open.threads);
  TrainingData data;
  if (!o.data.empty()) agree(comm, [&] { data.parts.push_back({open_data(o.data, "--data"), 1}); });
  const OpenCheckpoint open(o.checkpoint, OpenCheckpoint::Use::evaluate, options, comm);
  agree(comm, [&] {
    if (!o.data.empty()) require_text(open.info, "--data");
    if (o.data.empty()) data = open_training_data(open.config.data);
    const auto places = o.open.sequence > 1 ? open.model->positions() : std::vector<std::int32_t>{};
    if (data.synthetic) {
      const auto split = o.split == "train" ? SyntheticSource::Split::train : SyntheticSource::Split::validation;
      evaluators.emplace_back(SyntheticSource(*data.synthetic, open.context, split, open.config.run.seed), open.micro_batch, places);
      return;
    }
    const DatasetInfo& first = data.first();
    if (open.info.dataset.tokenizer_hash != first.tokenizer_hash)
      throw ConfigError(
          fmt::format("{}: made with tokenizer {} (hash {}), and {} was trained with {} (hash {}). Prepare the text with the "
                      "checkpoint's own: --tokenizer bpe:{}/tokenizer.json",
                      data.names(), first.tokenizer_name, first.tokenizer_hash.substr(0, 12), open.info.directory, open.info.dataset.tokenizer_name,
                      open.info.dataset.tokenizer_hash.substr(0, 12), open.info.directory));
    for (const MixPart& part : data.parts) {
      const SplitInfo& split = o.split == "train" ? part.data.train : part.data.validation;
      evaluators.emplace_back(part.data, split, *open.tokenizer, open.context, open.micro_batch, places);
      if (evaluators.back().batches() == 0) throw ConfigError(fmt::format("{}: split {} holds no text to evaluate", part.data.directory, o.split));
    }
  });
  if (comm.rank() == 0 && !open.notice.empty()) fmt::print(stderr, "tessera: note: {}\n", open.notice);
  const Skipping skipping = o.open.visit == "all" ? Skipping::compare : Skipping::as_configured;
  std::vector<Evaluation> found;
  std::vector<Json> results;
  std::vector<double> shares;
  for (std::size_t i = 0; i < evaluators.size(); ++i) {
    found.push_back(evaluators[i].run(*open.model, *open.ops, comm, open.ranks, *open.batch, o.batches, skipping));
    const Evaluation& e = found.back();
    const DatasetInfo* text = data.synthetic ? nullptr : &data.parts[i].data;
    results.push_back(
        to_json(e, open, text ? text->directory : data.names(), o.split, text ? of_text(e, *text, o.split) : of_task(e, *data.synthetic)));
    shares.push_back(data.share(i));
  }
  if (comm.rank() != 0) return;
  const Evaluation all = mixed(found, shares);
  const Json result = results.size() == 1 ? results[0] : mixture(results, all, data, o.split);
  if (!o.output.empty()) write_file(o.output, result.dump(2) + "\n");
  if (o.json) {
    std::cout << result.dump(2) << "\n";
    return;
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    print(results[i]);
    if (results.size() > 1) fmt::print("share           {:.4g} % of the mixture\n\n", 100 * shares[i]);
  }
  if (results.size() > 1)
    fmt::print("the mixture     loss {:.6f}, perplexity {:.4f}, bits per byte {:.6f}\n", all.loss, all.perplexity(), all.bits_per_byte);
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("eval", "Loss, perplexity, bits per byte and sparsity of a checkpoint on prepared data, or its CORE");
  command->add_option("CHECKPOINT", o->checkpoint, "A step folder, or a run folder (its newest checkpoint)")->type_name("")->required();
  command->add_option("--data", o->data, "Folder that tessera prepare wrote (default: what the checkpoint was trained on, synthetic tasks too)")
      ->type_name("DIR");
  command->add_option("--split", o->split, "Which part of it")->check(CLI::IsMember({"train", "validation"}))->capture_default_str();
  command->add_option("--batches", o->batches, "Evaluate this many micro-batches from the start of the split; 0: all of it")
      ->type_name("N")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  command
      ->add_option("--context", o->open.context, "Tokens a sequence; more than in training only without learned positions (default: as in training)")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--micro-batch", o->open.micro_batch, "Sequences at once (default: train.micro_batch, or as many fewer as --context is longer)")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--sequence", o->open.sequence, "Ranks that share each sequence, where one cannot hold it")
      ->type_name("N")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      ->add_option("--visit", o->open.visit,
                   "Attention tiles to compute (default: as in training). all: both ways, to prove that skipping changes no bit of any loss")
      ->check(CLI::IsMember({"all", "active"}));
  command
      ->add_option("--device", o->open.device,
                   "Where to compute; ranks share GPUs where there are fewer (default: as in training where that is there, else cpu)")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--threads", o->open.threads, "CPU threads a rank; 0: the host's cores divided by its ranks")
      ->type_name("N")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  add_eval_core_options(*command, o->core);
  command->add_flag("--json", o->json, "Print JSON");
  command->add_option("--output", o->output, "Write the JSON to a file too")->type_name("FILE");
  command->footer(
      "Under mpirun the text is divided among the ranks; the numbers are the same.\n"
      "Examples:\n"
      "  tessera eval runs/mine --data data/mine --split validation --json\n"
      "  tessera eval runs/mine --data data/mine --context 4096 --visit all\n"
      "  tessera eval runs/mine --core eval_bundle --tasks hellaswag,lambada_openai --limit 200");
  command->callback([o] {
    const auto comm = make_mpi_communicator();
    run_on_ranks(*comm, [&] {
      agree(*comm, [&] {  // before the work
        if (const auto folder = std::filesystem::path(o->output).parent_path(); !folder.empty() && !std::filesystem::is_directory(folder))
          throw ConfigError(fmt::format("--output {}: there is no folder {}", o->output, folder.string()));
      });
      if (o->core.bundle.empty())
        eval(*o, *comm);
      else
        eval_core(o->checkpoint, o->core, o->open, o->json, o->output, *comm);
    });
  });
}

}  // namespace tessera
