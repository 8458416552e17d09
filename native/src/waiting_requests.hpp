// The requests of one lane of which blocks are left to take: the most urgent, and the oldest.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "request.hpp"

namespace offload {

// Guarded by the queue's mutex, as are the requests' fields that it reads.
class WaitingRequests {
 public:
  bool empty() const { return by_age_.empty(); }
  // Of those that are equally urgent the one that came first. Not empty.
  const std::shared_ptr<Request>& most_urgent() const { return by_urgency_.begin()->second; }
  const std::shared_ptr<Request>& oldest() const { return by_age_.begin()->second; }

  // Throws std::bad_alloc; nothing is added then.
  void add(const std::shared_ptr<Request>& request) {
    const auto place = by_age_.emplace(request->sequence, request).first;
    try {
      by_urgency_.emplace(key(*request), request);
    } catch (...) {
      by_age_.erase(place);
      throw;
    }
  }

  // Nothing, if it is not there.
  void remove(const Request& request) {
    by_urgency_.erase(key(request));
    by_age_.erase(request.sequence);
  }

  // Changes the request's urgency, and its place if it is there. Allocates nothing.
  void set_urgency(Request& request, std::uint64_t urgency) {
    auto node = by_urgency_.extract(key(request));
    request.urgency = urgency;
    if (node.empty()) return;
    node.key() = key(request);
    by_urgency_.insert(std::move(node));
  }

 private:
  using Key = std::pair<std::uint64_t, std::uint64_t>;
  static Key key(const Request& request) { return {request.urgency, request.sequence}; }

  std::map<Key, std::shared_ptr<Request>> by_urgency_;
  std::map<std::uint64_t, std::shared_ptr<Request>> by_age_;
};

}  // namespace offload
