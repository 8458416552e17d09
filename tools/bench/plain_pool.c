/* What a plain C thread pool reaches: blocks taken in order by threads that call pread or pwrite; no
 * checksums, no error recovery. Built and loaded by io.py. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

typedef struct {
  char mode; /* 'r', 'w', or 'm': every second block is read */
  int source, target;
  char* memory;
  long num_blocks, block_bytes;
  atomic_long next_block;
  atomic_int num_failed;
} pool;

static void* work(void* argument) {
  pool* p = argument;
  for (long i; (i = atomic_fetch_add(&p->next_block, 1)) < p->num_blocks;) {
    const int reading = p->mode == 'r' || (p->mode == 'm' && i % 2 == 0);
    const long at = i * p->block_bytes;
    const long done = reading ? pread(p->source, p->memory + at, p->block_bytes, at)
                              : pwrite(p->target, p->memory + at, p->block_bytes, at);
    if (done != p->block_bytes) atomic_fetch_add(&p->num_failed, 1);
  }
  return NULL;
}

/* Moves `nbytes`; returns how many blocks failed. */
int plain_pool(char mode, int source, int target, char* memory, long nbytes, long block_bytes,
               int num_threads) {
  pool p = {mode, source, target, memory, nbytes / block_bytes, block_bytes, 0, 0};
  pthread_t threads[num_threads];
  for (int i = 0; i < num_threads; ++i) pthread_create(&threads[i], NULL, work, &p);
  for (int i = 0; i < num_threads; ++i) pthread_join(threads[i], NULL);
  return p.num_failed;
}
