// Bytes and busy seconds of one lane: busy while at least one block is in flight.
#pragma once

#include <chrono>
#include <cstdint>

namespace offload {

class LaneClock {
 public:
  using Clock = std::chrono::steady_clock;

  void begin() {
    if (num_in_flight_++ == 0) since_ = Clock::now();
  }
  void end(std::uint64_t nbytes) {
    nbytes_ += nbytes;
    if (--num_in_flight_ == 0) busy_ += Clock::now() - since_;
  }
  std::uint64_t nbytes() const { return nbytes_; }
  double busy_seconds() const {
    const auto open = num_in_flight_ != 0 ? Clock::now() - since_ : Clock::duration::zero();
    return std::chrono::duration<double>(busy_ + open).count();
  }

 private:
  std::uint64_t num_in_flight_ = 0;
  std::uint64_t nbytes_ = 0;
  Clock::duration busy_{};
  Clock::time_point since_{};
};

}  // namespace offload
