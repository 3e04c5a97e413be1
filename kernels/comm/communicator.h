#pragma once
// One interface for talking to the other ranks, with an MPI implementation (host memory) and an NCCL one (device memory, nccl.h).
// Collectives are called by every rank of the communicator in the same order with the same sizes. Results do not depend on timing:
// MPI sums are taken in rank order 0, 1, 2, ..., NCCL's in an order that depends on ranks and sizes only.  Wrong shapes or types throw
// std::logic_error, failed calls std::runtime_error with MPI's text. A failure (a dead peer, an MPI error) takes the whole job down with one message
// on stderr: an exception on one rank must end in abort(), never in a hang.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/tensor.h"

namespace tessera {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int local_rank() const = 0;  // among the ranks on this host
  virtual int local_size() const = 0;

  /// x (f32, f64, u64; any shape) becomes the sum over ranks, the same bits on every rank.
  virtual void all_reduce_sum(const Tensor& x) = 0;
  /// in: [size * n] f32; out: [n] f32 = sum over ranks of block `rank()` of `in`. out may be that block itself.
  virtual void reduce_scatter_sum(const Tensor& in, const Tensor& out) = 0;
  /// in: [n]; out: [size * n], block r from rank r. in may be block `rank()` of out.
  virtual void all_gather(const Tensor& in, const Tensor& out) = 0;
  virtual void broadcast(const Tensor& x, int root) = 0;
  /// A stretch of a tensor that goes to a rank, or comes from it: `count` elements from element `first` on.
  struct Part {
    int rank = 0;
    std::int64_t first = 0, count = 0;
  };
  /// Parts of `in` go to ranks, and parts of `out` come from ranks, which send as many elements of the same type (any): at most one part to and one
  /// from a rank. What goes to this rank itself is copied. Only ranks that have something for each other need to call it, so a group of some ranks
  /// may do so by itself; empty parts are left out. in and out do not overlap.
  void exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) {
    wait(begin_exchange(in, send, out, receive));
  }
  virtual void barrier() = 0;

  // The same, begun after what the device has been asked to do so far and done beside what it is asked next. What is asked after wait() comes
  // after the collective; the host does not wait. A communicator over host memory does it all at once. Until wait(), nothing else may touch
  // the tensors.
  using Ticket = std::int64_t;
  virtual Ticket begin_reduce_scatter_sum(const Tensor& in, const Tensor& out) { return reduce_scatter_sum(in, out), 0; }
  virtual Ticket begin_all_gather(const Tensor& in, const Tensor& out) { return all_gather(in, out), 0; }
  virtual Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) = 0;
  virtual void wait(Ticket /*begun*/) {}

  /// Host values, for control flow; every rank gets the same answer.
  virtual std::int64_t max(std::int64_t value) = 0;
  virtual std::string broadcast(const std::string& text, int root) = 0;

  /// Bytes that this rank has sent to other ranks by exchange() of this communicator.
  std::uint64_t sent_bytes() const { return sent_bytes_; }

  /// Ranks of equal color form a new communicator, ordered by (key, old rank).
  virtual std::unique_ptr<Communicator> split(int color, int key) = 0;

  /// Ends the job on every rank with this exit code; the message is printed once by this rank. Does not return.
  [[noreturn]] virtual void abort(int exit_code, const std::string& message) = 0;

 protected:
  std::uint64_t sent_bytes_ = 0;  // an implementation adds what comm::check_exchange() returns
};

/// One process, no MPI.
std::unique_ptr<Communicator> make_single_communicator();

/// Initialises MPI (once a process) and wraps a copy of MPI_COMM_WORLD. Call it, and the communicator, from one thread (MPI_THREAD_FUNNELED).
/// A process that no launcher started (mpirun, mpiexec and srun set environment variables for MPI: none is there) gets
/// make_single_communicator() and MPI is not touched.
/// MPI is finalised when the process ends in order. A communicator destroyed by an exception on its way suppresses that, since the
/// other ranks may be waiting elsewhere; the launcher then ends them. Still, answer an exception with abort(): it is prompt and says why.
std::unique_ptr<Communicator> make_mpi_communicator();

}  // namespace tessera
