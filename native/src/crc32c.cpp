#include "crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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

// x^(2^first exponent) modulo kPolynomial.
constexpr std::uint32_t power(std::uint64_t exponent, std::size_t first = 0) {
  std::uint32_t product = 1u << 31;
  for (std::size_t k = first; exponent != 0; exponent >>= 1, ++k) {
    if (exponent & 1) product = multiply(kPowers[k], product);
  }
  return product;
}

// x^(8 nbytes): the factor by which a CRC changes when `nbytes` zero bytes follow.
constexpr std::uint32_t zeros_factor(std::uint64_t nbytes) { return power(nbytes, 3); }

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

std::uint32_t crc32c_by_tables(const unsigned char* p, std::size_t nbytes, std::uint32_t crc) {
  for (; nbytes >= 8; nbytes -= 8, p += 8) {
    const std::uint64_t word = load64(p) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kSlicing[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; nbytes > 0; --nbytes, ++p) crc = kSlicing[0][(crc ^ *p) & 0xFF] ^ (crc >> 8);
  return crc;
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

#if defined(__x86_64__)
// Folding: 16 bytes X = L x^64 + H are moved D bits ahead by X x^D = L x^(D+64) + H x^D, where the
// two powers are taken modulo the polynomial, and added to the 16 bytes that stand there. On
// reflected operands a carry-less product is one place off, and a 32-bit constant in a 64-bit half
// 32 places: hence the 33. Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ Instruction", 2009.
constexpr std::uint64_t fold_low(std::uint64_t distance_bits) {
  return power(distance_bits + 64 - 33);
}
constexpr std::uint64_t fold_high(std::uint64_t distance_bits) { return power(distance_bits - 33); }

constexpr std::size_t kFoldBytes = 256;  // four registers of four times 16 bytes

#define OFFLOAD_FOLD_TARGET __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2")))

bool has_wide_folding() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul") &&
         has_instructions();
}

// The rest, fewer than kFoldBytes, is left to the caller.
OFFLOAD_FOLD_TARGET std::uint32_t crc32c_by_folding(const unsigned char* p, std::size_t nbytes,
                                                    std::uint32_t crc) {
  constexpr auto kLow = static_cast<long long>(fold_low(8 * kFoldBytes));
  constexpr auto kHigh = static_cast<long long>(fold_high(8 * kFoldBytes));
  const __m512i factors = _mm512_set_epi64(kHigh, kLow, kHigh, kLow, kHigh, kLow, kHigh, kLow);
  __m512i sums[4];
  for (std::size_t k = 0; k < 4; ++k) sums[k] = _mm512_loadu_si512(p + 64 * k);
  sums[0] =
      _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  for (p += kFoldBytes, nbytes -= kFoldBytes; nbytes >= kFoldBytes;
       p += kFoldBytes, nbytes -= kFoldBytes) {
    for (std::size_t k = 0; k < 4; ++k) {
      const __m512i low = _mm512_clmulepi64_epi128(sums[k], factors, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(sums[k], factors, 0x11);
      constexpr int kXorOfThree = 0x96;
      sums[k] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(p + 64 * k), kXorOfThree);
    }
  }
  __m128i parts[16];
  std::memcpy(parts, sums, sizeof parts);
  const __m128i neighbour = _mm_set_epi64x(fold_high(128), fold_low(128));
  __m128i sum = parts[0];
  for (std::size_t k = 1; k < 16; ++k) {
    const __m128i low = _mm_clmulepi64_si128(sum, neighbour, 0x00);
    const __m128i high = _mm_clmulepi64_si128(sum, neighbour, 0x11);
    sum = _mm_xor_si128(_mm_xor_si128(low, high), parts[k]);
  }
  const auto low = static_cast<std::uint64_t>(_mm_cvtsi128_si64(sum));
  const auto high = static_cast<std::uint64_t>(_mm_extract_epi64(sum, 1));
  return step64(step64(0, low), high);
}
#endif  // folding

}  // namespace

bool is_available(CrcWay way) noexcept {
  switch (way) {
    case CrcWay::kTables:
      return true;
    case CrcWay::kInstructions:
#ifdef OFFLOAD_CRC_INSTRUCTIONS
      return has_instructions();
#else
      return false;
#endif
    case CrcWay::kFolding:
#if defined(__x86_64__)
      return has_wide_folding();
#else
      return false;
#endif
  }
  return false;
}

std::uint32_t crc32c_by(CrcWay way, const void* data, std::size_t nbytes,
                        std::uint32_t seed) noexcept {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~seed;
#if defined(__x86_64__)
  if (way == CrcWay::kFolding && nbytes >= kFoldBytes) {
    crc = crc32c_by_folding(p, nbytes, crc);
    p += nbytes - nbytes % kFoldBytes;
    nbytes %= kFoldBytes;
  }
#endif
#ifdef OFFLOAD_CRC_INSTRUCTIONS
  if (way != CrcWay::kTables) return ~crc32c_by_instructions(p, nbytes, crc);
#endif
  return ~crc32c_by_tables(p, nbytes, crc);
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept {
  for (const CrcWay way : {CrcWay::kFolding, CrcWay::kInstructions}) {
    if (is_available(way)) return crc32c_by(way, data, nbytes, seed);
  }
  return crc32c_by(CrcWay::kTables, data, nbytes, seed);
}

std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_nbytes) noexcept {
  return multiply(zeros_factor(second_nbytes), first) ^ second;
}

}  // namespace offload
