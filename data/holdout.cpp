#include "data/holdout.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

namespace tessera {
namespace {

constexpr std::uint64_t kDecideBytes = 16 << 20;  // of text seen before the way of holding out is chosen
constexpr std::uint64_t kWholeBytes = 16 << 20;   // of a document that stay together; what lies beyond is drawn by pieces

}  // namespace

Holdout::Holdout(double fraction, SplitWriter& train, SplitWriter& validation, std::function<bool()> few_documents)
    : fraction_(fraction), writers_{&train, &validation}, few_documents_(std::move(few_documents)), decided_(fraction == 0) {}

void Holdout::add(TokenizedBatch batch) {
  if (decided_) return place(batch);
  for (const TokenizedPiece& piece : batch.pieces) {
    kept_bytes_ += piece.text_bytes;
    documents_ += piece.first;
  }
  kept_.push_back(std::move(batch));
  if (kept_bytes_ > kDecideBytes) decide(false);
}

void Holdout::finish() {
  if (!decided_) decide(true);
}

void Holdout::decide(bool complete) {
  decided_ = true;
  by_pieces_ = documents_ < kFewDocuments && (complete || few_documents_());
  if (complete) {
    std::vector<std::uint64_t> hashes;
    for (const TokenizedBatch& batch : kept_)
      for (const TokenizedPiece& piece : batch.pieces)
        if (piece.first || by_pieces_) hashes.push_back(piece.hash);
    std::sort(hashes.begin(), hashes.end());
    if (hashes.size() > 1) {
      const auto wanted = static_cast<std::size_t>(std::llround(fraction_ * static_cast<double>(hashes.size())));
      threshold_ = hashes[std::clamp<std::size_t>(wanted, 1, hashes.size() - 1)];
    }
  } else {
    threshold_ = static_cast<std::uint64_t>(std::ldexp(fraction_, 64));
  }
  for (const TokenizedBatch& batch : kept_) place(batch);
  kept_.clear();
}

void Holdout::place(const TokenizedBatch& batch) {
  std::span<const std::uint32_t> tokens = batch.tokens;
  for (const TokenizedPiece& piece : batch.pieces) {
    bool side = side_;
    if (piece.first) within_ = 0;
    if (piece.first || by_pieces_ || within_ >= kWholeBytes) side = piece.hash < threshold_;
    within_ += piece.text_bytes;
    writers_[side]->add(tokens.first(piece.tokens), piece.first || side != side_, piece.text_bytes, piece.at.file, piece.at.documents);
    side_ = side;
    tokens = tokens.subspan(piece.tokens);
  }
}

nlohmann::ordered_json Holdout::state() const { return {{"threshold", threshold_}, {"by_pieces", by_pieces_}, {"side", side_}, {"within", within_}}; }

void Holdout::restore(const nlohmann::ordered_json& state) {
  threshold_ = state.at("threshold");
  by_pieces_ = state.at("by_pieces");
  side_ = state.at("side");
  within_ = state.at("within");
  decided_ = true;
}

}  // namespace tessera
