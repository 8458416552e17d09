#include <cstdint>
#include <random>
#include <vector>

#include "crc32c.hpp"
#include "testing.hpp"

namespace {

std::vector<unsigned char> random_bytes(std::size_t count) {
  std::mt19937_64 random(7);
  std::vector<unsigned char> bytes(count);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

std::uint32_t crc_of(const std::vector<unsigned char>& bytes) {
  return offload::crc32c(bytes.data(), bytes.size(), 0);
}

}  // namespace

// RFC 3720, appendix B.4.
TEST(crc32c_gives_the_published_values) {
  const std::string digits = "123456789";
  CHECK_EQUAL(offload::crc32c(digits.data(), digits.size(), 0), 0xE3069283u);
  CHECK_EQUAL(crc_of(std::vector<unsigned char>(32, 0)), 0x8A9136AAu);
  CHECK_EQUAL(crc_of(std::vector<unsigned char>(32, 0xFF)), 0x62A8AB43u);
  std::vector<unsigned char> rising(32);
  for (std::size_t i = 0; i < rising.size(); ++i) rising[i] = static_cast<unsigned char>(i);
  CHECK_EQUAL(crc_of(rising), 0x46DD794Eu);
}

TEST(crc32c_is_the_same_by_every_way_at_every_length_and_alignment) {
  using offload::CrcWay;
  const auto bytes = random_bytes(3 * 4096 * 3 + 100);
  for (const CrcWay way : {CrcWay::kInstructions, CrcWay::kFolding}) {
    if (!offload::is_available(way)) continue;
    for (std::size_t start = 0; start < 9; ++start) {
      for (std::size_t length : {0, 1, 7, 8, 9, 63, 255, 256, 257, 511, 512, 1000, 4096, 12287,
                                 12288, 12289, 24576, 36863 + 91}) {
        const auto seed = static_cast<std::uint32_t>(length * 2654435761u);
        const auto* data = bytes.data() + start;
        CHECK_EQUAL(offload::crc32c_by(way, data, length, seed),
                    offload::crc32c_by(CrcWay::kTables, data, length, seed));
      }
    }
  }
}

TEST(crc32c_combine_equals_the_whole) {
  const auto bytes = random_bytes(100'003);
  const std::uint32_t whole = crc_of(bytes);
  for (std::size_t cut : {0u, 1u, 4095u, 4096u, 65'536u, 100'002u, 100'003u}) {
    const auto first = offload::crc32c(bytes.data(), cut, 0);
    const auto second = offload::crc32c(bytes.data() + cut, bytes.size() - cut, 0);
    CHECK_EQUAL(offload::crc32c_combine(first, second, bytes.size() - cut), whole);
    CHECK_EQUAL(offload::crc32c(bytes.data() + cut, bytes.size() - cut, first), whole);
  }
}
