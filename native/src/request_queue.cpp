#include "request_queue.hpp"

#include <utility>

namespace offload {

bool RequestQueue::push(std::shared_ptr<Request> request) {
  const std::lock_guard lock(mutex_);
  if (stopped_) return false;
  if (request->num_blocks() == 0) {
    request->outcome.checksum = request->spec.has_checksum ? request->spec.checksum_seed : 0;
    request->ended.store(true, std::memory_order_release);
    return true;
  }
  const bool several = request->num_blocks() > 1;
  waiting_[request->spec.lane].push_back(std::move(request));
  ++num_requests_;
  if (listener_ != nullptr) {
    listener_->on_push();
  } else if (several) {
    pushed_.notify_all();
  } else {
    pushed_.notify_one();
  }
  return true;
}

bool RequestQueue::is_exhausted(const Request& request) {
  return request.num_taken == request.num_blocks() || request.outcome.error != 0;
}

std::optional<Block> RequestQueue::take_locked() {
  for (int tries = 0; tries < 2; ++tries) {
    auto& lane = waiting_[turn_];
    turn_ ^= 1;
    if (lane.empty()) continue;
    Block block;
    block.request = lane.front();
    Request& request = *block.request;
    block.index = request.num_taken++;
    block.extent = request.extent(block.index);
    ++request.num_open;
    lanes_[request.spec.lane].begin();
    if (is_exhausted(request)) lane.pop_front();
    return block;
  }
  return std::nullopt;
}

std::optional<Block> RequestQueue::try_take() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

std::optional<Block> RequestQueue::take() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (auto block = take_locked()) return block;
    if (stopped_) return std::nullopt;
    pushed_.wait(lock);
  }
}

void RequestQueue::end_transfer(const Block& block, bool well) {
  const std::lock_guard lock(mutex_);
  lanes_[block.request->spec.lane].end(well ? block.extent.nbytes : 0);
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
    std::erase(waiting_[request.spec.lane], block.request);
  }
  settle_if_ended(request);
}

void RequestQueue::settle_if_ended(Request& request) {
  if (request.num_open != 0 || !is_exhausted(request)) return;
  if (request.outcome.error == 0 && request.spec.has_checksum) {
    request.outcome.checksum = request.joined_checksum();
  }
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

bool RequestQueue::has_waiting() {
  const std::lock_guard lock(mutex_);
  return !waiting_[0].empty() || !waiting_[1].empty();
}

std::array<LaneClock, 2> RequestQueue::lanes() {
  const std::lock_guard lock(mutex_);
  return lanes_;
}

}  // namespace offload
