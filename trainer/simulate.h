#pragma once
// The time of a training step on GPUs that are not there: work from the configuration and the plan, at rates that were measured on one GPU, and bytes
// over links of given speed. A model, not a measurement: every number that enters it is in `rates` or `cluster` and is printed beside the result.
//
// One micro-batch takes the time of the rank that has most to do, part by part:
//   dense       6 FLOPs a matrix parameter and token, a third of them forward, at gemm_tflops
//   other       norms, unit length and rotation by token, layer and width; cross-entropy by logit; a third of it forward
//   attention   for each direction: visible tiles x tile_ns + lists of a query tile that hold any x list_ns. Every visible tile is counted as active.
//               tile_ns is of heads of 64, and in proportion to their size
//   exchange    what the kernels do not hide. A rank's GPU sends and receives at once, to its node at link_gbps and to others at node_gbps, both at
//               once; the slowest rank's c is the exchange's. With a the attention's time:
//                 needed   one round of latency; in s turns of heads, `stages` or as many as there are heads, c of the next beside a of this:
//                          (a + c) / s + (s - 1) max(a, c) / s
//                 ring     S - 1 hops forward, S backward, each a latency; h hops beside S kernels:  a / S + h max(a / S, c / h) forward; backward
//                          its last hop, which brings sums home, has no kernel beside it:  a / S + (S - 1) max(a / S, c / S) + c / S
//                 heads    the same with two rounds, of the H / S heads of a rank
// A step is M micro-batches and, over all GPUs (ZeRO-1), with P parameters:
//   gradients   reduce-scatter of 4 P bytes, beside the backward pass of the last micro-batch; all-gather of 2 P (bf16), beside the forward pass of
//   the
//               first: what these do not hide. A ring over N GPUs moves (N - 1) / N of the bytes at the lesser of link_gbps and the node's
//               node_size x node_gbps (where there is more than one node), in N - 1 hops of a latency
//   optimizer   AdamW on P / N parameters
// train.recompute block: the forward pass of every block, its exchange with it, is made twice. Not counted: evaluation, checkpoints, input,
// embedding, self edges, sinks, what the output gate does beside its matrix, the few numbers that are summed over ranks, imbalance between
// data-parallel ranks, stragglers. Whether it fits in memory is not asked here.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "trainer/sequence_costs.h"

namespace tessera {

/// Rates of one NVIDIA H200. Defaults: tests/bench/RESULTS.md.
struct SimulatedRates {
  // "A training step of 354 M parameters": 100.5 ms of matrix products for 32 x 1024 tokens of 2.121 GFLOP.
  double gemm_tflops = 692;
  // "Attention on one NVIDIA H200": windows of 1024 and 256 at T = 65536 give time a tile and time a list. What they say of the other rows there is
  // within 6 % of the measured times.
  double tile_forward_ns = 1.92, list_forward_ns = 9.2;
  double tile_backward_ns = 6.14, list_backward_ns = 22.0;
  // The same step: norms 7.0 ms, unit length and rotation 4.0, over 32,768 tokens x 24 layers x width 1024; cross-entropy 1.7 ms over 50,304 logits
  // a token; AdamW 2.9 ms over 354 M parameters.
  double other_ps = 13.7, logit_ps = 1.03, adamw_ps = 8.2;
  // Turns of heads, of exchanges needed and heads.
  double stages = 4;
};

/// Per GPU and direction. Defaults are what the vendors state, not measured: NVLink 4 (900 GB/s both ways), one 400 Gbit/s port a GPU.
struct SimulatedCluster {
  int gpus = 8;
  int node_size = 8;
  double link_gbps = 3600;  // Gbit/s between GPUs of a node
  double node_gbps = 400;   // Gbit/s between nodes
  double latency_us = 5;    // a round of messages; assumed
};

/// Milliseconds of a step.
struct SimulatedStep {
  double dense = 0, other = 0, attention = 0, exchange = 0, gradients = 0, optimizer = 0;
  double exchange_whole = 0;         // of the exchange, hidden or not
  double gradients_whole = 0;        // of the reduce-scatter and the all-gather
  std::int64_t exchange_bytes = 0;   // sent by the GPU that sends most
  std::int64_t gradients_bytes = 0;  // sent by a GPU
  std::int64_t micro_batches = 0, tokens = 0;
  double total() const { return dense + other + attention + exchange + gradients + optimizer; }
};

/// Pure. `config` has its vocabulary; `costs` are sequence_costs() of it, for S = costs.split.ranks() ranks that share a sequence; gpus must be a
/// multiple of S. `exchange` is not automatic, and heads only where layers have it. Tokens a step: train.tokens_per_step, rounded up to what
/// gpus / S replicas of a micro-batch make.
SimulatedStep simulate_step(const Config& config, const SequenceCosts& costs, SequenceExchange exchange, const SimulatedCluster& cluster,
                            const SimulatedRates& rates);

/// Sets a rate by its name in SimulatedRates; throws ConfigError for "NAME=VALUE" that is none, or not a positive number (0 is one for times).
void set_rate(SimulatedRates& rates, const std::string& assignment);

/// As `tessera plan --simulate --json` prints it: "assumptions": [{"name", "value", "source"}], "steps": one for every number of GPUs, layout and
/// exchange, and "left_out": those that cannot be, with the reason. `sequence`: ranks of a sequence; 0: parallel.sequence, or where that is 1 as many
/// as a node has. Throws ConfigError for a device other than cuda and for ranks that do not divide the GPUs, saying which would; and
/// where none can be, with the reasons.
nlohmann::ordered_json simulate(const Config& config, const std::vector<int>& gpus, int sequence, SimulatedCluster cluster,
                                const SimulatedRates& rates);

}  // namespace tessera
