#include "ring_backend.hpp"

#include <algorithm>
#include <future>
#include <system_error>
#include <utility>

#include "threads.hpp"

namespace offload {
namespace {

// How many completions one slot can cause before the loop comes round: prompt retries.
constexpr std::size_t kCompletionsPerSlot = 12;

}  // namespace

RingBackend::RingBackend(RequestQueue& queue, FaultSpec& fault, std::unique_ptr<Ring> ring,
                         std::uint32_t num_slots, unsigned num_checksum_threads)
    : queue_(queue),
      fault_(fault),
      ring_(std::move(ring)),
      checksums_(queue, num_checksum_threads),
      slots_(num_slots) {
  for (std::uint32_t slot = num_slots; slot > 0; --slot) free_slots_.push_back(slot - 1);
  // The loop must not allocate: it could not report a failure.
  completions_.reserve(num_slots * kCompletionsPerSlot);
  delayed_.reserve(num_slots);
  std::promise<int> started;
  thread_ = start_thread("offload-ring", [this, &started] {
    const int error = ring_->start();
    started.set_value(error);
    if (error == 0) run();
  });
  if (const int error = started.get_future().get(); error != 0) {
    thread_.join();
    throw std::system_error(error, std::generic_category(), "the first submission");
  }
  queue_.set_listener(this);
}

RingBackend::~RingBackend() {
  stopped_.store(true);
  ring_->wake();
  thread_.join();
}

void RingBackend::on_push() noexcept {
  if (wants_wake_.exchange(false)) ring_->wake();
}

void RingBackend::run() noexcept {
  while (!stopped_.load()) {
    run_registrations();
    take_blocks();
    release_due();
    const bool is_left = ring_->submit(completions_);
    if (completions_.empty()) {
      wait_for_work(is_left);
      ring_->reap(completions_);
    }
    // Completing may append.
    for (std::size_t i = 0; i < completions_.size(); ++i) complete(completions_[i]);
    completions_.clear();
  }
  ring_->finish();
}

void RingBackend::take_blocks() noexcept {
  while (!free_slots_.empty()) {
    auto block = queue_.try_take();
    if (!block) return;
    const std::uint32_t slot = free_slots_.back();
    free_slots_.pop_back();
    slots_[slot].block = std::move(*block);
    launch(slot);
    const Block& placed = slots_[slot].block;
    const RequestSpec& spec = placed.request->spec;
    if (spec.operation == Operation::kWrite && spec.has_checksum) {
      // Beside the write: its memory does not change until the request has ended.
      queue_.open_piece(placed);
      checksums_.add(placed);
    }
  }
}

void RingBackend::launch(std::uint32_t slot) noexcept {
  Slot& place = slots_[slot];
  place.attempt = next_attempt(place.block, fault_);
  if (place.attempt.action.kind == FaultKind::kDrop) return;
  if (place.attempt.is_synthetic()) {
    completions_.push_back({slot, place.attempt.synthetic_result()});
  } else {
    ring_->prepare(slot, place.attempt);
  }
}

void RingBackend::complete(const Completion& completion) noexcept {
  const std::uint32_t slot = completion.slot;
  Slot& place = slots_[slot];
  if (place.attempt.action.kind == FaultKind::kDelay) {
    const std::chrono::milliseconds pause(place.attempt.action.value);
    place.attempt.action = {};
    delayed_.push_back({Clock::now() + pause, slot, completion.result});
    return;
  }
  const RequestSpec& spec = place.block.request->spec;
  const std::int64_t result = apply_fault(place.attempt, spec.fd, completion.result);
  Outcome outcome;
  switch (advance(place.block, place.attempt, result, outcome)) {
    case Step::kDone:
      queue_.end_transfer(place.block, true);
      if (spec.has_checksum && spec.operation == Operation::kRead) {
        checksums_.add(place.block);
      } else {
        queue_.end(place.block, {});
      }
      free_slot(slot);
      break;
    case Step::kAgain:
      launch(slot);
      break;
    case Step::kRetryLater:
      delayed_.push_back({Clock::now() + kRetryPause, slot, std::nullopt});
      break;
    case Step::kFailed:
      queue_.end_transfer(place.block, false);
      queue_.end(place.block, outcome);
      free_slot(slot);
      break;
  }
}

void RingBackend::free_slot(std::uint32_t slot) noexcept {
  slots_[slot] = {};
  free_slots_.push_back(slot);
}

void RingBackend::release_due() noexcept {
  if (delayed_.empty()) return;
  const auto now = Clock::now();
  for (std::size_t i = 0; i < delayed_.size();) {
    const Delayed delayed = delayed_[i];
    if (delayed.due > now) {
      ++i;
      continue;
    }
    delayed_[i] = delayed_.back();
    delayed_.pop_back();
    if (delayed.result) {
      completions_.push_back({delayed.slot, *delayed.result});
    } else {
      launch(delayed.slot);
    }
  }
}

void RingBackend::wait_for_work(bool is_left) noexcept {
  std::optional<Clock::time_point> until;
  if (is_left) until = Clock::now() + kRetryPause;
  for (const Delayed& delayed : delayed_)
    until = std::min(until.value_or(delayed.due), delayed.due);
  if (!free_slots_.empty()) {
    // First the wish, then the look: a push after the look sees the wish.
    wants_wake_.store(true);
    if (queue_.can_take()) {
      wants_wake_.store(false);
      return;
    }
  }
  // Stopping and registrations wake without being wished for.
  if (!stopped_.load() && !has_registrations_.load()) ring_->wait(until);
  wants_wake_.store(false);
}

void RingBackend::run_registrations() noexcept {
  if (!has_registrations_.load()) return;
  const std::lock_guard lock(registrations_mutex_);
  for (Registration* registration : registrations_) {
    try {
      registration->error = registration->nbytes != 0
                                ? ring_->register_buffer(registration->address,
                                                         registration->nbytes, registration->text)
                                : ring_->unregister_buffer(registration->address);
    } catch (const std::bad_alloc&) {
      registration->error = ENOMEM;
    }
    registration->done = true;
  }
  registrations_.clear();
  has_registrations_.store(false);
  registered_.notify_all();
}

int RingBackend::run_on_thread(Registration& registration) {
  std::unique_lock lock(registrations_mutex_);
  registrations_.push_back(&registration);
  has_registrations_.store(true);
  ring_->wake();
  registered_.wait(lock, [&registration] { return registration.done; });
  return registration.error;
}

int RingBackend::register_buffer(void* address, std::uint64_t nbytes, std::string& text) {
  Registration registration{address, nbytes};
  const int error = run_on_thread(registration);
  text = registration.text;
  return error;
}

int RingBackend::unregister_buffer(void* address) {
  Registration registration{address};
  return run_on_thread(registration);
}

}  // namespace offload
