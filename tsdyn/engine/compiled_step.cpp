// Training steps of one member at a time, whole epochs without leaving the cache; see compiled_step.py.
//
// Every product of a step is the same small one, C <- beta C + A B, with the columns of B and C contiguous:
//
//   forward    Z (node, sample)        = W      F        columns: samples
//   backward   G (input_node, sample)  = W^T    G        columns: samples
//   update     W (node, input_node)   += G      F^T      columns: input nodes
//
// A bias is the column of W that belongs to a constant node 1.  Rows are padded to whole cache lines with zeros, and
// the padding stays zero: padded samples have no gradient, padded input nodes no activation.
// Sums are added in the same order for any number of members or threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "job.hpp"
#include "product.hpp"

extern "C" {

// Mirrored by compiled_step.Job.
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t batch, steps, samples;
    double leak;
    // per layer: (member, node, input_node) and (member, node) or null; moments as the parameters, null if not needed
    void *const *weights, *const *biases;
    void *const *first_weights, *const *first_biases, *const *second_weights, *const *second_biases;
    const void *inputs, *targets;  // (member, sample, ...)
    const int64_t* rows;           // (member, step, batch)
    const double* rates;           // (member,)
    double momentum, weight_decay, beta_1, beta_2, epsilon;
    int64_t adam, normalize;
    const uint8_t* frozen;  // per layer
    int64_t taken;          // number of steps taken before
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(widths), TSDYN_FIELD(batch), TSDYN_FIELD(steps), TSDYN_FIELD(samples),
    TSDYN_FIELD(leak), TSDYN_FIELD(weights), TSDYN_FIELD(biases), TSDYN_FIELD(first_weights),
    TSDYN_FIELD(first_biases), TSDYN_FIELD(second_weights), TSDYN_FIELD(second_biases), TSDYN_FIELD(inputs),
    TSDYN_FIELD(targets), TSDYN_FIELD(rows), TSDYN_FIELD(rates), TSDYN_FIELD(momentum), TSDYN_FIELD(weight_decay),
    TSDYN_FIELD(beta_1), TSDYN_FIELD(beta_2), TSDYN_FIELD(epsilon), TSDYN_FIELD(adam), TSDYN_FIELD(normalize),
    TSDYN_FIELD(frozen), TSDYN_FIELD(taken))

namespace {

template <class Real>
class Member {
  public:
    explicit Member(const Job& job)
        : job(job),
          depth(job.depth),
          batch(job.batch),
          samples(Lanes<Real>::padded(batch)),
          moments(job.adam ? 2 : job.momentum != 0) {
        long size = 0, widest = 0;
        const auto reserve = [&size](long numbers) {
            size += numbers;
            return size - numbers;
        };
        std::vector<long> places;
        for (long l = 0; l < depth; ++l) {
            below.push_back(job.widths[l]);
            nodes.push_back(job.widths[l + 1]);
            stride.push_back(Lanes<Real>::padded(below[l] + 1));
            widest = std::max({widest, below[l], nodes[l]});
            places.push_back(reserve(nodes[l] * stride[l]));
            for (long m = 0; m < moments; ++m) places.push_back(reserve(nodes[l] * stride[l]));
            places.push_back(reserve(samples * stride[l]));
            places.push_back(reserve(stride[l] * samples));
        }
        long largest = 0;
        for (long l = 0; l < depth; ++l) largest = std::max(largest, nodes[l] * stride[l]);
        const long outputs = Lanes<Real>::padded(nodes[depth - 1]);
        widest = std::max(widest, outputs);
        const long down = reserve(moments ? largest : 0), y = reserve(samples * outputs);
        const long g0 = reserve(widest * samples), g1 = reserve(widest * samples);
        memory = static_cast<Real*>(std::aligned_alloc(64, (size * sizeof(Real) + 63) / 64 * 64));
        if (!memory) throw std::bad_alloc();
        std::memset(memory, 0, size * sizeof(Real));
        auto place = places.begin();
        for (long l = 0; l < depth; ++l) {
            weight.push_back(memory + *place++);
            first.push_back(moments > 0 ? memory + *place++ : nullptr);
            second.push_back(moments > 1 ? memory + *place++ : nullptr);
            by_sample.push_back(memory + *place++);
            by_node.push_back(memory + *place++);
            // the constant node
            for (long b = 0; b < batch; ++b) {
                const Real one = job.biases[l] ? 1 : 0;
                by_sample[l][b * stride[l] + below[l]] = one;
                by_node[l][below[l] * samples + b] = one;
            }
        }
        gradient = memory + down;
        target = memory + y;
        g = memory + g0;
        passed = memory + g1;
    }
    Member(const Member&) = delete;
    ~Member() { std::free(memory); }

    void train(long member) {
        exchange(member, &Member::pack);
        const long inputs = below[0], outputs = nodes[depth - 1];
        const Real* x = static_cast<const Real*>(job.inputs) + member * job.samples * inputs;
        const Real* y = static_cast<const Real*>(job.targets) + member * job.samples * outputs;
        const int64_t* rows = job.rows + member * job.steps * batch;
        rate = job.rates[member];
        for (long s = 0; s < job.steps; ++s, rows += batch) {
            for (long b = 0; b < batch; ++b) {
                std::memcpy(by_sample[0] + b * stride[0], x + rows[b] * inputs, inputs * sizeof(Real));
                std::memcpy(target + b * Lanes<Real>::padded(outputs), y + rows[b] * outputs, outputs * sizeof(Real));
            }
            if (s + 1 < job.steps)  // rows are scattered over the data: prefetch the next ones now
                for (long b = 0; b < batch; ++b) {
                    fetch(x + rows[batch + b] * inputs, inputs);
                    fetch(y + rows[batch + b] * outputs, outputs);
                }
            forward();
            backward(job.taken + s + 1);
        }
        exchange(member, &Member::unpack);
    }

  private:
    static void fetch(const Real* p, long numbers) {
        for (long i = 0; i < numbers; i += 64 / static_cast<long>(sizeof(Real))) __builtin_prefetch(p + i, 0, 2);
    }

    void forward() {
        const long outputs = Lanes<Real>::padded(nodes[depth - 1]);
        transpose(by_sample[0], stride[0], samples, stride[0], by_node[0], samples);
        transpose(target, outputs, samples, outputs, g, samples);
        for (long l = 0; l < depth; ++l) {
            const bool top = l == depth - 1;
            const long k = below[l] + (job.biases[l] ? 1 : 0);
            Real* out = top ? g : by_node[l + 1];
            // at the top z - y
            multiply<Real>({k, weight[l], stride[l], 1, by_node[l], samples, out, samples, Real(top ? -1 : 0)}, nodes[l],
                           samples);
            if (!top) activate(l + 1);
        }
        // everything below is linear in it
        const Real scale = static_cast<Real>((moments ? 1 : -rate) / batch);
        for (long i = 0; i < nodes[depth - 1] * samples; ++i) g[i] *= scale;
    }

    void activate(long l) {
        const Real leak = static_cast<Real>(job.leak);
        constexpr long lanes = Lanes<Real>::count;
        Real* f = by_node[l];
        for (long i = 0; i < below[l] * samples; i += lanes) {
            const Vector<Real> z = at(f + i);
            at(f + i) = z <= 0 ? (leak == 0 ? Vector<Real>{} : leak * z) : z;  // NaN stays NaN
        }
        transpose(f, samples, stride[l], samples, by_sample[l], stride[l]);
    }

    // Down the layers: g below = (W^T g) gate, and g f^T is dJ/dW, or at once the step -rate dJ/dW.
    void backward(long step) {
        long lowest = 0;
        while (lowest < depth && job.frozen[lowest]) ++lowest;
        for (long l = depth - 1; l >= lowest; --l) {
            if (l > lowest) {
                multiply<Real>({nodes[l], weight[l], 1, stride[l], g, samples, passed, samples, 0}, below[l], samples);
                gate(l);
            }
            if (!job.frozen[l]) update(l, step);
            std::swap(g, passed);
        }
    }

    void gate(long l) {
        const Real leak = static_cast<Real>(job.leak);
        for (long i = 0; i < below[l] * samples; i += Lanes<Real>::count) {
            const Vector<Real> slope = leak * at(passed + i);
            at(passed + i) = at(by_node[l] + i) > 0 ? at(passed + i) : slope;
        }
    }

    void update(long l, long step) {
        const Real kept = static_cast<Real>(moments ? 0 : 1 - rate * job.weight_decay);
        Real* sum = moments ? gradient : weight[l];
        multiply<Real>({batch, g, samples, 1, by_sample[l], stride[l], sum, stride[l], kept}, nodes[l], stride[l]);
        if (moments) job.adam ? adam(l, step) : momentum(l);
        if (job.normalize && l < depth - 1)
            for (long n = 0; n < nodes[l]; ++n) {
                Real* w = weight[l] + n * stride[l];
                Real sum = 0;
                for (long i = 0; i < below[l]; ++i) sum += w[i] * w[i];
                const Real norm = std::sqrt(sum);
                for (long i = 0; i < below[l]; ++i) w[i] /= norm;
            }
    }

    void momentum(long l) {
        const Real mu = job.momentum, decay = job.weight_decay, eta = rate;
        Real *w = weight[l], *m = first[l];
        for (long i = 0; i < nodes[l] * stride[l]; ++i) {
            m[i] = mu * m[i] + (gradient[i] + decay * w[i]);
            w[i] -= eta * m[i];
        }
    }

    void adam(long l, long step) {
        const Real decay = job.weight_decay, beta_1 = job.beta_1, beta_2 = job.beta_2, epsilon = job.epsilon;
        const Real rest_1 = 1 - job.beta_1, rest_2 = 1 - job.beta_2, unbias = 1 - std::pow(job.beta_2, double(step));
        const Real eta = rate / (1 - std::pow(job.beta_1, double(step)));
        Real *w = weight[l], *m = first[l], *v = second[l];
        for (long i = 0; i < nodes[l] * stride[l]; ++i) {
            const Real slope = gradient[i] + decay * w[i];
            m[i] = beta_1 * m[i] + rest_1 * slope;
            v[i] = beta_2 * v[i] + rest_2 * slope * slope;
            w[i] -= eta * m[i] / (std::sqrt(v[i] / unbias) + epsilon);
        }
    }

    // Copies between the caller's tensors and padded rows.
    void exchange(long member, void (Member::*copy)(long, long, void*, void*, Real*)) {
        for (long l = 0; l < depth; ++l) {
            (this->*copy)(l, member, job.weights[l], job.biases[l], weight[l]);
            if (first[l]) (this->*copy)(l, member, job.first_weights[l], job.first_biases[l], first[l]);
            if (second[l]) (this->*copy)(l, member, job.second_weights[l], job.second_biases[l], second[l]);
        }
    }

    void pack(long l, long member, void* weights, void* biases, Real* to) {
        const Real* w = static_cast<const Real*>(weights) + member * nodes[l] * below[l];
        const Real* b = static_cast<const Real*>(biases) + member * nodes[l];
        for (long n = 0; n < nodes[l]; ++n) {
            std::memcpy(to + n * stride[l], w + n * below[l], below[l] * sizeof(Real));
            if (biases) to[n * stride[l] + below[l]] = b[n];
        }
    }

    void unpack(long l, long member, void* weights, void* biases, Real* from) {
        Real* w = static_cast<Real*>(weights) + member * nodes[l] * below[l];
        Real* b = static_cast<Real*>(biases) + member * nodes[l];
        for (long n = 0; n < nodes[l]; ++n) {
            std::memcpy(w + n * below[l], from + n * stride[l], below[l] * sizeof(Real));
            if (biases) b[n] = from[n * stride[l] + below[l]];
        }
    }

    const Job& job;
    const long depth, batch, samples, moments;
    std::vector<long> below, nodes, stride;
    std::vector<Real*> weight, first, second;
    std::vector<Real*> by_sample, by_node;  // activations below each layer: (sample, node + 1), (node + 1, sample)
    Real *memory, *gradient, *target, *g, *passed;
    double rate = 0;
};

template <class Real>
int run(const Job& job, int64_t member) {
    try {
        Member<Real>(job).train(member);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {
int train_float64(const Job* job, int64_t member) { return run<double>(*job, member); }
int train_float32(const Job* job, int64_t member) { return run<float>(*job, member); }
}
