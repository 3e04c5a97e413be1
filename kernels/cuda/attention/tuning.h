#pragma once
// Choices between forms of the kernels that only a measurement can make. Each can be set on the compiler's command line.

/// Head size 64: a warpgroup's own tiles, left operands of every score product, held in registers: 0 none (shared memory), 1 those of the scores
/// (q, k), 2 those of the weights' gradients (do, v), 3 both.
#ifndef TESSERA_ATTENTION_HELD_FORWARD
#define TESSERA_ATTENTION_HELD_FORWARD 0
#endif
#ifndef TESSERA_ATTENTION_HELD_KV
#define TESSERA_ATTENTION_HELD_KV 0
#endif
#ifndef TESSERA_ATTENTION_HELD_Q
#define TESSERA_ATTENTION_HELD_Q 0
#endif
/// Query tiles of a block of the dq kernel, head size 64, Hopper.
#ifndef TESSERA_ATTENTION_GROUPS_Q
#define TESSERA_ATTENTION_GROUPS_Q 3
#endif
