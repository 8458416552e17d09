// CRC32C (Castagnoli): what a checksum is stands in offload/native/checksums.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// CRC32C of `nbytes` bytes at `data`, continued from `seed`; by instructions where there are some.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept;

// The same by tables alone, for machines without the instructions and as a test's oracle.
std::uint32_t crc32c_by_tables(const void* data, std::size_t nbytes, std::uint32_t seed) noexcept;

// CRC32C of a concatenation from those of its parts.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_nbytes) noexcept;

}  // namespace offload
