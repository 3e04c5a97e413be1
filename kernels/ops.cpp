#include "kernels/ops.h"

#include <stdexcept>

namespace tessera {

void Ops::move_rows(const MoveRows&) { throw std::logic_error("move_rows: not on this device (has_row_moves())"); }
void Ops::look_up(const Tensor&, const Tensor&, const Tensor&) { throw std::logic_error("look_up: not on this device (has_row_moves())"); }
void Ops::cache_append(const CacheAppend&) { throw std::logic_error("cache_append: not on this device (has_attention_decode())"); }
void Ops::attention_decode(const AttentionDecode&) { throw std::logic_error("attention_decode: not on this device (has_attention_decode())"); }

}  // namespace tessera
