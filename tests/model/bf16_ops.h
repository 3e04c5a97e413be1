#pragma once
// A GPU's element types without a GPU: operations that take and give bf16 as kernels/ops.h says for DeviceKind::cuda, computed by the CPU's in
// fp32, with every output rounded once. With it the model's mixed types are tested anywhere; and it is the error that bf16 makes, against which that
// of a GPU is measured.

#include <memory>

#include "kernels/ops.h"

namespace tessera::test {

/// Throws std::logic_error for a tensor of another type than the contract's.
std::unique_ptr<Ops> make_bf16_ops();

}  // namespace tessera::test
