#pragma once
// What the tests of CORE share: the bundle under tests/fixtures/core, what Python recorded of it (record.py), and a model that is none.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "data/files.h"
#include "data/tokenizer.h"
#include "trainer/core/bundle.h"
#include "trainer/core/score.h"

namespace tessera::testing {

inline const std::string kCoreFixtures = TESSERA_FIXTURES "/core";
inline const std::string kToyBundle = kCoreFixtures + "/bundle";

inline nlohmann::json recorded(const std::string& name) { return nlohmann::json::parse(read_file(kCoreFixtures + "/" + name)); }

inline const Tokenizer& small_tokenizer() {
  static const auto tokenizer = load_tokenizer("bpe:" TESSERA_FIXTURES "/tokenizer/small.json");
  return *tokenizer;
}

inline CoreTask toy_task(const std::string& label) { return select_tasks(read_core_bundle(kToyBundle), label).at(0); }

/// record.py's model().
inline void made_up_model(const HostBatch& batch, bool predictions, TokenScores& scores) {
  scores.losses.assign(batch.token.size(), 0);
  if (predictions) scores.predictions.assign(batch.token.size(), 0);
  for (std::int64_t row = 0; row < batch.batch; ++row) {
    std::int64_t state = 0;
    for (std::int64_t t = 0; t < batch.tokens; ++t) {
      const auto i = static_cast<std::size_t>(row * batch.tokens + t);
      const std::int64_t following = t + 1 < batch.tokens ? batch.token[i + 1] : 0;
      state = (state * 33 + batch.token[i] + 1) % 1000003;
      scores.losses[i] = static_cast<float>((state * 7 + following * 13) % 1024) / 128.0f;
      if (predictions) scores.predictions[i] = static_cast<std::int32_t>(following + (state % 4 == 0));
    }
  }
}

}  // namespace tessera::testing
