// Threads that do whole blocks by blocking calls: the "threads" backend, and the memory copies.
#pragma once

#include <thread>
#include <vector>

#include "request_queue.hpp"

namespace offload {

class WorkerPool {
 public:
  // Throws std::system_error if a thread cannot be made.
  WorkerPool(RequestQueue& queue, FaultSpec& fault, unsigned num_threads);
  // After the queue was stopped.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

 private:
  void run() noexcept;
  // False: the completion is never to come.
  bool transfer(Block& block, Outcome& outcome) noexcept;

  RequestQueue& queue_;
  FaultSpec& fault_;
  std::vector<std::thread> threads_;
};

}  // namespace offload
