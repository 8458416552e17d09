#include "fault.hpp"

#include <array>
#include <charconv>
#include <stdexcept>
#include <utility>

namespace offload {
namespace {

constexpr std::array<std::pair<std::string_view, Operation>, 4> kOperations{
    {{"read", Operation::kRead},
     {"write", Operation::kWrite},
     {"fsync", Operation::kFsync},
     {"copy", Operation::kCopy}}};

constexpr std::array<std::pair<std::string_view, FaultKind>, 7> kActions{
    {{"errno", FaultKind::kErrno},
     {"short", FaultKind::kShort},
     {"delay", FaultKind::kDelay},
     {"corrupt", FaultKind::kCorrupt},
     {"lost", FaultKind::kLost},
     {"misdirect", FaultKind::kMisdirect},
     {"drop", FaultKind::kDrop}}};

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(' ');
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

// Cuts `text` before the first `separator`; returns that part.
std::string_view cut(std::string_view& text, char separator) {
  const auto at = text.find(separator);
  const std::string_view part = text.substr(0, at);
  text = at == std::string_view::npos ? std::string_view{} : text.substr(at + 1);
  return trimmed(part);
}

[[noreturn]] void refuse(std::string_view part, const char* why) {
  throw std::invalid_argument("fault: '" + std::string(part) + "' " + why);
}

std::uint64_t parse_number(std::string_view text, std::string_view part) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) refuse(part, "is not a number");
  return number;
}

}  // namespace

FaultSpec::FaultSpec(std::string_view text) {
  while (!text.empty()) {
    const std::string_view part = cut(text, ';');
    if (!part.empty()) rules_.push_back(parse_rule(part));
  }
}

FaultSpec::Rule FaultSpec::parse_rule(std::string_view text) {
  Rule rule;
  const std::string_view whole = text;
  while (!text.empty()) {
    const std::string_view pair = cut(text, ',');
    std::string_view value = pair;
    const std::string_view key = cut(value, '=');
    if (key == "op") {
      rule.any = trimmed(value) == "any";
      bool known = rule.any;
      for (const auto& [name, operation] : kOperations) {
        if (trimmed(value) != name) continue;
        rule.operation = operation;
        known = true;
      }
      if (!known) refuse(pair, "is no operation");
      continue;
    }
    const std::uint64_t number = parse_number(trimmed(value), pair);
    if (key == "nth" && number >= 1) {
      rule.nth = number;
    } else if (key == "count") {
      rule.count = number;
    } else {
      if (rule.action.kind != FaultKind::kNone) refuse(pair, "is a second action");
      for (const auto& [name, kind] : kActions) {
        if (key == name) rule.action = {kind, number};
      }
      if (rule.action.kind == FaultKind::kNone) refuse(pair, "is unknown");
    }
  }
  if (rule.action.kind == FaultKind::kNone) refuse(whole, "has no action");
  return rule;
}

FaultAction FaultSpec::next(Operation operation) noexcept {
  if (rules_.empty()) return {};
  const std::lock_guard lock(mutex_);
  FaultAction found;
  for (Rule& rule : rules_) {
    if (!rule.any && rule.operation != operation) continue;
    ++rule.seen;
    const bool reached =
        rule.seen >= rule.nth && (rule.count == 0 || rule.seen - rule.nth < rule.count);
    if (reached && found.kind == FaultKind::kNone) found = rule.action;
  }
  return found;
}

}  // namespace offload
