#include "checksum_pool.hpp"

#include <algorithm>
#include <new>
#include <utility>

#include "threads.hpp"

namespace offload {

ChecksumPool::ChecksumPool(RequestQueue& queue, unsigned num_threads) : queue_(queue) {
  try {
    for (unsigned i = 0; i < num_threads; ++i) {
      threads_.push_back(start_thread("offload-crc", [this] { run(); }));
    }
  } catch (...) {
    end_threads();
    throw;
  }
}

ChecksumPool::~ChecksumPool() { end_threads(); }

void ChecksumPool::end_threads() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ChecksumPool::add(Block block) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(block);
  } catch (const std::bad_alloc&) {
    block.compute_checksum();
    queue_.end(block, {});
    return;
  }
  changed_.notify_one();
}

void ChecksumPool::run() noexcept {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopped_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    {
      const auto next = std::min_element(
          waiting_.begin(), waiting_.end(),
          [](const Block& left, const Block& right) { return left.urgency < right.urgency; });
      const Block block = std::move(*next);
      waiting_.erase(next);
      lock.unlock();
      block.compute_checksum();
      queue_.end(block, {});
    }
    lock.lock();
  }
}

}  // namespace offload
