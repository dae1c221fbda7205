// Memory for the buffers of one object, each at a cache line.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "product.hpp"

namespace {

// Places are reserved first, then allocated at once; all zero unless asked otherwise.
template <class Real>
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() { std::free(memory); }
    // `*place` is set by allocate()
    void reserve(Real** place, long numbers) {
        if (!numbers) return;
        places.push_back({place, size});
        size += Lanes<Real>::padded(numbers);
    }
    void allocate(bool zero = true) {
        const size_t bytes = std::max<long>(size, 16) * sizeof(Real);
        const size_t line = bytes < 2 * kPage ? 64 : kPage;
        memory = static_cast<Real*>(std::aligned_alloc(line, (bytes + line - 1) / line * line));
        if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (line == kPage) madvise(memory, bytes, MADV_HUGEPAGE);  // the first touch of small pages would take longer
#endif
        if (zero) std::memset(memory, 0, size * sizeof(Real));
        for (const auto& [place, from] : places) *place = memory + from;
    }

  private:
    static constexpr size_t kPage = size_t(1) << 21;  // a large page

    std::vector<std::pair<Real**, long>> places;
    long size = 0;
    Real* memory = nullptr;
};

}  // namespace
