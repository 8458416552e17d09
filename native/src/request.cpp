#include "request.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "crc32c.hpp"

namespace offload {
namespace {

constexpr unsigned kMaxRetries = 200;      // without progress
constexpr unsigned kMaxPromptRetries = 8;  // of an interrupted call, before pausing

std::uint64_t ceil_div(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }

}  // namespace

Request::Request(const RequestSpec& request_spec, std::uint64_t request_urgency)
    : spec(request_spec), urgency(request_urgency) {
  const std::uint64_t end = spec.offset + spec.nbytes;
  const std::uint64_t middle = ceil_div(spec.offset, spec.alignment) * spec.alignment;
  const std::uint64_t middle_end = end / spec.alignment * spec.alignment;
  const auto at_middle = reinterpret_cast<std::uintptr_t>(spec.address) + (middle - spec.offset);
  direct_ = spec.direct_fd >= 0 && middle < middle_end && at_middle % spec.memory_alignment == 0;
  prefix_bytes_ = direct_ ? middle - spec.offset : 0;
  middle_bytes_ = direct_ ? middle_end - middle : spec.nbytes;
  const std::uint64_t suffix_bytes = spec.nbytes - prefix_bytes_ - middle_bytes_;
  checksums.resize((prefix_bytes_ != 0) + ceil_div(middle_bytes_, spec.block_bytes) +
                   (suffix_bytes != 0));
}

Extent Request::extent(std::uint64_t index) const {
  if (prefix_bytes_ != 0) {
    if (index == 0) return {0, prefix_bytes_, false};
    --index;
  }
  const std::uint64_t start = index * spec.block_bytes;
  if (start < middle_bytes_) {
    return {prefix_bytes_ + start, std::min(spec.block_bytes, middle_bytes_ - start), direct_};
  }
  const std::uint64_t before = prefix_bytes_ + middle_bytes_;
  return {before, spec.nbytes - before, false};
}

std::uint32_t Request::joined_checksum() const {
  std::uint32_t crc = spec.checksum_seed;
  for (std::uint64_t i = 0; i < num_blocks(); ++i) {
    crc = crc32c_combine(crc, checksums[i], extent(i).nbytes);
  }
  return crc;
}

void Block::compute_checksum() const {
  request->checksums[index] = crc32c(data(), extent.nbytes, 0);
}

Attempt next_attempt(const Block& block, FaultSpec& fault) noexcept {
  const RequestSpec& spec = block.request->spec;
  Attempt attempt;
  const std::uint64_t start = block.extent.start + block.num_done;
  attempt.operation = spec.operation;
  attempt.offset = spec.offset + start;
  attempt.address = spec.address + start;
  attempt.nbytes = block.extent.nbytes - block.num_done;
  attempt.action = fault.next(spec.operation);
  if (attempt.action.kind == FaultKind::kMisdirect) attempt.offset += attempt.action.value;
  if (attempt.action.kind == FaultKind::kShort) {
    attempt.nbytes = std::clamp<std::uint64_t>(attempt.action.value, 1, attempt.nbytes);
  }
  // After a short call the rest may be unaligned.
  const bool aligned =
      (attempt.offset | attempt.nbytes) % spec.alignment == 0 &&
      reinterpret_cast<std::uintptr_t>(attempt.address) % spec.memory_alignment == 0;
  attempt.fd = block.extent.direct && aligned ? spec.direct_fd : spec.fd;
  return attempt;
}

std::int64_t apply_fault(const Attempt& attempt, int buffered_fd, std::int64_t result) noexcept {
  if (result > 0 && attempt.action.kind == FaultKind::kCorrupt) {
    const auto flipped = static_cast<unsigned char>(~attempt.address[0]);
    if (attempt.operation == Operation::kRead) {
      attempt.address[0] = flipped;
    } else if (::pwrite(buffered_fd, &flipped, 1, static_cast<off_t>(attempt.offset)) != 1) {
      return -EIO;
    }
  }
  return result;
}

Step advance(Block& block, const Attempt& attempt, std::int64_t result, Outcome& outcome) noexcept {
  outcome = {0, false, block.request->spec.offset + block.extent.start, 0};
  if (result > 0 && static_cast<std::uint64_t>(result) <= attempt.nbytes) {
    block.num_done += static_cast<std::uint64_t>(result);
    block.num_retries = 0;
    return block.num_done == block.extent.nbytes ? Step::kDone : Step::kAgain;
  }
  outcome.error = result < 0 ? static_cast<int>(-result) : EIO;
  outcome.is_short = result == 0;
  if (outcome.error == EINTR || outcome.error == EAGAIN) {
    if (++block.num_retries > kMaxRetries) return Step::kFailed;
    const bool prompt = outcome.error == EINTR && block.num_retries <= kMaxPromptRetries;
    return prompt ? Step::kAgain : Step::kRetryLater;
  }
  if (outcome.error == EINVAL && block.extent.direct && attempt.fd != block.request->spec.fd) {
    block.extent.direct = false;  // the file system refuses O_DIRECT after all
    return Step::kAgain;
  }
  return Step::kFailed;
}

}  // namespace offload
