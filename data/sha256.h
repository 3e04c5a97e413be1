#pragma once
// SHA-256 (FIPS 180-4), by OpenSSL; as text, 64 lower-case hexadecimal digits.

#include <array>
#include <initializer_list>
#include <string>
#include <string_view>

namespace tessera {

std::string sha256_hex(std::string_view bytes);

/// Of the parts, one after the other.
std::array<unsigned char, 32> sha256(std::initializer_list<std::string_view> parts);

/// Of a file's contents, read in pieces. Throws std::runtime_error naming the file when it cannot be opened or read.
std::string sha256_file(const std::string& path);

}  // namespace tessera
