// The whole library through its C ABI, every backend that works here.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "offload_native.h"
#include "testing.hpp"

namespace {

constexpr std::uint64_t kBlockBytes = 64 * 1024;
constexpr std::int64_t kSecond = 1'000'000'000;

std::vector<std::string> working_backends() {
  std::vector<std::string> names;
  for (const char* name : {"io_uring", "libaio", "threads"}) {
    if (offload_probe(name, nullptr, 0) == 0) names.emplace_back(name);
  }
  return names;
}

class Engine {
 public:
  explicit Engine(const std::string& backend, const char* fault = nullptr,
                  std::uint32_t queue_depth = 8, std::uint32_t threads = 2,
                  std::uint32_t held_depth = 0) {
    const offload_options options{backend.c_str(), queue_depth, threads, 2,
                                  held_depth,      kBlockBytes, fault};
    char text[200] = "";
    if (const int error = offload_engine_create(&options, &engine_, text, sizeof text)) {
      throw std::runtime_error(backend + ": " + std::to_string(error) + " " + text);
    }
  }
  ~Engine() {
    if (offload_engine_close(engine_, 10 * kSecond) == 0) offload_engine_free(engine_);
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  offload_engine* get() const { return engine_; }

 private:
  offload_engine* engine_ = nullptr;
};

// A file without a name, with both descriptors.
class File {
 public:
  File() {
    const char* folder = std::getenv("TMPDIR");
    std::string path = std::string(folder != nullptr ? folder : "/var/tmp") + "/offload-XXXXXX";
    fd_ = ::mkostemp(path.data(), O_CLOEXEC);
    if (fd_ < 0) throw std::runtime_error("mkostemp " + path);
    direct_fd_ = ::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    ::unlink(path.c_str());
  }
  ~File() {
    ::close(fd_);
    if (direct_fd_ >= 0) ::close(direct_fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  int direct_fd() const { return direct_fd_; }

 private:
  int fd_ = -1, direct_fd_ = -1;
};

class Memory {
 public:
  explicit Memory(std::size_t nbytes, unsigned seed = 0) : nbytes_(nbytes) {
    void* address =
        ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::runtime_error("mmap");
    data_ = static_cast<unsigned char*>(address);
    std::mt19937 random(seed);
    for (std::size_t i = 0; seed != 0 && i < nbytes; ++i) {
      data_[i] = static_cast<unsigned char>(random());
    }
  }
  ~Memory() { ::munmap(data_, nbytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  unsigned char* data() const { return data_; }

 private:
  std::size_t nbytes_;
  unsigned char* data_ = nullptr;
};

class Ticket {
 public:
  Ticket(const Engine& engine, int operation, const File& file, std::uint64_t offset, void* address,
         std::uint64_t nbytes, std::uint64_t urgency = OFFLOAD_URGENCY_BULK) {
    const offload_request request{operation, file.fd(), file.direct_fd(), 4096,   4096,   1,
                                  0,         0,         offset,           nbytes, address};
    CHECK_EQUAL(offload_start_urgent(engine.get(), &request, urgency, &ticket_), 0);
  }
  void expedite(std::uint64_t urgency) {
    CHECK_EQUAL(offload_ticket_expedite(ticket_, urgency), 0);
  }
  ~Ticket() { offload_ticket_free(ticket_); }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  int wait_for(std::int64_t timeout_ns) {
    return offload_ticket_wait(ticket_, timeout_ns, &outcome_);
  }
  offload_outcome wait() {
    CHECK_EQUAL(wait_for(20 * kSecond), 0);
    CHECK_EQUAL(offload_ticket_done(ticket_), 1);
    return outcome_;
  }
  bool done() const { return offload_ticket_done(ticket_) != 0; }
  int span(std::int64_t& began_ns, std::int64_t& ended_ns) const {
    return offload_ticket_span(ticket_, &began_ns, &ended_ns);
  }

 private:
  offload_ticket* ticket_ = nullptr;
  offload_outcome outcome_{};
};

void write_and_read_back(const Engine& engine, std::uint64_t offset, std::uint64_t nbytes,
                         std::size_t shift) {
  const File file;
  const Memory written(nbytes + 4096, 1), read(nbytes + 4096);
  const auto wrote =
      Ticket(engine, OFFLOAD_WRITE, file, offset, written.data() + shift, nbytes).wait();
  CHECK_EQUAL(wrote.error, 0);
  CHECK_EQUAL(wrote.checksum, offload_crc32c(written.data() + shift, nbytes, 0));
  const auto got = Ticket(engine, OFFLOAD_READ, file, offset, read.data() + shift, nbytes).wait();
  CHECK_EQUAL(got.error, 0);
  CHECK_EQUAL(got.checksum, wrote.checksum);
  CHECK(std::memcmp(written.data() + shift, read.data() + shift, nbytes) == 0);
  CHECK_EQUAL(read.data()[shift + nbytes], 0);
}

}  // namespace

TEST(round_trips_of_every_alignment) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend);
    write_and_read_back(engine, 0, 3 * kBlockBytes, 0);
    write_and_read_back(engine, 4096, kBlockBytes + 4096, 0);
    write_and_read_back(engine, 100, 3 * kBlockBytes + 77, 100);
    write_and_read_back(engine, 100, 2 * kBlockBytes, 3);
    write_and_read_back(engine, 0, 1, 0);
    write_and_read_back(engine, 4095, 2, 4095);
    write_and_read_back(engine, 8192, 0, 0);
  }
}

TEST(many_requests_from_many_threads) {
  constexpr int kThreads = 4, kRequests = 24;
  constexpr std::uint64_t kBytes = 3 * kBlockBytes / 2;
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, nullptr, 4);
    const File file;
    const Memory source(kThreads * kRequests * kBytes, 5), target(kThreads * kRequests * kBytes);
    std::atomic<int> num_bad{0};
    const auto work = [&](int thread) {
      std::vector<std::unique_ptr<Ticket>> writes, reads;
      const auto at = [&](int i) {
        return static_cast<std::uint64_t>(thread * kRequests + i) * kBytes;
      };
      for (int i = 0; i < kRequests; ++i) {
        writes.push_back(std::make_unique<Ticket>(engine, OFFLOAD_WRITE, file, at(i),
                                                  source.data() + at(i), kBytes));
      }
      for (int i = 0; i < kRequests; ++i) {
        if (writes[static_cast<std::size_t>(i)]->wait().error != 0) ++num_bad;
        reads.push_back(std::make_unique<Ticket>(engine, OFFLOAD_READ, file, at(i),
                                                 target.data() + at(i), kBytes));
      }
      for (auto& read : reads) num_bad += read->wait().error != 0;
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
    for (auto& thread : threads) thread.join();
    CHECK_EQUAL(num_bad.load(), 0);
    CHECK(std::memcmp(source.data(), target.data(), kThreads * kRequests * kBytes) == 0);
    offload_lane_report lanes[OFFLOAD_NUM_LANES];
    CHECK_EQUAL(offload_lanes(engine.get(), lanes), 0);
    CHECK_EQUAL(lanes[0].nbytes, kThreads * kRequests * kBytes);
    CHECK_EQUAL(lanes[1].nbytes, kThreads * kRequests * kBytes);
    CHECK(lanes[0].busy_seconds > 0 && lanes[1].busy_seconds > 0);
  }
}

TEST(error_of_each_block_reaches_the_caller_after_all_blocks_ended) {
  for (const auto& backend : working_backends()) {
    for (const int operation : {OFFLOAD_READ, OFFLOAD_WRITE}) {
      for (int nth = 1; nth <= 5; ++nth) {
        const char* name = operation == OFFLOAD_READ ? "read" : "write";
        const std::string fault =
            std::string("op=") + name + ",nth=" + std::to_string(nth) + ",errno=5";
        const Engine engine(backend, fault.c_str());
        const File file;
        CHECK_EQUAL(::ftruncate(file.fd(), 1 << 20), 0);
        const Memory memory(1 << 20, 3);
        Ticket ticket(engine, operation, file, 0, memory.data(), 5 * kBlockBytes);
        const auto outcome = ticket.wait();
        CHECK_EQUAL(outcome.error, EIO);
        CHECK_EQUAL(outcome.is_short, 0);
        CHECK_EQUAL(outcome.checksum, 0u);
        // The engine goes on.
        CHECK_EQUAL(Ticket(engine, operation, file, 0, memory.data(), kBlockBytes).wait().error, 0);
      }
    }
  }
}

TEST(short_interrupted_and_refused_calls_are_repeated) {
  for (const auto& backend : working_backends()) {
    for (const char* fault :
         {"nth=2,count=3,short=4096", "nth=1,count=4,short=100", "nth=2,count=20,errno=4",
          "nth=2,count=20,errno=11", "nth=1,count=3,delay=20"}) {
      const Engine engine(backend, fault);
      write_and_read_back(engine, 0, 4 * kBlockBytes, 0);
    }
  }
}

TEST(end_of_file_is_an_error) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend);
    const File file;
    CHECK_EQUAL(::ftruncate(file.fd(), 100'000), 0);
    const Memory memory(1 << 20);
    const auto outcome = Ticket(engine, OFFLOAD_READ, file, 0, memory.data(), 1 << 20).wait();
    CHECK_EQUAL(outcome.error, EIO);
    CHECK_EQUAL(outcome.is_short, 1);
    CHECK_EQUAL(Ticket(engine, OFFLOAD_READ, file, 0, memory.data(), 100'000).wait().error, 0);
  }
}

TEST(bad_descriptor_is_an_error) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend);
    const Memory memory(kBlockBytes);
    offload_request request{OFFLOAD_READ, 9999,         9999, 4096, 512, 0, 0, 0, 0,
                            kBlockBytes,  memory.data()};
    offload_ticket* ticket = nullptr;
    CHECK_EQUAL(offload_start(engine.get(), &request, &ticket), 0);
    offload_outcome outcome{};
    CHECK_EQUAL(offload_ticket_wait(ticket, 10 * kSecond, &outcome), 0);
    offload_ticket_free(ticket);
    CHECK_EQUAL(outcome.error, EBADF);
    request.fd = -1;
    CHECK_EQUAL(offload_start(engine.get(), &request, &ticket), EINVAL);
  }
}

TEST(wait_has_a_deadline_and_the_request_goes_on) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "op=read,delay=150");
    const File file;
    const Memory memory(kBlockBytes, 2), target(kBlockBytes);
    CHECK_EQUAL(Ticket(engine, OFFLOAD_WRITE, file, 0, memory.data(), kBlockBytes).wait().error, 0);
    Ticket ticket(engine, OFFLOAD_READ, file, 0, target.data(), kBlockBytes);
    CHECK_EQUAL(ticket.wait_for(20'000'000), ETIMEDOUT);
    CHECK(!ticket.done());
    CHECK_EQUAL(ticket.wait().error, 0);
    CHECK(std::memcmp(memory.data(), target.data(), kBlockBytes) == 0);
  }
}

TEST(span_of_a_request_is_known_when_it_has_ended) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "op=read,delay=50");
    const File file;
    const Memory memory(4096, 1);
    CHECK_EQUAL(Ticket(engine, OFFLOAD_WRITE, file, 0, memory.data(), 4096).wait().error, 0);
    std::int64_t began = 0, ended = 0;
    Ticket ticket(engine, OFFLOAD_READ, file, 0, memory.data(), 4096);
    CHECK_EQUAL(ticket.span(began, ended), EAGAIN);
    CHECK_EQUAL(ticket.wait().error, 0);
    CHECK_EQUAL(ticket.span(began, ended), 0);
    CHECK(began > 0);
    CHECK(ended - began >= kSecond / 20);
    Ticket nothing(engine, OFFLOAD_READ, file, 0, memory.data(), 0);
    CHECK_EQUAL(nothing.wait().error, 0);
    CHECK_EQUAL(nothing.span(began, ended), 0);
    CHECK_EQUAL(began, ended);
  }
}

TEST(lost_completion_ends_in_deadlines_not_hangs) {
  for (const auto& backend : working_backends()) {
    // In a process of its own, because such an engine can never be closed; killed at the end, so
    // that the sanitizers do not take its threads for leaks.
    const pid_t child = ::fork();
    CHECK(child >= 0);
    if (child == 0) {
      const Engine engine(backend, "op=write,drop=1");
      const File file;
      const Memory memory(kBlockBytes, 2);
      Ticket ticket(engine, OFFLOAD_WRITE, file, 0, memory.data(), kBlockBytes);
      const bool good = ticket.wait_for(20'000'000) == ETIMEDOUT &&
                        offload_engine_close(engine.get(), 20'000'000) == ETIMEDOUT;
      if (good) ::raise(SIGKILL);
      ::_exit(1);
    }
    int status = 0;
    CHECK_EQUAL(::waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  }
}

TEST(corrupt_lost_and_misdirected_writes_change_the_checksum) {
  for (const auto& backend : working_backends()) {
    for (const char* action : {"corrupt=1", "lost=1", "misdirect=65536"}) {
      const Engine engine(backend, (std::string("op=write,nth=2,") + action).c_str());
      const File file;
      CHECK_EQUAL(::ftruncate(file.fd(), 1 << 20), 0);
      const Memory memory(4 * kBlockBytes, 2), target(4 * kBlockBytes);
      const auto wrote =
          Ticket(engine, OFFLOAD_WRITE, file, 0, memory.data(), 2 * kBlockBytes).wait();
      CHECK_EQUAL(wrote.error, 0);
      const auto got = Ticket(engine, OFFLOAD_READ, file, 0, target.data(), 2 * kBlockBytes).wait();
      CHECK_EQUAL(got.error, 0);
      CHECK(got.checksum != wrote.checksum);
    }
  }
}

TEST(copies_move_everything_and_count_on_their_lanes) {
  const Engine engine("auto");
  constexpr std::uint64_t kBytes = 1'000'003;
  const Memory source(kBytes, 9), target(kBytes);
  for (const int lane : {OFFLOAD_H2D, OFFLOAD_D2H}) {
    std::memset(target.data(), 0, kBytes);
    offload_ticket* ticket = nullptr;
    CHECK_EQUAL(
        offload_start_copy(engine.get(), lane, target.data(), source.data(), kBytes, &ticket), 0);
    offload_outcome outcome{};
    CHECK_EQUAL(offload_ticket_wait(ticket, -1, &outcome), 0);
    offload_ticket_free(ticket);
    CHECK_EQUAL(outcome.error, 0);
    CHECK(std::memcmp(source.data(), target.data(), kBytes) == 0);
  }
  offload_lane_report lanes[OFFLOAD_NUM_LANES];
  CHECK_EQUAL(offload_lanes(engine.get(), lanes), 0);
  CHECK_EQUAL(lanes[2].nbytes, kBytes);
  CHECK_EQUAL(lanes[3].nbytes, kBytes);
}

TEST(registered_memory_gives_the_same_bytes) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend);
    const File file;
    const Memory memory(4 * kBlockBytes, 4);
    Memory target(4 * kBlockBytes);
    char text[200] = "";
    const int error =
        offload_register(engine.get(), target.data(), 4 * kBlockBytes, text, sizeof text);
    CHECK(error == 0 || text[0] != '\0');
    CHECK_EQUAL(Ticket(engine, OFFLOAD_WRITE, file, 0, memory.data(), 4 * kBlockBytes).wait().error,
                0);
    CHECK_EQUAL(Ticket(engine, OFFLOAD_READ, file, 0, target.data(), 4 * kBlockBytes).wait().error,
                0);
    CHECK(std::memcmp(memory.data(), target.data(), 4 * kBlockBytes) == 0);
    CHECK_EQUAL(offload_unregister(engine.get(), target.data()), error == 0 ? 0 : ENOENT);
    CHECK_EQUAL(Ticket(engine, OFFLOAD_READ, file, 0, target.data(), kBlockBytes).wait().error, 0);
  }
}

// What is written last at a place stays there, and what is read tells what was written before: so
// the order shows without a clock. The first write is as urgent as any, so it goes first, and long
// enough in flight for all others to be queued behind it.
TEST(urgent_requests_pass_bulk_ones_of_both_lanes) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "op=write,nth=1,delay=300", 1, 1);
    const File file;
    CHECK_EQUAL(::ftruncate(file.fd(), 8 * kBlockBytes), 0);
    const Memory first(kBlockBytes, 1), bulk(2 * kBlockBytes, 2), urgent(2 * kBlockBytes, 3),
        raised(kBlockBytes, 4), seen(2 * kBlockBytes), left(4 * kBlockBytes);
    Ticket holds(engine, OFFLOAD_WRITE, file, 7 * kBlockBytes, first.data(), kBlockBytes, 0);
    Ticket bulk_write(engine, OFFLOAD_WRITE, file, 0, bulk.data(), 2 * kBlockBytes);
    Ticket bulk_read(engine, OFFLOAD_READ, file, 2 * kBlockBytes, seen.data(), 2 * kBlockBytes);
    Ticket passes_write(engine, OFFLOAD_WRITE, file, 0, urgent.data(), kBlockBytes, 0);
    Ticket passes_read(engine, OFFLOAD_WRITE, file, 2 * kBlockBytes, urgent.data() + kBlockBytes,
                       kBlockBytes, 0);
    Ticket is_raised(engine, OFFLOAD_WRITE, file, 3 * kBlockBytes, raised.data(), kBlockBytes);
    is_raised.expedite(0);
    for (Ticket* ticket :
         {&holds, &bulk_write, &bulk_read, &passes_write, &passes_read, &is_raised}) {
      CHECK_EQUAL(ticket->wait().error, 0);
    }
    CHECK(std::memcmp(seen.data(), urgent.data() + kBlockBytes, kBlockBytes) == 0);
    CHECK(std::memcmp(seen.data() + kBlockBytes, raised.data(), kBlockBytes) == 0);
    Ticket(engine, OFFLOAD_READ, file, 0, left.data(), 4 * kBlockBytes).wait();
    CHECK(std::memcmp(left.data(), bulk.data(), 2 * kBlockBytes) == 0);
  }
}

TEST(urgent_request_does_not_wait_for_the_bulk_that_the_disk_has) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "op=write,nth=1,delay=1500", 8, 2, 1);
    const File file;
    CHECK_EQUAL(::ftruncate(file.fd(), 8 * kBlockBytes), 0);
    const Memory memory(4 * kBlockBytes, 1), target(kBlockBytes);
    Ticket bulk(engine, OFFLOAD_WRITE, file, 0, memory.data(), 4 * kBlockBytes);
    offload_lane_report lanes[OFFLOAD_NUM_LANES]{};
    while (lanes[1].busy_seconds == 0) {  // until its first block is in flight
      CHECK_EQUAL(offload_lanes(engine.get(), lanes), 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    Ticket urgent(engine, OFFLOAD_READ, file, 4 * kBlockBytes, target.data(), kBlockBytes, 0);
    CHECK_EQUAL(urgent.wait().error, 0);
    CHECK(!bulk.done());
    CHECK_EQUAL(offload_lanes(engine.get(), lanes), 0);
    CHECK_EQUAL(lanes[1].nbytes, 0u);  // its other blocks are held back
    CHECK_EQUAL(bulk.wait().error, 0);
  }
}

TEST(bulk_ends_while_urgent_requests_go_on_and_fail) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "op=read,nth=5,count=0,errno=5", 2, 1, 1);
    const File file;
    CHECK_EQUAL(::ftruncate(file.fd(), 8 * kBlockBytes), 0);
    const Memory memory(8 * kBlockBytes, 1), target(4 * kBlockBytes);
    Ticket bulk(engine, OFFLOAD_WRITE, file, 0, memory.data(), 8 * kBlockBytes);
    int num_failed = 0;
    std::vector<std::unique_ptr<Ticket>> urgent;
    const auto start_urgent = [&] {
      urgent.push_back(std::make_unique<Ticket>(engine, OFFLOAD_READ, file, 0, target.data(),
                                                4 * kBlockBytes, 0));
    };
    for (int i = 0; i < 16; ++i) start_urgent();
    while (!bulk.done()) {
      num_failed += urgent.front()->wait().error == EIO;
      urgent.erase(urgent.begin());
      start_urgent();
    }
    CHECK_EQUAL(bulk.wait().error, 0);
    for (auto& ticket : urgent) num_failed += ticket->wait().error == EIO;
    CHECK(num_failed > 0);
  }
}

TEST(requests_of_every_urgency_from_many_threads_with_faults) {
  constexpr int kThreads = 4, kRequests = 40;
  constexpr std::uint64_t kBytes = 2 * kBlockBytes;
  for (const auto& backend : working_backends()) {
    const Engine engine(backend, "nth=9,count=5,errno=4;nth=31,count=4,short=4096;nth=55,delay=20",
                        4, 2, 2);
    const File file;
    const Memory source(kThreads * kRequests * kBytes, 5), target(kThreads * kRequests * kBytes);
    std::atomic<int> num_bad{0};
    const auto work = [&](int thread) {
      std::mt19937 random(static_cast<unsigned>(thread) + 1);
      for (const int operation : {OFFLOAD_WRITE, OFFLOAD_READ}) {
        std::vector<std::unique_ptr<Ticket>> tickets;
        for (int i = 0; i < kRequests; ++i) {
          const auto at = static_cast<std::uint64_t>(thread * kRequests + i) * kBytes;
          const auto& memory = operation == OFFLOAD_WRITE ? source : target;
          const auto urgency = std::uint64_t{random() % 4} << OFFLOAD_URGENCY_CLASS_SHIFT;
          tickets.push_back(std::make_unique<Ticket>(engine, operation, file, at,
                                                     memory.data() + at, kBytes, urgency));
          tickets[random() % tickets.size()]->expedite(random() % 100);
        }
        for (auto& ticket : tickets) num_bad += ticket->wait().error != 0;
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
    for (auto& thread : threads) thread.join();
    CHECK_EQUAL(num_bad.load(), 0);
    CHECK(std::memcmp(source.data(), target.data(), kThreads * kRequests * kBytes) == 0);
  }
}

TEST(urgent_copy_passes_between_the_blocks_of_a_bulk_one) {
  const offload_options options{"threads", 8, 1, 1, 0, kBlockBytes, "op=copy,nth=1,delay=300"};
  offload_engine* engine = nullptr;
  CHECK_EQUAL(offload_engine_create(&options, &engine, nullptr, 0), 0);
  const Memory bulk(4 * kBlockBytes, 1), urgent(kBlockBytes, 2), target(4 * kBlockBytes);
  offload_ticket *first = nullptr, *second = nullptr;
  CHECK_EQUAL(
      offload_start_copy(engine, OFFLOAD_D2H, target.data(), bulk.data(), 4 * kBlockBytes, &first),
      0);
  CHECK_EQUAL(offload_start_copy_urgent(engine, OFFLOAD_D2H, target.data() + 3 * kBlockBytes,
                                        urgent.data(), kBlockBytes, 0, &second),
              0);
  offload_outcome outcome{};
  for (offload_ticket* ticket : {first, second}) {
    CHECK_EQUAL(offload_ticket_wait(ticket, 20 * kSecond, &outcome), 0);
    CHECK_EQUAL(outcome.error, 0);
    offload_ticket_free(ticket);
  }
  CHECK_EQUAL(offload_engine_close(engine, 10 * kSecond), 0);
  offload_engine_free(engine);
  // The last block of the bulk copy was copied after the urgent one to the same place.
  CHECK(std::memcmp(target.data(), bulk.data(), 4 * kBlockBytes) == 0);
}

TEST(child_of_a_fork_does_nothing) {
  for (const auto& backend : working_backends()) {
    const Engine engine(backend);
    const File file;
    const Memory memory(kBlockBytes, 4);
    const pid_t child = ::fork();
    CHECK(child >= 0);
    if (child == 0) {
      const offload_request request{
          OFFLOAD_WRITE, file.fd(),    file.direct_fd(), 4096, 512, 0, 0, 0, 0,
          kBlockBytes,   memory.data()};
      offload_ticket* ticket = nullptr;
      const bool good = offload_start(engine.get(), &request, &ticket) == EPERM &&
                        offload_fsync(engine.get(), file.fd()) == EPERM &&
                        offload_engine_close(engine.get(), 0) == 0;
      offload_engine_free(engine.get());
      ::_exit(good ? 0 : 1);
    }
    int status = 0;
    CHECK_EQUAL(::waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    write_and_read_back(engine, 0, kBlockBytes, 0);
  }
}

TEST(several_engines_and_none_after_close) {
  for (const auto& backend : working_backends()) {
    const Engine first(backend), second(backend);
    write_and_read_back(first, 0, 2 * kBlockBytes, 0);
    write_and_read_back(second, 0, 2 * kBlockBytes, 0);
    CHECK_EQUAL(offload_engine_close(first.get(), kSecond), 0);
    CHECK_EQUAL(offload_engine_close(first.get(), kSecond), 0);
    const Memory memory(kBlockBytes);
    const File file;
    const offload_request request{OFFLOAD_READ, file.fd(),    -1, 0, 0, 0, 0, 0, 0,
                                  kBlockBytes,  memory.data()};
    offload_ticket* ticket = nullptr;
    CHECK_EQUAL(offload_start(first.get(), &request, &ticket), ESHUTDOWN);
    write_and_read_back(second, 0, kBlockBytes, 0);
  }
}

TEST(tickets_outlive_their_engine) {
  for (const auto& backend : working_backends()) {
    const File file;
    const Memory memory(kBlockBytes, 4);
    auto engine = std::make_unique<Engine>(backend);
    Ticket ticket(*engine, OFFLOAD_WRITE, file, 0, memory.data(), kBlockBytes);
    engine.reset();
    CHECK_EQUAL(ticket.wait().checksum, offload_crc32c(memory.data(), kBlockBytes, 0));
  }
}

TEST(bad_options_are_refused_with_a_text) {
  const offload_options good{"auto", 8, 2, 1, 0, kBlockBytes, nullptr};
  std::vector<offload_options> bad(5, good);
  bad[0].backend = "magnetic";
  bad[1].queue_depth = 0;
  bad[2].threads = 5000;
  bad[3].block_bytes = 1000;
  bad[4].fault = "nth=1";
  for (const auto& options : bad) {
    char text[200] = "";
    offload_engine* engine = nullptr;
    CHECK_EQUAL(offload_engine_create(&options, &engine, text, sizeof text), EINVAL);
    CHECK(text[0] != '\0');
  }
}
