// safetensors: files of the real library are read and written to the same bytes; everything that is not of the format is one error naming file and
// tensor.

#include "data/safetensors.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "data/files.h"
#include "tests/data/support.h"
#include "tests/data/support_tokens.h"

namespace tessera {
namespace {

using namespace test;

const std::string kMixed = TESSERA_FIXTURES "/hf/mixed.safetensors";

std::string file_of(const std::string& header, std::size_t data) {
  return little_endian<std::uint64_t>({header.size()}) + header + std::string(data, '\0');
}

std::vector<float> values_of(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsEntry* entry = file.find(name);
  if (!entry) throw std::runtime_error("no tensor " + name);
  std::vector<float> values(entry->elements());
  file.read(*entry, values);
  return values;
}

TEST(Safetensors, ReadsWhatTheLibraryWrote) {
  const SafetensorsFile file(kMixed);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(file.entries().size(), 7u);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(values_of(file, "f32"), (std::vector<float>{1.0f, -2.5f, 3.0e-39f, kInfinity, 0.1f, -0.0f}));
  EXPECT_TRUE(std::signbit(values_of(file, "f32")[5]));
  EXPECT_EQ(file.find("f32")->shape, (std::vector<std::uint64_t>{2, 3}));
  // The nearest numbers of eight and of eleven bits.
  EXPECT_EQ(values_of(file, "bf16"), (std::vector<float>{1.0f, -2.5f, 0x1.9ap-4f, 0x1.c4p127f}));
  EXPECT_EQ(values_of(file, "f16"), (std::vector<float>{1.0f, -2.5f, 0x1.998p-4f, 65504.0f, 0x1p-24f, -kInfinity, 503 * 0x1p-24f}));
  EXPECT_EQ(values_of(file, "f64"), (std::vector<float>{0.1f, -kInfinity}));
  EXPECT_EQ(values_of(file, "scalar"), (std::vector<float>{7.0f}));
  EXPECT_EQ(values_of(file, "empty"), (std::vector<float>{}));
  EXPECT_EQ(file.find("nothing"), nullptr);
  EXPECT_NE(message_of([&] { values_of(file, "bool"); }).find("tensor \"bool\": expected F32, BF16, F16 or F64, found BOOL"), std::string::npos);
}

TEST(Safetensors, WritesTheBytesThatTheLibraryWrites) {
  const TemporaryFolder folder;
  const std::string original = read_file(kMixed);
  const SafetensorsFile file(kMixed);
  std::vector<SafetensorsTensor> tensors;
  for (auto e = file.entries().rbegin(); e != file.entries().rend(); ++e) tensors.push_back({e->name, e->dtype, e->shape});
  write_safetensors(folder / "again.safetensors", tensors, file.metadata(), [&](std::size_t i) {
    const SafetensorsEntry* e = file.find(tensors[i].name);
    return original.substr(e->first, e->bytes);
  });
  EXPECT_EQ(read_file(folder / "again.safetensors"), original);
}

TEST(Safetensors, AWriteThatFailsLeavesNothing) {
  const TemporaryFolder folder;
  const auto write = [&](const std::string& bytes) {
    write_safetensors(folder / "a.safetensors", {{"a", "F32", {2}}}, {}, [&](std::size_t) { return bytes; });
  };
  EXPECT_THROW(write("short"), std::logic_error);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  write("12345678");
  EXPECT_THROW(write("short"), std::logic_error);
  EXPECT_TRUE(read_file(folder / "a.safetensors").ends_with("12345678"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

struct Bad {
  std::string bytes, says;
};

TEST(Safetensors, WhatIsNotOfTheFormatIsNamed) {
  const auto tensor = [](const std::string& fields) { return file_of("{\"a\":{" + fields + "}}", 8); };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const std::vector<Bad> cases = {
      {"", "0 bytes: expected a safetensors file"},
      {"1234567", "7 bytes"},
      {little_endian<std::uint64_t>({100}) + "{}", "a header of 100 bytes in a file of 10: the file is cut short"},
      {little_endian<std::uint64_t>({~0ull}) + "{}", "a header of 18446744073709551615 bytes in a file of 10"},
      {file_of("", 0), "header: not valid JSON at byte 1"},
      {file_of("{", 0), "header: not valid JSON"},
      {file_of("{} x", 0), "header: not valid JSON"},
      {file_of("[]", 0), "header: expected an object of tensors, found an array"},
      {file_of("{\"\xff\":1}", 0), "ill-formed UTF-8"},
      {file_of("{\"a\":1}", 0), "tensor \"a\": expected an object, found a number"},
      {file_of("{\"__metadata__\":{\"x\":1}}", 0), "__metadata__: \"x\": expected a text, found a number"},
      {file_of("{\"__metadata__\":{\"x\":\"1\",\"x\":\"2\"}}", 0), "__metadata__: \"x\" is there twice"},
      {file_of("{\"__metadata__\":{},\"__metadata__\":{}}", 0), "\"__metadata__\" is there twice"},
      {file_of("{\"a\":{" + good + "},\"a\":{" + good + "}}", 8), "tensor \"a\" is there twice"},
      {tensor(good + ",\"dtype\":\"F32\""), "tensor \"a\": dtype is there twice"},
      {tensor(good + ",\"more\":1"), "tensor \"a\": unknown key \"more\""},
      {tensor(R"("dtype":"F32","shape":[2])"), "tensor \"a\": data_offsets is missing"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "data_offsets: expected two numbers, found 1"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,9])"), "data_offsets: expected two numbers, found 3"},
      {tensor(R"("dtype":"F31","shape":[2],"data_offsets":[0,8])"), "dtype \"F31\" is none of the format"},
      {tensor(R"("dtype":3,"shape":[2],"data_offsets":[0,8])"), "dtype: expected a text, found a number"},
      {tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "shape: expected an array of integers from 0, found -2"},
      {tensor(R"("dtype":"F32","shape":[2.5],"data_offsets":[0,8])"), "shape: expected an array of integers from 0, found \"2.5\""},
      {tensor(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "shape: expected an array of integers from 0, found an array"},
      {tensor(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), "shape: expected an array of integers from 0, found a number"},
      {tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8])"), "shape: expected an array of integers from 0"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "data_offsets [8, 0] in 8 bytes of data: the end comes first"},
      {tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,12])"), "data_offsets [0, 12] in 8 bytes of data: the file is cut short"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,0])"), "the end comes first"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])"), "data_offsets [0, 8] are 8 bytes, and F32 of shape [1] takes 4"},
      {tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), "are too many to count"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), "4 bytes after the last tensor belong to none"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), "tensor \"a\": 4 bytes before it belong to no tensor"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[2,6])"), "data_offsets begin at 2, which is no multiple of the 4 bytes of F32"},
      {file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8),
       "tensors \"a\" and \"b\" overlap"},
      {file_of("{}", 1), "1 bytes after the last tensor belong to none"},
  };
  const TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  for (const Bad& bad : cases) {
    put(path, bad.bytes);
    const std::string message = message_of([&] { SafetensorsFile file(path); });
    EXPECT_TRUE(message.starts_with(path + ": ")) << message;
    EXPECT_NE(message.find(bad.says), std::string::npos) << message << "\nexpected: " << bad.says;
  }
  put(path, file_of("{\"a\":{" + good + "}}  ", 8));  // blanks after it are how headers are padded
  EXPECT_EQ(values_of(SafetensorsFile(path), "a"), (std::vector<float>{0.0f, 0.0f}));
  std::string dimensions = "1";
  for (int i = 0; i < 100; ++i) dimensions += ",1";
  put(path, tensor(R"("dtype":"F64","shape":[)" + dimensions + R"(],"data_offsets":[0,8])"));
  EXPECT_NE(message_of([&] { SafetensorsFile file(path); }).find("shape: more than 64 numbers"), std::string::npos);
  EXPECT_NE(message_of([&] { SafetensorsFile file(folder.path()); }).find("not a regular file"), std::string::npos);
  EXPECT_NE(message_of([&] { SafetensorsFile file(folder / "none"); }).find("cannot be opened"), std::string::npos);
}

TEST(Safetensors, AFileThatShrinksWhileItIsReadIsAnError) {
  const TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  put(path, file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  const SafetensorsFile file(path);
  std::filesystem::resize_file(path, file_bytes(path) - 1);
  EXPECT_NE(message_of([&] { values_of(file, "a"); }).find("the file has become shorter"), std::string::npos);
}

TEST(Safetensors, IndexAndFilesMustNameTheSame) {
  const TemporaryFolder folder;
  const auto one = [](const std::string& name) { return file_of("{\"" + name + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4); };
  const std::string index = folder / "model.safetensors.index.json";
  const auto says = [&](const std::string& weight_map, const std::string& text) {
    put(index, "{\"weight_map\": " + weight_map + "}");
    const std::string message = message_of([&] { SafetensorsFolder opened(folder.path()); });
    EXPECT_TRUE(text.empty() ? message.empty() : message.find(text) != std::string::npos) << message << "\nexpected: " << text;
  };
  EXPECT_NE(message_of([&] { SafetensorsFolder opened(folder.path()); }).find("no model.safetensors and no model.safetensors.index.json"),
            std::string::npos);
  put(folder / "1.safetensors", one("a"));
  put(folder / "2.safetensors", one("b"));
  says(R"({"a": "1.safetensors", "b": "2.safetensors"})", "");
  EXPECT_EQ(SafetensorsFolder(folder.path()).tensors().at("b").file->path(), folder / "2.safetensors");
  says(R"({"a": "2.safetensors", "b": "1.safetensors"})", "tensor \"a\" belongs in \"2.safetensors\"");
  says(R"({"a": "1.safetensors", "b": "3.safetensors"})",
       "3.safetensors: the file is missing: model.safetensors.index.json names it for tensor \"b\"");
  says(R"({"a": "1.safetensors", "c": "1.safetensors"})", "tensor \"c\" is missing");
  says(R"({"c": "1.safetensors"})", "tensor \"a\" is not in the weight_map");
  says(R"({"a": "../1.safetensors"})", "expected the name of a file in this folder");
  says(R"({"a": 1})", "expected the name of a file in this folder, found no text");
  says(R"({"a": "1.safetensors", "a": "2.safetensors"})", "key \"a\" is there twice");
  says("{}", "weight_map names no tensor");
  says("[]", "expected an object with weight_map");
  put(folder / "model.safetensors", one("d"));  // goes before an index
  EXPECT_EQ(SafetensorsFolder(folder.path()).tensors().begin()->first, "d");
}

}  // namespace
}  // namespace tessera
