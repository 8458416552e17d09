#include "engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace offload {
namespace {

constexpr std::array<const char*, 3> kBackends{"io_uring", "libaio", "threads"};  // auto's order
constexpr std::uint64_t kBlockAlignment = 4096;
constexpr std::uint64_t kMaxBlockBytes = std::uint64_t{1} << 30;
constexpr std::uint32_t kMaxCount = 4096;
constexpr std::uint64_t kCopyAlignment = 4096;

void check(const EngineOptions& options) {
  const auto in_range = [](std::uint32_t count) { return count >= 1 && count <= kMaxCount; };
  if (!in_range(options.queue_depth) || !in_range(options.threads) ||
      !in_range(options.copy_threads)) {
    throw std::invalid_argument("queue_depth, threads and copy_threads are between 1 and 4096");
  }
  if (options.block_bytes == 0 || options.block_bytes % kBlockAlignment != 0 ||
      options.block_bytes > kMaxBlockBytes) {
    throw std::invalid_argument("block_bytes is a positive multiple of 4096, at most 1 GiB");
  }
  if (options.backend != "auto" &&
      std::find(kBackends.begin(), kBackends.end(), options.backend) == kBackends.end()) {
    throw std::invalid_argument("backend is none of auto, io_uring, libaio, threads");
  }
}

std::unique_ptr<Ring> make_ring(const std::string& name, std::uint32_t num_slots) {
  return name == "io_uring" ? make_io_uring(num_slots) : make_linux_aio(num_slots);
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : pid_(::getpid()), options_(options), fault_(options.fault) {
  check(options);
  try {
    make_first_backend();
    copiers_ = std::make_unique<WorkerPool>(copies_, fault_, options.copy_threads);
  } catch (...) {
    close(std::nullopt);  // ends the threads that were made
    throw;
  }
}

void Engine::make_first_backend() {
  if (options_.backend != "auto") return make_backend(options_.backend);
  for (const char* name : kBackends) {
    try {
      return make_backend(name);
    } catch (const std::system_error&) {
      if (name == kBackends.back()) throw;
    }
  }
}

void Engine::make_backend(const std::string& name) {
  limit(name == "threads" ? options_.threads : options_.queue_depth);
  if (name == "threads") {
    workers_ = std::make_unique<WorkerPool>(files_, fault_, options_.threads);
  } else {
    ring_ = std::make_unique<RingBackend>(files_, fault_, make_ring(name, options_.queue_depth),
                                          options_.queue_depth, options_.threads);
  }
  backend_ = name;
}

bool Engine::is_child() const { return ::getpid() != pid_; }

// Of `num_slots` that can be in flight one is kept for the most urgent, if it can be spared.
void Engine::limit(std::uint32_t num_slots) {
  const std::uint32_t depth = options_.held_depth;
  if (depth == 0) return;
  files_.limit(depth < num_slots ? num_slots - 1 : num_slots, depth * options_.block_bytes);
}

RequestQueue& Engine::queue_of(const Request& request) {
  return request.spec.operation == Operation::kCopy ? copies_ : files_;
}

std::shared_ptr<Request> Engine::start(RequestSpec spec, std::uint64_t urgency) {
  spec.block_bytes = options_.block_bytes;
  auto request = std::make_shared<Request>(spec, urgency);
  return files_.push(request) ? request : nullptr;
}

std::shared_ptr<Request> Engine::start_copy(RequestSpec spec, std::uint64_t urgency) {
  // One part per thread, or more so that none is longer than a block.
  const std::uint64_t part = spec.nbytes / options_.copy_threads + kCopyAlignment;
  spec.block_bytes = std::min(part - part % kCopyAlignment, options_.block_bytes);
  auto request = std::make_shared<Request>(spec, urgency);
  return copies_.push(request) ? request : nullptr;
}

void Engine::expedite(Request& request, std::uint64_t urgency) {
  queue_of(request).expedite(request, urgency);
}

bool Engine::wait(Request& request, std::optional<Clock::time_point> until) {
  return queue_of(request).wait(request, until);
}

int Engine::fsync(int fd) {
  const FaultAction action = fault_.next(Operation::kFsync);
  if (action.kind == FaultKind::kErrno) return static_cast<int>(action.value);
  if (action.kind == FaultKind::kLost) return 0;
  // Not repeated, whatever the error: the kernel may have dropped the data that it could not write.
  return ::fsync(fd) < 0 ? errno : 0;
}

std::array<LaneClock, 4> Engine::lanes() {
  const auto files = files_.lanes();
  const auto copies = copies_.lanes();
  return {files[0], files[1], copies[0], copies[1]};
}

int Engine::register_buffer(void* address, std::uint64_t nbytes, std::string& text) {
  const std::lock_guard lock(close_mutex_);
  if (ring_ != nullptr) return ring_->register_buffer(address, nbytes, text);
  text = is_closed_ ? "the engine is closed" : "the threads backend has no fixed buffers";
  return ENOTSUP;
}

int Engine::unregister_buffer(void* address) {
  const std::lock_guard lock(close_mutex_);
  return ring_ != nullptr ? ring_->unregister_buffer(address) : ENOENT;
}

bool Engine::close(std::optional<Clock::time_point> until) {
  const std::lock_guard lock(close_mutex_);
  const bool are_files_idle = files_.stop(until);
  if (!copies_.stop(until) || !are_files_idle) return false;
  ring_.reset();
  workers_.reset();
  copiers_.reset();
  is_closed_ = true;
  return true;
}

std::optional<std::system_error> probe_backend(const std::string& name) {
  constexpr std::uint32_t kProbeSlots = 4;
  if (name == "threads") return std::nullopt;
  try {
    const auto ring = make_ring(name, kProbeSlots);
    const int error = ring->start();
    ring->finish();
    if (error == 0) return std::nullopt;
    return std::system_error(error, std::generic_category(), "the first submission");
  } catch (const std::system_error& error) {
    return error;
  }
}

}  // namespace offload
