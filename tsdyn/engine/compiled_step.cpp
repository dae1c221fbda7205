// Training steps of one member at a time, whole epochs without leaving the cache; see compiled_step.py.
//
// Every product of a step is the same small one, C <- beta C + A B, with the columns of B and C contiguous:
//
//   forward    Z (node, sample)        = W      F        columns: samples
//   backward   G (input_node, sample)  = W^T    G        columns: samples
//   update     W (node, input_node)   += G      F^T      columns: input nodes
//
// A bias is the column of W that belongs to a constant node 1.  Rows are padded to whole cache lines with zeros.
// Padded samples may get numbers, but columns do not mix in the first two products and the third leaves them out;
// padded input nodes stay zero.  A step on all samples takes them in parts that stay in the cache, and sums the
// gradients of the parts.
// Sums are added in the same order for any number of members or threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arena.hpp"
#include "job.hpp"
#include "product.hpp"
#include "smooth.hpp"

extern "C" {

// Mirrored by compiled_step.Job.
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t batch, steps, samples;
    int64_t activation;  // smooth.hpp's Kind
    double leak;
    int64_t entropy;  // loss: cross entropy, else the squared error
    // per layer: (member, node, input_node) and (member, node) or null; moments as the parameters, null if not needed
    void *const *weights, *const *biases;
    void *const *first_weights, *const *first_biases, *const *second_weights, *const *second_biases;
    // BatchNorm per hidden layer, each (member, node) or null: statistics, affine map, and its moments
    void *const *means, *const *variances, *const *scales, *const *shifts;
    void *const *first_scales, *const *first_shifts, *const *second_scales, *const *second_shifts;
    const uint8_t* norm_first;        // per hidden layer: before the activation, else after
    const double *floors, *follow;  // per hidden layer: eps, and the weight of a batch in the statistics
    const void *inputs, *targets;     // (member, sample, ...)
    const int64_t* rows;              // (member, step, batch); null: each step uses all samples, in their order
    const double* rates;              // (member,)
    const double* factors;            // per layer, on the rates
    double momentum, weight_decay, beta_1, beta_2, epsilon;
    double clip;  // norm of the whole gradient; 0: none
    int64_t method, decay_biases, normalize;
    const uint8_t* frozen;  // per layer
    int64_t taken;          // number of steps taken before
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(widths), TSDYN_FIELD(batch), TSDYN_FIELD(steps), TSDYN_FIELD(samples),
    TSDYN_FIELD(activation), TSDYN_FIELD(leak), TSDYN_FIELD(entropy), TSDYN_FIELD(weights), TSDYN_FIELD(biases),
    TSDYN_FIELD(first_weights), TSDYN_FIELD(first_biases), TSDYN_FIELD(second_weights), TSDYN_FIELD(second_biases),
    TSDYN_FIELD(means), TSDYN_FIELD(variances), TSDYN_FIELD(scales), TSDYN_FIELD(shifts), TSDYN_FIELD(first_scales),
    TSDYN_FIELD(first_shifts), TSDYN_FIELD(second_scales), TSDYN_FIELD(second_shifts), TSDYN_FIELD(norm_first),
    TSDYN_FIELD(floors), TSDYN_FIELD(follow), TSDYN_FIELD(inputs), TSDYN_FIELD(targets), TSDYN_FIELD(rows),
    TSDYN_FIELD(rates), TSDYN_FIELD(factors), TSDYN_FIELD(momentum), TSDYN_FIELD(weight_decay), TSDYN_FIELD(beta_1),
    TSDYN_FIELD(beta_2), TSDYN_FIELD(epsilon), TSDYN_FIELD(clip), TSDYN_FIELD(method), TSDYN_FIELD(decay_biases),
    TSDYN_FIELD(normalize), TSDYN_FIELD(frozen), TSDYN_FIELD(taken))

namespace {

// Mirrored by compiled_step.METHODS.
enum Method : int64_t { kSgd, kMomentum, kNesterov, kAdam, kAdamW };

// Samples of a part of a step on all samples.
constexpr long kPart = 64;
// Rows of a step of fewer bytes are asked for in one burst.
constexpr long kBurst = 1 << 14;

// A parameter with its moments and its gradient, null if there are none.
template <class Real>
struct Parameter {
    Real *value = nullptr, *first = nullptr, *second = nullptr, *gradient = nullptr;
};

template <class Real>
struct Layer {
    long below, nodes, stride;
    bool sloped;  // the slopes are kept; else the sign of the activation tells the slope
    Parameter<Real> weight;
    // below this layer: (sample, node + 1), (node + 1, sample), and slopes (node, sample)
    Real *by_sample = nullptr, *by_node = nullptr, *slope = nullptr;
    // BatchNorm of what this layer puts out: (node,), and what it normalised, (node, sample)
    bool normalized = false, norm_first = false;
    Parameter<Real> scale, shift;
    Real *mean = nullptr, *variance = nullptr, *inverse = nullptr, *standard = nullptr;
};

template <class Real>
class Member {
    static constexpr long lanes = Lanes<Real>::count;

  public:
    explicit Member(const Job& job)
        : job(job),
          depth(job.depth),
          batch(parted(job) ? kPart : job.batch),
          samples(Lanes<Real>::padded(batch)),
          moments(job.method == kSgd ? 0 : job.method < kAdam ? 1 : 2),
          together(job.clip != 0 || parted(job)),
          // otherwise the step is added to the weights as it is summed
          separate(moments || together || factored() || (job.weight_decay != 0 && !job.decay_biases)) {
        layers.resize(depth);
        long widest = 0, largest = 0;
        for (long l = 0; l < depth; ++l) widest = std::max({widest, plan(l), job.widths[l + 1]});
        for (const auto& layer : layers) largest = std::max(largest, layer.nodes * layer.stride);
        const long outputs = Lanes<Real>::padded(job.widths[depth]);
        widest = std::max(widest, outputs);
        arena.reserve(&shared, separate && !together ? largest : 0);
        arena.reserve(&target, samples * outputs);
        arena.reserve(&g, widest * samples);
        arena.reserve(&passed, widest * samples);
        arena.allocate();
        for (long l = 0; l < depth; ++l) {
            Layer<Real>& layer = layers[l];
            rounds += rounds_of<Real>(layer.nodes, samples, layer.below) + rounds_of<Real>(layer.nodes, layer.stride, batch);
            if (l > 0) rounds += rounds_of<Real>(layer.below, samples, layer.nodes);
            if (!together) layer.weight.gradient = shared;
            for (long b = 0; b < batch; ++b) {  // the constant node
                const Real one = job.biases[l] ? 1 : 0;
                layer.by_sample[b * layer.stride + layer.below] = one;
                layer.by_node[layer.below * samples + b] = one;
            }
        }
    }
    Member(const Member&) = delete;

    void train(long member) {
        exchange(member, &Member::pack);
        const long inputs = layers[0].below, outputs = layers[depth - 1].nodes;
        const Real* x = static_cast<const Real*>(job.inputs) + member * job.samples * inputs;
        const Real* y = static_cast<const Real*>(job.targets) + member * job.samples * outputs;
        const int64_t* rows = job.rows ? job.rows + member * job.steps * batch : nullptr;
        rate = job.rates[member];
        for (step = job.taken + 1; step <= job.taken + job.steps; ++step) {
            for (first = 0; first < job.batch; first += batch) {
                for (long b = 0; b < batch; ++b) {  // a part that is not full holds its first sample again
                    const long at = rows ? rows[b] : first + b < job.batch ? first + b : first;
                    std::memcpy(layers[0].by_sample + b * layers[0].stride, x + at * inputs, inputs * sizeof(Real));
                    std::memcpy(target + b * Lanes<Real>::padded(outputs), y + at * outputs, outputs * sizeof(Real));
                }
                if (rows && step < job.taken + job.steps)  // rows are scattered over the data: ask for the next ones
                    ask_for(rows + batch, x, y);
                forward();
                backward();
            }
            if (together) finish();
            if (rows) rows += batch;
        }
        exchange(member, &Member::unpack);
    }

  private:
    // BatchNorm needs all samples of a step at once.
    static bool parted(const Job& job) {
        return !job.rows && job.batch > kPart &&
               std::none_of(job.means, job.means + job.depth, [](const void* mean) { return mean != nullptr; });
    }

    bool factored() const { return std::any_of(job.factors, job.factors + job.depth, [](double f) { return f != 1; }); }

    // Reserves the memory of a layer and what is below it; returns its number of input nodes.
    long plan(long l) {
        Layer<Real>& layer = layers[l];
        layer.below = job.widths[l];
        layer.nodes = job.widths[l + 1];
        layer.stride = Lanes<Real>::padded(layer.below + 1);
        const bool norm_below = l > 0 && job.means[l - 1];
        layer.sloped = l > 0 && (job.activation != kLeaky || (norm_below && !job.norm_first[l - 1]));
        reserve(layer.weight, layer.nodes * layer.stride);
        arena.reserve(&layer.by_sample, samples * layer.stride);
        arena.reserve(&layer.by_node, layer.stride * samples);
        arena.reserve(&layer.slope, layer.sloped ? layer.below * samples : 0);
        layer.normalized = l + 1 < depth && job.means[l];
        if (layer.normalized) {
            layer.norm_first = job.norm_first[l];
            for (Real** place : {&layer.mean, &layer.variance, &layer.inverse}) arena.reserve(place, layer.nodes);
            arena.reserve(&layer.standard, layer.nodes * samples);
            for (Parameter<Real>* p : {&layer.scale, &layer.shift}) {
                reserve(*p, layer.nodes);
                if (!together) arena.reserve(&p->gradient, layer.nodes);
            }
        }
        return layer.below;
    }

    void reserve(Parameter<Real>& p, long numbers) {
        arena.reserve(&p.value, numbers);
        arena.reserve(&p.first, moments > 0 ? numbers : 0);
        arena.reserve(&p.second, moments > 1 ? numbers : 0);
        arena.reserve(&p.gradient, together ? numbers : 0);
    }

    // Have the next step's rows in a near cache by then; where they are few bytes, ask for them at once.
    void ask_for(const int64_t* rows, const Real* x, const Real* y) {
        const long inputs = layers[0].below, outputs = layers[depth - 1].nodes;
        const bool little = batch * (inputs + outputs) * static_cast<long>(sizeof(Real)) < kBurst;
        later.clear();
        for (long b = 0; b < batch; ++b) {
            const Real *input = x + rows[b] * inputs, *output = y + rows[b] * outputs;
            if (little) {
                fetch(input, inputs);
                fetch(output, outputs);
            } else {
                later.add(output, outputs);
                later.add(input, inputs);
            }
        }
        later.within(rounds);
    }
    static void fetch(const Real* p, long numbers) {
        for (long i = 0; i < numbers; i += kLineBytes / static_cast<long>(sizeof(Real))) __builtin_prefetch(p + i, 0, 2);
    }

    // --- forward -------------------------------------------------------------------------------------------------

    void forward() {
        const long outputs = layers[depth - 1].nodes, padded = Lanes<Real>::padded(outputs);
        const Layer<Real>& lowest = layers[0];
        transpose(lowest.by_sample, lowest.stride, samples, lowest.stride, lowest.by_node, samples);
        transpose(target, padded, samples, padded, g, samples);
        for (long l = 0; l < depth; ++l) {
            const Layer<Real>& layer = layers[l];
            const bool top = l == depth - 1, square = top && !job.entropy;
            const long k = layer.below + (job.biases[l] ? 1 : 0);
            Real* out = square ? g : top ? passed : layers[l + 1].by_node;
            // at the top z - y
            multiply<Real>({k, layer.weight.value, layer.stride, 1, layer.by_node, samples, out, samples,
                            Real(square ? -1 : 0)},
                           layer.nodes, samples, later);
            if (!top) hidden(layer, layers[l + 1]);
        }
        if (job.entropy) softmax(outputs);
        // everything below is linear in it
        const Real scale = static_cast<Real>((separate ? 1 : -rate) / job.batch);
        for (long i = 0; i < outputs * samples; ++i) g[i] *= scale;
        const long held = job.batch - first;
        for (long n = 0; held < batch && n < outputs; ++n) std::fill(g + n * samples + held, g + (n + 1) * samples, Real(0));
    }

    // What follows a hidden layer's sums, in place: activation, BatchNorm; above is the next layer.
    void hidden(const Layer<Real>& layer, const Layer<Real>& above) {
        if (layer.normalized && layer.norm_first) standardize(layer, above.by_node);
        activate<Real>(job.activation, static_cast<Real>(job.leak), above.by_node, above.slope, layer.nodes * samples);
        if (layer.normalized && !layer.norm_first) standardize(layer, above.by_node);
        transpose(above.by_node, samples, above.stride, samples, above.by_sample, above.stride);
    }

    // Sum over the batch of one node.
    template <class Term>
    Real sum(Term term) const {
        Vector<Real> part{};
        const long whole = batch / lanes * lanes;
        for (long b = 0; b < whole; b += lanes) part += term(b, Vector<Real>{});
        Real total = 0;
        for (long i = 0; i < lanes; ++i) total += part[i];
        for (long b = whole; b < batch; ++b) total += term(b, Real{});
        return total;
    }
    static Vector<Real> take(const Real* p, Vector<Real>) { return at(p); }
    static Real take(const Real* p, Real) { return *p; }

    // f <- scale (f - mean)/sqrt(variance + eps) + shift with the batch's mean and variance
    void standardize(const Layer<Real>& layer, Real* f) {
        const Real eps = static_cast<Real>(floor_of(layer)), weight = static_cast<Real>(job.follow[&layer - &layers[0]]);
        for (long n = 0; n < layer.nodes; ++n) {
            Real *row = f + n * samples, *standard = layer.standard + n * samples;
            const Real mean = sum([&](long b, auto one) { return take(row + b, one); }) / batch;
            const Real square = sum([&](long b, auto one) {
                const auto off = take(row + b, one) - mean;
                return off * off;
            });
            layer.mean[n] += weight * (mean - layer.mean[n]);
            layer.variance[n] += weight * (square / (batch - 1) - layer.variance[n]);
            const Real inverse = 1 / std::sqrt(square / batch + eps);
            layer.inverse[n] = inverse;
            const Real scale = layer.scale.value[n], shift = layer.shift.value[n];
            for (long b = 0; b < samples; b += lanes) {
                at(standard + b) = (at(row + b) - mean) * inverse;
                at(row + b) = scale * at(standard + b) + shift;
            }
        }
    }
    double floor_of(const Layer<Real>& layer) const { return job.floors[&layer - &layers[0]]; }

    // g <- (sum of y) softmax(z) - y over the nodes of every sample; z is in `passed`
    void softmax(long outputs) {
        for (long b = 0; b < samples; b += lanes) {
            Vector<Real> most = at(passed + b), sum{}, weight{};
            for (long n = 1; n < outputs; ++n) {
                const Vector<Real> z = at(passed + n * samples + b);
                most = z > most ? z : most;
            }
            for (long n = 0; n < outputs; ++n) {
                Vector<Real>& z = at(passed + n * samples + b);
                const Vector<Real> below = most - z;
                const auto power = Smooth<Real>::exponential(-Smooth<Real>::at_most(below, Smooth<Real>::kDeep));
                z = power.scaled(power.mantissa().hi);
                sum += z;
                weight += at(g + n * samples + b);
            }
            const Vector<Real> factor = weight / sum;
            for (long n = 0; n < outputs; ++n) {
                Vector<Real>& y = at(g + n * samples + b);
                y = at(passed + n * samples + b) * factor - y;
            }
        }
    }

    // --- backward ------------------------------------------------------------------------------------------------

    long lowest() const {
        return std::find(job.frozen, job.frozen + depth, uint8_t(0)) - job.frozen;
    }

    // Down the layers: g below = (W^T g) gate, and g f^T is dJ/dW, or at once the step -rate dJ/dW.
    void backward() {
        const long lowest = this->lowest();
        for (long l = depth - 1; l >= lowest; --l) {
            Layer<Real>& layer = layers[l];
            if (l > lowest) {
                multiply<Real>({layer.nodes, layer.weight.value, 1, layer.stride, g, samples, passed, samples, 0},
                               layer.below, samples, later);
                Layer<Real>& under = layers[l - 1];
                if (under.normalized && !under.norm_first) through_norm(under);
                gate(layer);
                if (under.normalized && under.norm_first) through_norm(under);
            }
            if (!job.frozen[l]) {
                differentiate(layer);
                if (!together) update(l);
            }
            std::swap(g, passed);
        }
    }

    // Updates all layers, where that waits for the gradients of all layers and parts.
    void finish() {
        if (job.clip != 0) clip(lowest());
        for (long l = lowest(); l < depth; ++l)
            if (!job.frozen[l]) update(l);
    }

    void gate(const Layer<Real>& layer) {
        const Real leak = static_cast<Real>(job.leak);
        if (layer.sloped) {
            for (long i = 0; i < layer.below * samples; i += lanes) at(passed + i) *= at(layer.slope + i);
            return;
        }
        for (long i = 0; i < layer.below * samples; i += lanes) {
            const Vector<Real> slope = leak * at(passed + i);
            at(passed + i) = at(layer.by_node + i) > 0 ? at(passed + i) : slope;
        }
    }

    // passed <- the gradient of what BatchNorm takes, from that of what it gives; and its parameters' gradients
    void through_norm(Layer<Real>& layer) {
        for (long n = 0; n < layer.nodes; ++n) {
            Real* row = passed + n * samples;
            const Real* standard = layer.standard + n * samples;
            const Real shift = sum([&](long b, auto one) { return take(row + b, one); });
            const Real scale = sum([&](long b, auto one) { return take(row + b, one) * take(standard + b, one); });
            layer.shift.gradient[n] = shift;
            layer.scale.gradient[n] = scale;
            const Real factor = layer.scale.value[n] * layer.inverse[n];
            const Real flat = shift / batch, along = scale / batch;
            for (long b = 0; b < samples; b += lanes)
                at(row + b) = factor * ((at(row + b) - flat) - along * at(standard + b));
        }
    }

    void differentiate(Layer<Real>& layer) {
        const Real kept = static_cast<Real>(separate ? first > 0 : 1 - rate * job.weight_decay);
        Real* sum = separate ? layer.weight.gradient : layer.weight.value;
        multiply<Real>({batch, g, samples, 1, layer.by_sample, layer.stride, sum, layer.stride, kept}, layer.nodes,
                       layer.stride, later);
    }

    // Scales the gradient of all trained parameters to the norm `clip` where it is longer, as torch's clip_grad_norm_.
    void clip(long lowest) {
        Real square = 0;
        const auto each = [&](auto change) {
            for (long l = lowest; l < depth; ++l) {
                Layer<Real>& layer = layers[l];
                if (job.frozen[l]) continue;
                change(layer.weight.gradient, layer.nodes * layer.stride);
                if (!has_map(l)) continue;
                change(layer.scale.gradient, layer.nodes);
                change(layer.shift.gradient, layer.nodes);
            }
        };
        each([&](Real* gradient, long numbers) {
            Vector<Real> part{};
            for (long i = 0; i < numbers; i += lanes) part += at(gradient + i) * at(gradient + i);
            for (long i = 0; i < lanes; ++i) square += part[i];
        });
        const Real scale = std::min<Real>(1, job.clip / (std::sqrt(square) + Real(1e-6)));
        if (!(scale == 1))  // NaN included
            each([&](Real* gradient, long numbers) {
                for (long i = 0; i < numbers; i += lanes) at(gradient + i) *= scale;
            });
    }

    bool has_map(long l) const { return layers[l].normalized && job.scales[l]; }

    void update(long l) {
        Layer<Real>& layer = layers[l];
        const double eta = rate * job.factors[l], on_biases = job.decay_biases ? job.weight_decay : 0;
        if (separate && on_biases == job.weight_decay) {
            take_step(layer.weight, 0, layer.nodes * layer.stride, eta, job.weight_decay);
        } else if (separate) {
            for (long n = 0; n < layer.nodes; ++n) {
                take_step(layer.weight, n * layer.stride, layer.below, eta, job.weight_decay);
                take_step(layer.weight, n * layer.stride + layer.below, 1, eta, 0);
            }
        }
        if (has_map(l))
            for (Parameter<Real>* p : {&layer.scale, &layer.shift}) {
                if (separate) {
                    take_step(*p, 0, layer.nodes, eta, on_biases);
                } else {  // the gradient is the step
                    const Real kept = 1 - rate * job.weight_decay;
                    for (long n = 0; n < layer.nodes; ++n) p->value[n] = kept * p->value[n] + p->gradient[n];
                }
            }
        if (job.normalize && l < depth - 1)
            for (long n = 0; n < layer.nodes; ++n) {
                Real* w = layer.weight.value + n * layer.stride;
                Real sum = 0;
                for (long i = 0; i < layer.below; ++i) sum += w[i] * w[i];
                const Real norm = std::sqrt(sum);
                for (long i = 0; i < layer.below; ++i) w[i] /= norm;
            }
    }

    // One step of some of a parameter's numbers; as rule.OPTIMIZERS.
    void take_step(Parameter<Real>& p, long from, long numbers, double eta, double decay) {
        Real *w = p.value + from, *gradient = p.gradient + from;
        switch (job.method) {
            case kSgd: return plain(w, gradient, numbers, eta, decay);
            case kMomentum: return with_momentum<false>(w, gradient, p.first + from, numbers, eta, decay);
            case kNesterov: return with_momentum<true>(w, gradient, p.first + from, numbers, eta, decay);
            case kAdam: return adam(w, gradient, p.first + from, p.second + from, numbers, eta, decay, 1);
            case kAdamW:
                return adam(w, gradient, p.first + from, p.second + from, numbers, eta, 0, 1 - eta * decay);
        }
    }

    void plain(Real* w, const Real* gradient, long numbers, Real eta, Real decay) {
        for (long i = 0; i < numbers; ++i) w[i] -= eta * (gradient[i] + decay * w[i]);
    }

    template <bool nesterov>
    void with_momentum(Real* w, const Real* gradient, Real* m, long numbers, Real eta, Real decay) {
        const Real mu = job.momentum;
        for (long i = 0; i < numbers; ++i) {
            const Real slope = gradient[i] + decay * w[i];
            m[i] = mu * m[i] + slope;
            w[i] -= eta * (nesterov ? slope + mu * m[i] : m[i]);
        }
    }

    void adam(Real* w, const Real* gradient, Real* m, Real* v, long numbers, double plain, Real decay, Real kept) {
        const Real beta_1 = job.beta_1, beta_2 = job.beta_2, epsilon = job.epsilon;
        const Real rest_1 = 1 - job.beta_1, rest_2 = 1 - job.beta_2, unbias = 1 - std::pow(job.beta_2, double(step));
        const Real eta = plain / (1 - std::pow(job.beta_1, double(step)));
        for (long i = 0; i < numbers; ++i) {
            const Real slope = gradient[i] + decay * w[i];
            m[i] = beta_1 * m[i] + rest_1 * slope;
            v[i] = beta_2 * v[i] + rest_2 * slope * slope;
            w[i] = kept * w[i] - eta * m[i] / (std::sqrt(v[i] / unbias) + epsilon);
        }
    }

    // --- the caller's tensors ------------------------------------------------------------------------------------

    // Copies between the caller's tensors and padded rows.
    void exchange(long member, void (Member::*copy)(const Layer<Real>&, long, void*, void*, Real*)) {
        for (long l = 0; l < depth; ++l) {
            Layer<Real>& layer = layers[l];
            (this->*copy)(layer, member, job.weights[l], job.biases[l], layer.weight.value);
            if (moments > 0) (this->*copy)(layer, member, job.first_weights[l], job.first_biases[l], layer.weight.first);
            if (moments > 1)
                (this->*copy)(layer, member, job.second_weights[l], job.second_biases[l], layer.weight.second);
            if (!layer.normalized) continue;
            const bool in = copy == &Member::pack;
            exchange_nodes(layer, member, job.means[l], layer.mean, in);
            exchange_nodes(layer, member, job.variances[l], layer.variance, in);
            if (!job.scales[l]) {
                std::fill_n(layer.scale.value, layer.nodes, Real(1));
                continue;
            }
            exchange_nodes(layer, member, job.scales[l], layer.scale.value, in);
            exchange_nodes(layer, member, job.shifts[l], layer.shift.value, in);
            if (moments > 0) exchange_nodes(layer, member, job.first_scales[l], layer.scale.first, in);
            if (moments > 0) exchange_nodes(layer, member, job.first_shifts[l], layer.shift.first, in);
            if (moments > 1) exchange_nodes(layer, member, job.second_scales[l], layer.scale.second, in);
            if (moments > 1) exchange_nodes(layer, member, job.second_shifts[l], layer.shift.second, in);
        }
    }

    void exchange_nodes(const Layer<Real>& layer, long member, void* theirs, Real* mine, bool in) {
        Real* p = static_cast<Real*>(theirs) + member * layer.nodes;
        std::memcpy(in ? mine : p, in ? p : mine, layer.nodes * sizeof(Real));
    }

    void pack(const Layer<Real>& layer, long member, void* weights, void* biases, Real* to) {
        const Real* w = static_cast<const Real*>(weights) + member * layer.nodes * layer.below;
        const Real* b = static_cast<const Real*>(biases) + member * layer.nodes;
        for (long n = 0; n < layer.nodes; ++n) {
            std::memcpy(to + n * layer.stride, w + n * layer.below, layer.below * sizeof(Real));
            if (biases) to[n * layer.stride + layer.below] = b[n];
        }
    }

    void unpack(const Layer<Real>& layer, long member, void* weights, void* biases, Real* from) {
        Real* w = static_cast<Real*>(weights) + member * layer.nodes * layer.below;
        Real* b = static_cast<Real*>(biases) + member * layer.nodes;
        for (long n = 0; n < layer.nodes; ++n) {
            std::memcpy(w + n * layer.below, from + n * layer.stride, layer.below * sizeof(Real));
            if (biases) b[n] = from[n * layer.stride + layer.below];
        }
    }

    const Job& job;
    const long depth, batch, samples, moments;
    const bool together, separate;
    std::vector<Layer<Real>> layers;
    Arena<Real> arena;
    Real *shared = nullptr, *target = nullptr, *g = nullptr, *passed = nullptr;
    double rate = 0;
    long step = 0, first = 0;  // the step's number from 1, and the first sample of its part
    Ahead later;
    long rounds = 0;  // of all tiles of a step
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

// Value and slope at whole vectors of numbers, in place; for tests.
void activate_float64(int64_t kind, double leak, double* f, double* slope, int64_t numbers) {
    activate<double>(kind, leak, f, slope, numbers);
}
void activate_float32(int64_t kind, double leak, float* f, float* slope, int64_t numbers) {
    activate<float>(kind, static_cast<float>(leak), f, slope, numbers);
}
}
