#include "data/sha256.h"

#include <openssl/evp.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace tessera {
namespace {

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) throw std::runtime_error("OpenSSL cannot start a SHA-256");
  }
  void update(const void* data, std::size_t size) {
    if (EVP_DigestUpdate(context_.get(), data, size) != 1) throw std::runtime_error("OpenSSL cannot go on with a SHA-256");
  }
  std::array<unsigned char, 32> digest() {
    std::array<unsigned char, 32> out;
    if (EVP_DigestFinal_ex(context_.get(), out.data(), nullptr) != 1) throw std::runtime_error("OpenSSL cannot finish a SHA-256");
    return out;
  }
  std::string hex() {
    constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    for (const unsigned char byte : digest()) {
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    }
    return out;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

std::string sha256_hex(std::string_view bytes) {
  Sha256 hash;
  hash.update(bytes.data(), bytes.size());
  return hash.hex();
}

std::array<unsigned char, 32> sha256(std::initializer_list<std::string_view> parts) {
  Sha256 hash;
  for (const std::string_view part : parts) hash.update(part.data(), part.size());
  return hash.digest();
}

std::string sha256_file(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::runtime_error(path + ": cannot open: " + std::strerror(errno));
  Sha256 hash;
  std::vector<char> buffer(1 << 20);
  while (const std::size_t size = std::fread(buffer.data(), 1, buffer.size(), file.get())) hash.update(buffer.data(), size);
  if (std::ferror(file.get())) throw std::runtime_error(path + ": cannot read: " + std::strerror(errno));
  return hash.hex();
}

}  // namespace tessera
