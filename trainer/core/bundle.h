#pragma once
// CORE's data: the tasks of DataComp-LM's CORE metric (Li et al., arXiv 2406.11794) in the folder that nanochat publishes.
//
//   core.yaml            the tasks: label, file, number of examples shown, type, delimiter
//   eval_meta_data.csv   what guessing gets right, in percent, by task
//   eval_data/           a JSON object a line and item; plain, or compressed with .zst or .gz behind the name
//
// Every error is a std::invalid_argument that names file and line.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace tessera {

enum class CoreType { multiple_choice, schema, language_modeling };
const char* name_of(CoreType type);  // as core.yaml writes it

/// One question. Its candidates are one context with each of several continuations (multiple choice: query, choices), several contexts with one
/// continuation (schema: context_options, continuation), or one of each (language modelling: context, stripped as Python's str.strip() does, and
/// continuation).
struct CoreItem {
  std::vector<std::string> contexts, continuations;
  std::size_t gold = 0;    // the right candidate
  std::uint64_t line = 0;  // of the file, from 1

  std::size_t candidates() const { return contexts.size() > 1 ? contexts.size() : continuations.size(); }
  const std::string& context(std::size_t candidate) const { return contexts[contexts.size() > 1 ? candidate : 0]; }
  const std::string& continuation(std::size_t candidate) const { return continuations[continuations.size() > 1 ? candidate : 0]; }
};

struct CoreTask {
  std::string label;
  CoreType type = CoreType::multiple_choice;
  std::size_t shots = 0;        // other items shown, with their answers, before each question
  std::string delimiter = " ";  // between context and continuation
  std::string file;             // of its items, as it was found; where it is missing, the name that was expected
  bool missing = false;
  double baseline = 0;  // percent that guessing gets right, by the bundle's eval_meta_data.csv
};

struct CoreBundle {
  std::string directory;
  std::vector<CoreTask> tasks;  // in the order of core.yaml
};

/// core.yaml and eval_meta_data.csv. Items are not read; that a file of them is missing is noted in the task.
CoreBundle read_core_bundle(const std::string& directory);
/// The tasks with these labels (comma-separated; "": all), in the bundle's order. An unknown label is an error that names the nearest, and so is a
/// task whose file is missing when it was asked for by its label.
std::vector<CoreTask> select_tasks(const CoreBundle& bundle, const std::string& labels);
/// The items of a task in the order of its file. Blank lines count for nothing.
std::vector<CoreItem> read_core_items(const CoreTask& task);

/// A task of CORE as DataComp-LM defines it (mlfoundations/dclm, eval/mmlu_and_lowvar.yaml without MMLU, and eval/eval_meta_data.csv).
struct DclmTask {
  const char* label;
  CoreType type;
  std::size_t shots;
  double baseline;  // percent
};
/// All 22.
std::span<const DclmTask> dclm_tasks();
/// The one of this label, or null.
const DclmTask* find_dclm_task(const std::string& label);

}  // namespace tessera
