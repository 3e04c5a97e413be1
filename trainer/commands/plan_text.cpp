// The tables of `tessera plan`: what the ranks of a sequence compute and move, and a step on GPUs that are not there.

#include <fmt/format.h>

#include <vector>

#include "trainer/commands/plan.h"
#include "trainer/text_table.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

/// [0, 1, 2, 5] as "0-2,5".
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ",", numbers[i]);
    if (last > i) text += fmt::format("-{}", numbers[last]);
    i = last;
  }
  return text;
}

std::string text_of(const Json& name) { return name.is_null() ? "-" : name.get<std::string>(); }

}  // namespace

std::string sequence_text(const Json& sequence) {
  const char* const exchanges[] = {"needed", "ring", "heads"};
  std::string text = fmt::format("a sequence of {} tokens over {} ranks, layout {}, blocks of {} tokens; exchange {}{}\n",
                                 grouped(sequence["context"].get<std::int64_t>()), sequence["ranks"].get<int>(), text_of(sequence["layout"]),
                                 sequence["block_tokens"].get<int>(), text_of(sequence["exchange"]),
                                 sequence["exchange_asked"] == "auto" ? ", which moves fewest bytes" : "");
  text += fmt::format("a layer and a micro-batch of {}, numbers of {} bytes, forward + backward\n", sequence["micro_batch"].get<std::int64_t>(),
                      sequence["element_bytes"].get<int>());
  std::vector<std::vector<std::string>> table = {{"layers", "rank", "tokens", "visible tiles", "keys"}};
  for (const char* e : exchanges) {
    table[0].push_back(fmt::format("{} sent", e));
    table[0].push_back("received");
  }
  for (const Json& layer : sequence["layers"]) {
    for (const Json& rank : layer["ranks"]) {
      std::vector<std::string> row = {ranges(layer["layers"].get<std::vector<int>>()), rank["rank"].dump()};
      for (const char* count : {"tokens", "visible_tiles", "keys"}) row.push_back(grouped(rank[count].get<std::int64_t>()));
      for (const char* e : exchanges) {
        for (const std::string way : {"sent", "received"})
          row.push_back(rank.contains(e) ? human_bytes(rank[e]["forward_" + way].get<double>() + rank[e]["backward_" + way].get<double>()) : "-");
      }
      table.push_back(std::move(row));
    }
  }
  text += text_table(table);
  const int again = sequence["layers_computed_again"].get<int>();
  text += fmt::format("sent by all ranks in all layers, forward + backward{}:", again > 0 ? fmt::format(", {} layers forward twice", again) : "");
  for (const char* e : exchanges) {
    const Json& bytes = sequence["bytes"][e];
    const std::string found =
        bytes.is_null() ? fmt::format("not possible ({})", sequence["heads_problem"].get<std::string>()) : human_bytes(bytes.get<double>());
    text += fmt::format(" {} {}{}", e, found, e == exchanges[2] ? "\n" : ",");
  }
  return text;
}

std::string simulation_text(const Json& simulation) {
  std::string text = fmt::format("predicted, not measured: a step at context {}, micro-batch {}; assumes\n",
                                 grouped(simulation["context"].get<std::int64_t>()), simulation["micro_batch"].get<std::int64_t>());
  for (const Json& a : simulation["assumptions"])
    text += fmt::format("  {:<18}{:>10}  {}\n", a["name"].get<std::string>(), fmt::format("{:g}", a["value"].get<double>()),
                        a["source"].get<std::string>());
  text +=
      "  every visible tile is active; ranks of a sequence are neighbours; exchanges needed and heads hide behind the turn of heads before, ring "
      "behind each hop's kernel;\n"
      "  gradients are reduced beside the last backward pass and weights gathered beside the first forward pass; memory is not asked for\n"
      "ms by part; exchange and gradients: what is not hidden, and in brackets all of it\n";
  std::vector<std::vector<std::string>> table = {{"GPUs", "a sequence", "layout", "exchange", "dense", "other", "attention", "exchange", "gradients",
                                                  "optimizer", "step", "tokens a step", "tokens/s", "sent a GPU"}};
  for (const Json& step : simulation["steps"]) {
    const Json &ms = step["ms"], &hidden = step["hidden_ms"];
    const auto time = [](double t) { return fmt::format("{:.{}f}", t, t < 100 ? 1 : 0); };
    std::vector<std::string> row = {step["gpus"].dump(), step["sequence"].dump(), text_of(step["layout"]), text_of(step["exchange"])};
    for (const char* part : {"dense", "other", "attention"}) row.push_back(time(ms[part].get<double>()));
    for (const char* part : {"exchange", "gradients"}) {
      const double shown = ms[part].get<double>();
      row.push_back(fmt::format("{} ({})", time(shown), time(shown + hidden[part].get<double>())));
    }
    for (const char* part : {"optimizer", "step"}) row.push_back(time(ms[part].get<double>()));
    row.push_back(grouped(step["tokens"].get<std::int64_t>()));
    row.push_back(grouped(static_cast<std::int64_t>(step["tokens_per_second"].get<double>())));
    row.push_back(human_bytes(step["sent_bytes"]["exchange"].get<double>() + step["sent_bytes"]["gradients"].get<double>()));
    table.push_back(std::move(row));
  }
  text += text_table(table);
  for (const Json& out : simulation["left_out"])
    text += fmt::format("left out: {} GPUs, layout {}, exchange {}: {}\n", out["gpus"].get<int>(), text_of(out["layout"]),
                        out["exchange"].is_null() ? "any" : text_of(out["exchange"]), out["reason"].get<std::string>());
  return text;
}

}  // namespace tessera
