#pragma once
// A check of what a run of several ranks stands on, before it starts: a few seconds in which mistakes of set-up show as one line each, and not as a
// hang or a wrong sum an hour later.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/ops.h"

namespace tessera {

struct PreflightRequest {
  Communicator& host;    // all ranks of the job (make_mpi_communicator)
  Communicator& device;  // between the devices; on the CPU, or alone, it may be `host` itself
  Ops& ops;
  std::size_t planned_bytes = 0;      // of device memory that this rank is about to allocate
  std::int64_t heads = 0, width = 0;  // of the model; 0: no attention
  std::vector<int> partners{};        // ranks that it exchanges keys with (exchange_partners), this one among them; none or one: with nobody
};

/// Looks, in this order, at: whether MPI reaches as many ranks as were launched and sums right; the same build and libraries on every rank;
/// check_head_size; whether the device gives back what it was given; small sums over the devices; check_exchange; memory for what all ranks of a
/// device plan together, beside what connections took by then. Silent when all is well. Throws an error that every rank throws alike (CommonError, or
/// of a single rank std::runtime_error) with one line that says what is wrong and what to do; what NCCL itself reports, std::runtime_error on the
/// rank that it reports it to. Collective.
void preflight(const PreflightRequest& request);

/// Whether every rank's GPU has the shared memory that attention with so many heads in this width takes. Needs no memory of the device. Collective.
void check_head_size(Communicator& host, Ops& ops, std::int64_t heads, std::int64_t width);

/// Its small message from each rank to each of its `partners`, which opens the connections that exchanges of keys will use. Partners are so to each
/// other. Collective.
void check_exchange(Communicator& host, Communicator& device, Ops& ops, const std::vector<int>& partners);

/// Its look at memory alone, for those who are about to allocate `planned_bytes` on each rank. Collective.
void check_memory(Communicator& host, Ops& ops, std::size_t planned_bytes);

/// Processes that the launcher says it started (Open MPI's and PMI's variables); 0 when it says nothing.
int launched_ranks();
/// The name of this host.
std::string host_name();
/// Of the machine, one word: the same for all containers of a host.
std::string machine();

// Its parts that need no other rank; "" when all is well.

/// `launched` as the launcher's variables state it (0: not stated), `found` as MPI counts, `sum` of a one from each rank.
std::string launch_problem(int launched, int found, double sum);

/// Texts of all ranks ("tessera 0.1.0, NCCL 2.28.9"), and the names of their hosts.
std::string build_problem(const std::vector<std::string>& builds, const std::vector<std::string>& hosts);

/// Of heads of width / heads, a block of whose attention takes `needed` bytes of shared memory, on `device`, where it may take `has`.
std::string head_size_problem(std::int64_t heads, std::int64_t width, std::size_t needed, const std::string& device, std::size_t has);

struct MemoryClaim {
  std::string device;  // with its host's name
  std::size_t planned = 0, available = 0;
  std::string machine{};  // tells hosts of one name apart: ranks of the same machine and device share its memory
};
std::string memory_problem(const std::vector<MemoryClaim>& ranks);

}  // namespace tessera
