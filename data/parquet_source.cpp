#include "data/parquet_source.h"

#include <fmt/core.h>

#include <stdexcept>

#ifdef TESSERA_HAS_PARQUET
#include <arrow/memory_pool.h>
#include <parquet/column_reader.h>
#include <parquet/file_reader.h>
#include <parquet/properties.h>
#include <parquet/schema.h>
#include <parquet/types.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "data/document_reader.h"
#include "data/row_filter.h"

namespace tessera {
namespace {

constexpr std::int64_t kMostMemory = 256 << 20;  // of the library, for one file: a page that wants more is damaged, or of no use here
constexpr std::int64_t kReadBytes = 1 << 20;
constexpr std::int64_t kBatchRows = 128;

/// A column of the row group being read, row by row.
class Cursor {
 public:
  virtual ~Cursor() = default;
  virtual void open(parquet::RowGroupReader& group) = 0;
  /// Goes to the next row; false when the column has no more.
  virtual bool advance() = 0;
  virtual bool null() const = 0;
};

template <typename Type>
class TypedCursor : public Cursor {
 public:
  using Value = typename Type::c_type;
  explicit TypedCursor(int column) : column_(column) {}

  void open(parquet::RowGroupReader& group) override {
    reader_ = std::dynamic_pointer_cast<parquet::TypedColumnReader<Type>>(group.Column(column_));
    if (!reader_) throw std::runtime_error(fmt::format("column {} is of another type than the schema says", column_));
    most_ = reader_->descr()->max_definition_level();
    level_ = levels_ = 0;
  }
  bool advance() override {
    if (level_ == levels_) {
      if (!reader_->HasNext()) return false;
      std::int64_t values = 0;
      levels_ = reader_->ReadBatch(kBatchRows, defined_.data(), nullptr, values_.data(), &values);
      level_ = value_ = 0;
      if (levels_ <= 0) throw std::runtime_error("a page that holds nothing where rows are due");
    }
    if (most_ == 0 || defined_[static_cast<std::size_t>(level_)] == most_) ++value_;
    ++level_;
    return true;
  }
  bool null() const override { return most_ > 0 && defined_[static_cast<std::size_t>(level_ - 1)] < most_; }
  const Value& value() const { return values_[static_cast<std::size_t>(value_ - 1)]; }

 private:
  const int column_;
  std::shared_ptr<parquet::TypedColumnReader<Type>> reader_;
  std::int16_t most_ = 0;  // 0: no nulls
  std::array<std::int16_t, kBatchRows> defined_{};
  std::array<Value, kBatchRows> values_{};
  std::int64_t level_ = 0, levels_ = 0, value_ = 0;
};

using TextCursor = TypedCursor<parquet::ByteArrayType>;
std::string_view text_of(const TextCursor& cursor) { return {reinterpret_cast<const char*>(cursor.value().ptr), cursor.value().len}; }

/// One of --where, on its column.
class Condition {
 public:
  virtual ~Condition() = default;
  virtual Cursor& cursor() = 0;
  virtual bool holds() const = 0;  // in a row where the column is not null
};

class TextCondition : public Condition {
 public:
  TextCondition(int column, RowFilter filter) : cursor_(column), filter_(std::move(filter)) {}
  Cursor& cursor() override { return cursor_; }
  bool holds() const override { return filter_.holds(text_of(cursor_)); }

 private:
  TextCursor cursor_;
  const RowFilter filter_;
};

/// Stored: the type whose values the column's are, as an unsigned one kept in a signed physical type.
template <typename Type, typename Stored>
class NumberCondition : public Condition {
 public:
  NumberCondition(int column, RowFilter filter) : cursor_(column), filter_(std::move(filter)) {}
  Cursor& cursor() override { return cursor_; }
  bool holds() const override { return filter_.holds(static_cast<long double>(static_cast<Stored>(cursor_.value()))); }

 private:
  TypedCursor<Type> cursor_;
  const RowFilter filter_;
};

class ParquetSource : public EntrySource {
 public:
  ParquetSource(const std::string& path, const std::string& column, const std::vector<std::string>& where)
      : path_(path), pool_(arrow::default_memory_pool(), kMostMemory) {
    std::error_code error;
    bytes_ = std::filesystem::file_size(path, error);
    if (error || !std::filesystem::is_regular_file(path))
      throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", path, error ? error.message() : "not a regular file, which Parquet needs"));
    try {
      parquet::ReaderProperties properties(&pool_);
      properties.enable_buffered_stream();
      properties.set_buffer_size(kReadBytes);
      reader_ = parquet::ParquetFileReader::OpenFile(path, false, properties);
      metadata_ = reader_->metadata();
    } catch (const std::exception& e) {
      throw std::runtime_error(fmt::format("{}: damaged, or no Parquet file: {}", path, e.what()));
    }
    text_ = std::make_unique<TextCursor>(find(column, "--text-key"));
    if (type_of(column) != parquet::Type::BYTE_ARRAY || is_number(column))
      throw std::invalid_argument(fmt::format("{}: column \"{}\" is {}, expected text", path, column, describe(column)));
    for (const std::string& condition : where) conditions_.push_back(make_condition(parse_row_filter(condition)));
  }

  bool next(std::vector<Entry>& out) override {
    while (used_ == document_.size()) {
      while (row_ == rows_)  // a row group may be empty
        if (!next_group()) return false;
      try {
        read_row();
      } catch (const std::exception& e) {
        throw std::runtime_error(fmt::format("{}: row group {} of {}, row {}: {}", path_, group_, metadata_->num_row_groups(), row_, e.what()));
      }
    }
    const std::string_view left = std::string_view(document_).substr(used_);
    const std::size_t length = piece_length(left);
    Entry entry;
    entry.first = used_ == 0;
    entry.bytes = left.substr(0, length);
    out.push_back(std::move(entry));
    used_ += length;
    if (used_ == document_.size() && document_.capacity() > 64 * kPieceBytes) std::string().swap(document_), used_ = 0;
    return true;
  }

  std::uint64_t consumed() const override {
    const auto rows = static_cast<double>(metadata_->num_rows());
    return rows > 0 ? static_cast<std::uint64_t>(static_cast<double>(bytes_) * std::min(1.0, static_cast<double>(rows_before_ + row_) / rows))
                    : bytes_;
  }

 private:
  /// Index of a column that is no part of another.
  int find(const std::string& name, const char* option) const {
    const parquet::SchemaDescriptor& schema = *metadata_->schema();
    std::string names;
    bool nested = false;
    for (int i = 0; i < schema.num_columns(); ++i) {
      const auto path = schema.Column(i)->path()->ToDotVector();
      if (path.size() == 1 && path[0] == name && schema.Column(i)->max_repetition_level() == 0) return i;
      nested = nested || path[0] == name;
      if (path.size() == 1 && names.size() < 200) names += fmt::format("{}{}", names.empty() ? "" : ", ", path[0]);
    }
    throw std::invalid_argument(fmt::format("{}: {} \"{}\" (it has {}); choose another with {}", path_,
                                            nested ? "nested, expected single values: column" : "has no column", name, names.empty() ? "none" : names,
                                            option));
  }
  const parquet::ColumnDescriptor& descriptor(const std::string& name) const { return *metadata_->schema()->Column(find(name, "--where")); }
  parquet::Type::type type_of(const std::string& name) const { return descriptor(name).physical_type(); }
  std::string describe(const std::string& name) const {
    const auto& logical = descriptor(name).logical_type();
    const std::string physical = parquet::TypeToString(type_of(name));
    return logical && !logical->is_none() ? fmt::format("{} {}", physical, logical->ToString()) : physical;
  }
  /// Whether the bytes stand for a number (a decimal).
  bool is_number(const std::string& name) const {
    const auto& logical = descriptor(name).logical_type();
    return logical && logical->is_decimal();
  }

  std::unique_ptr<Condition> make_condition(RowFilter filter) const {
    const int column = find(filter.column, "--where");
    const auto type = type_of(filter.column);
    const auto& logical = descriptor(filter.column).logical_type();
    const bool plain = !logical || logical->is_none(), integer = plain || logical->is_int();
    const bool is_signed = plain || !logical->is_int() || static_cast<const parquet::IntLogicalType&>(*logical).is_signed();
    const auto refuse = [&](const std::string& why) {
      throw std::invalid_argument(
          fmt::format("{}: --where {}: column \"{}\" is {}{}", path_, filter.source, filter.column, describe(filter.column), why));
    };
    if (type == parquet::Type::BYTE_ARRAY && !is_number(filter.column)) {
      if (filter.orders()) refuse(", and text is compared with == and != only");
      return std::make_unique<TextCondition>(column, std::move(filter));
    }
    if (type == parquet::Type::BOOLEAN) {
      if (filter.orders() || (filter.text != "true" && filter.text != "false")) refuse(", expected == true or == false");
      filter.number = filter.text == "true";
      return std::make_unique<NumberCondition<parquet::BooleanType, bool>>(column, std::move(filter));
    }
    if (!filter.number) refuse(", expected a number to compare with");
    if (type == parquet::Type::INT32 && integer) {
      if (is_signed) return std::make_unique<NumberCondition<parquet::Int32Type, std::int32_t>>(column, std::move(filter));
      return std::make_unique<NumberCondition<parquet::Int32Type, std::uint32_t>>(column, std::move(filter));
    }
    if (type == parquet::Type::INT64 && integer) {
      if (is_signed) return std::make_unique<NumberCondition<parquet::Int64Type, std::int64_t>>(column, std::move(filter));
      return std::make_unique<NumberCondition<parquet::Int64Type, std::uint64_t>>(column, std::move(filter));
    }
    if (type == parquet::Type::FLOAT) {
      filter.number = static_cast<float>(*filter.number);  // so that 2.9 equals the 2.9 that the column can hold
      return std::make_unique<NumberCondition<parquet::FloatType, float>>(column, std::move(filter));
    }
    if (type == parquet::Type::DOUBLE) {
      filter.number = static_cast<double>(*filter.number);
      return std::make_unique<NumberCondition<parquet::DoubleType, double>>(column, std::move(filter));
    }
    refuse(", which --where does not compare; expected numbers, text or true and false");
    return nullptr;
  }

  bool next_group() {
    rows_before_ += rows_;
    row_ = rows_ = 0;
    if (group_ + 1 >= metadata_->num_row_groups()) return false;
    ++group_;
    try {
      group_reader_ = reader_->RowGroup(group_);
      rows_ = metadata_->RowGroup(group_)->num_rows();
      if (rows_ < 0) throw std::runtime_error(fmt::format("{} rows", rows_));
      text_->open(*group_reader_);
      for (const auto& condition : conditions_) condition->cursor().open(*group_reader_);
    } catch (const std::exception& e) {
      throw std::runtime_error(fmt::format("{}: row group {} of {}: {}", path_, group_, metadata_->num_row_groups(), e.what()));
    }
    return true;
  }

  /// Goes on by a row; its text becomes the document when the row is wanted.
  void read_row() {
    document_.clear();
    used_ = 0;
    const auto advance = [&](Cursor& cursor) {
      if (!cursor.advance()) throw std::runtime_error(fmt::format("a column ends there, expected {} rows", rows_));
    };
    advance(*text_);
    bool wanted = !text_->null();
    for (const auto& condition : conditions_) {
      advance(condition->cursor());
      wanted = wanted && !condition->cursor().null() && condition->holds();
    }
    ++row_;
    if (wanted) document_ = text_of(*text_);
  }

  const std::string path_;
  std::uint64_t bytes_ = 0;
  arrow::CappedMemoryPool pool_;
  std::unique_ptr<parquet::ParquetFileReader> reader_;
  std::shared_ptr<parquet::FileMetaData> metadata_;
  std::shared_ptr<parquet::RowGroupReader> group_reader_;
  std::unique_ptr<TextCursor> text_;
  std::vector<std::unique_ptr<Condition>> conditions_;
  int group_ = -1;
  std::int64_t row_ = 0, rows_ = 0, rows_before_ = 0;  // of the row group; rows of those before it
  std::string document_;
  std::size_t used_ = 0;
};

}  // namespace

bool has_parquet_support() { return true; }
void check_parquet_support(const std::string&) {}

std::unique_ptr<EntrySource> open_parquet(const std::string& path, const std::string& column, const std::vector<std::string>& where) {
  return std::make_unique<ParquetSource>(path, column, where);
}

}  // namespace tessera

#else

namespace tessera {

bool has_parquet_support() { return false; }

void check_parquet_support(const std::string& path) {
  throw std::invalid_argument(fmt::format(
      "{}: this build of Tessera reads no Parquet files. Get Arrow's library and build again: pip install pyarrow, then cmake with "
      "-DTESSERA_ARROW_ROOT=$(python3 -c \"import pyarrow; print(pyarrow.__path__[0])\"); or install libparquet-dev from Apache's packages",
      path));
}

std::unique_ptr<EntrySource> open_parquet(const std::string& path, const std::string&, const std::vector<std::string>&) {
  check_parquet_support(path);
  return nullptr;
}

}  // namespace tessera

#endif
