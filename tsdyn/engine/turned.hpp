// Images of several samples with their numbers side by side in a vector, and back: squares of lanes x lanes are turned
// in registers.

#pragma once

#include <algorithm>

#include "product.hpp"

namespace {

// Rows of numbers: from one row and one channel to the next.
struct Strides {
    long line, image;
};

// Some samples, at most as many as a vector has lanes; lanes beyond `count` repeat the last one.
struct Samples {
    long first, count;
    long of(long lane) const { return first + std::min(lane, count - 1); }
};

// `numbers` of each sample, contiguous from `from` on and `apart` from one sample to the next:
// put(place, vector of lanes).
template <class Real, class Put>
void turn(const Samples& samples, const Real* from, long apart, long numbers, Put put) {
    constexpr long lanes = Lanes<Real>::count;
    alignas(kLineBytes) Real read[lanes * lanes] = {}, turned[lanes * lanes];
    for (long n = 0; n < numbers; n += lanes) {
        const long some = std::min(lanes, numbers - n);
        for (long lane = 0; lane < lanes; ++lane) {
            const Real* own = from + samples.of(lane) * apart + n;
            if (some == lanes)
                at(read + lane * lanes) = anywhere(own);
            else
                std::copy_n(own, some, read + lane * lanes);
        }
        transpose(read, lanes, lanes, lanes, turned, lanes);
        for (long i = 0; i < some; ++i) put(n + i, at(turned + i * lanes));
    }
}

// The way back, to numbers that lie as `turn` reads them: get(place) is a vector of lanes.
template <class Real, class Get>
void turn_back(const Samples& samples, Real* to, long apart, long numbers, Get get) {
    constexpr long lanes = Lanes<Real>::count;
    alignas(kLineBytes) Real read[lanes * lanes], turned[lanes * lanes];
    for (long n = 0; n < numbers; n += lanes) {
        const long some = std::min(lanes, numbers - n);
        for (long i = 0; i < lanes; ++i) at(read + i * lanes) = get(n + std::min(i, some - 1));
        transpose(read, lanes, lanes, lanes, turned, lanes);
        for (long lane = 0; lane < samples.count; ++lane) {
            Real* own = to + samples.of(lane) * apart + n;
            if (some == lanes)
                __builtin_memcpy(own, turned + lane * lanes, sizeof(Vector<Real>));
            else
                std::copy_n(turned + lane * lanes, some, own);
        }
    }
}

}  // namespace
