#pragma once
// What a memory plan needs to know of a kind of device without having one: `tessera plan` runs where there is no GPU.

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"
#include "kernels/tiles.h"

namespace tessera {

enum class DeviceKind { cpu, cuda };

const char* name_of(DeviceKind kind);  // "cpu", "cuda"

/// The type of activations and of the weights that multiply them (kernels/ops.h): f32 on the CPU, bf16 on a GPU.
DType compute_type(DeviceKind kind);

/// Bytes that Ops::prepare(rows, width) allocates. width: of the widest rows that a backward pass adds up, those of linear layers with biases
/// included.
std::size_t scratch_bytes(DeviceKind kind, std::int64_t rows, std::int64_t width);

/// Bytes of Ops::upload_tiles(map), lists and masks; within a few per cent on a GPU.
std::size_t tiles_bytes(DeviceKind kind, const TileMap& map);

/// Bytes that the device's libraries take once a process (CUDA context, cuBLASLt's workspace), as measured; 0 on the CPU.
std::size_t library_bytes(DeviceKind kind);

/// Bytes that NCCL takes on each GPU beside its calls' arguments: its channels once there are several ranks, and the buffers between this one and
/// each of the `others` that it sends to and receives from. As measured with NVLink between GPUs of one host (tests/bench/RESULTS.md); 0 for one rank
/// and on the CPU.
std::size_t connection_bytes(DeviceKind kind, int ranks, int others);

/// Bytes of a chunk of logits in the classifier: large enough for a matrix product to be efficient.
std::size_t logits_bytes(DeviceKind kind);

}  // namespace tessera
