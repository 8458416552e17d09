// Threads of a library: they take no signal, so that those reach the program's own threads.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace offload {

// `name`: at most 15 characters. Throws std::system_error.
template <typename Function>
std::thread start_thread(const char* name, Function&& function) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  struct Restore {
    sigset_t& mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
  std::thread thread(std::forward<Function>(function));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace offload
