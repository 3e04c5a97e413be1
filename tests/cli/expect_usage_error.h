#pragma once
// What every command's mistakes have in common.

#include <gtest/gtest.h>

#include <string>

#include "tests/cli/run_tessera.h"

namespace tessera {

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// A usage error: exit code 2, nothing on stdout, "tessera: error: ..." on stderr with each of `parts`.
template <class... Parts>
void expect_usage_error(const Outcome& outcome, const Parts&... parts) {
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_TRUE(outcome.err.starts_with("tessera: error: ")) << outcome.err;
  EXPECT_TRUE(outcome.err.ends_with("\n"));
  for (const std::string& part : {std::string(parts)...}) EXPECT_TRUE(has(outcome.err, part)) << "expected: " << part << "\nfound: " << outcome.err;
}

}  // namespace tessera
