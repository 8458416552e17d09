// A request, how it is cut into blocks, and what a system call's result means for a block.
//
// [Note: cutting]
// O_DIRECT needs aligned offsets, lengths and addresses. A request is cut into
//   prefix   buffered, up to the first aligned offset
//   middle   direct, in blocks of block_bytes
//   suffix   buffered, from the last aligned offset
// The alignment is a multiple of the page size, so that the page cache never holds a page of which
// a part was written directly. If the addresses are not aligned when the offsets are, or there is
// no direct descriptor, everything is a buffered middle.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <vector>

#include "fault.hpp"
#include "offload_native.h"

namespace offload {

using Clock = std::chrono::steady_clock;

struct Outcome {
  int error = 0;
  bool is_short = false;
  std::uint64_t offset = 0;  // of the first block that failed
  std::uint32_t checksum = 0;
};

// What is asked for; never changes.
struct RequestSpec {
  Operation operation = Operation::kRead;
  unsigned lane = 0;  // 0 or 1 within its queue
  int fd = -1;
  int direct_fd = -1;
  std::uint64_t alignment = 1;
  std::uint64_t memory_alignment = 1;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  unsigned char* address = nullptr;
  const unsigned char* source = nullptr;  // of a copy
  std::uint64_t block_bytes = 0;
  bool has_checksum = false;
  std::uint32_t checksum_seed = 0;
};

struct Extent {
  std::uint64_t start = 0;  // from the request's start
  std::uint64_t nbytes = 0;
  bool direct = false;
};

class Request {
 public:
  Request(const RequestSpec& spec, std::uint64_t urgency);

  const RequestSpec spec;
  std::uint64_t num_blocks() const { return checksums.size(); }
  Extent extent(std::uint64_t index) const;

  // Joins the blocks' checksums.
  std::uint32_t joined_checksum() const;

  // One per block; each is written by the one thread that works on the block.
  std::vector<std::uint32_t> checksums;

  std::uint64_t urgency_class() const { return urgency >> OFFLOAD_URGENCY_CLASS_SHIFT; }

  // Guarded by the queue's mutex.
  std::uint64_t urgency;        // the lower, the sooner; only ever lowered
  std::uint64_t sequence = 0;   // the order of the pushes
  std::uint64_t num_taken = 0;  // blocks
  std::uint64_t num_open = 0;   // pieces of work (I/O or checksum of a block) that have not ended
  Outcome outcome;
  Clock::time_point began_at{};  // when the first block was taken
  Clock::time_point ended_at{};
  std::condition_variable ended_condition;

  // Set last, under the mutex; read without it.
  std::atomic<bool> ended{false};

 private:
  std::uint64_t prefix_bytes_ = 0;
  std::uint64_t middle_bytes_ = 0;
  bool direct_ = false;
};

// One block on its way.
struct Block {
  std::shared_ptr<Request> request;
  std::uint64_t index = 0;
  std::uint64_t urgency = 0;  // of the request when it was taken
  Extent extent;
  std::uint64_t num_done = 0;  // bytes
  unsigned num_retries = 0;    // since the last progress

  unsigned char* data() const { return request->spec.address + extent.start; }
  void compute_checksum() const;
};

// One system call for the rest of a block.
struct Attempt {
  int fd = -1;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  unsigned char* address = nullptr;
  Operation operation = Operation::kRead;
  FaultAction action;

  // Whether `result` is known without a system call.
  bool is_synthetic() const {
    return action.kind == FaultKind::kErrno || action.kind == FaultKind::kLost;
  }
  std::int64_t synthetic_result() const {
    return action.kind == FaultKind::kErrno ? -static_cast<std::int64_t>(action.value)
                                            : static_cast<std::int64_t>(nbytes);
  }
};

Attempt next_attempt(const Block& block, FaultSpec& fault) noexcept;

// Applies what a fault does after the call; returns the result to go on with.
std::int64_t apply_fault(const Attempt& attempt, int buffered_fd, std::int64_t result) noexcept;

enum class Step : std::uint8_t {
  kDone,
  kAgain,       // make another attempt for the rest
  kRetryLater,  // the same after kRetryPause
  kFailed
};

inline constexpr std::chrono::milliseconds kRetryPause{1};

// What the result of a system call (bytes, or -errno) means; on kFailed fills `outcome`.
Step advance(Block& block, const Attempt& attempt, std::int64_t result, Outcome& outcome) noexcept;

}  // namespace offload
