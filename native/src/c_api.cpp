// The C ABI over Engine: checks arguments and the process, and turns exceptions into errno values.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include "crc32c.hpp"
#include "engine.hpp"
#include "offload_native.h"

// Tickets keep the engine: a garbage collector may free the two in any order.
struct offload_engine {
  std::shared_ptr<offload::Engine> engine;
};

struct offload_ticket {
  std::shared_ptr<offload::Engine> engine;
  std::shared_ptr<offload::Request> request;
};

namespace {

using offload::Clock;

constexpr std::uint64_t kMaxOffset = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t kPageBytes = 4096;

void put_text(char* text, std::size_t text_bytes, std::string_view value) {
  if (text == nullptr || text_bytes == 0) return;
  const std::size_t count = std::min(value.size(), text_bytes - 1);
  std::memcpy(text, value.data(), count);
  text[count] = '\0';
}

// Runs `call`, which returns an errno; nothing is thrown past here.
template <typename Call>
int guarded(char* text, std::size_t text_bytes, Call call) noexcept {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    put_text(text, text_bytes, error.what());
    return EINVAL;
  } catch (const std::system_error& error) {
    put_text(text, text_bytes, error.what());
    return error.code().value() != 0 ? error.code().value() : EIO;
  } catch (const std::bad_alloc&) {
    put_text(text, text_bytes, "out of memory");
    return ENOMEM;
  } catch (const std::exception& error) {
    put_text(text, text_bytes, error.what());
    return EIO;
  }
}

std::optional<Clock::time_point> time_limit(std::int64_t timeout_ns) {
  if (timeout_ns < 0) return std::nullopt;
  const auto now = Clock::now();
  const auto longest = Clock::time_point::max() - now;
  return now + std::min<Clock::duration>(std::chrono::nanoseconds(timeout_ns), longest);
}

int publish(const offload_engine& owner, std::shared_ptr<offload::Request> request,
            std::unique_ptr<offload_ticket> place, offload_ticket** ticket) {
  if (request == nullptr) return ESHUTDOWN;
  place->engine = owner.engine;
  place->request = std::move(request);
  *ticket = place.release();
  return 0;
}

bool is_valid(const offload_request& request) {
  if (request.operation != OFFLOAD_READ && request.operation != OFFLOAD_WRITE) return false;
  if (request.address == nullptr || request.fd < 0) return false;
  if (request.offset > kMaxOffset || request.nbytes > kMaxOffset - request.offset) return false;
  if (request.direct_fd < 0) return true;
  return request.memory_alignment != 0 && request.alignment != 0 &&
         request.alignment % kPageBytes == 0;
}

}  // namespace

extern "C" {

uint32_t offload_abi_version(void) noexcept { return OFFLOAD_ABI_VERSION; }

int offload_probe(const char* backend, char* text, size_t text_bytes) noexcept {
  return guarded(text, text_bytes, [&] {
    const auto error = offload::probe_backend(backend);
    if (error) throw *error;
    put_text(text, text_bytes, "ok");
    return 0;
  });
}

int offload_engine_create(const offload_options* options, offload_engine** engine, char* text,
                          size_t text_bytes) noexcept {
  return guarded(text, text_bytes, [&] {
    const offload::EngineOptions chosen{options->backend,
                                        options->queue_depth,
                                        options->threads,
                                        options->copy_threads,
                                        options->block_bytes,
                                        options->held_depth,
                                        options->fault != nullptr ? options->fault : ""};
    *engine = new offload_engine{std::make_shared<offload::Engine>(chosen)};
    return 0;
  });
}

const char* offload_engine_backend(const offload_engine* engine) noexcept {
  return engine->engine->backend().c_str();
}

int offload_engine_close(offload_engine* engine, int64_t timeout_ns) noexcept {
  if (engine->engine->is_child()) return 0;
  return guarded(nullptr, 0,
                 [&] { return engine->engine->close(time_limit(timeout_ns)) ? 0 : ETIMEDOUT; });
}

void offload_engine_free(offload_engine* engine) noexcept {
  if (!engine->engine->is_child() && engine->engine->is_closed()) delete engine;
}

int offload_register(offload_engine* engine, void* address, uint64_t nbytes, char* text,
                     size_t text_bytes) noexcept {
  if (engine->engine->is_child()) return EPERM;
  if (address == nullptr || nbytes == 0) return EINVAL;
  return guarded(text, text_bytes, [&] {
    std::string reason;
    const int error = engine->engine->register_buffer(address, nbytes, reason);
    put_text(text, text_bytes, reason);
    return error;
  });
}

int offload_unregister(offload_engine* engine, void* address) noexcept {
  if (engine->engine->is_child()) return EPERM;
  return guarded(nullptr, 0, [&] { return engine->engine->unregister_buffer(address); });
}

int offload_start(offload_engine* engine, const offload_request* request,
                  offload_ticket** ticket) noexcept {
  return offload_start_urgent(engine, request, OFFLOAD_URGENCY_BULK, ticket);
}

int offload_start_urgent(offload_engine* engine, const offload_request* request, uint64_t urgency,
                         offload_ticket** ticket) noexcept {
  if (engine->engine->is_child()) return EPERM;
  if (!is_valid(*request)) return EINVAL;
  return guarded(nullptr, 0, [&] {
    auto place = std::make_unique<offload_ticket>();
    const bool reading = request->operation == OFFLOAD_READ;
    offload::RequestSpec spec;
    spec.operation = reading ? offload::Operation::kRead : offload::Operation::kWrite;
    spec.lane = reading ? 0 : 1;
    spec.fd = request->fd;
    spec.direct_fd = request->direct_fd;
    spec.alignment = request->direct_fd < 0 ? kPageBytes : request->alignment;
    spec.memory_alignment = request->direct_fd < 0 ? 1 : request->memory_alignment;
    spec.offset = request->offset;
    spec.nbytes = request->nbytes;
    spec.address = static_cast<unsigned char*>(request->address);
    spec.has_checksum = request->has_checksum != 0;
    spec.checksum_seed = request->checksum_seed;
    return publish(*engine, engine->engine->start(spec, urgency), std::move(place), ticket);
  });
}

int offload_start_copy(offload_engine* engine, int lane, void* destination, const void* source,
                       uint64_t nbytes, offload_ticket** ticket) noexcept {
  return offload_start_copy_urgent(engine, lane, destination, source, nbytes, OFFLOAD_URGENCY_BULK,
                                   ticket);
}

int offload_start_copy_urgent(offload_engine* engine, int lane, void* destination,
                              const void* source, uint64_t nbytes, uint64_t urgency,
                              offload_ticket** ticket) noexcept {
  if (engine->engine->is_child()) return EPERM;
  if ((lane != OFFLOAD_H2D && lane != OFFLOAD_D2H) || destination == nullptr || source == nullptr ||
      nbytes > kMaxOffset) {
    return EINVAL;
  }
  return guarded(nullptr, 0, [&] {
    auto place = std::make_unique<offload_ticket>();
    offload::RequestSpec spec;
    spec.operation = offload::Operation::kCopy;
    spec.lane = static_cast<unsigned>(lane);
    spec.nbytes = nbytes;
    spec.address = static_cast<unsigned char*>(destination);
    spec.source = static_cast<const unsigned char*>(source);
    return publish(*engine, engine->engine->start_copy(spec, urgency), std::move(place), ticket);
  });
}

int offload_ticket_expedite(offload_ticket* ticket, uint64_t urgency) noexcept {
  offload::Engine& engine = *ticket->engine;
  if (engine.is_child()) return EPERM;
  return guarded(nullptr, 0, [&] {
    engine.expedite(*ticket->request, urgency);
    return 0;
  });
}

int offload_ticket_done(const offload_ticket* ticket) noexcept {
  return ticket->request->ended.load(std::memory_order_acquire) ? 1 : 0;
}

int offload_ticket_wait(offload_ticket* ticket, int64_t timeout_ns,
                        offload_outcome* outcome) noexcept {
  offload::Engine& engine = *ticket->engine;
  if (engine.is_child()) return EPERM;
  return guarded(nullptr, 0, [&] {
    if (!engine.wait(*ticket->request, time_limit(timeout_ns))) return ETIMEDOUT;
    const offload::Outcome& ended = ticket->request->outcome;
    *outcome = {ended.error, ended.is_short ? 1 : 0, ended.offset, ended.checksum, 0};
    return 0;
  });
}

int offload_ticket_span(const offload_ticket* ticket, int64_t* began_ns,
                        int64_t* ended_ns) noexcept {
  const offload::Request& request = *ticket->request;
  if (!request.ended.load(std::memory_order_acquire)) return EAGAIN;
  const auto in_ns = [](offload::Clock::time_point time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
  };
  *began_ns = in_ns(request.began_at);
  *ended_ns = in_ns(request.ended_at);
  return 0;
}

void offload_ticket_free(offload_ticket* ticket) noexcept {
  if (!ticket->engine->is_child()) delete ticket;
}

int offload_fsync(offload_engine* engine, int fd) noexcept {
  return engine->engine->is_child() ? EPERM : engine->engine->fsync(fd);
}

int offload_lanes(offload_engine* engine, offload_lane_report* lanes) noexcept {
  if (engine->engine->is_child()) return EPERM;
  return guarded(nullptr, 0, [&] {
    const auto clocks = engine->engine->lanes();
    for (std::size_t i = 0; i < clocks.size(); ++i) {
      lanes[i] = {clocks[i].nbytes(), clocks[i].busy_seconds()};
    }
    return 0;
  });
}

uint32_t offload_crc32c(const void* address, uint64_t nbytes, uint32_t seed) noexcept {
  return offload::crc32c(address, nbytes, seed);
}

uint32_t offload_crc32c_combine(uint32_t first, uint32_t second, uint64_t second_nbytes) noexcept {
  return offload::crc32c_combine(first, second, second_nbytes);
}

}  // extern "C"
