// Training steps backwards, one member at a time: derivatives in all that they started from; see compiled_adjoint.py.
//
// The steps are taken forwards, and what they went through is stored: activations f, and gamma, the gradients in a
// layer's sums.  Then back: with R the derivative along the direction C that the slope in the parameters gives the
// gradient (Pearlmutter 1994),
//
//   R z = C f + W R f,   R f = gate R z,   R gamma below = gate (C^T gamma + W^T R gamma),
//   slope in W  +=  R gamma f^T + gamma (R f)^T
//
// No Hessian is formed.  The activation is piecewise linear, so that the gates are constant where they have a
// derivative.  The weights of every step would be most of the memory: of plain SGD the steps are undone on the way back,
// W + rate gamma f^T, which is exact up to the rounding of the largest weights that they went through, since gamma and f
// are the stored ones; where weights grew or shrank by much, some are held (`hold`).  Products, layouts and padding are
// those of compiled_step.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "arena.hpp"
#include "job.hpp"
#include "product.hpp"
#include "smooth.hpp"

extern "C" {

// Mirrored by compiled_adjoint.Job.
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t batch, steps, samples;
    double leak;
    int64_t entropy;  // loss: cross entropy, else the squared error
    // per layer: (member, node, input_node) and (member, node) or null; first moments null without momentum
    // before the first step; forth overwrites them by those after the last
    void *const *weights, *const *biases, *const *first_weights, *const *first_biases;
    // slopes in those after the last step; back overwrites them by the slopes in those before the first
    void *const *slopes, *const *bias_slopes, *const *first_slopes, *const *first_bias_slopes;
    const void *inputs, *targets;  // (member, sample, ...)
    const int64_t* rows;           // (member, step, batch)
    const double* rates;           // (step,)
    const double* factors;         // per layer, on the rates
    double momentum, weight_decay;
    int64_t method, decay_biases;
    const uint8_t* frozen;  // per layer
    void* by_rate;          // (member, step), set
    void* by_weight;        // (member, sample), added to unless null, as the next two, (member, sample, ...)
    void *by_target, *by_input;
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(widths), TSDYN_FIELD(batch), TSDYN_FIELD(steps), TSDYN_FIELD(samples),
    TSDYN_FIELD(leak), TSDYN_FIELD(entropy), TSDYN_FIELD(weights), TSDYN_FIELD(biases), TSDYN_FIELD(first_weights),
    TSDYN_FIELD(first_biases), TSDYN_FIELD(slopes), TSDYN_FIELD(bias_slopes), TSDYN_FIELD(first_slopes),
    TSDYN_FIELD(first_bias_slopes), TSDYN_FIELD(inputs), TSDYN_FIELD(targets), TSDYN_FIELD(rows), TSDYN_FIELD(rates),
    TSDYN_FIELD(factors), TSDYN_FIELD(momentum), TSDYN_FIELD(weight_decay), TSDYN_FIELD(method),
    TSDYN_FIELD(decay_biases), TSDYN_FIELD(frozen), TSDYN_FIELD(by_rate), TSDYN_FIELD(by_weight),
    TSDYN_FIELD(by_target), TSDYN_FIELD(by_input))

namespace {

// Mirrored by compiled_adjoint.METHODS.
enum Method : int64_t { kSgd, kMomentum, kNesterov };

// What a step went through in one layer.
template <class Real>
struct Passed {
    Real *weight = nullptr, *first = nullptr;  // before the step; of all steps the same memory where they are undone
    Real* by_sample = nullptr;                 // its inputs, (sample, node + 1); of the lowest layer read again
    Real* gamma = nullptr;                     // (node, sample)
    std::unique_ptr<Real[]> held;              // the weights before the step, where undoing would lose digits of them
};

// Below this share of the weights that decay leaves them, undoing it would amplify rounding.
constexpr double kLeastKept = 1e-2;
// By this factor a layer's largest weight may change within steps that are undone; roundings of the small ones grow by it.
constexpr double kGrowth = 64;

template <class Real>
struct Layer {
    long below, nodes, stride;
    Real *slope = nullptr, *first_slope = nullptr;      // of the observable, in the parameters and in their moment
    Real* along = nullptr;                              // with a moment the direction C, else it is a multiple of slope
    Real* by_node = nullptr;                            // inputs of the present step, (node + 1, sample)
    Real *moved = nullptr, *moved_by_sample = nullptr;  // R of its inputs
    Real* moved_gamma = nullptr;
    // of steps that are undone: the largest weight when it was last looked for, how far weights can have moved since,
    // and the smallest and largest that were found since weights were held
    Real size = 0, reach = 0, least = std::numeric_limits<Real>::infinity(), most = 0;
};

template <class Real>
class Member {
    static constexpr long lanes = Lanes<Real>::count;

  public:
    explicit Member(const Job& job)
        : job(job),
          depth(job.depth),
          batch(job.batch),
          samples(Lanes<Real>::padded(batch)),
          with_moment(job.method != kSgd),
          undone(!with_moment && least_kept() > kLeastKept),
          layers(depth),
          passed(depth * (job.steps + 1)) {
        const long outputs = Lanes<Real>::padded(job.widths[depth]);
        long largest = 0, widest = outputs;
        for (long l = 0; l < depth; ++l) {
            plan(l);
            largest = std::max(largest, layers[l].nodes * layers[l].stride);
            widest = std::max({widest, layers[l].stride, layers[l].nodes});
        }
        arena.reserve(&gradient, largest);
        arena.reserve(&scaled, widest * samples);
        arena.reserve(&target, samples * outputs);
        arena.reserve(&wanted, outputs * samples);
        arena.reserve(&output, widest * samples);
        arena.reserve(&lower, samples * layers[0].stride);
        softmax.resize(job.steps);
        whole_target.resize(job.steps);
        for (Real*& place : softmax) store.reserve(&place, job.entropy ? outputs * samples : 0);
        for (Real*& place : whole_target) store.reserve(&place, job.entropy ? samples : 0);
        arena.allocate();
        store.allocate(false);
        share();
    }
    Member(const Member&) = delete;

    void go_forth(long member) {
        const long inputs = layers[0].below, outputs = layers[depth - 1].nodes;
        const Real* x = static_cast<const Real*>(job.inputs) + member * job.samples * inputs;
        const Real* y = static_cast<const Real*>(job.targets) + member * job.samples * outputs;
        const int64_t* rows = job.rows + member * job.steps * batch;
        exchange(member, 0, true);
        for (long s = 0; s < job.steps; ++s, rows += batch) {
            gather(x, rows);
            for (long b = 0; b < batch; ++b)
                std::memcpy(target + b * Lanes<Real>::padded(outputs), y + rows[b] * outputs, outputs * sizeof(Real));
            if (s + 1 < job.steps) {  // rows are scattered over the data: prefetch the next ones now
                fetch(x, inputs, rows + batch);
                fetch(y, outputs, rows + batch);
            }
            forward(s);
            for (long l = 0; l < depth; ++l) {
                if (undone) hold(s, l);
                update(s, l);
            }
        }
        exchange(member, job.steps, false);
    }

    void go_back(long member) {
        const long inputs = layers[0].below;
        const Real* x = static_cast<const Real*>(job.inputs) + member * job.samples * inputs;
        const int64_t* rows = job.rows + member * job.steps * batch;
        exchange_slopes(member, true);
        Real* by_rate = static_cast<Real*>(job.by_rate) + member * job.steps;
        for (long s = job.steps - 1; s >= 0; --s) {
            gather(x, rows + s * batch);
            if (s > 0) fetch(x, inputs, rows + (s - 1) * batch);
            by_rate[s] = back(s, member, rows + s * batch);
        }
        exchange_slopes(member, false);
    }

  private:
    void fetch(const Real* all, long numbers, const int64_t* rows) const {
        for (long b = 0; b < batch; ++b)
            for (long i = 0; i < numbers; i += kLineBytes / static_cast<long>(sizeof(Real)))
                __builtin_prefetch(all + rows[b] * numbers + i, 0, 2);
    }

    Passed<Real>& at_step(long step, long layer) { return passed[step * depth + layer]; }
    bool learns(long l) const { return !job.frozen[l]; }
    Real decay_of(long l) const { return learns(l) ? static_cast<Real>(job.weight_decay) : 0; }
    double kept(long s, long l) const { return 1 - job.rates[s] * job.factors[l] * job.weight_decay; }

    // The smallest share of a layer's weights that the decay of all steps leaves.
    double least_kept() const {
        double least = 1;
        for (long l = 0; l < depth; ++l) {
            double share = 1;
            for (long s = 0; s < job.steps; ++s) share *= std::max(0.0, kept(s, l));
            if (!job.frozen[l]) least = std::min(least, share);
        }
        return least;
    }

    Real rate(long s, long l) const { return static_cast<Real>(job.rates[s] * job.factors[l]); }

    void plan(long l) {
        Layer<Real>& layer = layers[l];
        layer.below = job.widths[l];
        layer.nodes = job.widths[l + 1];
        layer.stride = Lanes<Real>::padded(layer.below + 1);
        const long numbers = layer.nodes * layer.stride;
        arena.reserve(&layer.slope, numbers);
        arena.reserve(&layer.first_slope, with_moment ? numbers : 0);
        arena.reserve(&layer.along, with_moment ? numbers : 0);
        if (l == 0) arena.reserve(&at_step(0, 0).by_sample, samples * layer.stride);
        arena.reserve(&layer.by_node, layer.stride * samples);
        arena.reserve(&layer.moved, layer.stride * samples);
        arena.reserve(&layer.moved_by_sample, samples * layer.stride);
        arena.reserve(&layer.moved_gamma, layer.nodes * samples);
        for (long s = 0; s <= job.steps; ++s) {
            Passed<Real>& p = at_step(s, l);
            if (s == 0 || !undone) store.reserve(&p.weight, numbers);
            store.reserve(&p.first, with_moment ? numbers : 0);
            if (l > 0 && s < job.steps) store.reserve(&p.by_sample, samples * layer.stride);
            if (s < job.steps) store.reserve(&p.gamma, layer.nodes * samples);
        }
    }

    // Steps that share memory point to that of the first.
    void share() {
        for (long s = 1; s <= job.steps; ++s)
            for (long l = 0; l < depth; ++l) {
                if (undone) at_step(s, l).weight = at_step(0, l).weight;
                if (l == 0) at_step(s, l).by_sample = at_step(0, l).by_sample;
            }
    }

    // --- forwards ------------------------------------------------------------------------------------------------

    // The inputs of a step, with the constant node and padding, both ways.
    void gather(const Real* x, const int64_t* rows) {
        const Layer<Real>& layer = layers[0];
        Real* by_sample = at_step(0, 0).by_sample;
        for (long b = 0; b < batch; ++b) {
            std::memcpy(by_sample + b * layer.stride, x + rows[b] * layer.below, layer.below * sizeof(Real));
            by_sample[b * layer.stride + layer.below] = job.biases[0] ? 1 : 0;
        }
        transpose(by_sample, layer.stride, samples, layer.stride, layer.by_node, samples);
    }

    // Sums, activations, and gamma of every layer.
    void forward(long s) {
        const long padded = Lanes<Real>::padded(layers[depth - 1].nodes);
        transpose(target, padded, samples, padded, wanted, samples);
        for (long l = 0; l < depth; ++l) {
            const Layer<Real>& layer = layers[l];
            const Passed<Real>& p = at_step(s, l);
            Real* out = l == depth - 1 ? output : layers[l + 1].by_node;
            multiply<Real>({constant(l), p.weight, layer.stride, 1, layer.by_node, samples, out, samples, 0}, layer.nodes,
                           samples);
            if (l < depth - 1) pass_on(layers[l + 1], at_step(s, l + 1), l + 1);
        }
        loss(at_step(s, depth - 1).gamma, softmax[s], whole_target[s]);
        for (long l = depth - 1; l > 0; --l) {
            const Layer<Real>& layer = layers[l];
            const Passed<Real>& p = at_step(s, l);
            Real* below = at_step(s, l - 1).gamma;
            multiply<Real>({layer.nodes, p.weight, 1, layer.stride, p.gamma, samples, below, samples, 0}, layer.below,
                           samples);
            gate(layer.by_node, below, layer.below);
        }
    }

    // Number of input nodes, with the constant one if there are biases.
    long constant(long l) const { return layers[l].below + (job.biases[l] ? 1 : 0); }

    // Activations of a layer's inputs in place, the constant node and padding, and all of it by sample.
    void pass_on(const Layer<Real>& layer, const Passed<Real>& p, long l) {
        activate<Real>(kLeaky, static_cast<Real>(job.leak), layer.by_node, nullptr, layer.below * samples);
        std::memset(layer.by_node + layer.below * samples, 0, (layer.stride - layer.below) * samples * sizeof(Real));
        if (job.biases[l]) std::fill_n(layer.by_node + layer.below * samples, batch, Real(1));
        transpose(layer.by_node, samples, layer.stride, samples, p.by_sample, layer.stride);
    }

    // gamma of the outputs, over the batch: z - y, or (sum of y) softmax(z) - y; 0 of padded samples
    void loss(Real* gamma, Real* soft, Real* wholes) {
        const long outputs = layers[depth - 1].nodes;
        if (job.entropy) to_softmax(outputs, soft);
        const Real* f = job.entropy ? soft : output;
        for (long b = 0; b < samples; b += lanes) {
            const Vector<Real> share = share_of(b);
            Vector<Real> whole = Vector<Real>{} + 1;
            if (job.entropy) at(wholes + b) = whole = sum_of_targets(outputs, b);
            for (long i = b; i < outputs * samples; i += samples) at(gamma + i) = (whole * at(f + i) - at(wanted + i)) * share;
        }
    }

    // 1/batch for these samples, 0 for padded ones
    Vector<Real> share_of(long b) const {
        Vector<Real> share{};
        for (long i = 0; i < std::min(lanes, batch - b); ++i) share[i] = Real(1) / batch;
        return share;
    }

    // Sum of each of these samples' targets.
    Vector<Real> sum_of_targets(long outputs, long b) const {
        Vector<Real> whole{};
        for (long n = 0; n < outputs; ++n) whole += at(wanted + n * samples + b);
        return whole;
    }

    void to_softmax(long outputs, Real* soft) {
        for (long b = 0; b < samples; b += lanes) {
            Vector<Real> most = at(output + b), sum{};
            for (long n = 1; n < outputs; ++n) {
                const Vector<Real> z = at(output + n * samples + b);
                most = z > most ? z : most;
            }
            for (long n = 0; n < outputs; ++n) {
                const Vector<Real> below = most - at(output + n * samples + b);
                const auto power = Smooth<Real>::exponential(-Smooth<Real>::at_most(below, Smooth<Real>::kDeep));
                sum += at(soft + n * samples + b) = power.scaled(power.mantissa().hi);
            }
            for (long n = 0; n < outputs; ++n) at(soft + n * samples + b) /= sum;
        }
    }

    void gate(const Real* f, Real* p, long nodes) const {
        const Real leak = static_cast<Real>(job.leak);
        for (long i = 0; i < nodes * samples; i += lanes) {
            const Vector<Real> slope = leak * at(p + i);
            at(p + i) = at(f + i) > 0 ? at(p + i) : slope;
        }
    }

    // The optimizer's step, as rule.OPTIMIZERS.
    void update(long s, long l) {
        const Layer<Real>& layer = layers[l];
        const Passed<Real>&p = at_step(s, l), &after = at_step(s + 1, l);
        const long numbers = layer.nodes * layer.stride;
        if (!learns(l)) {
            std::memcpy(after.weight, p.weight, numbers * sizeof(Real));
            if (with_moment) std::memcpy(after.first, p.first, numbers * sizeof(Real));
            return;
        }
        const Real eta = rate(s, l), mu = static_cast<Real>(job.momentum), decay = decay_of(l);
        const bool nesterov = job.method == kNesterov;
        if (!with_moment && (decay == 0 || job.decay_biases)) {
            for (long i = 0; i < layer.nodes * samples; i += lanes) at(scaled + i) = -eta * at(p.gamma + i);
            multiply<Real>({batch, scaled, samples, 1, p.by_sample, layer.stride, after.weight, layer.stride,
                            1 - eta * decay, p.weight}, layer.nodes, layer.stride);
            return;
        }
        multiply<Real>({batch, p.gamma, samples, 1, p.by_sample, layer.stride, gradient, layer.stride, 0}, layer.nodes,
                       layer.stride);
        const Real *g = gradient, *w = p.weight, *m = p.first;
        Real *next = after.weight, *kept = after.first;
        each_part(layer, decay, [=](long from, long to, Real decay) {
            if (!m) {
                for (long i = from; i < to; ++i) next[i] = w[i] - eta * (g[i] + decay * w[i]);
                return;
            }
            for (long i = from; i < to; ++i) {
                const Real change = g[i] + decay * w[i];
                kept[i] = mu * m[i] + change;
                next[i] = w[i] - eta * (nesterov ? change + mu * kept[i] : kept[i]);
            }
        });
    }

    // Holds the weights before a step if those since others were held are, or can become, too large to come back from.
    void hold(long s, long l) {
        Layer<Real>& layer = layers[l];
        Passed<Real>& p = at_step(s, l);
        if (!learns(l)) return;
        const long numbers = layer.nodes * layer.stride;
        const Real most = largest(p.gamma, layer.nodes * samples) * largest(p.by_sample, batch * layer.stride);
        const Real moves = rate(s, l) * static_cast<Real>(batch) * most;
        layer.reach += moves;
        if (layer.reach <= layer.size) return;  // at most twice what they were
        layer.size = largest(p.weight, numbers);
        layer.reach = moves;
        layer.least = std::min(layer.least, layer.size);
        layer.most = std::max(layer.most, layer.size);
        if (std::max(layer.most, layer.size + moves) <= static_cast<Real>(kGrowth) * layer.least) return;
        p.held.reset(new Real[numbers]);
        std::memcpy(p.held.get(), p.weight, numbers * sizeof(Real));
        layer.size = layer.most = 0;
        layer.least = std::numeric_limits<Real>::infinity();
    }

    static Real largest(const Real* p, long numbers) {
        Vector<Real> most{};
        for (long i = 0; i < numbers; i += lanes) {
            const Vector<Real> size = Smooth<Real>::absolute(at(p + i));
            most = size > most ? size : most;
        }
        Real found = 0;
        for (long i = 0; i < lanes; ++i) found = std::max(found, most[i]);
        return found;
    }

    // Takes back what `update` did to the weights.
    void undo(long s, long l) {
        const Layer<Real>& layer = layers[l];
        const Passed<Real>& p = at_step(s, l);
        if (!learns(l)) return;
        if (p.held) {
            std::memcpy(p.weight, p.held.get(), layer.nodes * layer.stride * sizeof(Real));
            return;
        }
        const Real eta = rate(s, l), decay = decay_of(l);
        if (decay == 0 || job.decay_biases) {
            const Real wider = 1 / static_cast<Real>(decay == 0 ? 1 : kept(s, l));
            for (long i = 0; i < layer.nodes * samples; i += lanes) at(scaled + i) = eta * wider * at(p.gamma + i);
            multiply<Real>({batch, scaled, samples, 1, p.by_sample, layer.stride, p.weight, layer.stride, wider},
                           layer.nodes, layer.stride);
            return;
        }
        multiply<Real>({batch, p.gamma, samples, 1, p.by_sample, layer.stride, gradient, layer.stride, 0}, layer.nodes,
                       layer.stride);
        each_part(layer, decay, [&](long from, long to, Real decay) {
            for (long i = from; i < to; ++i) p.weight[i] = (p.weight[i] + eta * gradient[i]) / (1 - eta * decay);
        });
    }

    // Calls with (from, to, decay) of the numbers of a layer that decay alike.
    template <class Call>
    void each_part(const Layer<Real>& layer, Real decay, Call call) const {
        if (job.decay_biases || decay == 0) return call(0, layer.nodes * layer.stride, decay);
        for (long n = 0; n < layer.nodes; ++n) {
            call(n * layer.stride, n * layer.stride + layer.below, decay);
            call(n * layer.stride + layer.below, (n + 1) * layer.stride, Real(0));
        }
    }

    // --- backwards -----------------------------------------------------------------------------------------------

    // The direction of the gradient is scale times this.
    const Real* along(const Layer<Real>& layer) const { return with_moment ? layer.along : layer.slope; }
    Real scale_of(long s, long l) const { return !learns(l) ? 0 : with_moment ? 1 : -rate(s, l); }

    // One step back; returns the slope in its rate.
    Real back(long s, long member, const int64_t* rows) {
        Real by_rate = 0;
        if (job.by_target) fetch(sums(job.by_target, member, job.widths[depth]), job.widths[depth], rows);
        if (job.by_input) fetch(sums(job.by_input, member, job.widths[0]), job.widths[0], rows);
        for (long l = 1; l < depth; ++l)
            transpose(at_step(s, l).by_sample, layers[l].stride, samples, layers[l].stride, layers[l].by_node, samples);
        for (long l = 0; l < depth; ++l) {
            if (undone) undo(s, l);
            if (with_moment) by_rate += through_moment(s, l);
        }
        for (long l = 0; l < depth; ++l) by_rate += moved_up(s, l);
        at_the_top(s, member, rows);
        for (long l = depth - 1; l >= 0; --l) moved_down(s, l, member, rows);
        return by_rate;
    }

    // Through the update: the direction, and the slope in the moment before; returns what the rate gets.
    Real through_moment(long s, long l) {
        Layer<Real>& layer = layers[l];
        if (!learns(l)) return 0;
        const Passed<Real>&p = at_step(s, l), &after = at_step(s + 1, l);
        const Real eta = rate(s, l), mu = static_cast<Real>(job.momentum);
        const bool nesterov = job.method == kNesterov;
        Real by_rate = 0;
        for (long i = 0; i < layer.nodes * layer.stride; ++i) {
            // with Nesterov's the change is m - mu m before
            by_rate -= layer.slope[i] * (nesterov ? (1 + mu) * after.first[i] - mu * p.first[i] : after.first[i]);
            const Real in_moment = layer.first_slope[i] - eta * (nesterov ? mu : 1) * layer.slope[i];
            layer.first_slope[i] = mu * in_moment;
            layer.along[i] = nesterov ? in_moment - eta * layer.slope[i] : in_moment;
        }
        return static_cast<Real>(job.factors[l]) * by_rate;
    }

    // R of a layer's sums; of a hidden layer R of the next one's inputs.  Returns what the rate gets without a moment.
    Real moved_up(long s, long l) {
        const Layer<Real>& layer = layers[l];
        const Passed<Real>& p = at_step(s, l);
        const bool top = l == depth - 1;
        Real *out = top ? output : layers[l + 1].moved, by_rate = 0;
        const Real scale = scale_of(s, l);
        if (learns(l)) {
            multiply<Real>({constant(l), along(layer), layer.stride, 1, layer.by_node, samples, out, samples, 0}, layer.nodes,
                           samples);
            if (!with_moment)
                by_rate = -static_cast<Real>(job.factors[l]) * (dot(p.gamma, out, layer.nodes) + decayed(p, l));
        } else if (l == 0) {
            std::memset(out, 0, layer.nodes * samples * sizeof(Real));
        }
        if (l > 0)
            multiply<Real>({layer.below, p.weight, layer.stride, 1, layer.moved, samples, out, samples, scale},
                           layer.nodes, samples);
        else if (scale != 1)
            for (long i = 0; i < layer.nodes * samples; i += lanes) at(out + i) *= scale;
        if (top) return by_rate;
        const Layer<Real>& above = layers[l + 1];
        gate(above.by_node, out, layer.nodes);
        transpose(out, samples, above.stride, samples, above.moved_by_sample, above.stride);
        return by_rate;
    }

    // <a, b> of two (node, sample); gamma of padded samples is 0.
    Real dot(const Real* a, const Real* b, long nodes) const {
        Vector<Real> part{};
        for (long i = 0; i < nodes * samples; i += lanes) part += at(a + i) * at(b + i);
        Real total = 0;
        for (long i = 0; i < lanes; ++i) total += part[i];
        return total;
    }

    // decay <slope, w>, which the change of the weights has beside the gradient
    Real decayed(const Passed<Real>& p, long l) const {
        Real total = 0;
        if (decay_of(l) != 0)
            each_part(layers[l], decay_of(l), [&](long from, long to, Real decay) {
                for (long i = from; i < to; ++i) total += decay * layers[l].slope[i] * p.weight[i];
            });
        return total;
    }

    // From R z of the outputs: R gamma, and the slopes in the samples' weights and targets.
    void at_the_top(long s, long member, const int64_t* rows) {
        const Layer<Real>& layer = layers[depth - 1];
        const Real *gamma = at_step(s, depth - 1).gamma, *soft = softmax[s];
        const long outputs = layer.nodes, padded = Lanes<Real>::padded(outputs);
        Real* by_weight = sums(job.by_weight, member, 1);
        for (long b = 0; b < samples; b += lanes) {
            Vector<Real> weight{}, mean{};
            for (long i = b; i < outputs * samples; i += samples) {
                weight += at(gamma + i) * at(output + i);
                if (job.entropy) mean += at(soft + i) * at(output + i);
            }
            for (long i = 0; by_weight && i < std::min(lanes, batch - b); ++i) by_weight[rows[b + i]] += weight[i];
            const Vector<Real> share = share_of(b);
            const Vector<Real> whole = job.entropy ? at(whole_target[s] + b) : Vector<Real>{};
            for (long i = b; i < outputs * samples; i += samples) {
                const Vector<Real> v = (at(output + i) - mean) * share;
                at(output + i) = -v;
                at(layer.moved_gamma + i) = job.entropy ? whole * at(soft + i) * v : v;
            }
        }
        if (!job.by_target) return;
        transpose(output, samples, padded, samples, target, padded);
        add(sums(job.by_target, member, outputs), outputs, target, padded, rows);
    }

    // Adds rows of a batch to those of the samples.
    void add(Real* to, long numbers, const Real* from, long stride, const int64_t* rows) const {
        for (long b = 0; b < batch; ++b) {
            Real* sum = to + rows[b] * numbers;
            for (long i = 0; i < numbers; ++i) sum[i] += from[b * stride + i];
        }
    }

    Real* sums(void* all, long member, long numbers) const {
        return all ? static_cast<Real*>(all) + member * job.samples * numbers : nullptr;
    }

    // R gamma of the layer below, or the slope in the inputs; and the slope in the layer's parameters.
    void moved_down(long s, long l, long member, const int64_t* rows) {
        Layer<Real>& layer = layers[l];
        const Passed<Real>& p = at_step(s, l);
        const Real scale = scale_of(s, l), decay = decay_of(l);
        if (l > 0) {
            Real* out = layers[l - 1].moved_gamma;
            if (scale != 0)
                multiply<Real>({layer.nodes, along(layer), 1, layer.stride, p.gamma, samples, out, samples, 0},
                               layer.below, samples);
            multiply<Real>({layer.nodes, p.weight, 1, layer.stride, layer.moved_gamma, samples, out, samples, scale},
                           layer.below, samples);
            gate(layer.by_node, out, layer.below);
        } else if (job.by_input) {  // by sample, as the sums are
            if (scale != 0)
                multiply<Real>({layer.nodes, p.gamma, 1, samples, along(layer), layer.stride, lower, layer.stride, 0},
                               batch, layer.stride);
            multiply<Real>({layer.nodes, layer.moved_gamma, 1, samples, p.weight, layer.stride, lower, layer.stride,
                            scale}, batch, layer.stride);
            add(sums(job.by_input, member, layer.below), layer.below, lower, layer.stride, rows);
        }
        Real kept = 1;
        if (decay != 0 && !with_moment && job.decay_biases)
            kept = 1 + scale * decay;
        else if (decay != 0)
            each_part(layer, decay, [&](long from, long to, Real decay) {
                for (long i = from; i < to; ++i) layer.slope[i] += decay * (with_moment ? 1 : scale) * along(layer)[i];
            });
        multiply<Real>({batch, layer.moved_gamma, samples, 1, p.by_sample, layer.stride, layer.slope, layer.stride, kept},
                       layer.nodes, layer.stride);
        if (l > 0)
            multiply<Real>({batch, p.gamma, samples, 1, layer.moved_by_sample, layer.stride, layer.slope, layer.stride, 1},
                           layer.nodes, layer.stride);
    }

    // --- the caller's tensors ------------------------------------------------------------------------------------

    // The state at a step, in or out.
    void exchange(long member, long step, bool in) {
        for (long l = 0; l < depth; ++l) {
            const Passed<Real>& p = at_step(step, l);
            copy(layers[l], member, job.weights[l], job.biases[l], p.weight, in);
            if (with_moment) copy(layers[l], member, job.first_weights[l], job.first_biases[l], p.first, in);
        }
    }

    void exchange_slopes(long member, bool in) {
        for (long l = 0; l < depth; ++l) {
            Layer<Real>& layer = layers[l];
            copy(layer, member, job.slopes[l], job.bias_slopes[l], layer.slope, in);
            if (with_moment) copy(layer, member, job.first_slopes[l], job.first_bias_slopes[l], layer.first_slope, in);
        }
    }

    // Between a caller's (node, input_node) and (node,) and rows with the bias as last column, the rest of them 0.
    static void copy(const Layer<Real>& layer, long member, void* weights, void* biases, Real* rows, bool in) {
        Real* w = static_cast<Real*>(weights) + member * layer.nodes * layer.below;
        Real* b = static_cast<Real*>(biases) + member * layer.nodes;
        for (long n = 0; n < layer.nodes; ++n, w += layer.below, rows += layer.stride) {
            if (in) std::memset(rows + layer.below, 0, (layer.stride - layer.below) * sizeof(Real));
            std::memcpy(in ? rows : w, in ? w : rows, layer.below * sizeof(Real));
            if (biases) (in ? rows[layer.below] : b[n]) = in ? b[n] : rows[layer.below];
        }
    }

    const Job& job;
    const long depth, batch, samples;
    const bool with_moment, undone;
    std::vector<Layer<Real>> layers;
    std::vector<Passed<Real>> passed;
    std::vector<Real*> softmax, whole_target;  // per step, (output, sample), and the sum of each sample's targets
    Arena<Real> arena, store;
    Real *gradient = nullptr, *scaled = nullptr, *target = nullptr, *wanted = nullptr, *output = nullptr, *lower = nullptr;
};

}  // namespace

extern "C" {
// Takes the steps; returns what they went through, for the next two, or null if there is no memory for it.
void* forth_float64(const Job* job, int64_t member) {
    try {
        auto* passed = new Member<double>(*job);
        passed->go_forth(member);
        return passed;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void back_float64(void* passed, int64_t member) { static_cast<Member<double>*>(passed)->go_back(member); }
void drop_float64(void* passed) { delete static_cast<Member<double>*>(passed); }
}
