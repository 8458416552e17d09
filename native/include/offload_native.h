/* Asynchronous file I/O, memory copies and CRC32C behind a plain C ABI.
 *
 * The library knows nothing of Python or torch, has no global state, and throws nothing across this
 * boundary. Every function that can fail returns 0 or an errno value. All functions may be called
 * from any thread.
 *
 * Ownership. A request owns its memory from offload_start* until it has ended: until every one of
 * its blocks has, also after an error and after a wait that timed out. Files stay the caller's; a
 * descriptor must stay open until the requests on it have ended.
 *
 * Fork. An engine works in the process that created it only. In a child every call returns EPERM
 * (close returns 0) and does nothing.
 */
#ifndef OFFLOAD_NATIVE_H_
#define OFFLOAD_NATIVE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define OFFLOAD_NOEXCEPT noexcept
#else
#define OFFLOAD_NOEXCEPT
#endif

#define OFFLOAD_API __attribute__((visibility("default")))

/* Raised by every change of a structure or a signature below; not by a new function. */
#define OFFLOAD_ABI_VERSION 1

typedef struct offload_engine offload_engine;
typedef struct offload_ticket offload_ticket;

typedef struct {
  const char* backend;   /* "auto", "io_uring", "libaio" or "threads" */
  uint32_t queue_depth;  /* blocks in flight at once */
  uint32_t threads;      /* of system calls ("threads") or of checksums (the others) */
  uint32_t copy_threads; /* of memory copies */
  uint32_t held_depth;   /* blocks in flight at once but for the first class; 0 = no limit */
  uint64_t block_bytes;  /* a multiple of 4096, at most 1 GiB */
  const char* fault;     /* NULL, or a fault specification (src/fault.hpp) */
} offload_options;

enum { OFFLOAD_READ = 0, OFFLOAD_WRITE = 1 };
enum { OFFLOAD_H2D = 0, OFFLOAD_D2H = 1 };

/* How urgent a request is: the lower, the sooner; of equals the first. The upper 8 bits are its
 * class, the others its place in the class. Reads and writes of one class take turns, blocks of an
 * earlier class pass those of a later one. Class 0 is given to the disk at once; of the others so
 * little that what is urgent does not wait there either (src/request_queue.hpp, [Note: order]). */
#define OFFLOAD_URGENCY_CLASS_SHIFT 56
/* Of requests that were started without one. */
#define OFFLOAD_URGENCY_BULK (UINT64_C(2) << OFFLOAD_URGENCY_CLASS_SHIFT)

typedef struct {
  int32_t operation;         /* OFFLOAD_READ or OFFLOAD_WRITE */
  int32_t fd;                /* buffered */
  int32_t direct_fd;         /* the same file with O_DIRECT, or -1 */
  uint32_t alignment;        /* of offsets and lengths on direct_fd; a multiple of the page size */
  uint32_t memory_alignment; /* of addresses on direct_fd */
  int32_t has_checksum;      /* 0: none is computed */
  uint32_t checksum_seed;
  uint32_t reserved; /* 0 */
  uint64_t offset;
  uint64_t nbytes;
  void* address;
} offload_request;

typedef struct {
  int32_t error;     /* 0 or the errno of the first block that failed */
  int32_t is_short;  /* the file ended (error is EIO) */
  uint64_t offset;   /* where in the file that block begins */
  uint32_t checksum; /* 0 if none was asked for or error is not 0 */
  uint32_t reserved;
} offload_outcome;

typedef struct {
  uint64_t nbytes;
  double busy_seconds; /* with at least one block in flight */
} offload_lane_report;

/* nvme_read, nvme_write, h2d, d2h */
#define OFFLOAD_NUM_LANES 4

OFFLOAD_API uint32_t offload_abi_version(void) OFFLOAD_NOEXCEPT;

/* 0 if `backend` works here; otherwise an errno, and why as text. */
OFFLOAD_API int offload_probe(const char* backend, char* text, size_t text_bytes) OFFLOAD_NOEXCEPT;

/* EINVAL: an option is out of range; else what the backend's probe gives. `text` says what. */
OFFLOAD_API int offload_engine_create(const offload_options* options, offload_engine** engine,
                                      char* text, size_t text_bytes) OFFLOAD_NOEXCEPT;
OFFLOAD_API const char* offload_engine_backend(const offload_engine* engine) OFFLOAD_NOEXCEPT;

/* Takes no more requests, waits for those in flight to end, then ends the threads. ETIMEDOUT: some
 * are still in flight and go on; call again. A negative timeout is none. */
OFFLOAD_API int offload_engine_close(offload_engine* engine, int64_t timeout_ns) OFFLOAD_NOEXCEPT;

/* Frees a closed engine; its tickets stay valid. One that is not closed is left alone. */
OFFLOAD_API void offload_engine_free(offload_engine* engine) OFFLOAD_NOEXCEPT;

/* Fixed buffers of io_uring: the pages are locked now and found without cost at each request.
 * Best effort: an error means that the memory is used without. A registered range must be given
 * back by offload_unregister before it is unmapped, with no request on it in flight. */
OFFLOAD_API int offload_register(offload_engine* engine, void* address, uint64_t nbytes, char* text,
                                 size_t text_bytes) OFFLOAD_NOEXCEPT;
OFFLOAD_API int offload_unregister(offload_engine* engine, void* address) OFFLOAD_NOEXCEPT;

/* EINVAL: the request makes no sense. ESHUTDOWN: the engine is closed. Without an urgency it is
 * OFFLOAD_URGENCY_BULK. */
OFFLOAD_API int offload_start(offload_engine* engine, const offload_request* request,
                              offload_ticket** ticket) OFFLOAD_NOEXCEPT;
OFFLOAD_API int offload_start_copy(offload_engine* engine, int lane, void* destination,
                                   const void* source, uint64_t nbytes,
                                   offload_ticket** ticket) OFFLOAD_NOEXCEPT;

OFFLOAD_API int offload_start_urgent(offload_engine* engine, const offload_request* request,
                                     uint64_t urgency, offload_ticket** ticket) OFFLOAD_NOEXCEPT;
OFFLOAD_API int offload_start_copy_urgent(offload_engine* engine, int lane, void* destination,
                                          const void* source, uint64_t nbytes, uint64_t urgency,
                                          offload_ticket** ticket) OFFLOAD_NOEXCEPT;

/* Makes what has not been given to the disk yet at least so urgent. */
OFFLOAD_API int offload_ticket_expedite(offload_ticket* ticket, uint64_t urgency) OFFLOAD_NOEXCEPT;

/* 1 if the request has ended, well or not. */
OFFLOAD_API int offload_ticket_done(const offload_ticket* ticket) OFFLOAD_NOEXCEPT;

/* ETIMEDOUT: not ended, goes on. 0: `outcome` tells how it ended. A negative timeout is none. */
OFFLOAD_API int offload_ticket_wait(offload_ticket* ticket, int64_t timeout_ns,
                                    offload_outcome* outcome) OFFLOAD_NOEXCEPT;

/* When the first block was given to the lane and when the request ended, in ns on CLOCK_MONOTONIC;
 * of a request without bytes when it was started. EAGAIN: it has not ended. */
OFFLOAD_API int offload_ticket_span(const offload_ticket* ticket, int64_t* began_ns,
                                    int64_t* ended_ns) OFFLOAD_NOEXCEPT;

/* The request goes on if it has not ended. */
OFFLOAD_API void offload_ticket_free(offload_ticket* ticket) OFFLOAD_NOEXCEPT;

OFFLOAD_API int offload_fsync(offload_engine* engine, int fd) OFFLOAD_NOEXCEPT;
OFFLOAD_API int offload_lanes(offload_engine* engine, offload_lane_report* lanes) OFFLOAD_NOEXCEPT;

/* CRC32C of `nbytes` at `address`, continued from `seed`; and of a concatenation from its parts. */
OFFLOAD_API uint32_t offload_crc32c(const void* address, uint64_t nbytes,
                                    uint32_t seed) OFFLOAD_NOEXCEPT;
OFFLOAD_API uint32_t offload_crc32c_combine(uint32_t first, uint32_t second,
                                            uint64_t second_nbytes) OFFLOAD_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif /* OFFLOAD_NATIVE_H_ */
