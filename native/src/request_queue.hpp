// The requests of two lanes (reads and writes, or copies each way): waiting, in flight, ended.
//
// [Note: pieces of work]
// A block is one piece of work (its I/O), or two (its I/O and its checksum). `num_open` counts the
// pieces that were taken and have not ended. A request has ended when all its blocks were taken, or
// one has failed, and no piece is open: so its memory is no longer touched.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "lane_clock.hpp"
#include "request.hpp"

namespace offload {

class RequestQueue {
 public:
  // Told that there is something to take. Under the lock: so stop() outlasts every call, and the
  // listener may be destroyed after it.
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void on_push() noexcept = 0;
  };

  // Before the first push.
  void set_listener(Listener* listener) { listener_ = listener; }

  // False after stop(). Throws std::bad_alloc.
  bool push(std::shared_ptr<Request> request);

  // The next block, the lanes taking turns; opens one piece of work. Its lane counts as busy.
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

  bool has_waiting();
  std::array<LaneClock, 2> lanes();

 private:
  std::optional<Block> take_locked();
  static bool is_exhausted(const Request& request);
  void settle_if_ended(Request& request);

  std::mutex mutex_;  // guards everything below, and the requests' fields that say so
  std::condition_variable pushed_;
  std::condition_variable idle_;
  std::array<std::deque<std::shared_ptr<Request>>, 2> waiting_;
  std::array<LaneClock, 2> lanes_;
  std::uint64_t num_requests_ = 0;  // that have not ended
  unsigned turn_ = 0;
  bool stopped_ = false;
  Listener* listener_ = nullptr;
};

}  // namespace offload
