// Memory for the buffers of one object, each at a cache line.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

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
        memory = static_cast<Real*>(std::aligned_alloc(64, std::max<long>(size, 16) * sizeof(Real)));
        if (!memory) throw std::bad_alloc();
        if (zero) std::memset(memory, 0, size * sizeof(Real));
        for (const auto& [place, from] : places) *place = memory + from;
    }

  private:
    std::vector<std::pair<Real**, long>> places;
    long size = 0;
    Real* memory = nullptr;
};

}  // namespace
