// A test main without a framework: TEST(name) registers itself, CHECK ends the test.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace testing {

struct Case {
  std::string name;
  std::function<void()> body;
};
std::vector<Case>& cases();

struct Registration {
  Registration(const char* name, std::function<void()> body) {
    cases().push_back({name, std::move(body)});
  }
};

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* text, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << "line " << line << ": " << text << ": " << a << " is not " << b;
  throw std::runtime_error(message.str());
}

inline void check(bool condition, const char* text, int line) {
  if (!condition) throw std::runtime_error("line " + std::to_string(line) + ": " + text);
}

}  // namespace testing

#define TEST(name)                                                     \
  static void name();                                                  \
  static const testing::Registration registration_##name(#name, name); \
  static void name()
#define CHECK(condition) testing::check((condition), #condition, __LINE__)
#define CHECK_EQUAL(a, b) testing::check_equal((a), (b), #a " == " #b, __LINE__)
