// What the loop of ring_backend.cpp asks of a kernel interface that takes I/O and completes it
// later.
//
// All functions but wake() are called by the loop's thread alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "request.hpp"

namespace offload {

struct Completion {
  std::uint32_t slot = 0;
  std::int64_t result = 0;  // bytes or -errno
};

class Ring {
 public:
  virtual ~Ring() = default;

  // First of all, on the loop's thread. Returns 0 or an errno.
  virtual int start() noexcept = 0;

  // Puts an attempt down for submit(). There is room for one attempt per slot.
  virtual void prepare(std::uint32_t slot, const Attempt& attempt) noexcept = 0;

  // Hands over everything prepared. What the kernel refuses comes back as a completion with its
  // errno. True: something is left for the next call, because the kernel is out of resources.
  virtual bool submit(std::vector<Completion>& refused) noexcept = 0;

  // Appends what has completed.
  virtual void reap(std::vector<Completion>& completions) noexcept = 0;

  // Sleeps until there may be a completion, a wake(), or `until`; may return early.
  virtual void wait(std::optional<Clock::time_point> until) noexcept = 0;

  // Ends the present or next wait(); any thread.
  virtual void wake() noexcept = 0;

  // Fixed buffers. Returns 0 or an errno; `text` says why.
  virtual int register_buffer(void* address, std::uint64_t nbytes, std::string& text) = 0;
  virtual int unregister_buffer(void* address) noexcept = 0;

  // Before the thread ends, with nothing in flight.
  virtual void finish() noexcept = 0;
};

// Both throw std::system_error, whose text says why the kernel interface does not work here.
std::unique_ptr<Ring> make_io_uring(std::uint32_t num_slots);
std::unique_ptr<Ring> make_linux_aio(std::uint32_t num_slots);

}  // namespace offload
