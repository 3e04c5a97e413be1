#pragma once
// Choices between forms of the kernels that only a measurement can make. Each can be set on the compiler's command line.

/// Query tiles of a block of the forward and of the dq kernel, head size 64, Hopper: 2 or 3. The dq kernel overlaps neighbouring tiles with 2 only.
#ifndef TESSERA_ATTENTION_GROUPS_FORWARD
#define TESSERA_ATTENTION_GROUPS_FORWARD 3
#endif
#ifndef TESSERA_ATTENTION_GROUPS_Q
#define TESSERA_ATTENTION_GROUPS_Q 2
#endif
/// dk, dv kernel, head size 64, Hopper: 0 one tile at a time; 1 the next tile's scores ahead, and dk still under way from one tile to the next; 2 the
/// next tile's scores ahead, and nothing under way between tiles, which takes fewer registers.
#ifndef TESSERA_ATTENTION_AHEAD_KV
#define TESSERA_ATTENTION_AHEAD_KV 1
#endif
