// The one thread that feeds a ring and handles its completions.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "checksum_pool.hpp"
#include "request_queue.hpp"
#include "ring.hpp"

namespace offload {

class RingBackend final : public RequestQueue::Listener {
 public:
  // Throws std::system_error if the ring does not start or a thread cannot be made.
  RingBackend(RequestQueue& queue, FaultSpec& fault, std::unique_ptr<Ring> ring,
              std::uint32_t num_slots, unsigned num_checksum_threads);
  // After the queue was stopped.
  ~RingBackend() override;

  void on_push() noexcept override;
  int register_buffer(void* address, std::uint64_t nbytes, std::string& text);
  int unregister_buffer(void* address);

 private:
  // A block in flight.
  struct Slot {
    Block block;
    Attempt attempt;
  };
  // A completion that is held back by a fault, or (no result) an attempt that is made later.
  struct Delayed {
    Clock::time_point due;
    std::uint32_t slot = 0;
    std::optional<std::int64_t> result;
  };
  // Work for the ring's thread, which alone may change the ring's buffers.
  struct Registration {
    void* address = nullptr;
    std::uint64_t nbytes = 0;  // 0 = unregister
    std::string text{};
    int error = 0;
    bool done = false;
  };

  void run() noexcept;
  void take_blocks() noexcept;
  void launch(std::uint32_t slot) noexcept;
  void complete(const Completion& completion) noexcept;
  void free_slot(std::uint32_t slot) noexcept;
  void release_due() noexcept;
  void wait_for_work(bool is_left) noexcept;
  void run_registrations() noexcept;
  int run_on_thread(Registration& registration);

  RequestQueue& queue_;
  FaultSpec& fault_;
  const std::unique_ptr<Ring> ring_;
  ChecksumPool checksums_;

  // Of the ring's thread alone.
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  std::vector<Completion> completions_;
  std::vector<Delayed> delayed_;

  std::atomic<bool> wants_wake_{false};  // the thread sleeps and has room for a block
  std::atomic<bool> stopped_{false};
  std::mutex registrations_mutex_;  // guards the next two and what they point to
  std::deque<Registration*> registrations_;
  std::condition_variable registered_;
  std::atomic<bool> has_registrations_{false};
  std::thread thread_;
};

}  // namespace offload
