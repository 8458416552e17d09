// The order in which blocks are taken; see [Note: order] in request_queue.hpp.
#include <cerrno>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "request_queue.hpp"
#include "testing.hpp"

namespace {

using offload::Block;
using offload::RequestQueue;

constexpr std::uint64_t kBlockBytes = 4096;
constexpr std::uint64_t kBulk = OFFLOAD_URGENCY_BULK;
constexpr std::uint64_t kPlanned = std::uint64_t{1} << OFFLOAD_URGENCY_CLASS_SHIFT;
constexpr unsigned kRead = 0, kWrite = 1;

std::shared_ptr<offload::Request> make_request(unsigned lane, std::uint64_t num_blocks,
                                               std::uint64_t urgency) {
  offload::RequestSpec spec;
  spec.lane = lane;
  spec.operation = lane == kRead ? offload::Operation::kRead : offload::Operation::kWrite;
  spec.nbytes = num_blocks * kBlockBytes;
  spec.block_bytes = kBlockBytes;
  return std::make_shared<offload::Request>(spec, urgency);
}

// A queue whose requests have letters; take() tells whose block was next, '-' = none may start.
class Letters {
 public:
  offload::Request& push(char letter, unsigned lane, std::uint64_t num_blocks,
                         std::uint64_t urgency) {
    requests_.emplace_back(letter, make_request(lane, num_blocks, urgency));
    CHECK(queue.push(requests_.back().second));
    return *requests_.back().second;
  }
  char take() {
    CHECK_EQUAL(queue.can_take(), true);
    auto block = queue.try_take();
    CHECK(block.has_value());
    open_.push_back(*block);
    for (const auto& [letter, request] : requests_) {
      if (request == block->request) return letter;
    }
    return '?';
  }
  std::string take_and_end(std::size_t count) {
    std::string letters;
    for (std::size_t i = 0; i < count; ++i) {
      letters += take();
      end_first();
    }
    return letters;
  }
  void end_first(int error = 0) {
    const Block block = open_.front();
    open_.erase(open_.begin());
    queue.end_transfer(block, error == 0);
    queue.end(block, {error, false, 0, 0});
  }
  bool is_held() { return !queue.can_take() && !queue.try_take().has_value(); }

  RequestQueue queue;

 private:
  std::vector<std::pair<char, std::shared_ptr<offload::Request>>> requests_;
  std::vector<Block> open_;
};

}  // namespace

TEST(equally_urgent_requests_keep_their_order_and_lanes_take_turns) {
  Letters letters;
  letters.push('a', kRead, 2, kBulk);
  letters.push('b', kRead, 1, kBulk);
  letters.push('x', kWrite, 2, kBulk);
  CHECK_EQUAL(letters.take_and_end(5), "axaxb");
}

TEST(urgent_request_passes_between_the_blocks_of_a_bulk_one) {
  Letters letters;
  letters.push('a', kRead, 3, kBulk);
  CHECK_EQUAL(letters.take_and_end(1), "a");
  letters.push('u', kRead, 2, 0);
  CHECK_EQUAL(letters.take_and_end(4), "uuaa");
}

TEST(place_in_a_class_decides_and_the_earlier_class_passes_the_other_lane) {
  Letters letters;
  letters.push('x', kWrite, 2, kBulk);
  letters.push('a', kRead, 1, kBulk + 7);
  letters.push('b', kRead, 1, kPlanned + 2);
  letters.push('c', kRead, 1, kPlanned + 1);
  letters.push('d', kRead, 1, 0);
  // Of bulk the lanes take turns, whatever the places.
  CHECK_EQUAL(letters.take_and_end(6), "dcbxax");
}

TEST(expedited_request_passes_and_is_never_put_back) {
  Letters letters;
  letters.push('a', kRead, 2, kBulk);
  offload::Request& request = letters.push('b', kRead, 3, kBulk);
  CHECK_EQUAL(letters.take_and_end(1), "a");
  letters.queue.expedite(request, kPlanned);
  CHECK_EQUAL(letters.take_and_end(1), "b");
  letters.queue.expedite(request, kBulk + 1);
  CHECK_EQUAL(letters.take_and_end(3), "bba");
  letters.queue.expedite(request, 0);  // it has ended
  CHECK(!letters.queue.can_take());
}

TEST(all_but_the_first_class_is_held_while_much_is_in_flight) {
  Letters letters;
  letters.queue.limit(5, 4 * kBlockBytes);
  offload::Request& first = letters.push('a', kRead, 4, kBulk);
  letters.push('x', kWrite, 4, kBulk);
  for (const char expected : {'a', 'x', 'a', 'x'}) CHECK_EQUAL(letters.take(), expected);
  CHECK(letters.is_held());
  letters.push('p', kRead, 1, kPlanned);
  CHECK(letters.is_held());
  letters.push('u', kRead, 2, 0);
  CHECK_EQUAL(letters.take(), 'u');
  for (int i = 0; i < 4; ++i) letters.end_first();
  CHECK_EQUAL(letters.take(), 'u');
  // Beside more urgent blocks half as much.
  CHECK(letters.is_held());
  letters.end_first();
  CHECK_EQUAL(letters.take(), 'p');
  CHECK(letters.is_held());
  letters.end_first();
  CHECK_EQUAL(letters.take(), 'x');
  CHECK(letters.is_held());
  letters.queue.expedite(first, 0);
  CHECK_EQUAL(letters.take(), 'a');
}

TEST(number_of_blocks_in_flight_is_limited_too) {
  Letters letters;
  letters.queue.limit(2, 100 * kBlockBytes);
  letters.push('a', kRead, 3, kBulk);
  CHECK_EQUAL(letters.take(), 'a');
  CHECK_EQUAL(letters.take(), 'a');
  CHECK(letters.is_held());
}

TEST(bulk_block_larger_than_the_limit_goes_alone) {
  Letters letters;
  letters.queue.limit(4, kBlockBytes / 2);
  letters.push('a', kRead, 2, kBulk);
  CHECK_EQUAL(letters.take(), 'a');
  CHECK(letters.is_held());
  letters.end_first();
  CHECK_EQUAL(letters.take(), 'a');
}

TEST(oldest_request_is_served_while_urgent_ones_go_on) {
  Letters letters;
  letters.queue.limit(1, kBlockBytes);
  letters.push('a', kWrite, 3, kBulk);
  std::string taken;
  for (int i = 0; i < 60; ++i) {
    letters.push('u', kRead, 2, 0);
    taken += letters.take();  // so that ever more urgent ones wait, and are in flight
  }
  std::string expected;
  for (int i = 0; i < 3; ++i) expected += std::string(RequestQueue::kMaxPassed, 'u') + 'a';
  CHECK_EQUAL(taken.substr(0, expected.size()), expected);
  CHECK_EQUAL(taken.substr(expected.size()), std::string(60 - expected.size(), 'u'));
}

TEST(failed_request_gives_its_turn_up) {
  Letters letters;
  letters.push('a', kRead, 3, 0);
  letters.push('b', kRead, 1, kBulk);
  CHECK_EQUAL(letters.take(), 'a');
  letters.end_first(EIO);
  CHECK_EQUAL(letters.take_and_end(1), "b");
  CHECK(!letters.queue.can_take());
  CHECK(letters.queue.stop(offload::Clock::now()));
}

TEST(a_thread_that_waits_for_room_takes_the_next_bulk_block) {
  RequestQueue queue;
  queue.limit(1, kBlockBytes);
  const auto request = make_request(kRead, 64, kBulk);
  CHECK(queue.push(request));
  const auto work = [&queue] {
    while (auto block = queue.take()) {
      queue.end_transfer(*block, true);
      queue.end(*block, {});
    }
  };
  std::thread first(work), second(work), third(work);
  CHECK(queue.wait(*request, offload::Clock::now() + std::chrono::seconds(20)));
  CHECK(queue.stop(std::nullopt));
  first.join();
  second.join();
  third.join();
  CHECK_EQUAL(queue.lanes()[kRead].nbytes(), 64 * kBlockBytes);
}
