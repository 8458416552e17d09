// The requests of two lanes (reads and writes, or copies each way): waiting, in flight, ended.
//
// [Note: pieces of work]
// A block is one piece of work (its I/O), or two (its I/O and its checksum). `num_open` counts the
// pieces that were taken and have not ended. A request has ended when all its blocks were taken, or
// one has failed, and no piece is open: so its memory is no longer touched.
//
// [Note: order]
// A block is the quantum. The next one is of the most urgent request of its lane; of those that are
// equally urgent the one that came first. Between the lanes the class decides (see
// OFFLOAD_URGENCY_BULK), and lanes whose first requests are of one class take turns.
//
// What the disk has is out of this order's reach, and a scheduler of the kernel may serve what
// comes last first. So little is given to it: a block is taken only while few bytes are in flight,
// and half as few while more urgent ones are. Blocks of the first class are taken at once.
//
// The oldest request gets a block, whatever its urgency, when kMaxPassed blocks of more urgent ones
// have been taken since it got its last: so every request ends while urgent ones go on without end.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>

#include "lane_clock.hpp"
#include "request.hpp"
#include "waiting_requests.hpp"

namespace offload {

class RequestQueue {
 public:
  static constexpr unsigned kMaxPassed = 16;  // blocks

  // Told that there may be something to take. Under the lock: so stop() outlasts every call, and
  // the listener may be destroyed after it.
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void on_push() noexcept = 0;
  };

  // Both before the first push. A block that is not of the first class is taken only if with it at
  // most `num_blocks` blocks and `nbytes` bytes are in flight, or none but it.
  void limit(std::uint64_t num_blocks, std::uint64_t nbytes);
  void set_listener(Listener* listener) { listener_ = listener; }

  // False after stop(). Throws std::bad_alloc.
  bool push(const std::shared_ptr<Request>& request);
  // Makes the blocks that are not taken yet at least so urgent.
  void expedite(Request& request, std::uint64_t urgency);

  // The next block, see [Note: order]; opens one piece of work. Its lane counts as busy.
  std::optional<Block> try_take();
  // The same, waiting for it; nothing = stopped.
  std::optional<Block> take();

  // The block's I/O has ended; it stays open for its checksum until end().
  void end_transfer(const Block& block, bool well);
  // Opens one more piece of work of a block that is open.
  void open_piece(const Block& block);
  // A piece of work has ended; `outcome` with an error fails the request.
  void end(const Block& block, const Outcome& outcome);

  // Whether the request ended before `until`; nothing = wait without end.
  bool wait(Request& request, std::optional<Clock::time_point> until);
  // From now on nothing can be pushed. Whether everything ended before `until`.
  bool stop(std::optional<Clock::time_point> until);

  // Whether try_take() would give a block.
  bool can_take();
  std::array<LaneClock, 2> lanes();

 private:
  bool has_waiting() const { return !waiting_[0].empty() || !waiting_[1].empty(); }
  const std::shared_ptr<Request>& oldest() const;
  std::shared_ptr<Request> choose() const;
  bool may_start(const Request& request) const;
  std::size_t class_place(std::uint64_t urgency) const;  // in num_in_flight_
  std::optional<Block> take_locked();
  void tell(bool several);
  static bool is_exhausted(const Request& request);
  void settle_if_ended(Request& request);

  std::mutex mutex_;  // guards everything below, and the requests' fields that say so
  std::condition_variable pushed_;
  std::condition_variable idle_;
  std::array<WaitingRequests, 2> waiting_;
  std::array<LaneClock, 2> lanes_;
  std::uint64_t num_requests_ = 0;  // that have not ended
  std::uint64_t next_sequence_ = 0;
  std::array<std::uint64_t, 4> num_in_flight_{};  // blocks by class; the last is of all later ones
  std::uint64_t num_blocks_in_flight_ = 0;
  std::uint64_t num_bytes_in_flight_ = 0;
  std::uint64_t max_blocks_ = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t max_bytes_ = std::numeric_limits<std::uint64_t>::max();
  unsigned num_passed_ = 0;  // blocks taken of requests more urgent than the oldest
  unsigned turn_ = 0;
  bool stopped_ = false;
  Listener* listener_ = nullptr;
};

}  // namespace offload
