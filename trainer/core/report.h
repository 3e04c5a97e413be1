#pragma once
// CORE out of the accuracies of its tasks: centred = (accuracy - guess) / (1 - guess), and their mean (Li et al., arXiv 2406.11794). What guessing
// gets right differs between the bundle's eval_meta_data.csv and DataComp-LM's for three tasks, so there are two means.

#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "trainer/core/score.h"

namespace tessera {

/// What was evaluated, and out of what.
struct CoreScope {
  std::vector<CoreTask> missing;       // of the bundle's tasks those that were asked for and have no file
  std::vector<CoreTask> not_selected;  // those that were not asked for (--tasks)
  std::size_t limit = 0;               // items of a task, at most; 0: all
};

struct CoreRow {
  const CoreWork* work = nullptr;
  CoreResult result;
};

/// "CORE" when the rows are the 22 tasks of CORE with every item, and else what they are: "CORE (21 of 22)", "CORE (21 of 22; at most 20 items a
/// task)", or "mean of 3 tasks (0 of CORE's 22)" when some are none of CORE's. A task counts as CORE's when it has the label, the type and the number
/// of examples of DataComp-LM's.
std::string core_title(std::span<const CoreRow> rows);

/// title, score (by the bundle's and by DataComp-LM's baselines), complete, limit, missing, not_selected, tasks: all that was found.
nlohmann::ordered_json core_json(std::span<const CoreRow> rows, const CoreScope& scope);

/// The table on a console: head, a row as each task is done, and what follows the last.
std::string core_table_head();
std::string core_table_row(const CoreRow& row);
std::string core_summary(std::span<const CoreRow> rows, const CoreScope& scope);

}  // namespace tessera
