#include "trainer/open_checkpoint.h"

#include <fmt/core.h>

#include <algorithm>
#include <stdexcept>

#include "trainer/collective.h"
#include "trainer/device.h"
#include "trainer/preflight.h"

namespace tessera {
namespace {

std::unique_ptr<Tokenizer> load_own_tokenizer(const std::string& directory) {
  try {
    return load_tokenizer("bpe:" + directory + "/tokenizer.json");
  } catch (const std::invalid_argument& e) {  // not the user's file: a damaged part of the checkpoint
    throw std::runtime_error(e.what());
  }
}

}  // namespace

CheckpointContents read_checkpoint(const std::string& path) {
  CheckpointContents c{read_checkpoint_info(resolve_checkpoint(path)), {}, nullptr};
  const CheckpointInfo& info = c.info;
  c.config = parse_stored_config(info.config, info.directory + "/model.h5");
  find_training_data(c.config.data, info.dataset.working_directory);
  resolve_vocabulary(c.config, info.dataset.vocabulary, info.directory);
  if (info.dataset.tokenizer_hash.empty()) return c;
  c.tokenizer = load_own_tokenizer(info.directory);
  if (c.tokenizer->hash() != info.dataset.tokenizer_hash)
    throw std::runtime_error(fmt::format("{}/tokenizer.json is not the tokenizer that the model was trained with (SHA-256 {}, expected {})",
                                         info.directory, c.tokenizer->hash(), info.dataset.tokenizer_hash));
  return c;
}

void require_text(const CheckpointInfo& info, const std::string& purpose) {
  if (info.dataset.tokenizer_hash.empty())
    throw ConfigError(fmt::format("{}: trained on the synthetic task {}, and has no tokenizer: {} needs a model of text", info.directory,
                                  info.dataset.path, purpose));
}

OpenCheckpoint::OpenCheckpoint(const std::string& path, Use use, const Options& o, Communicator& host) {
  agree(host, [&] {
    CheckpointContents contents = read_checkpoint(path);
    info = std::move(contents.info);
    if (use == Use::generate) require_text(info, "generating text");
    config = std::move(contents.config);
    tokenizer = std::move(contents.tokenizer);
    if (o.sequence == 1) config.parallel.share_gpu = true;  // nothing is exchanged between GPUs
    // How ranks share a sequence here has nothing to do with how they did in training.
    config.parallel.exchange = ParallelConfig().exchange;
    config.parallel.layout = ParallelConfig().layout;
    if (host.size() % o.sequence != 0)
      throw ConfigError(fmt::format("--sequence {}: {} rank{} do not make groups of {}; expected a divisor of {}", o.sequence, host.size(),
                                    host.size() == 1 ? "" : "s", o.sequence, host.size()));
    set_batch(use, o);
    if (o.tile > 0) config.model.attention.tile_query = config.model.attention.tile_key = o.tile;
    if (!o.visit.empty()) config.model.attention.visit = o.visit == "all" ? Visit::all : Visit::active;
  });
  choose_device(o.device, host);
  ops = make_ops(config.device, o.threads, config.parallel, host, use == Use::generate && !o.fast);
  ranks = lay_out_ranks(host, o.sequence);
  if (o.sequence > 1) comm = make_device_communicator(config.parallel, host, *ops);
  agree(host, [&] {
    Gpt::Options options;
    options.micro_batch = micro_batch;
    options.tokens = context;
    options.training = false;
    options.sequence = {o.sequence, ranks.place, config.parallel.layout, config.parallel.exchange};
    if (use == Use::generate) {
      options.cache = o.cache_sequences;
      if (o.sequence_tokens > 0) options.tokens = std::min(o.sequence_tokens, config.model.context);
    }
    model = std::make_unique<Gpt>(config.model, *ops, plan, options);
    if (use == Use::evaluate) batch = std::make_unique<BatchBuffer>(plan, micro_batch, std::ssize(model->positions()));
  });
  check_head_size(host, *ops, config.model.heads, config.model.width);
  check_exchange(host, comm ? *comm : host, *ops, exchange_partners(ranks, model->options().sequence.exchange));
  if (host.size() > 1) check_memory(host, *ops, plan.total_bytes());  // alone, allocate() itself looks
  agree(host, [&] {
    plan.allocate(*ops);
    model->bind({comm ? comm.get() : &host, ranks.members});
    load_model(info.directory, *model, *ops);
  });
}

void OpenCheckpoint::set_batch(Use use, const Options& o) {
  ModelConfig& m = config.model;
  const std::int64_t trained = m.context;
  context = trained;
  micro_batch = 1;
  if (use == Use::generate) return;
  if (o.context > 0) context = o.context;
  if (context > trained && m.positions == Positions::learned)
    throw ConfigError(fmt::format("--context {}: {} has learned positions for {} tokens: at most that", context, info.directory, trained));
  m.context = std::max(context, trained);
  micro_batch =
      o.micro_batch > 0 ? o.micro_batch : std::clamp<std::int64_t>(config.train.micro_batch * trained / context, 1, config.train.micro_batch);
}

void OpenCheckpoint::choose_device(const std::string& wanted, Communicator& host) {
  if (!wanted.empty()) {
    config.device = wanted;
    return;
  }
  const std::string problem = device_problem(config.device);
  const bool missing = host.max(problem.empty() ? 0 : 1) != 0;  // on any rank: all compute on the same kind of device
  if (!missing) return;
  notice = fmt::format("trained on {}, computed on cpu: {}", config.device, problem.empty() ? "a rank has no such device" : problem);
  config.device = "cpu";
}

}  // namespace tessera
