// CRC32C (Castagnoli): what a checksum is stands in offload/native/checksums.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// The ways to compute it, slowest first; all give the same.
enum class CrcWay : std::uint8_t {
  kTables,        // any machine
  kInstructions,  // SSE 4.2, ARMv8 CRC
  kFolding        // AVX-512 with VPCLMULQDQ
};
bool is_available(CrcWay way) noexcept;

// CRC32C of `nbytes` bytes at `data`, continued from `seed`, by one way that is available.
std::uint32_t crc32c_by(CrcWay way, const void* data, std::size_t nbytes,
                        std::uint32_t seed) noexcept;

// The same by the fastest way.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept;

// CRC32C of a concatenation from those of its parts.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_nbytes) noexcept;

}  // namespace offload
