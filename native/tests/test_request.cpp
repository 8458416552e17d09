#include <cerrno>

#include "request.hpp"
#include "testing.hpp"

namespace {

constexpr std::uint64_t kPage = 4096;

offload::RequestSpec make_spec(std::uint64_t offset, std::uint64_t nbytes, std::uintptr_t address) {
  offload::RequestSpec spec;
  spec.fd = 10;
  spec.direct_fd = 11;
  spec.alignment = kPage;
  spec.memory_alignment = 512;
  spec.offset = offset;
  spec.nbytes = nbytes;
  spec.address = reinterpret_cast<unsigned char*>(address);
  spec.block_bytes = 2 * kPage;
  return spec;
}

offload::Block make_block(const offload::RequestSpec& spec) {
  offload::Block block;
  block.request = std::make_shared<offload::Request>(spec, 0);
  block.extent = block.request->extent(0);
  return block;
}

}  // namespace

// Coverage, order, no overlap; only aligned parts are direct.
TEST(request_is_cut_without_gap_or_overlap) {
  for (std::uint64_t offset : {0u, 1u, 511u, 4096u, 4097u, 12'288u}) {
    for (std::uint64_t nbytes : {0u, 1u, 100u, 4095u, 4096u, 8191u, 8192u, 20'000u, 40'960u}) {
      for (std::uintptr_t shift : {0u, 1u, 512u}) {
        const std::uintptr_t address = 0x100000 + shift + offset % kPage;
        const offload::Request request(make_spec(offset, nbytes, address), 0);
        std::uint64_t at = 0;
        for (std::uint64_t i = 0; i < request.num_blocks(); ++i) {
          const offload::Extent extent = request.extent(i);
          CHECK_EQUAL(extent.start, at);
          CHECK(extent.nbytes > 0 && extent.nbytes <= 2 * kPage);
          if (extent.direct) {
            CHECK_EQUAL((offset + at) % kPage, 0u);
            CHECK_EQUAL(extent.nbytes % kPage, 0u);
            CHECK_EQUAL((address + at) % 512, 0u);
          }
          at += extent.nbytes;
        }
        CHECK_EQUAL(at, nbytes);
        const bool has_aligned_page = (offset + nbytes) / kPage > (offset + kPage - 1) / kPage;
        if (has_aligned_page && shift != 1) {
          bool any = false;
          for (std::uint64_t i = 0; i < request.num_blocks(); ++i) any |= request.extent(i).direct;
          CHECK(any);
        }
      }
    }
  }
}

TEST(completion_is_done_again_or_failed) {
  offload::FaultSpec fault("");
  offload::Block block = make_block(make_spec(0, 2 * kPage, 0x100000));
  offload::Outcome outcome;
  auto attempt = offload::next_attempt(block, fault);
  CHECK_EQUAL(attempt.fd, 11);
  CHECK(offload::advance(block, attempt, 100, outcome) == offload::Step::kAgain);
  attempt = offload::next_attempt(block, fault);
  CHECK_EQUAL(attempt.fd, 10);  // the rest is unaligned
  CHECK_EQUAL(attempt.offset, 100u);
  CHECK(offload::advance(block, attempt, -EINTR, outcome) == offload::Step::kAgain);
  CHECK(offload::advance(block, attempt, -EAGAIN, outcome) == offload::Step::kRetryLater);
  CHECK(offload::advance(block, attempt, 2 * kPage - 100, outcome) == offload::Step::kDone);
}

TEST(completion_with_zero_or_an_error_or_too_much_fails) {
  offload::FaultSpec fault("");
  offload::Outcome outcome;
  for (const std::int64_t result :
       {std::int64_t{0}, std::int64_t{-ENOSPC}, std::int64_t{1} << 20}) {
    offload::Block block = make_block(make_spec(kPage, 2 * kPage, 0x100000));
    const auto attempt = offload::next_attempt(block, fault);
    CHECK(offload::advance(block, attempt, result, outcome) == offload::Step::kFailed);
    CHECK_EQUAL(outcome.error, result == -ENOSPC ? ENOSPC : EIO);
    CHECK_EQUAL(outcome.is_short, result == 0);
    CHECK_EQUAL(outcome.offset, kPage);
  }
}

TEST(endless_eagain_fails_in_the_end) {
  offload::FaultSpec fault("");
  offload::Block block = make_block(make_spec(0, 2 * kPage, 0x100000));
  offload::Outcome outcome;
  const auto attempt = offload::next_attempt(block, fault);
  int count = 0;
  while (offload::advance(block, attempt, -EAGAIN, outcome) != offload::Step::kFailed) ++count;
  CHECK_EQUAL(count, 200);
  CHECK_EQUAL(outcome.error, EAGAIN);
}

TEST(refused_direct_io_goes_on_buffered) {
  offload::FaultSpec fault("");
  offload::Block block = make_block(make_spec(0, 2 * kPage, 0x100000));
  offload::Outcome outcome;
  auto attempt = offload::next_attempt(block, fault);
  CHECK(offload::advance(block, attempt, -EINVAL, outcome) == offload::Step::kAgain);
  attempt = offload::next_attempt(block, fault);
  CHECK_EQUAL(attempt.fd, 10);
  CHECK(offload::advance(block, attempt, -EINVAL, outcome) == offload::Step::kFailed);
}
