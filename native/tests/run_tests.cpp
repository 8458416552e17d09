// Runs every test whose name contains the argument; returns how many failed.
#include <cstdio>
#include <cstring>

#include "testing.hpp"

namespace testing {
std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
}  // namespace testing

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  int num_run = 0, num_failed = 0;
  for (const testing::Case& test : testing::cases()) {
    if (std::strstr(test.name.c_str(), filter) == nullptr) continue;
    ++num_run;
    try {
      test.body();
      std::printf("ok    %s\n", test.name.c_str());
    } catch (const std::exception& error) {
      ++num_failed;
      std::printf("FAIL  %s: %s\n", test.name.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d run, %d failed\n", num_run, num_failed);
  return num_run == 0 || num_failed != 0;
}
