// Threads that compute the checksums of blocks, beside the I/O of others.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "request_queue.hpp"

namespace offload {

class ChecksumPool {
 public:
  // Throws std::system_error if a thread cannot be made.
  ChecksumPool(RequestQueue& queue, unsigned num_threads);
  // When no request is in flight.
  ~ChecksumPool();
  ChecksumPool(const ChecksumPool&) = delete;
  ChecksumPool& operator=(const ChecksumPool&) = delete;

  // Takes over one open piece of work of the block; ends it when the checksum is there.
  void add(Block block) noexcept;

 private:
  void run() noexcept;
  void end_threads() noexcept;

  RequestQueue& queue_;
  std::mutex mutex_;  // guards waiting_ and stopped_
  std::condition_variable changed_;
  std::deque<Block> waiting_;
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace offload
