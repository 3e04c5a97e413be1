#pragma once
// What the configuration's tests share.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "trainer/config.h"

namespace tessera {

/// The message of the ConfigError that this text (as file x.yaml) and these --set give; "" when they load.
inline std::string error_of(const std::string& yaml, const std::vector<std::string>& sets = {}) {
  try {
    parse_config(yaml, "x.yaml", sets);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "";
}

/// Expects each of `parts` in the message.
template <class... Parts>
void expect_error(const std::string& message, const Parts&... parts) {
  for (const std::string& part : {std::string(parts)...})
    EXPECT_NE(message.find(part), std::string::npos) << "expected: " << part << "\nfound:    " << message;
}

}  // namespace tessera
