// The fault hook of tests. Its language stands in offload/native/fault_spec.py,
// [Note: fault specification]; both sides read the same.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace offload {

enum class Operation : std::uint8_t { kRead, kWrite, kFsync, kCopy };

enum class FaultKind : std::uint8_t {
  kNone,
  kErrno,
  kShort,
  kDelay,
  kCorrupt,
  kLost,
  kMisdirect,
  kDrop
};

struct FaultAction {
  FaultKind kind = FaultKind::kNone;
  std::uint64_t value = 0;
};

class FaultSpec {
 public:
  // Throws std::invalid_argument that names the part that is wrong.
  explicit FaultSpec(std::string_view text);

  // Counts one attempt of `operation`; returns what to do to it.
  FaultAction next(Operation operation) noexcept;

 private:
  struct Rule {
    bool any = true;
    Operation operation = Operation::kRead;
    std::uint64_t nth = 1;
    std::uint64_t count = 1;  // 0 = all
    FaultAction action;
    std::uint64_t seen = 0;
  };
  static Rule parse_rule(std::string_view text);

  std::vector<Rule> rules_;  // the counters are guarded by mutex_
  std::mutex mutex_;
};

}  // namespace offload
