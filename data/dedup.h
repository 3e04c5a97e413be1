#pragma once
// Leaves out documents whose text has come before: the first in the order of the input stays. Texts are compared by 128 bits of SHA-256, which
// takes 20 to 40 bytes of memory a document. Documents longer than kLongestCompared stay without being compared, so that no more than that is held.

#include <array>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "data/prepare_pipeline.h"
#include "data/spool.h"

namespace tessera {

/// A set of keys that are themselves hashes. In 256 parts that grow one by one, so that growing takes little memory on top.
class KeySet {
 public:
  /// Whether it was not yet in the set.
  bool insert(const TextKey& key);
  std::uint64_t size() const { return size_; }

 private:
  struct Part {
    std::vector<TextKey> slots;  // {0, 0}: free
    std::size_t used = 0;
  };
  static TextKey* find(std::vector<TextKey>& slots, const TextKey& key);
  std::array<Part, 256> parts_;
  bool zero_ = false;
  std::uint64_t size_ = 0;
};

constexpr std::size_t kLongestCompared = 32 << 20;

class Deduplicator {
 public:
  /// The keys are also kept in a file, from which restore() takes them.
  Deduplicator(std::string file, std::function<void(TokenizedBatch)> take);

  /// Hands on the documents that are complete and new. The last one is held back until the next begins, or finish().
  void add(TokenizedBatch batch);
  void finish();

  /// Where the document begins that is held back.
  std::optional<InputPosition> held() const;
  std::uint64_t duplicates() const { return duplicates_; }
  std::uint64_t duplicate_bytes() const { return duplicate_bytes_; }

  nlohmann::ordered_json state();
  void restore(const nlohmann::ordered_json& state);

 private:
  void end_document();
  void accept(const TokenizedPiece& piece, std::span<const std::uint32_t> tokens);

  const std::string path_;
  const std::function<void(TokenizedBatch)> take_;
  KeySet seen_;
  std::unique_ptr<Spool> keys_;
  TokenizedBatch document_, accepted_;
  std::size_t held_bytes_ = 0;
  bool passing_ = false;  // the document is too long to be held
  std::uint64_t duplicates_ = 0, duplicate_bytes_ = 0;
};

}  // namespace tessera
