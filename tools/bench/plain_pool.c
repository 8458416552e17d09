/* What a plain C thread pool reaches: blocks taken in order by threads that call pread or pwrite on
 * O_DIRECT descriptors; no checksums, no error recovery. Built and run by io.py.
 *
 * usage: plain_pool read|write|mixed SOURCE TARGET NBYTES BLOCK_BYTES THREADS
 * Prints the seconds of the loop and the CPU seconds of the process within it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static atomic_long next_block;
static long num_blocks, block_bytes;
static int source, target, mode; /* mode: 'r', 'w' or 'm' */
static char* memory;

static void* work(void* unused) {
  (void)unused;
  for (long i; (i = atomic_fetch_add(&next_block, 1)) < num_blocks;) {
    const int reading = mode == 'r' || (mode == 'm' && i % 2 == 0);
    char* at = memory + i * block_bytes;
    const long done = reading ? pread(source, at, block_bytes, i * block_bytes)
                              : pwrite(target, at, block_bytes, i * block_bytes);
    if (done != block_bytes) {
      perror("plain_pool");
      exit(1);
    }
  }
  return NULL;
}

static double seconds(struct timeval time) { return time.tv_sec + time.tv_usec / 1e6; }

static double cpu_seconds(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  mode = argv[1][0];
  source = open(argv[2], O_RDONLY | O_DIRECT);
  target = open(argv[3], O_RDWR | O_DIRECT);
  const long nbytes = atol(argv[4]);
  block_bytes = atol(argv[5]);
  const long num_threads = atol(argv[6]);
  num_blocks = nbytes / block_bytes;
  memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (source < 0 || target < 0 || memory == MAP_FAILED) {
    perror("plain_pool");
    return 1;
  }
  memset(memory, 1, nbytes);
  const double cpu_before = cpu_seconds(), before = now();
  pthread_t threads[64];
  for (long i = 0; i < num_threads; ++i) pthread_create(&threads[i], NULL, work, NULL);
  for (long i = 0; i < num_threads; ++i) pthread_join(threads[i], NULL);
  const double elapsed = now() - before;
  printf("%.6f %.6f\n", elapsed, cpu_seconds() - cpu_before);
  return 0;
}
