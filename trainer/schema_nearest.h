#pragma once
// The word that was probably meant.

#include <string>
#include <vector>

namespace tessera {

/// Which of `words` (at least one) is most like `word`: of those that begin with it where there are any, the least optimal string alignment distance,
/// the first of several.
std::string nearest(const std::string& word, const std::vector<std::string>& words);

}  // namespace tessera
