#include "crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace offload {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the byte order of all supported targets");

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // reflected

// Product of two polynomials modulo kPolynomial; bit 31 is x^0.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b >> 1) ^ ((b & 1) ? kPolynomial : 0);
  }
  return product;
}

// kPowers[k] = x^(2^k) modulo kPolynomial.
constexpr std::array<std::uint32_t, 67> make_powers() {
  std::array<std::uint32_t, 67> powers{};
  powers[0] = 1u << 30;
  for (std::size_t k = 1; k < powers.size(); ++k) {
    powers[k] = multiply(powers[k - 1], powers[k - 1]);
  }
  return powers;
}
constexpr auto kPowers = make_powers();

// x^(8 nbytes): the factor by which a CRC changes when `nbytes` zero bytes follow.
constexpr std::uint32_t zeros_factor(std::uint64_t nbytes) {
  std::uint32_t factor = 1u << 31;
  for (std::size_t k = 3; nbytes != 0; nbytes >>= 1, ++k) {
    if (nbytes & 1) factor = multiply(kPowers[k], factor);
  }
  return factor;
}

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// Slicing by 8; table k advances a byte by k more bytes. Source: M. Kounavis, F. Berry, 2005.
constexpr Tables make_slicing_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (std::size_t k = 1; k < tables.size(); ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t previous = tables[k - 1][byte];
      tables[k][byte] = tables[0][previous & 0xFF] ^ (previous >> 8);
    }
  }
  return tables;
}
constexpr Tables kSlicing = make_slicing_tables();

inline std::uint64_t load64(const unsigned char* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__ARM_FEATURE_CRC32))
#define OFFLOAD_CRC_INSTRUCTIONS 1

// The instruction takes 3 cycles but one starts every cycle, so three streams run interleaved; each
// is kStride bytes long, and the factor of kStride zero bytes, as a table per byte, joins them.
// Source: V. Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction",
// 2011.
constexpr std::size_t kStride = 4096;

constexpr std::array<std::array<std::uint32_t, 256>, 4> make_stride_tables() {
  std::array<std::array<std::uint32_t, 256>, 4> tables{};
  const std::uint32_t factor = zeros_factor(kStride);
  for (std::size_t k = 0; k < 4; ++k) {
    // The product is linear: one multiplication per bit, not per byte value.
    for (std::size_t bit = 0; bit < 8; ++bit) {
      tables[k][std::size_t{1} << bit] = multiply(factor, 1u << (8 * k + bit));
    }
    for (std::size_t byte = 1; byte < 256; ++byte) {
      const std::size_t low = byte & (~byte + 1);
      tables[k][byte] = tables[k][low] ^ (byte == low ? 0 : tables[k][byte ^ low]);
    }
  }
  return tables;
}
constexpr auto kStrideTables = make_stride_tables();

inline std::uint32_t append_stride_of_zeros(std::uint32_t crc) {
  return kStrideTables[0][crc & 0xFF] ^ kStrideTables[1][(crc >> 8) & 0xFF] ^
         kStrideTables[2][(crc >> 16) & 0xFF] ^ kStrideTables[3][crc >> 24];
}

#if defined(__x86_64__)
#define OFFLOAD_CRC_TARGET __attribute__((target("sse4.2")))
OFFLOAD_CRC_TARGET inline std::uint32_t step64(std::uint32_t crc, std::uint64_t word) {
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
}
OFFLOAD_CRC_TARGET inline std::uint32_t step8(std::uint32_t crc, unsigned char byte) {
  return _mm_crc32_u8(crc, byte);
}
bool has_instructions() { return __builtin_cpu_supports("sse4.2"); }
#else
#define OFFLOAD_CRC_TARGET
inline std::uint32_t step64(std::uint32_t crc, std::uint64_t word) { return __crc32cd(crc, word); }
inline std::uint32_t step8(std::uint32_t crc, unsigned char byte) { return __crc32cb(crc, byte); }
bool has_instructions() { return true; }  // part of the target the file was compiled for
#endif

OFFLOAD_CRC_TARGET std::uint32_t crc32c_by_instructions(const unsigned char* p, std::size_t nbytes,
                                                        std::uint32_t crc) {
  while (nbytes >= 3 * kStride) {
    std::uint32_t a = crc, b = 0, c = 0;
    for (std::size_t i = 0; i < kStride; i += 8) {
      a = step64(a, load64(p + i));
      b = step64(b, load64(p + kStride + i));
      c = step64(c, load64(p + 2 * kStride + i));
    }
    crc = append_stride_of_zeros(append_stride_of_zeros(a) ^ b) ^ c;
    p += 3 * kStride;
    nbytes -= 3 * kStride;
  }
  for (; nbytes >= 8; nbytes -= 8, p += 8) crc = step64(crc, load64(p));
  for (; nbytes > 0; --nbytes, ++p) crc = step8(crc, *p);
  return crc;
}
#endif  // instructions

}  // namespace

std::uint32_t crc32c_by_tables(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~seed;
  for (; nbytes >= 8; nbytes -= 8, p += 8) {
    const std::uint64_t word = load64(p) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kSlicing[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; nbytes > 0; --nbytes, ++p) crc = kSlicing[0][(crc ^ *p) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept {
#ifdef OFFLOAD_CRC_INSTRUCTIONS
  if (has_instructions()) {
    return ~crc32c_by_instructions(static_cast<const unsigned char*>(data), nbytes, ~seed);
  }
#endif
  return crc32c_by_tables(data, nbytes, seed);
}

std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_nbytes) noexcept {
  return multiply(zeros_factor(second_nbytes), first) ^ second;
}

}  // namespace offload
