#pragma once
// TFRecord: what TensorBoard's event files are made of.
//
//   u64 length       all numbers little-endian
//   u32              masked CRC-32C of the eight bytes before it
//   u8[length] data
//   u32              masked CRC-32C of the data

#include <cstdint>
#include <string>
#include <string_view>

namespace tessera {

/// CRC-32C (Castagnoli), as in RFC 3720: that of "123456789" is 0xE3069283.
std::uint32_t crc32c(std::string_view bytes);

/// TFRecord's mask, so that a CRC of bytes that hold a CRC stays sound: rotated right by 15 bits, plus 0xA282EAD8 (mod 2^32).
constexpr std::uint32_t masked_crc(std::uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u; }

/// The bytes of a record that holds `data`.
std::string tf_record(std::string_view data);

}  // namespace tessera
