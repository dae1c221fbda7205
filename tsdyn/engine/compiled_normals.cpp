// Standard normal numbers of a Philox generator, in the order and with the bits of numpy's; see compiled_normals.py.
//
// The generator's blocks do not depend on one another; many are made before their words are looked at, so that the
// processor works at several side by side.  A number takes one word, which the
// ziggurat of 256 layers (Marsaglia & Tsang 2000) accepts in 99 of 100 cases; else it takes more.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "job.hpp"

extern "C" {

// Mirrored by compiled_normals.Job.
struct Job {
    uint64_t counter[4], key[2], buffer[4];  // the generator before, and after
    int64_t position;                        // of the next word in the buffer
    int64_t count;                           // numbers asked for
    int64_t made;                            // numbers made: fewer if the next one is `margin` from another
    double margin;
    const double *widths, *heights;  // of the layers
    const uint64_t* sure;            // per layer: what is below it is accepted
    double edge;                     // where the tail begins
    double* found;
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(counter), TSDYN_FIELD(key), TSDYN_FIELD(buffer), TSDYN_FIELD(position), TSDYN_FIELD(count),
    TSDYN_FIELD(made), TSDYN_FIELD(margin), TSDYN_FIELD(widths), TSDYN_FIELD(heights), TSDYN_FIELD(sure),
    TSDYN_FIELD(edge), TSDYN_FIELD(found))

namespace {

constexpr int kBlocks = 256, kWords = 4, kRounds = 10, kTogether = 8;
constexpr uint64_t kSizes = 0x000fffffffffffffull;

class Words {
  public:
    explicit Words(const Job& job) : at(job.position), end(kWords) {
        std::memcpy(first, job.counter, sizeof first);
        std::memcpy(key, job.key, sizeof key);
        std::memcpy(words, job.buffer, sizeof job.buffer);
    }

    uint64_t next() {
        if (at == end) refill();
        return words[at++];
    }
    // Words that are there already, to be looked at before they are taken.
    int64_t waiting() const { return end - at; }
    const uint64_t* ahead() const { return words + at; }
    void take(int64_t count) { at += count; }
    double unit() { return static_cast<double>(next() >> 11) * (1.0 / 9007199254740992.0); }

    // The generator as it is before the word that was taken last, or after it, in a state that numpy itself has: one to
    // four words of a block are taken.  Before the first word of a block these are the four of the block before.
    void keep(Job& job, bool before) const {
        const int64_t taken = at - (before ? 1 : 0);
        if (taken == 0) return;
        const int64_t block = (taken - 1) / kWords;
        counter(block, job.counter);
        std::memcpy(job.buffer, words + block * kWords, sizeof job.buffer);
        job.position = taken - block * kWords;
    }

  private:
    // The counter of a block of `words`.
    void counter(uint64_t block, uint64_t* to) const {
        for (int i = 0; i < kWords; ++i) {
            to[i] = first[i] + block;
            block = to[i] < block ? 1 : 0;
        }
    }

    // Makes `words` anew: the last block, whose words are all taken, and those after it.
    void refill() {
        uint64_t last[kWords];
        counter(end / kWords - 1, last);
        std::memcpy(first, last, sizeof first);
        std::memmove(words, words + end - kWords, sizeof last);  // the same place when there is one block
        at = kWords;
        end = (kBlocks + 1) * kWords;
        for (int block = 1; block <= kBlocks; ++block) fill(block);
    }

    // Philox 4x64 of ten rounds (Salmon et al. 2011).
    void fill(int block) {
        uint64_t v[kWords], k0 = key[0], k1 = key[1];
        counter(block, v);
        for (int round = 0; round < kRounds; ++round) {
            const auto a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ull) * v[0];
            const auto b = static_cast<unsigned __int128>(0xCA5A826395121157ull) * v[2];
            v[0] = static_cast<uint64_t>(b >> 64) ^ v[1] ^ k0;
            v[1] = static_cast<uint64_t>(b);
            v[2] = static_cast<uint64_t>(a >> 64) ^ v[3] ^ k1;
            v[3] = static_cast<uint64_t>(a);
            k0 += 0x9E3779B97F4A7C15ull;
            k1 += 0xBB67AE8584CAA73Bull;
        }
        std::memcpy(words + block * kWords, v, sizeof v);
    }

    uint64_t first[kWords], key[2], words[(kBlocks + 1) * kWords];
    int64_t at, end;
};

// The number of a word whose layer accepts it: with the sign of one bit, without a branch, which would guess wrong.
inline double number(uint64_t word, const double* widths) {
    const double x = static_cast<double>(static_cast<int64_t>(word >> 9 & kSizes)) * widths[word & 0xff];
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits ^= (word & 0x100) << 55;
    double found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

// A number beyond the edge, by Marsaglia's way; products are rounded before they are added.
double beyond(Words& words, double edge) {
    for (;;) {
        const volatile double x = -(1 / edge) * std::log1p(-words.unit());
        const volatile double square = x * x;
        const double y = -std::log1p(-words.unit());
        if (y + y > square) return edge + x;
    }
}

}  // namespace

extern "C" int draw(Job* job) {
    Words words(*job);
    int64_t made = 0;
    const double* const widths = job->widths;
    const uint64_t* const sure = job->sure;
    while (made < job->count) {
        while (words.waiting() >= kTogether && job->count - made >= kTogether) {
            const uint64_t* const ahead = words.ahead();
            double* const to = job->found + made;
            uint64_t refused = 0;
            for (int i = 0; i < kTogether; ++i) {
                refused |= uint64_t((ahead[i] >> 9 & kSizes) >= sure[ahead[i] & 0xff]) << i;
                to[i] = number(ahead[i], widths);
            }
            const int accepted = refused ? __builtin_ctzll(refused) : kTogether;
            words.take(accepted);
            made += accepted;
            if (refused) break;
        }
        if (made == job->count) break;
        const uint64_t word = words.next(), layer = word & 0xff, size = word >> 9 & kSizes;
        const double x = number(word, widths);
        if (size >= sure[layer]) {
            if (layer == 0) {
                const double far = beyond(words, job->edge);
                job->found[made++] = (size >> 8) & 1 ? -far : far;
                continue;
            }
            Job before = *job;
            words.keep(before, true);
            const double low = job->heights[layer], high = job->heights[layer - 1];
            const double over = (high - low) * words.unit() + low - std::exp(-0.5 * x * x);
            if (std::fabs(over) <= job->margin) {
                *job = before;
                job->made = made;
                return 0;
            }
            if (over > 0) continue;
        }
        job->found[made++] = x;
    }
    words.keep(*job, false);
    job->made = made;
    return 0;
}
