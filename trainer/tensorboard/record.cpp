#include "trainer/tensorboard/record.h"

#include <isa-l/crc.h>

namespace tessera {

namespace {

template <class T>
void put(std::string& out, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) out += static_cast<char>(value >> (8 * i));
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  // The library only reads; it leaves the first and last inversion to the caller.
  auto* const data = reinterpret_cast<unsigned char*>(const_cast<char*>(bytes.data()));
  return ~crc32_iscsi(data, static_cast<int>(bytes.size()), ~0u);
}

std::string tf_record(std::string_view data) {
  std::string record;
  record.reserve(data.size() + 16);
  put<std::uint64_t>(record, data.size());
  put<std::uint32_t>(record, masked_crc(crc32c(record)));
  record += data;
  put<std::uint32_t>(record, masked_crc(crc32c(data)));
  return record;
}

}  // namespace tessera
