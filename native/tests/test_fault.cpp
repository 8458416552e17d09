#include <stdexcept>

#include "fault.hpp"
#include "testing.hpp"

using offload::FaultKind;
using offload::FaultSpec;
using offload::Operation;

TEST(fault_acts_on_the_nth_operation_only) {
  FaultSpec fault("op=write, nth=2, errno=28; op=read,nth=1,count=0,short=512");
  CHECK(fault.next(Operation::kWrite).kind == FaultKind::kNone);
  const auto second = fault.next(Operation::kWrite);
  CHECK(second.kind == FaultKind::kErrno);
  CHECK_EQUAL(second.value, 28u);
  CHECK(fault.next(Operation::kWrite).kind == FaultKind::kNone);
  for (int i = 0; i < 5; ++i) CHECK(fault.next(Operation::kRead).kind == FaultKind::kShort);
  CHECK(fault.next(Operation::kFsync).kind == FaultKind::kNone);
}

TEST(fault_refuses_what_it_cannot_read) {
  for (const char* text : {"op=erase,errno=5", "nth=2", "errno=x", "errno=5,short=1", "speed=3",
                           "nth=0,errno=5", "errno"}) {
    bool refused = false;
    try {
      FaultSpec fault(text);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    if (!refused) throw std::runtime_error(std::string("accepted: ") + text);
  }
}
