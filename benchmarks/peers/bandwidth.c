// Reads memory with some threads that take pieces from a shared counter, so that a core that others use takes fewer.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { PIECE = 1 << 20, MOST = 64 };

typedef struct {
  const uint64_t *words;
  uint64_t num_bytes;
  atomic_ullong *next;
  uint64_t sum;
} Share;

static void *read_pieces(void *argument) {
  Share *share = argument;
  uint64_t sums[32] = {0};
  for (;;) {
    uint64_t start = atomic_fetch_add(share->next, PIECE);
    if (start + PIECE > share->num_bytes) break;
    const uint64_t *words = share->words + start / 8;
    for (int i = 0; i < PIECE / 8; i += 32)
      for (int j = 0; j < 32; j++) sums[j] += words[i + j];
  }
  for (int j = 0; j < 32; j++) share->sum += sums[j];
  return 0;
}

// Returns bytes a second; `sink` keeps the reads from being dropped.
double read_bandwidth(const void *memory, uint64_t num_bytes, int num_threads, uint64_t *sink) {
  pthread_t threads[MOST];
  Share shares[MOST];
  atomic_ullong next = 0;
  struct timespec begin, end;
  if (num_threads > MOST) num_threads = MOST;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int i = 0; i < num_threads; i++) {
    shares[i] = (Share){memory, num_bytes, &next, 0};
    pthread_create(&threads[i], 0, read_pieces, &shares[i]);
  }
  for (int i = 0; i < num_threads; i++) {
    pthread_join(threads[i], 0);
    *sink += shares[i].sum;
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  double seconds = (end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec);
  return num_bytes / PIECE * (double)PIECE / seconds;
}
