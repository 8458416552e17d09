// An engine: two queues (files, copies) and what works on them.
#pragma once

#include <sys/types.h>

#include <array>
#include <memory>
#include <string>

#include "ring_backend.hpp"
#include "worker_pool.hpp"

namespace offload {

struct EngineOptions {
  std::string backend;
  std::uint32_t queue_depth = 0;
  std::uint32_t threads = 0;
  std::uint32_t copy_threads = 0;
  std::uint64_t block_bytes = 0;
  std::uint32_t held_depth = 0;  // 0 = no limit
  std::string fault;
};

class Engine {
 public:
  // Throws std::invalid_argument, std::system_error (the backend does not work; text says why).
  explicit Engine(const EngineOptions& options);

  const std::string& backend() const { return backend_; }
  bool is_child() const;  // of the process that made the engine
  bool is_closed() const { return is_closed_; }

  // Fills block_bytes in; nothing after close(). Throws std::bad_alloc.
  std::shared_ptr<Request> start(RequestSpec spec, std::uint64_t urgency);
  std::shared_ptr<Request> start_copy(RequestSpec spec, std::uint64_t urgency);
  void expedite(Request& request, std::uint64_t urgency);
  bool wait(Request& request, std::optional<Clock::time_point> until);
  int fsync(int fd);
  std::array<LaneClock, 4> lanes();
  int register_buffer(void* address, std::uint64_t nbytes, std::string& text);
  int unregister_buffer(void* address);

  // False: requests are still in flight.
  bool close(std::optional<Clock::time_point> until);

 private:
  void make_first_backend();  // that works
  void make_backend(const std::string& name);
  void limit(std::uint32_t num_slots);
  RequestQueue& queue_of(const Request& request);

  const pid_t pid_;
  const EngineOptions options_;
  FaultSpec fault_;
  RequestQueue files_;
  RequestQueue copies_;
  std::mutex close_mutex_;  // guards the next four after construction
  std::unique_ptr<RingBackend> ring_;
  std::unique_ptr<WorkerPool> workers_;
  std::unique_ptr<WorkerPool> copiers_;
  std::atomic<bool> is_closed_{false};
  std::string backend_;
};

// Why a backend does not work here; nothing = it does.
std::optional<std::system_error> probe_backend(const std::string& name);

}  // namespace offload
