#pragma once
// Texts out of a column of a Parquet file, through Arrow's Parquet library where the build has it. Row groups are streamed, a page of each
// column that is needed at a time.

#include <memory>
#include <string>
#include <vector>

#include "data/entry_source.h"

namespace tessera {

/// Throws std::invalid_argument saying what to do when the build has no Parquet library.
void check_parquet_support(const std::string& path);
bool has_parquet_support();

/// The texts under `column` in the rows for which every one of `where` holds (row_filter.h). Rows whose text is null or empty are left out, and rows
/// with a null where `where` looks. Throws std::invalid_argument when the file cannot be opened, is no Parquet file, or lacks a column or has it in
/// a type that is of no use here; std::runtime_error naming file and row group when it is damaged.
std::unique_ptr<EntrySource> open_parquet(const std::string& path, const std::string& column, const std::vector<std::string>& where);

}  // namespace tessera
