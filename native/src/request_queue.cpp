#include "request_queue.hpp"

#include <algorithm>
#include <utility>

namespace offload {

void RequestQueue::limit(std::uint64_t num_blocks, std::uint64_t nbytes) {
  max_blocks_ = num_blocks;
  max_bytes_ = nbytes;
}

bool RequestQueue::push(const std::shared_ptr<Request>& request) {
  const std::lock_guard lock(mutex_);
  if (stopped_) return false;
  if (request->num_blocks() == 0) {
    request->outcome.checksum = request->spec.has_checksum ? request->spec.checksum_seed : 0;
    request->began_at = request->ended_at = Clock::now();
    request->ended.store(true, std::memory_order_release);
    return true;
  }
  request->sequence = next_sequence_++;
  waiting_[request->spec.lane].add(request);
  ++num_requests_;
  tell(request->num_blocks() > 1);
  return true;
}

void RequestQueue::expedite(Request& request, std::uint64_t urgency) {
  const std::lock_guard lock(mutex_);
  if (urgency >= request.urgency) return;
  waiting_[request.spec.lane].set_urgency(request, urgency);
  if (has_waiting()) tell(true);
}

void RequestQueue::tell(bool several) {
  if (listener_ != nullptr) {
    listener_->on_push();
  } else if (several) {
    pushed_.notify_all();
  } else {
    pushed_.notify_one();
  }
}

bool RequestQueue::is_exhausted(const Request& request) {
  return request.num_taken == request.num_blocks() || request.outcome.error != 0;
}

const std::shared_ptr<Request>& RequestQueue::oldest() const {
  if (waiting_[0].empty()) return waiting_[1].oldest();
  if (waiting_[1].empty()) return waiting_[0].oldest();
  const auto &first = waiting_[0].oldest(), &second = waiting_[1].oldest();
  return first->sequence < second->sequence ? first : second;
}

// The request whose block is next; nothing if none may start now.
std::shared_ptr<Request> RequestQueue::choose() const {
  if (!has_waiting()) return nullptr;
  if (num_passed_ >= kMaxPassed) return oldest();
  const Request* chosen = nullptr;
  for (const unsigned lane : {turn_, turn_ ^ 1}) {
    if (waiting_[lane].empty()) continue;
    const Request* first = waiting_[lane].most_urgent().get();
    if (chosen == nullptr || first->urgency_class() < chosen->urgency_class()) chosen = first;
  }
  return may_start(*chosen) ? waiting_[chosen->spec.lane].most_urgent() : nullptr;
}

bool RequestQueue::may_start(const Request& request) const {
  const std::size_t place = class_place(request.urgency);
  if (place == 0 || num_blocks_in_flight_ == 0) return true;
  const bool beside_urgent = std::any_of(num_in_flight_.begin(), num_in_flight_.begin() + place,
                                         [](std::uint64_t count) { return count != 0; });
  const std::uint64_t nbytes = request.extent(request.num_taken).nbytes;
  return num_blocks_in_flight_ < max_blocks_ &&
         num_bytes_in_flight_ + nbytes <= (beside_urgent ? max_bytes_ / 2 : max_bytes_);
}

std::size_t RequestQueue::class_place(std::uint64_t urgency) const {
  return std::min<std::size_t>(urgency >> OFFLOAD_URGENCY_CLASS_SHIFT, num_in_flight_.size() - 1);
}

std::optional<Block> RequestQueue::take_locked() {
  Block block;
  block.request = choose();
  if (block.request == nullptr) return std::nullopt;
  Request& request = *block.request;
  if (const Request& first = *oldest(); &first == &request) {
    num_passed_ = 0;
  } else if (request.urgency < first.urgency) {
    ++num_passed_;
  }
  turn_ = request.spec.lane ^ 1;
  block.urgency = request.urgency;
  if (request.num_taken == 0) request.began_at = Clock::now();
  block.index = request.num_taken++;
  block.extent = request.extent(block.index);
  ++request.num_open;
  ++num_in_flight_[class_place(block.urgency)];
  ++num_blocks_in_flight_;
  num_bytes_in_flight_ += block.extent.nbytes;
  lanes_[request.spec.lane].begin();
  if (is_exhausted(request)) waiting_[request.spec.lane].remove(request);
  return block;
}

std::optional<Block> RequestQueue::try_take() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

std::optional<Block> RequestQueue::take() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (auto block = take_locked()) return block;
    if (stopped_ && !has_waiting()) return std::nullopt;
    pushed_.wait(lock);
  }
}

void RequestQueue::end_transfer(const Block& block, bool well) {
  const std::lock_guard lock(mutex_);
  lanes_[block.request->spec.lane].end(well ? block.extent.nbytes : 0);
  --num_in_flight_[class_place(block.urgency)];
  --num_blocks_in_flight_;
  num_bytes_in_flight_ -= block.extent.nbytes;
  // There may be room for more. The listener looks by itself: it is who calls this.
  if (listener_ == nullptr && has_waiting()) pushed_.notify_one();
}

void RequestQueue::open_piece(const Block& block) {
  const std::lock_guard lock(mutex_);
  ++block.request->num_open;
}

void RequestQueue::end(const Block& block, const Outcome& outcome) {
  const std::lock_guard lock(mutex_);
  Request& request = *block.request;
  --request.num_open;
  if (outcome.error != 0 && request.outcome.error == 0) {
    request.outcome = outcome;
    // The blocks that were not taken never will be.
    waiting_[request.spec.lane].remove(request);
  }
  settle_if_ended(request);
}

void RequestQueue::settle_if_ended(Request& request) {
  if (request.num_open != 0 || !is_exhausted(request)) return;
  if (request.outcome.error == 0 && request.spec.has_checksum) {
    request.outcome.checksum = request.joined_checksum();
  }
  request.ended_at = Clock::now();
  request.ended.store(true, std::memory_order_release);
  request.ended_condition.notify_all();
  if (--num_requests_ == 0) idle_.notify_all();
}

bool RequestQueue::wait(Request& request, std::optional<Clock::time_point> until) {
  std::unique_lock lock(mutex_);
  const auto has_ended = [&request] { return request.ended.load(std::memory_order_relaxed); };
  if (until) return request.ended_condition.wait_until(lock, *until, has_ended);
  request.ended_condition.wait(lock, has_ended);
  return true;
}

bool RequestQueue::stop(std::optional<Clock::time_point> until) {
  std::unique_lock lock(mutex_);
  stopped_ = true;
  pushed_.notify_all();
  const auto is_idle = [this] { return num_requests_ == 0; };
  if (until) return idle_.wait_until(lock, *until, is_idle);
  idle_.wait(lock, is_idle);
  return true;
}

bool RequestQueue::can_take() {
  const std::lock_guard lock(mutex_);
  return choose() != nullptr;
}

std::array<LaneClock, 2> RequestQueue::lanes() {
  const std::lock_guard lock(mutex_);
  return lanes_;
}

}  // namespace offload
