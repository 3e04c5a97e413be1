#include "data/dedup.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "data/sha256.h"

namespace tessera {

/// The slot that holds the key, or the free one where it would go.
TextKey* KeySet::find(std::vector<TextKey>& slots, const TextKey& key) {
  const std::size_t mask = slots.size() - 1;
  std::size_t at = key[0] & mask;
  while (slots[at] != TextKey{} && slots[at] != key) at = (at + 1) & mask;
  return &slots[at];
}

bool KeySet::insert(const TextKey& key) {
  if (key == TextKey{}) {
    size_ += !zero_;
    return !std::exchange(zero_, true);
  }
  Part& part = parts_[key[1] >> 56];
  if (part.used >= part.slots.size() / 5 * 4) {
    std::vector<TextKey> larger(std::max<std::size_t>(16, 2 * part.slots.size()));
    for (const TextKey& old : part.slots)
      if (old != TextKey{}) *find(larger, old) = old;
    part.slots = std::move(larger);
  }
  TextKey* slot = find(part.slots, key);
  if (*slot == key) return false;
  *slot = key;
  ++part.used;
  ++size_;
  return true;
}

Deduplicator::Deduplicator(std::string file, std::function<void(TokenizedBatch)> take) : path_(std::move(file)), take_(std::move(take)) {}

void Deduplicator::accept(const TokenizedPiece& piece, std::span<const std::uint32_t> tokens) {
  accepted_.pieces.push_back(piece);
  accepted_.tokens.insert(accepted_.tokens.end(), tokens.begin(), tokens.end());
}

void Deduplicator::add(TokenizedBatch batch) {
  std::span<const std::uint32_t> left = batch.tokens;
  for (const TokenizedPiece& piece : batch.pieces) {
    const auto tokens = left.first(piece.tokens);
    left = left.subspan(piece.tokens);
    if (piece.first) {
      end_document();
      passing_ = false;
    }
    if (!passing_ && held_bytes_ + piece.text_bytes > kLongestCompared) {
      passing_ = true;
      std::span<const std::uint32_t> held = document_.tokens;
      for (const TokenizedPiece& early : document_.pieces) {
        accept(early, held.first(early.tokens));
        held = held.subspan(early.tokens);
      }
      document_ = {};
      held_bytes_ = 0;
    }
    if (passing_) {
      accept(piece, tokens);
    } else {
      document_.pieces.push_back(piece);
      document_.tokens.insert(document_.tokens.end(), tokens.begin(), tokens.end());
      held_bytes_ += piece.text_bytes;
    }
  }
  if (!accepted_.pieces.empty()) take_(std::exchange(accepted_, {}));
}

void Deduplicator::end_document() {
  if (document_.pieces.empty()) return;
  TextKey key = document_.pieces.front().key;
  if (document_.pieces.size() > 1) {  // the pieces of equal texts are equal
    std::string keys;
    for (const TokenizedPiece& piece : document_.pieces) keys.append(reinterpret_cast<const char*>(piece.key.data()), sizeof(TextKey));
    std::memcpy(key.data(), sha256({"tessera document\n", keys}).data(), sizeof(TextKey));
  }
  if (seen_.insert(key)) {
    if (!keys_) keys_ = std::make_unique<Spool>(path_);
    keys_->append(std::as_bytes(std::span(key)));
    std::span<const std::uint32_t> left = document_.tokens;
    for (const TokenizedPiece& piece : document_.pieces) {
      accept(piece, left.first(piece.tokens));
      left = left.subspan(piece.tokens);
    }
  } else {
    ++duplicates_;
    duplicate_bytes_ += held_bytes_;
  }
  document_.pieces.clear();
  document_.tokens.clear();
  if (document_.tokens.capacity() > (1 << 20)) document_.tokens.shrink_to_fit();
  held_bytes_ = 0;
}

void Deduplicator::finish() {
  end_document();
  if (!accepted_.pieces.empty()) take_(std::exchange(accepted_, {}));
}

std::optional<InputPosition> Deduplicator::held() const {
  if (document_.pieces.empty()) return std::nullopt;
  return document_.pieces.front().at;
}

nlohmann::ordered_json Deduplicator::state() {
  const Spool::Mark mark = keys_ ? keys_->mark() : Spool::Mark{};
  return {{"duplicates", duplicates_}, {"duplicate_bytes", duplicate_bytes_}, {"passing", passing_}, {"bytes", mark.bytes}, {"crc", mark.crc}};
}

void Deduplicator::restore(const nlohmann::ordered_json& state) {
  duplicates_ = state.at("duplicates");
  duplicate_bytes_ = state.at("duplicate_bytes");
  passing_ = state.at("passing");
  const Spool::Mark mark{state.at("bytes"), state.at("crc")};
  if (mark.bytes == 0) return;
  keys_ = std::make_unique<Spool>(path_, mark);
  keys_->read(sizeof(TextKey) << 16, [&](std::span<const std::byte> bytes) {
    TextKey key;
    for (; bytes.size() >= sizeof(TextKey); bytes = bytes.subspan(sizeof(TextKey))) {
      std::memcpy(key.data(), bytes.data(), sizeof(TextKey));
      seen_.insert(key);
    }
  });
}

}  // namespace tessera
