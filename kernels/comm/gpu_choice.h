#pragma once
// Which GPU each rank takes, as a pure function of what all ranks see: every rank computes the same answer, or the same error.

#include <string>
#include <vector>

namespace tessera {

/// What one rank sees.
struct VisibleGpus {
  std::string host;                    // its name, for messages
  std::string machine;                 // what tells one host from another
  std::string problem;                 // why this rank cannot use a GPU at all; "" when it can
  std::vector<std::string> addresses;  // of the GPUs, in this process's order: the same GPU has the same one in every process of a machine
};

/// For each rank the index, in its own order, of the GPU that it takes. The ranks of a machine choose in turn, each the first of its GPUs that no
/// earlier one has: where all see the same GPUs, the n-th rank takes the n-th; where the launcher shows each rank its own, each takes that. With
/// `share` a rank that finds all taken joins the least used. Throws std::invalid_argument when a rank has no GPU, or none of its own without `share`.
std::vector<int> choose_gpus(const std::vector<VisibleGpus>& ranks, bool share);

}  // namespace tessera
