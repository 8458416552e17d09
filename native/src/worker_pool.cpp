#include "worker_pool.hpp"

#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <system_error>

#include "threads.hpp"

namespace offload {
namespace {

// Makes the system call of an attempt; returns bytes or -errno.
std::int64_t call(const Attempt& attempt, const RequestSpec& spec) noexcept {
  if (attempt.is_synthetic()) return attempt.synthetic_result();
  const auto offset = static_cast<off_t>(attempt.offset);
  std::int64_t result = 0;
  switch (attempt.operation) {
    case Operation::kRead:
      result = ::pread(attempt.fd, attempt.address, attempt.nbytes, offset);
      break;
    case Operation::kWrite:
      result = ::pwrite(attempt.fd, attempt.address, attempt.nbytes, offset);
      break;
    default:
      std::memcpy(attempt.address, spec.source + (attempt.address - spec.address), attempt.nbytes);
      return static_cast<std::int64_t>(attempt.nbytes);
  }
  return result < 0 ? -errno : result;
}

void sleep_for(std::chrono::milliseconds pause) noexcept {
  timespec left{pause.count() / 1000, (pause.count() % 1000) * 1'000'000};
  while (::nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

}  // namespace

WorkerPool::WorkerPool(RequestQueue& queue, FaultSpec& fault, unsigned num_threads)
    : queue_(queue), fault_(fault) {
  try {
    for (unsigned i = 0; i < num_threads; ++i) {
      threads_.push_back(start_thread("offload-io", [this] { run(); }));
    }
  } catch (...) {
    queue_.stop(std::nullopt);
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

WorkerPool::~WorkerPool() {
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::run() noexcept {
  while (auto block = queue_.take()) {
    const RequestSpec& spec = block->request->spec;
    // A blocking call: here the checksum of a write can only come before it.
    const bool writing = spec.operation == Operation::kWrite;
    if (spec.has_checksum && writing) block->compute_checksum();
    Outcome outcome;
    if (!transfer(*block, outcome)) continue;
    queue_.end_transfer(*block, outcome.error == 0);
    if (spec.has_checksum && !writing && outcome.error == 0) block->compute_checksum();
    queue_.end(*block, outcome);
  }
}

bool WorkerPool::transfer(Block& block, Outcome& outcome) noexcept {
  const RequestSpec& spec = block.request->spec;
  for (;;) {
    const Attempt attempt = next_attempt(block, fault_);
    if (attempt.action.kind == FaultKind::kDrop) return false;
    const std::int64_t result = apply_fault(attempt, spec.fd, call(attempt, spec));
    if (attempt.action.kind == FaultKind::kDelay) {
      sleep_for(std::chrono::milliseconds(attempt.action.value));
    }
    switch (advance(block, attempt, result, outcome)) {
      case Step::kDone:
        outcome = {};
        return true;
      case Step::kAgain:
        break;
      case Step::kRetryLater:
        sleep_for(kRetryPause);
        break;
      case Step::kFailed:
        return true;
    }
  }
}

}  // namespace offload
