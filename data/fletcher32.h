#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tessera {

/// Fletcher's checksum as HDF5's filter of that name takes it: two sums modulo 65535 over big-endian words of 16 bits. An even number of bytes.
std::uint32_t fletcher32(std::span<const std::byte> bytes);

}  // namespace tessera
