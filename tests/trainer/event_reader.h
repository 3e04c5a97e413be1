#pragma once
// Reads TensorBoard's event files from their published format alone: TFRecord's framing, Protocol Buffers' wire format, and the field numbers of
// TensorFlow's event.proto and summary.proto. Shares no code with what writes them.

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace tessera::testing {

/// Bit by bit: reflected polynomial 0x1EDC6F41.
inline std::uint32_t reference_crc32c(std::string_view bytes) {
  std::uint32_t crc = ~0u;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
  }
  return ~crc;
}

template <class T>
T little_endian(std::string_view bytes) {
  T value;
  if (bytes.size() < sizeof value) throw std::runtime_error("cut off");
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

/// The records of a file. Stops at one that is cut off, as a killed writer leaves it, and says so; throws at a wrong checksum.
inline std::vector<std::string> read_records(std::string_view file, bool* cut_off = nullptr) {
  const auto check = [](std::string_view bytes, std::uint32_t stored) {
    const std::uint32_t crc = std::rotr(reference_crc32c(bytes), 15) + 0xA282EAD8u;
    if (crc != stored) throw std::runtime_error("wrong checksum");
  };
  std::vector<std::string> records;
  if (cut_off) *cut_off = false;
  while (!file.empty()) {
    const std::uint64_t length = file.size() < 12 ? 0 : little_endian<std::uint64_t>(file);
    if (file.size() >= 12) check(file.substr(0, 8), little_endian<std::uint32_t>(file.substr(8)));
    if (file.size() < 16 || length > file.size() - 16) {
      if (cut_off) *cut_off = true;
      break;
    }
    records.emplace_back(file.substr(12, length));
    check(records.back(), little_endian<std::uint32_t>(file.substr(12 + length)));
    file.remove_prefix(16 + length);
  }
  return records;
}

struct WireField {
  int number = 0;
  std::uint64_t varint = 0;  // of varints
  std::string_view bytes;    // of all others
};
inline std::vector<WireField> wire_fields(std::string_view message) {
  const auto varint = [&] {
    std::uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const auto byte = static_cast<unsigned char>(little_endian<char>(message));
      message.remove_prefix(1);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
  };
  std::vector<WireField> fields;
  while (!message.empty()) {
    const std::uint64_t key = varint();
    WireField field{static_cast<int>(key >> 3), 0, {}};
    if ((key & 7) == 0) {
      field.varint = varint();
    } else {
      const std::size_t size = (key & 7) == 1 ? 8 : (key & 7) == 5 ? 4 : varint();
      if (size > message.size()) throw std::runtime_error("a field that is cut off");
      field.bytes = message.substr(0, size);
      message.remove_prefix(size);
    }
    fields.push_back(field);
  }
  return fields;
}

struct ReadValue {
  std::string tag, description, plugin;
  std::optional<float> scalar;
  struct Histogram {
    double min = 0, max = 0, num = 0, sum = 0, sum_squares = 0;
    std::vector<double> limits, buckets;
  };
  std::optional<Histogram> histogram;
  struct Image {
    std::uint64_t width = 0, height = 0, colorspace = 0;
    std::string png;
  };
  std::optional<Image> image;
};
struct ReadEvent {
  double wall_time = 0;
  std::int64_t step = 0;
  std::string version;
  std::optional<std::uint64_t> session;  // status of a session log
  std::vector<ReadValue> values;
  const ReadValue* find(std::string_view tag) const {
    for (const ReadValue& value : values)
      if (value.tag == tag) return &value;
    return nullptr;
  }
};

inline ReadValue read_value(std::string_view message) {
  ReadValue value;
  for (const WireField& f : wire_fields(message)) {
    if (f.number == 1) value.tag = f.bytes;
    if (f.number == 2) value.scalar = little_endian<float>(f.bytes);
    if (f.number == 4) {
      auto& image = value.image.emplace();
      for (const WireField& part : wire_fields(f.bytes)) {
        if (part.number == 1) image.height = part.varint;
        if (part.number == 2) image.width = part.varint;
        if (part.number == 3) image.colorspace = part.varint;
        if (part.number == 4) image.png = part.bytes;
      }
    }
    if (f.number == 5) {
      auto& histogram = value.histogram.emplace();
      const std::array<double*, 5> numbers = {&histogram.min, &histogram.max, &histogram.num, &histogram.sum, &histogram.sum_squares};
      for (const WireField& part : wire_fields(f.bytes)) {
        if (part.number <= 5) *numbers.at(static_cast<std::size_t>(part.number - 1)) = little_endian<double>(part.bytes);
        for (std::size_t at = 0; part.number >= 6 && at < part.bytes.size(); at += 8)  // packed
          (part.number == 6 ? histogram.limits : histogram.buckets).push_back(little_endian<double>(part.bytes.substr(at)));
      }
    }
    if (f.number == 9)
      for (const WireField& part : wire_fields(f.bytes)) {
        if (part.number == 1) value.plugin = wire_fields(part.bytes).at(0).bytes;
        if (part.number == 3) value.description = part.bytes;
      }
  }
  return value;
}

inline ReadEvent read_event(std::string_view message) {
  ReadEvent event;
  for (const WireField& f : wire_fields(message)) {
    if (f.number == 1) event.wall_time = little_endian<double>(f.bytes);
    if (f.number == 2) event.step = static_cast<std::int64_t>(f.varint);
    if (f.number == 3) event.version = f.bytes;
    if (f.number == 5)
      for (const WireField& value : wire_fields(f.bytes)) event.values.push_back(read_value(value.bytes));
    if (f.number == 7)
      for (const WireField& part : wire_fields(f.bytes))
        if (part.number == 1) event.session = part.varint;
  }
  return event;
}

inline std::vector<ReadEvent> read_events(std::string_view file, bool* cut_off = nullptr) {
  std::vector<ReadEvent> events;
  for (const std::string& record : read_records(file, cut_off)) events.push_back(read_event(record));
  return events;
}

}  // namespace tessera::testing
