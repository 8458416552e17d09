// The io_uring backend, on the raw system calls. Source: io_uring_setup(2), io_uring_enter(2),
// io_uring_register(2); liburing's examples/io_uring-cp.c for the cases of a completion.
#include <cerrno>
#include <system_error>

#include "ring.hpp"

#if __has_include(<linux/io_uring.h>)

#include <linux/io_uring.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "file_descriptor.hpp"

namespace offload {
namespace {

// Numbers of the kernel's interface that older headers lack; the kernel itself is asked at run
// time.
constexpr long kSetup = 425, kEnter = 426, kRegister = 427;
constexpr std::uint32_t kSetupRDisabled = 1u << 6;
constexpr std::uint32_t kSetupSubmitAll = 1u << 7;
constexpr std::uint32_t kSetupSingleIssuer = 1u << 12;
constexpr std::uint32_t kSetupDeferTaskrun = 1u << 13;
constexpr std::uint32_t kEnterExtArg = 1u << 3;
constexpr std::uint32_t kFeatureExtArg = 1u << 8;  // Linux 5.11
constexpr std::uint32_t kRegisterEnableRings = 12;
constexpr std::uint32_t kRegisterBuffers2 = 15;
constexpr std::uint32_t kRegisterBuffersUpdate = 16;
constexpr std::uint32_t kResourceSparse = 1u << 0;  // Linux 5.19
constexpr std::uint8_t kOpReadFixed = 4, kOpWriteFixed = 5, kOpRead = 22, kOpWrite = 23;

struct GeteventsArg {
  std::uint64_t sigmask;
  std::uint32_t sigmask_nbytes;
  std::uint32_t pad;
  std::uint64_t timespec;
};
struct KernelTimespec {
  std::int64_t seconds;
  long long nanoseconds;
};
struct ResourceRegister {
  std::uint32_t num;
  std::uint32_t flags;
  std::uint64_t reserved;
  std::uint64_t data;
  std::uint64_t tags;
};
struct ResourceUpdate {
  std::uint32_t offset;
  std::uint32_t reserved;
  std::uint64_t data;
  std::uint64_t tags;
  std::uint32_t num;
  std::uint32_t reserved2;
};

constexpr std::uint64_t kWakeTag = ~std::uint64_t{0};
constexpr std::uint64_t kMaxBufferBytes = std::uint64_t{1} << 30;  // the kernel's limit
constexpr std::uint32_t kMaxBuffers = 1024;

int setup(std::uint32_t entries, io_uring_params* params) {
  return static_cast<int>(::syscall(kSetup, entries, params));
}
int enter(int fd, std::uint32_t num_submit, std::uint32_t min_complete, std::uint32_t flags,
          const void* arg, std::size_t arg_nbytes) {
  return static_cast<int>(::syscall(kEnter, fd, num_submit, min_complete, flags, arg, arg_nbytes));
}
int do_register(int fd, std::uint32_t opcode, const void* arg, std::uint32_t num) {
  return static_cast<int>(::syscall(kRegister, fd, opcode, arg, num));
}

[[noreturn]] void refuse(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

std::uint32_t load_acquire(const std::uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void store_release(std::uint32_t* p, std::uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (address_ != MAP_FAILED) ::munmap(address_, nbytes_);
  }
  void map(int fd, std::size_t nbytes, off_t offset) {
    address_ =
        ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (address_ == MAP_FAILED) refuse(errno, "mmap of an io_uring");
    nbytes_ = nbytes;
    ::madvise(address_, nbytes, MADV_DONTFORK);  // a child must not even be able to submit
  }
  template <typename T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(address_) + offset);
  }

 private:
  void* address_ = MAP_FAILED;
  std::size_t nbytes_ = 0;
};

class IoUring final : public Ring {
 public:
  explicit IoUring(std::uint32_t num_slots);

  int start() noexcept override;
  void prepare(std::uint32_t slot, const Attempt& attempt) noexcept override;
  bool submit(std::vector<Completion>& refused) noexcept override;
  void reap(std::vector<Completion>& completions) noexcept override;
  void wait(std::optional<Clock::time_point> until) noexcept override;
  void wake() noexcept override;
  int register_buffer(void* address, std::uint64_t nbytes, std::string& text) override;
  int unregister_buffer(void* address) noexcept override;
  void finish() noexcept override;

 private:
  struct Buffer {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    std::uintptr_t registration = 0;  // the address that was registered
  };

  io_uring_sqe& next_sqe() noexcept;
  void arm_wake() noexcept;
  int update_buffer(std::uint32_t index, void* address, std::uint64_t nbytes) noexcept;
  const Buffer* find_buffer(const Attempt& attempt) const noexcept;

  FileDescriptor ring_;
  FileDescriptor wake_event_;
  Mapping rings_, completions_, entries_;
  std::uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0;
  const io_uring_cqe* cqes_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  std::uint32_t tail_ = 0;  // of what is prepared; *sq_tail_ is that of what was handed over
  bool is_disabled_ = false;
  bool is_wake_armed_ = false;
  std::uint64_t wake_count_ = 0;  // the kernel writes here while the wake is armed
  bool has_buffer_table_ = false;
  std::vector<Buffer> buffers_;  // index = the kernel's; end 0 = free
};

IoUring::IoUring(std::uint32_t num_slots) {
  // One entry more than slots: for the wake.
  const std::uint32_t entries = std::bit_ceil(num_slots + 1);
  // With the first set completions are processed only when the loop waits for them (Linux 6.1).
  constexpr std::array<std::uint32_t, 2> kFlagSets{
      kSetupRDisabled | kSetupSubmitAll | kSetupSingleIssuer | kSetupDeferTaskrun, 0};
  io_uring_params params{};
  int fd = -1;
  for (const std::uint32_t flags : kFlagSets) {
    params = {};
    params.flags = flags;
    fd = setup(entries, &params);
    if (fd >= 0 || errno != EINVAL) break;
  }
  if (fd < 0) refuse(errno, "io_uring_setup");
  ring_ = FileDescriptor(fd);
  is_disabled_ = (params.flags & kSetupRDisabled) != 0;
  if (!(params.features & kFeatureExtArg)) refuse(ENOSYS, "io_uring of a kernel before 5.11");
  wake_event_ = FileDescriptor(::eventfd(0, EFD_CLOEXEC));
  if (wake_event_.get() < 0) refuse(errno, "eventfd");

  std::size_t sq_nbytes = params.sq_off.array + params.sq_entries * sizeof(std::uint32_t);
  const std::size_t cq_nbytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  const bool single = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
  if (single) sq_nbytes = std::max(sq_nbytes, cq_nbytes);
  rings_.map(fd, sq_nbytes, IORING_OFF_SQ_RING);
  if (!single) completions_.map(fd, cq_nbytes, IORING_OFF_CQ_RING);
  const Mapping& cq = single ? rings_ : completions_;
  entries_.map(fd, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
  sq_head_ = rings_.at<std::uint32_t>(params.sq_off.head);
  sq_tail_ = rings_.at<std::uint32_t>(params.sq_off.tail);
  sq_mask_ = *rings_.at<std::uint32_t>(params.sq_off.ring_mask);
  cq_head_ = cq.at<std::uint32_t>(params.cq_off.head);
  cq_tail_ = cq.at<std::uint32_t>(params.cq_off.tail);
  cq_mask_ = *cq.at<std::uint32_t>(params.cq_off.ring_mask);
  cqes_ = cq.at<io_uring_cqe>(params.cq_off.cqes);
  sqes_ = entries_.at<io_uring_sqe>(0);
  // The indirection array never changes: entry i is submitted from place i.
  auto* array = rings_.at<std::uint32_t>(params.sq_off.array);
  for (std::uint32_t i = 0; i < params.sq_entries; ++i) array[i] = i;
}

int IoUring::start() noexcept {
  // The thread that enables a single-issuer ring is its issuer.
  if (is_disabled_ && do_register(ring_.get(), kRegisterEnableRings, nullptr, 0) < 0) return errno;
  arm_wake();
  std::vector<Completion> refused;  // stays empty: only the wake is prepared
  submit(refused);
  return is_wake_armed_ ? 0 : EPERM;  // a sandbox may allow the set-up and block the use
}

io_uring_sqe& IoUring::next_sqe() noexcept {
  io_uring_sqe& sqe = sqes_[tail_++ & sq_mask_];
  std::memset(&sqe, 0, sizeof sqe);
  return sqe;
}

void IoUring::arm_wake() noexcept {
  io_uring_sqe& sqe = next_sqe();
  sqe.opcode = kOpRead;
  sqe.fd = wake_event_.get();
  sqe.addr = reinterpret_cast<std::uintptr_t>(&wake_count_);
  sqe.len = sizeof wake_count_;
  sqe.user_data = kWakeTag;
  is_wake_armed_ = true;
}

const IoUring::Buffer* IoUring::find_buffer(const Attempt& attempt) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(attempt.address);
  for (const Buffer& buffer : buffers_) {
    if (begin >= buffer.begin && begin + attempt.nbytes <= buffer.end) return &buffer;
  }
  return nullptr;
}

void IoUring::prepare(std::uint32_t slot, const Attempt& attempt) noexcept {
  const Buffer* buffer = find_buffer(attempt);
  const bool reading = attempt.operation == Operation::kRead;
  io_uring_sqe& sqe = next_sqe();
  if (buffer != nullptr) {
    sqe.opcode = reading ? kOpReadFixed : kOpWriteFixed;
    sqe.buf_index = static_cast<std::uint16_t>(buffer - buffers_.data());
  } else {
    sqe.opcode = reading ? kOpRead : kOpWrite;
  }
  sqe.fd = attempt.fd;
  sqe.off = attempt.offset;
  sqe.addr = reinterpret_cast<std::uintptr_t>(attempt.address);
  sqe.len = static_cast<std::uint32_t>(attempt.nbytes);
  sqe.user_data = slot;
}

bool IoUring::submit(std::vector<Completion>& refused) noexcept {
  store_release(sq_tail_, tail_);
  for (;;) {
    const std::uint32_t head = load_acquire(sq_head_);
    if (head == tail_) return false;
    const int count = enter(ring_.get(), tail_ - head, 0, 0, nullptr, 0);
    if (count > 0 || (count < 0 && errno == EINTR)) continue;
    if (count == 0 || errno == EAGAIN || errno == EBUSY) return true;
    const int error = errno;
    for (std::uint32_t at = load_acquire(sq_head_); at != tail_; ++at) {
      const std::uint64_t tag = sqes_[at & sq_mask_].user_data;
      if (tag == kWakeTag) {
        is_wake_armed_ = false;
      } else {
        refused.push_back({static_cast<std::uint32_t>(tag), -error});
      }
    }
    tail_ = load_acquire(sq_head_);
    store_release(sq_tail_, tail_);
    return false;
  }
}

void IoUring::reap(std::vector<Completion>& completions) noexcept {
  std::uint32_t head = *cq_head_;
  const std::uint32_t tail = load_acquire(cq_tail_);
  for (; head != tail; ++head) {
    const io_uring_cqe& cqe = cqes_[head & cq_mask_];
    if (cqe.user_data == kWakeTag) {
      is_wake_armed_ = false;
    } else {
      completions.push_back({static_cast<std::uint32_t>(cqe.user_data), cqe.res});
    }
  }
  store_release(cq_head_, head);
}

void IoUring::wait(std::optional<Clock::time_point> until) noexcept {
  if (!is_wake_armed_) {
    arm_wake();
    store_release(sq_tail_, tail_);
  }
  KernelTimespec timespec{};
  GeteventsArg arg{};
  if (until) {
    const auto left = std::max<Clock::duration>(*until - Clock::now(), Clock::duration::zero());
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
    timespec = {ns / 1'000'000'000, ns % 1'000'000'000};
    arg.timespec = reinterpret_cast<std::uintptr_t>(&timespec);
  }
  // Every outcome, an interruption included, leads back to the loop, which looks for completions.
  enter(ring_.get(), tail_ - load_acquire(sq_head_), 1, IORING_ENTER_GETEVENTS | kEnterExtArg, &arg,
        sizeof arg);
}

void IoUring::wake() noexcept {
  const std::uint64_t one = 1;
  // Fails only when the counter is full: then a wake is pending anyway.
  [[maybe_unused]] const ssize_t written = ::write(wake_event_.get(), &one, sizeof one);
}

void IoUring::finish() noexcept {
  // The kernel must not write to wake_count_ after this object is gone.
  std::vector<Completion> none;
  while (is_wake_armed_) {
    wake();
    enter(ring_.get(), tail_ - load_acquire(sq_head_), 1, IORING_ENTER_GETEVENTS, nullptr, 0);
    reap(none);
  }
}

int IoUring::update_buffer(std::uint32_t index, void* address, std::uint64_t nbytes) noexcept {
  struct {
    void* base;
    std::uint64_t nbytes;
  } vector{address, nbytes};
  ResourceUpdate update{};
  update.offset = index;
  update.data = reinterpret_cast<std::uintptr_t>(&vector);
  update.num = 1;
  return do_register(ring_.get(), kRegisterBuffersUpdate, &update, sizeof update) < 0 ? errno : 0;
}

int IoUring::register_buffer(void* address, std::uint64_t nbytes, std::string& text) {
  if (!has_buffer_table_) {
    ResourceRegister table{};
    table.num = kMaxBuffers;
    table.flags = kResourceSparse;
    if (do_register(ring_.get(), kRegisterBuffers2, &table, sizeof table) < 0) {
      text = "the kernel has no sparse table of fixed buffers (Linux 5.19)";
      return errno;
    }
    has_buffer_table_ = true;
    buffers_.resize(kMaxBuffers);
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  for (std::uint64_t done = 0; done < nbytes; done += kMaxBufferBytes) {
    const std::uint64_t part = std::min(kMaxBufferBytes, nbytes - done);
    std::uint32_t index = 0;
    while (index < kMaxBuffers && buffers_[index].end != 0) ++index;
    int error = index == kMaxBuffers ? ENOSPC : 0;
    if (error == 0) error = update_buffer(index, static_cast<unsigned char*>(address) + done, part);
    if (error != 0) {
      unregister_buffer(address);
      text = error == ENOMEM ? "the limit of locked memory (ulimit -l) is too low"
                             : std::string("io_uring_register: ") + std::strerror(error);
      return error;
    }
    buffers_[index] = {begin + done, begin + done + part, begin};
  }
  return 0;
}

int IoUring::unregister_buffer(void* address) noexcept {
  int error = ENOENT;
  for (std::uint32_t index = 0; index < buffers_.size(); ++index) {
    Buffer& buffer = buffers_[index];
    if (buffer.end == 0 || buffer.registration != reinterpret_cast<std::uintptr_t>(address))
      continue;
    error = update_buffer(index, nullptr, 0);
    if (error != 0) return error;
    buffer = {};
  }
  return error;
}

}  // namespace

std::unique_ptr<Ring> make_io_uring(std::uint32_t num_slots) {
  return std::make_unique<IoUring>(num_slots);
}

}  // namespace offload

#else

namespace offload {

std::unique_ptr<Ring> make_io_uring(std::uint32_t) {
  throw std::system_error(ENOSYS, std::generic_category(), "io_uring was not there at build time");
}

}  // namespace offload

#endif
