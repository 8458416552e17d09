// The kernel AIO backend ("libaio"), on the raw system calls. Source: io_submit(2),
// io_getevents(2).
//
// With O_DIRECT a submission returns at once; on a buffered descriptor io_submit does the I/O
// itself.
#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

#include "file_descriptor.hpp"
#include "ring.hpp"

namespace offload {
namespace {

long io_setup(unsigned num, aio_context_t* context) {
  return ::syscall(SYS_io_setup, num, context);
}
long io_destroy(aio_context_t context) { return ::syscall(SYS_io_destroy, context); }
long io_submit(aio_context_t context, long num, iocb** blocks) {
  return ::syscall(SYS_io_submit, context, num, blocks);
}
long io_getevents(aio_context_t context, long min, long max, io_event* events, timespec* timeout) {
  return ::syscall(SYS_io_getevents, context, min, max, events, timeout);
}

class LinuxAio final : public Ring {
 public:
  explicit LinuxAio(std::uint32_t num_slots) : blocks_(num_slots) {
    prepared_.reserve(num_slots);
    event_ = FileDescriptor(::eventfd(0, EFD_CLOEXEC));
    if (event_.get() < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    if (io_setup(num_slots, &context_) < 0) {
      throw std::system_error(errno, std::generic_category(),
                              errno == EAGAIN ? "io_setup: fs.aio-max-nr is used up" : "io_setup");
    }
  }
  ~LinuxAio() override { io_destroy(context_); }
  LinuxAio(const LinuxAio&) = delete;
  LinuxAio& operator=(const LinuxAio&) = delete;

  int start() noexcept override {
    // Shows whether submitting is allowed; nothing is submitted.
    return io_submit(context_, 0, nullptr) < 0 ? errno : 0;
  }

  void prepare(std::uint32_t slot, const Attempt& attempt) noexcept override {
    iocb& block = blocks_[slot];
    block = {};
    block.aio_data = slot;
    block.aio_lio_opcode = attempt.operation == Operation::kRead ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE;
    block.aio_fildes = static_cast<std::uint32_t>(attempt.fd);
    block.aio_buf = reinterpret_cast<std::uintptr_t>(attempt.address);
    block.aio_nbytes = attempt.nbytes;
    block.aio_offset = static_cast<std::int64_t>(attempt.offset);
    block.aio_flags = IOCB_FLAG_RESFD;  // completions and wakes arrive at one place
    block.aio_resfd = static_cast<std::uint32_t>(event_.get());
    prepared_.push_back(&block);
  }

  bool submit(std::vector<Completion>& refused) noexcept override {
    std::size_t num_done = 0;
    bool is_left = false;
    while (num_done < prepared_.size()) {
      const long count = io_submit(context_, static_cast<long>(prepared_.size() - num_done),
                                   prepared_.data() + num_done);
      if (count > 0) {
        num_done += static_cast<std::size_t>(count);
      } else if (count == 0 || errno == EAGAIN) {
        is_left = true;
        break;
      } else if (errno != EINTR) {
        // The error is that of the first one.
        refused.push_back({static_cast<std::uint32_t>(prepared_[num_done]->aio_data), -errno});
        ++num_done;
      }
    }
    prepared_.erase(prepared_.begin(), prepared_.begin() + static_cast<std::ptrdiff_t>(num_done));
    return is_left;
  }

  void reap(std::vector<Completion>& completions) noexcept override {
    std::array<io_event, 64> events;
    for (;;) {
      timespec none{};
      const long count =
          io_getevents(context_, 0, static_cast<long>(events.size()), events.data(), &none);
      if (count < 0 && errno == EINTR) continue;
      for (long i = 0; i < count; ++i) {
        const io_event& event = events[static_cast<std::size_t>(i)];
        completions.push_back({static_cast<std::uint32_t>(event.data), event.res});
      }
      if (count < static_cast<long>(events.size())) return;
    }
  }

  void wait(std::optional<Clock::time_point> until) noexcept override {
    if (until) {
      const auto left = std::max<Clock::duration>(*until - Clock::now(), Clock::duration::zero());
      const auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
      pollfd poll_event{event_.get(), POLLIN, 0};
      constexpr std::int64_t kLongestMs = 1000;
      if (::poll(&poll_event, 1, static_cast<int>(std::min<std::int64_t>(ms, kLongestMs))) <= 0) {
        return;
      }
    }
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(event_.get(), &count, sizeof count);
  }

  void wake() noexcept override {
    const std::uint64_t one = 1;
    // Fails only when the counter is full: then a wake is pending anyway.
    [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof one);
  }

  int register_buffer(void*, std::uint64_t, std::string& text) override {
    text = "the libaio backend has no fixed buffers";
    return ENOTSUP;
  }
  int unregister_buffer(void*) noexcept override { return ENOENT; }
  void finish() noexcept override {}

 private:
  FileDescriptor event_;
  aio_context_t context_ = 0;
  std::vector<iocb> blocks_;  // one per slot
  std::vector<iocb*> prepared_;
};

}  // namespace

std::unique_ptr<Ring> make_linux_aio(std::uint32_t num_slots) {
  return std::make_unique<LinuxAio>(num_slots);
}

}  // namespace offload
