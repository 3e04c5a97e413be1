#include "trainer/checkpoint.h"

#include <fmt/chrono.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <stdexcept>

#include "data/files.h"
#include "data/sha256.h"
#include "trainer/collective.h"
#include "trainer/schema.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

constexpr std::int64_t kFormat = 1;           // of the folder and of model.h5
constexpr std::int64_t kOptimizerFormat = 2;  // 1: one segment, as attributes
constexpr const char* kMarker = "COMPLETE.json";

std::string optimizer_name(int rank, int ranks) { return fmt::format("optimizer_{:04d}_of_{:04d}.h5", rank, ranks); }

/// Equal when the flat buffers hold the same parameters in the same places.
std::string layout_hash(const ParameterLayout& layout) {
  std::string text;
  for (const ParameterInfo& p : layout.parameters) text += fmt::format("{} {} {}\n", p.name, p.shape.str(), p.offset);
  return sha256_hex(text);
}

Hdf5Shape extents(const Shape& shape) {
  Hdf5Shape s;
  for (int i = 0; i < shape.rank; ++i) s.push_back(static_cast<std::uint64_t>(shape[i]));
  return s;
}

std::vector<float> to_host(Ops& ops, const Tensor& x) {
  std::vector<float> host(static_cast<std::size_t>(x.numel()));
  ops.download(host.data(), x);
  return host;
}

void write_model(const std::string& file, const CheckpointRequest& r, const ParameterLayout& layout, const ParameterValues& values,
                 const Hdf5Shape& threshold_shape, const std::vector<float>& thresholds, const std::vector<float>& balances) {
  Hdf5File h5 = Hdf5File::create(file);
  h5.set_attribute("format", kFormat);
  h5.set_attribute("step", r.position.step);
  h5.set_attribute("updates", r.position.updates);
  h5.set_attribute("tokens", r.position.tokens);
  h5.set_attribute("skipped", r.position.skipped);
  h5.set_attribute("nonfinite_in_a_row", r.position.nonfinite_in_a_row);
  h5.set_attribute("parameters", layout.count);
  h5.set_attribute("config", r.config);
  Json dataset = {{"path", r.dataset.path},
                  {"tokenizer", r.dataset.tokenizer_name},
                  {"tokenizer_hash", r.dataset.tokenizer_hash},
                  {"vocabulary", r.dataset.vocabulary},
                  {"train_tokens", r.dataset.train_tokens},
                  {"fingerprint", r.dataset.fingerprint},
                  {"working_directory", r.dataset.working_directory}};
  for (const Provenance::Part& part : r.dataset.mix)
    dataset["mix"].push_back({{"path", part.path}, {"fingerprint", part.fingerprint}, {"share", part.share}, {"train_tokens", part.train_tokens}});
  h5.set_attribute("dataset", dataset.dump());
  if (!r.init.path.empty()) h5.set_attribute("init", Json{{"checkpoint", r.init.path}, {"step", r.init.step}, {"sha256", r.init.sha256}}.dump());
  h5.set_attribute("created", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))));
  for (const ParameterInfo& p : layout.parameters) h5.write<float>("parameters/" + p.name, extents(p.shape), values(p));
  h5.write<float>("thresholds", threshold_shape, thresholds);
  if (!balances.empty()) h5.write<float>("balances", threshold_shape, balances);
  h5.close();
}

void write_optimizer(const std::string& file, std::int64_t step, const ParameterLayout& layout, const ShardedAdamW& optimizer, Ops& ops) {
  Hdf5File h5 = Hdf5File::create(file);
  h5.set_attribute("format", kOptimizerFormat);
  h5.set_attribute("step", step);
  h5.set_attribute("parameters", layout.count);
  h5.set_attribute("layout", layout_hash(layout));
  if (optimizer.count() > 0) {
    std::vector<std::int64_t> segments;
    for (const ShardedAdamW::Segment& s : optimizer.segments()) segments.insert(segments.end(), {s.first, s.count});
    h5.write<std::int64_t>("segments", {optimizer.segments().size(), 2}, segments);
    const Hdf5Shape shape{static_cast<std::uint64_t>(optimizer.count())};
    h5.write<float>("m", shape, to_host(ops, optimizer.m()));
    h5.write<float>("v", shape, to_host(ops, optimizer.v()));
  }
  h5.close();
}

/// {"name", "bytes", "sha256"} of a file just written.
Json receipt(const std::string& directory, const std::string& name) {
  const std::string path = directory + "/" + name;
  return {{"name", name}, {"bytes", fs::file_size(path)}, {"sha256", sha256_file(path)}};
}

void write_marker(const std::string& directory, std::int64_t step, int ranks, const Json& files) {
  write_file(directory + "/" + kMarker, Json{{"format", kFormat}, {"step", step}, {"ranks", ranks}, {"files", files}}.dump(2) + "\n");
}

/// Removes a checkpoint so that a removal cut short leaves no complete one.
void remove_checkpoint(const std::string& directory) {
  std::error_code ignored;
  fs::remove(directory + "/" + kMarker, ignored);
  fs::remove_all(directory, ignored);
}

/// Whether it has what write_marker() writes.
bool is_marker(const Json& marker) {
  const auto has = [](const Json& object, const char* key, bool (Json::*is)() const) { return object.contains(key) && (object[key].*is)(); };
  for (const char* key : {"format", "step", "ranks"})
    if (!has(marker, key, &Json::is_number_integer)) return false;
  return has(marker, "files", &Json::is_array) && std::ranges::all_of(marker["files"], [&](const Json& file) {
           return has(file, "name", &Json::is_string) && has(file, "bytes", &Json::is_number_unsigned) && has(file, "sha256", &Json::is_string);
         });
}

Json read_marker(const std::string& directory) {
  const std::string path = directory + "/" + kMarker;
  Json marker = Json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  if (marker.is_object() && marker.contains("format") && marker["format"].is_number() && marker["format"] != kFormat)
    throw std::runtime_error(fmt::format("{}: format {}, this build reads format {}", path, marker["format"].dump(), kFormat));
  if (!is_marker(marker))
    throw std::runtime_error(
        fmt::format("{}: damaged: expected a JSON object with the numbers format, step and ranks and the list files, of each its name, bytes and "
                    "sha256. Use another checkpoint, as that of an earlier step beside it; --resume finds it",
                    path));
  return marker;
}

/// What the marker says beside checksums, which no checksum covers: compared with the files.
void check_marker(const std::string& directory, const Json& marker, std::vector<std::string>& problems) {
  const auto damaged = [&](const std::string& what) { problems.push_back(fmt::format("{}/{}: damaged: {}", directory, kMarker, what)); };
  const auto step = marker.at("step").get<std::int64_t>(), found = read_checkpoint_info(directory).position.step;
  if (step != found) damaged(fmt::format("step {}, and model.h5 is of step {}", step, found));
  std::set<std::string> listed;
  for (const Json& file : marker.at("files")) listed.insert(file.at("name").get<std::string>());
  const auto ranks = marker.at("ranks").get<std::int64_t>();
  const std::int64_t beside = read_checkpoint_info(directory).dataset.tokenizer_hash.empty() ? 1 : 2;  // the model, and a tokenizer if it has one
  bool complete = ranks >= 0 && static_cast<std::int64_t>(listed.size()) == ranks + beside && listed.contains("model.h5") &&
                  (beside == 1 || listed.contains("tokenizer.json"));
  for (int r = 0; complete && r < ranks; ++r) complete = listed.contains(optimizer_name(r, static_cast<int>(ranks)));
  if (!complete) damaged(fmt::format("it lists {} files, not the model, the tokenizer and the optimizer of {} ranks", listed.size(), ranks));
}

Hdf5File open_part(const std::string& path, std::int64_t newest_format) {
  try {
    Hdf5File h5 = Hdf5File::open(path);
    const std::int64_t format = h5.integer_attribute("format");
    if (format < 1 || format > newest_format)
      throw std::runtime_error(fmt::format("{}: format {}, this build reads formats up to {}", path, format, newest_format));
    return h5;
  } catch (const std::invalid_argument& e) {  // a part of a checkpoint that is not there is damage, not bad usage
    throw std::runtime_error(e.what());
  }
}

/// The pieces of the flat parameters whose moments an optimizer file holds; `local` is where in its m and v.
std::vector<ShardedAdamW::Segment> read_segments(const Hdf5File& h5, std::int64_t parameters) {
  std::vector<std::int64_t> pairs;
  if (h5.integer_attribute("format") == 1) {
    pairs = {h5.integer_attribute("first"), h5.integer_attribute("count")};
  } else if (h5.contains("segments")) {  // not when the rank owned nothing
    pairs = h5.read<std::int64_t>("segments");
  }
  std::vector<ShardedAdamW::Segment> segments;
  std::int64_t local = 0;
  for (std::size_t i = 0; i + 1 < pairs.size(); i += 2) {
    const std::int64_t first = pairs[i], count = pairs[i + 1];
    if (first < 0 || count < 0 || count > parameters || first > parameters - count)
      throw std::runtime_error(fmt::format("{}: {} elements from {} on, of a model of {}: the file is damaged", h5.path(), count, first, parameters));
    segments.push_back({first, local, count});
    local += count;
  }
  return segments;
}

}  // namespace

Provenance provenance_of(const TrainingData& data) {
  if (data.synthetic) return {data.names(), "", "", sha256_hex(write_synthetic(data.synthetic).dump()), data.synthetic->vocabulary, 0, {}};
  const DatasetInfo& first = data.first();
  Provenance all{data.names(), first.tokenizer_name, first.tokenizer_hash, "", first.vocabulary, data.train_tokens(), {}};
  std::string parts;
  for (std::size_t i = 0; i < data.parts.size(); ++i) {
    const DatasetInfo& info = data.parts[i].data;
    std::string checksums;
    for (const ShardInfo& shard : info.train.shards) checksums += shard.sha256 + "\n";
    all.mix.push_back({info.directory, sha256_hex(checksums), data.share(i), info.train.tokens});
    parts += fmt::format("{} {}\n", all.mix.back().fingerprint, all.mix.back().share);
  }
  std::error_code gone;  // a folder that is removed while one is in it
  all.working_directory = fs::current_path(gone).string();
  all.fingerprint = data.parts.size() == 1 ? all.mix[0].fingerprint : sha256_hex(parts);
  if (data.parts.size() == 1) all.mix.clear();
  return all;
}

std::string checkpoint_name(std::int64_t step) { return fmt::format("step_{:08d}", step); }

std::vector<CheckpointEntry> list_checkpoints(const std::string& checkpoints) {
  static const std::regex pattern("step_([0-9]{8,18})");
  std::vector<CheckpointEntry> found;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(checkpoints, none)) {
    const std::string name = entry.path().filename();
    std::smatch part;
    if (entry.is_directory(none) && std::regex_match(name, part, pattern))
      found.push_back({std::stoll(part[1]), entry.path(), fs::exists(entry.path() / kMarker, none)});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return found;
}

std::string resolve_checkpoint(const std::string& path) {
  if (fs::exists(path + "/" + kMarker)) return path;
  if (!fs::is_directory(path))
    throw std::invalid_argument(path + ": no such folder; expected a checkpoint (step_NNNNNNNN), a run or its checkpoints");
  if (fs::exists(path + "/model.h5"))
    throw std::invalid_argument(
        fmt::format("{}: an incomplete checkpoint: {} is missing, so writing it was cut short. Use an earlier one", path, kMarker));
  for (const std::string& folder : {path + "/checkpoints", path}) {
    auto entries = list_checkpoints(folder);
    std::erase_if(entries, [](const CheckpointEntry& e) { return !e.complete; });
    if (!entries.empty()) return entries.back().directory;
  }
  throw std::invalid_argument(fmt::format("{}: no complete checkpoint here: looked for {} and for step_NNNNNNNN/{} in it and in {}/checkpoints", path,
                                          kMarker, kMarker, path));
}

std::vector<std::string> verify_checkpoint(const std::string& directory) {
  std::vector<std::string> problems;
  try {
    const Json marker = read_marker(directory);
    for (const Json& file : marker.at("files")) {
      const std::string path = directory + "/" + file.at("name").get<std::string>();
      const auto bytes = file.at("bytes").get<std::uint64_t>();
      if (!fs::exists(path)) {
        problems.push_back(path + ": missing");
      } else if (const auto found = fs::file_size(path); found != bytes) {
        problems.push_back(fmt::format("{}: {} bytes, expected {}", path, found, bytes));
      } else if (sha256_file(path) != file.at("sha256").get<std::string>()) {
        problems.push_back(path + ": the contents do not match their SHA-256: the file is damaged");
      }
    }
    if (problems.empty()) check_marker(directory, marker, problems);
  } catch (const std::exception& e) {
    problems.push_back(e.what());
  }
  return problems;
}

CheckpointInfo read_checkpoint_info(const std::string& directory) {
  CheckpointInfo info;
  info.directory = directory;
  info.ranks = read_marker(directory).at("ranks").get<int>();
  const Hdf5File h5 = open_part(directory + "/model.h5", kFormat);
  info.position = {h5.integer_attribute("step"), h5.integer_attribute("updates"), h5.integer_attribute("tokens"), h5.integer_attribute("skipped"),
                   h5.integer_attribute("nonfinite_in_a_row")};
  info.parameters = h5.integer_attribute("parameters");
  info.config = h5.string_attribute("config");
  info.created = h5.string_attribute("created");
  if (h5.has_attribute("init")) {
    try {
      const Json init = Json::parse(h5.string_attribute("init"));
      info.init = {init.at("checkpoint"), init.at("step"), init.at("sha256")};
    } catch (const Json::exception& e) {
      throw std::runtime_error(fmt::format("{}/model.h5: attribute init: {}", directory, e.what()));
    }
  }
  try {
    const Json d = Json::parse(h5.string_attribute("dataset"));
    info.dataset = {d.at("path"),
                    d.at("tokenizer"),
                    d.at("tokenizer_hash"),
                    d.at("fingerprint"),
                    d.at("vocabulary"),
                    d.at("train_tokens"),
                    {},
                    d.value("working_directory", "")};
    if (d.contains("mix"))
      for (const Json& part : d["mix"])
        info.dataset.mix.push_back({part.at("path"), part.at("fingerprint"), part.at("share"), part.at("train_tokens")});
  } catch (const Json::exception& e) {
    throw std::runtime_error(fmt::format("{}/model.h5: attribute dataset: {}", directory, e.what()));
  }
  return info;
}

StoredParameters::StoredParameters(const std::string& directory) : file_(open_part(directory + "/model.h5", kFormat)) {}

std::vector<float> StoredParameters::read(const std::string& name, const Shape& shape) const {
  std::vector<float> values(static_cast<std::size_t>(shape.numel()));
  file_.read<float>("parameters/" + name, extents(shape), values);
  return values;
}

std::vector<float> StoredParameters::read_rows(const std::string& name, std::int64_t rows, std::int64_t columns) const {
  std::vector<float> values(static_cast<std::size_t>(rows * columns));
  file_.read_part<float>("parameters/" + name, {0, 0}, extents({rows, columns}), std::span(values));
  return values;
}

std::vector<float> StoredParameters::thresholds(int layers, int heads) const {
  std::vector<float> values(static_cast<std::size_t>(layers) * static_cast<std::size_t>(heads));
  file_.read<float>("thresholds", extents({layers, heads}), values);
  return values;
}

std::vector<float> StoredParameters::balances(int layers, int heads) const {
  std::vector<float> values;
  if (!file_.contains("balances")) return values;
  values.resize(static_cast<std::size_t>(layers) * static_cast<std::size_t>(heads));
  file_.read<float>("balances", extents({layers, heads}), values);
  return values;
}

std::vector<float> load_thresholds(const StoredParameters& stored, const Gpt& model, Ops& ops) {
  const int layers = model.config().layers, heads = model.config().heads;
  const std::vector<float> thresholds = stored.thresholds(layers, heads);
  ops.upload(model.thresholds(), thresholds.data());
  if (const Tensor balances = model.balances())
    if (const auto values = stored.balances(layers, heads); !values.empty()) ops.upload(balances, values.data());
  return thresholds;
}

void load_model(const std::string& directory, Gpt& model, Ops& ops, ShardedAdamW* optimizer) {
  const StoredParameters stored(directory);
  for (const ParameterInfo& p : model.layout().parameters) {
    const std::vector<float> values = stored.read(p.name, p.shape);
    model.set_parameters(p.offset, values);
    if (optimizer) optimizer->set_master(p.offset, values);
  }
  load_thresholds(stored, model, ops);
}

void load_optimizer(const std::string& directory, const ParameterLayout& layout, ShardedAdamW& optimizer, Ops& ops) {
  const int ranks = read_marker(directory).at("ranks").get<int>();
  if (ranks == 0)
    throw std::runtime_error(
        fmt::format("{}: weights alone, without optimizer state: no run can be resumed from it. Start a new one from them: run.init", directory));
  std::vector<float> m(static_cast<std::size_t>(optimizer.count())), v(m.size());
  std::int64_t filled = 0;
  for (int r = 0; r < ranks && filled < optimizer.count(); ++r) {
    const Hdf5File h5 = open_part(directory + "/" + optimizer_name(r, ranks), kOptimizerFormat);
    if (h5.integer_attribute("parameters") != layout.count || h5.string_attribute("layout") != layout_hash(layout))
      throw std::runtime_error(h5.path() + ": made for a model of other parameters");
    for (const auto& stored : read_segments(h5, layout.count)) {
      for (const auto& own : optimizer.segments()) {
        const std::int64_t from = std::max(stored.first, own.first), to = std::min(stored.first + stored.count, own.first + own.count);
        if (from >= to) continue;
        const Hdf5Shape offset{static_cast<std::uint64_t>(stored.local + from - stored.first)}, length{static_cast<std::uint64_t>(to - from)};
        const auto part = [&](std::vector<float>& x) { return std::span(x).subspan(own.local + from - own.first, to - from); };
        h5.read_part<float>("m", offset, length, part(m));
        h5.read_part<float>("v", offset, length, part(v));
        filled += to - from;
      }
    }
  }
  if (filled != optimizer.count())
    throw std::runtime_error(fmt::format("{}: the optimizer files hold {} of the {} elements of this rank", directory, filled, optimizer.count()));
  ops.upload(optimizer.m(), m.data());
  ops.upload(optimizer.v(), v.data());
}

std::string save_checkpoint(const CheckpointRequest& r, const Gpt& model, ShardedAdamW& optimizer, Ops& ops, Communicator& host) {
  const std::string final = r.checkpoints + "/" + checkpoint_name(r.position.step), aside = final + ".tmp";
  const bool first = host.rank() == 0;
  agree(host, [&] {
    if (!first) return;
    fs::remove_all(aside);
    make_folder(aside);
  });
  const Tensor parameters = optimizer.gather_parameters();
  const auto undo = [&](const std::string& folder) {
    if (first) remove_checkpoint(folder);
  };

  Json receipts = Json::array();
  try {
    agree(host, [&] {
      const std::string name = optimizer_name(host.rank(), host.size());
      write_optimizer(aside + "/" + name, r.position.step, model.layout(), optimizer, ops);
      receipts.push_back(receipt(aside, name));
      r.between_files();
      if (!first) return;
      const auto values = [&](const ParameterInfo& p) { return to_host(ops, parameters.slice(p.offset, p.shape.numel())); };
      write_model(aside + "/model.h5", r, model.layout(), values, extents(model.thresholds().shape), to_host(ops, model.thresholds()),
                  model.balances() ? to_host(ops, model.balances()) : std::vector<float>{});
      receipts.push_back(receipt(aside, "model.h5"));
      if (r.tokenizer.empty()) return;
      write_file(aside + "/tokenizer.json", r.tokenizer);
      receipts.push_back(receipt(aside, "tokenizer.json"));
    });
  } catch (...) {
    undo(aside);
    throw;
  }
  Json files = Json::array();
  for (const std::string& text : all_gather(host, receipts.dump()))
    for (const Json& file : Json::parse(text)) files.push_back(file);

  try {
    agree(host, [&] {
      if (!first) return;
      sync_folder(aside);
      if (fs::exists(final)) remove_checkpoint(final);  // incomplete or damaged: a run never makes a sound one twice
      fs::rename(aside, final);
      sync_folder(r.checkpoints);
      write_marker(final, r.position.step, host.size(), files);
    });
  } catch (...) {
    undo(aside);
    undo(final);
    throw;
  }

  if (first && r.keep > 0) {
    auto entries = list_checkpoints(r.checkpoints);
    std::erase_if(entries, [](const CheckpointEntry& e) { return !e.complete; });
    for (std::size_t i = 0; i + static_cast<std::size_t>(r.keep) < entries.size(); ++i) remove_checkpoint(entries[i].directory);
  }
  return final;
}

void save_weights(const std::string& directory, const CheckpointRequest& r, const ModelConfig& model, const ParameterValues& values,
                  const std::vector<float>& thresholds, const std::vector<std::pair<std::string, std::string>>& attachments) {
  const std::string aside = fmt::format("{}.tmp-{}", directory, ::getpid());
  make_folder(aside);
  try {
    write_model(aside + "/model.h5", r, make_parameter_layout(model), values, extents({model.layers, model.heads}), thresholds, {});
    write_file(aside + "/tokenizer.json", r.tokenizer);
    for (const auto& [name, contents] : attachments) write_file(aside + "/" + name, contents);
    write_marker(aside, r.position.step, 0, Json::array({receipt(aside, "model.h5"), receipt(aside, "tokenizer.json")}));
    sync_folder(aside);
    if (fs::exists(directory)) throw std::invalid_argument(directory + ": appeared while the checkpoint was written");
    fs::rename(aside, directory);
    sync_folder(folder_of(directory));
  } catch (...) {
    remove_checkpoint(aside);
    throw;
  }
}

}  // namespace tessera
