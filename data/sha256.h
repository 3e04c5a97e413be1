#pragma once
// SHA-256 (FIPS 180-4), by OpenSSL, as 64 lower-case hexadecimal digits.

#include <string>
#include <string_view>

namespace tessera {

std::string sha256_hex(std::string_view bytes);

/// Of a file's contents, read in pieces. Throws std::runtime_error naming the file when it cannot be opened or read.
std::string sha256_file(const std::string& path);

}  // namespace tessera
