// One training step of a relu ConvNet up to its gradients, one member after another; see compiled_convnet.py.
//
// Samples are innermost.  Activations are written where the layer above reads them, with its frame of zeros, gradients
// in a frame of columns; rows of the frame are left out of the sums.  The memory of a thread serves one member after
// another, step after step: it stays in the cache, frames stay zero, and no page is new.

#include <cmath>
#include <new>
#include <vector>

#include "convolution.hpp"
#include "job.hpp"

extern "C" {

// Mirrored by compiled_convnet.Job.  Arrays have an entry for each layer; pointers are null for what is not there.
struct Job {
    int64_t depth, batch, lowest, loss;  // lowest: the first layer that is trained, from 0; loss: kMse, ...
    int64_t image_channels, image_rows, image_columns;
    const int64_t *channels, *kernel_rows, *kernel_columns, *paddings;  // kernels: 0 for a linear layer
    const int64_t *places;                                              // of BatchNorm: kNone, kBefore, kAfter
    const double *epsilons, *momenta;
    const void *const *weights, *const *biases, *const *scales, *const *shifts;
    void *const *means, *const *variances;
    void *const *down_weights, *const *down_biases, *const *down_scales, *const *down_shifts;
    const void *inputs, *targets;  // (member, sample, ...)
    void* memory;                  // of each thread
    void* outputs;                 // of a loss of the user's own: (member, sample, output), which it replaces by its slope
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(batch), TSDYN_FIELD(lowest), TSDYN_FIELD(loss), TSDYN_FIELD(image_channels),
    TSDYN_FIELD(image_rows), TSDYN_FIELD(image_columns), TSDYN_FIELD(channels), TSDYN_FIELD(kernel_rows), TSDYN_FIELD(kernel_columns),
    TSDYN_FIELD(paddings), TSDYN_FIELD(places), TSDYN_FIELD(epsilons), TSDYN_FIELD(momenta), TSDYN_FIELD(weights),
    TSDYN_FIELD(biases), TSDYN_FIELD(scales), TSDYN_FIELD(shifts), TSDYN_FIELD(means), TSDYN_FIELD(variances),
    TSDYN_FIELD(down_weights), TSDYN_FIELD(down_biases), TSDYN_FIELD(down_scales), TSDYN_FIELD(down_shifts),
    TSDYN_FIELD(inputs), TSDYN_FIELD(targets), TSDYN_FIELD(memory), TSDYN_FIELD(outputs))

namespace {

enum Place { kNone, kBefore, kAfter };
enum Loss { kOwn, kMse, kCrossEntropy };

// Numbers (channel, row, run) in memory, a run being columns x samples.
template <class Real>
struct Planes {
    Real* p = nullptr;
    long channels = 0, rows = 0, run = 0;
    Strides strides{};
    Real* row(long c, long r) const { return p + c * strides.image + r * strides.line; }
    double values() const { return double(rows) * run; }
};

template <class T, class Real>
inline T read(const Real* p) {
    T found;
    __builtin_memcpy(&found, p, sizeof found);
    return found;
}

// each(T, place) of every vector and, at the end of the run, every number: T says which of them it is.
template <class Real, class Each>
inline void over(long run, Each each) {
    constexpr long lanes = Lanes<Real>::count;
    long q = 0;
    for (; q + lanes <= run; q += lanes) each(Vector<Real>{}, q);
    for (; q < run; ++q) each(Real{}, q);
}

// The sum over a run of what each(T, place) gives; four sums, since an addition waits for the one before it.
template <class Real, class Each>
inline double sum_over(long run, Each each) {
    constexpr long lanes = Lanes<Real>::count;
    Vector<Real> sum[4] = {};
    double total = 0;
    long q = 0;
    for (; q + 4 * lanes <= run; q += 4 * lanes)
        for (int v = 0; v < 4; ++v) sum[v] += each(Vector<Real>{}, q + v * lanes);
    for (; q + lanes <= run; q += lanes) sum[0] += each(Vector<Real>{}, q);
    for (; q < run; ++q) total += each(Real{}, q);
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (long lane = 0; lane < lanes; ++lane) total += sum[0][lane];
    return total;
}

template <class T>
inline T relu(T z) {
    return z < 0 ? T{} : z;  // NaN stays NaN
}
template <class T>
inline T gated(T g, T f) {
    return f <= 0 ? T{} : g;
}

template <class Real>
class Net {
  public:
    // In the memory of a thread; with none it only measures.
    Net(const Job& job, long thread) : job(job), layers(job.depth) {
        lay_out(nullptr);
        if (!job.memory) return;
        Real* own = static_cast<Real*>(job.memory) + thread * used;
        used = 0;
        lay_out(own);
    }

    // How many numbers the memory of a thread holds.
    long numbers() const { return used; }

    void step(long of) {
        forward(of);
        const long outputs = layers.back().channels;
        const Real* y = static_cast<const Real*>(job.targets) + member * job.batch * outputs;
        for (long s = 0; s < job.batch; ++s, y += outputs)
            job.loss == kMse ? slope_of_mse(s, y) : slope_of_cross_entropy(s, y);
        backward(of);
    }

    // The slope of the loss in the outputs stands in their place.
    void backward_from_outputs(long of) {
        member = of;
        const Planes<Real>& g = layers.back().g;
        const Real* slopes = static_cast<const Real*>(job.outputs) + member * job.batch * g.channels;
        for (long s = 0; s < job.batch; ++s)
            for (long c = 0; c < g.channels; ++c) g.row(c, 0)[s] = *slopes++;
        backward(of);
    }

    void forward_to_outputs(long of) {
        forward(of);
        Real* outputs = static_cast<Real*>(job.outputs) + member * job.batch * output.channels;
        for (long s = 0; s < job.batch; ++s)
            for (long c = 0; c < output.channels; ++c) *outputs++ = output.row(c, 0)[s];
    }

  private:
    void forward(long of) {
        member = of;
        turn_inputs();
        for (long i = 0; i < job.depth; ++i) {
            const Layer& own = layers[i];
            const bool top = i == job.depth - 1, rectified = !top && own.place != kBefore;
            const Planes<Real>& to = own.place == kNone ? above(i) : own.r;
            if (own.linear)
                multiply_by_weight(i, to, rectified);
            else
                convolve_by_weight(i, to, rectified);
            if (own.place != kNone) normalize(i, own.r, above(i));
        }
    }

    void backward(long of) {
        member = of;
        for (long i = job.depth - 1; i >= job.lowest; --i) {
            if (Real* down = own(job.down_weights, i, layers[i].channels * layers[i].taps)) gradient_of_weight(i, down);
            if (Real* down = own(job.down_biases, i, layers[i].channels)) gradient_of_bias(layers[i].g, down);
            if (i == job.lowest) return;
            if (layers[i].linear)
                through_linear(i);
            else
                through_convolution(i);
            if (layers[i - 1].place != kNone) through_norm(i - 1);
        }
    }

    struct Layer {
        bool linear;
        long channels, taps, place;
        Convolution convolution;     // of a convolution
        Planes<Real> f, r, g;        // input; what BatchNorm stands on; gradient at W f + b
        Real *mean, *deviation;      // of BatchNorm; 1/deviation is kept
        Real *lines, *turned;        // of a linear layer: its input in whole vectors, (input, sample) and (sample, input)
        long inputs, frame;          // of a linear layer: taps in whole lines; of a convolution: columns beside g
    };

    const Job& job;
    long member = 0;
    std::vector<Layer> layers;
    Planes<Real> output;
    Real *packed, *scratch, *down;
    long used = 0, lines = 0;  // lines: the batch in whole lines

    // --- memory ----------------------------------------------------------------------------------------------

    Real* take(Real* base, long numbers) {
        Real* found = base + used;
        used += Lanes<Real>::padded(numbers);
        return found;
    }

    // Planes within frames of zeros.
    Planes<Real> planes(Real* base, long channels, long rows, long columns, long row_frame, long column_frame) {
        const long line = (columns + 2 * column_frame) * job.batch, image = (rows + 2 * row_frame) * line;
        Planes<Real> found{nullptr, channels, rows, columns * job.batch, {line, image}};
        found.p = take(base, channels * found.strides.image) + row_frame * line + column_frame * job.batch;
        return found;
    }

    // Planes of one run, the samples in whole lines.
    Planes<Real> nodes(Real* base, long channels) {
        return {take(base, Lanes<Real>::padded(channels) * lines), channels, 1, job.batch, {lines, lines}};
    }

    void lay_out(Real* base) {
        lines = Lanes<Real>::padded(job.batch);
        long channels = job.image_channels, rows = job.image_rows, columns = job.image_columns;
        long most_packed = 0, most_scratch = 0, most_down = 0;
        for (long i = 0; i < job.depth; ++i) {
            Layer& own = layers[i];
            own.linear = !job.kernel_rows[i];
            own.channels = job.channels[i];
            own.place = job.places[i];
            if (own.linear) {
                const bool flat = i && layers[i - 1].linear;
                own.taps = flat ? channels : channels * rows * columns;
                own.inputs = Lanes<Real>::padded(own.taps);
                own.f = flat ? nodes(base, channels) : planes(base, channels, rows, columns, 0, 0);
                own.lines = flat ? own.f.p : nullptr;
                if (!flat) {  // room for the lines that are read beyond its end
                    take(base, (own.inputs - own.taps) * job.batch);
                    own.lines = lines == job.batch ? own.f.p : take(base, own.inputs * lines);
                }
                own.turned = take(base, lines * own.inputs);
                own.g = nodes(base, own.channels);
                if (own.place != kNone) own.r = nodes(base, own.channels);
                most_down = std::max({most_down, own.channels * own.inputs, own.inputs * lines});
            } else {
                const long edge = job.paddings[i];
                Convolution& s = own.convolution;
                own.f = planes(base, channels, rows, columns, edge, edge);
                s.below = channels;
                s.batch = job.batch;
                s.channels = channels = own.channels;
                s.kernel_rows = job.kernel_rows[i];
                s.kernel_columns = job.kernel_columns[i];
                s.rows = rows = rows + 2 * edge - s.kernel_rows + 1;
                s.columns = columns = columns + 2 * edge - s.kernel_columns + 1;
                s.x = own.f.strides;
                own.taps = s.taps();
                own.frame = std::max<long>(0, s.kernel_columns - 1 - edge);
                own.g = planes(base, channels, rows, columns, 0, own.frame);
                if (own.place != kNone) own.r = planes(base, channels, rows, columns, 0, 0);
                most_packed = std::max(most_packed, s.channels * s.taps());
                most_scratch = std::max(most_scratch, gradient_scratch<Real>(s));
            }
            if (own.place != kNone) {
                own.mean = take(base, own.channels);
                own.deviation = take(base, own.channels);
            }
            channels = own.channels;
        }
        output = nodes(base, channels);
        packed = take(base, most_packed);
        scratch = take(base, most_scratch);
        down = take(base, most_down + Lanes<Real>::count);  // a gate reads a whole vector
    }

    const Planes<Real>& above(long i) const { return i == job.depth - 1 ? output : layers[i + 1].f; }

    // This member's numbers of a layer's tensor; null if it is not there.
    template <class Pointer>
    auto* own(Pointer const* tensors, long i, long numbers) const {
        using Own = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const Real, Real>;
        return tensors[i] ? static_cast<Own*>(tensors[i]) + member * numbers : nullptr;
    }

    // --- forward ---------------------------------------------------------------------------------------------

    void turn_inputs() {
        const Planes<Real>& f = layers[0].f;
        const long columns = f.run / job.batch, inputs = f.channels * f.rows * columns;
        const Real* from = static_cast<const Real*>(job.inputs) + member * job.batch * inputs;
        for (long c = 0; c < f.channels; ++c)
            for (long r = 0; r < f.rows; ++r)
                for (long column = 0; column < columns; ++column, ++from)
                    for (long s = 0; s < job.batch; ++s) f.row(c, r)[column * job.batch + s] = from[s * inputs];
    }

    void convolve_by_weight(long i, const Planes<Real>& to, bool rectified) {
        Convolution s = layers[i].convolution;
        s.z = to.strides;
        pack(s, own(job.weights, i, s.channels * s.taps()), packed);
        const Planes<Real>& f = layers[i].f;
        const Real* from = f.p - job.paddings[i] * (f.strides.line + job.batch);
        const Real* bias = own(job.biases, i, s.channels);
        if (rectified)
            convolve(s, from, packed, bias, to.p, [](Vector<Real> z, long, long, long, long) { return relu(z); });
        else
            convolve(s, from, packed, bias, to.p, [](Vector<Real> z, long, long, long, long) { return z; });
    }

    void multiply_by_weight(long i, const Planes<Real>& to, bool rectified) {
        const Layer& layer = layers[i];
        if (layer.lines != layer.f.p)
            for (long k = 0; k < layer.taps; ++k)
                std::copy_n(layer.f.p + k * job.batch, job.batch, layer.lines + k * lines);
        const Real* bias = own(job.biases, i, layer.channels);
        for (long c = 0; c < layer.channels; ++c) std::fill_n(to.row(c, 0), lines, bias ? bias[c] : Real(0));
        const Real* weight = own(job.weights, i, layer.channels * layer.taps);
        multiply(Product<Real>{layer.taps, weight, layer.taps, 1, layer.lines, lines, to.p, lines, 1}, layer.channels,
                 lines);
        if (!rectified) return;
        for (long c = 0; c < layer.channels; ++c)
            over<Real>(job.batch, [z = to.row(c, 0)](auto like, long q) {
                const auto found = relu(read<decltype(like)>(z + q));
                __builtin_memcpy(z + q, &found, sizeof found);
            });
    }

    // BatchNorm with the statistics of the batch, which the running ones follow.
    void normalize(long i, const Planes<Real>& from, const Planes<Real>& to) {
        const Layer& layer = layers[i];
        const Real *scale = own(job.scales, i, layer.channels), *shift = own(job.shifts, i, layer.channels);
        Real *means = own(job.means, i, layer.channels), *variances = own(job.variances, i, layer.channels);
        const double n = from.values(), momentum = job.momenta[i];
        for (long c = 0; c < layer.channels; ++c) {
            double total = 0, squares = 0;
            for (long r = 0; r < from.rows; ++r)
                total += sum_over<Real>(from.run, [x = from.row(c, r)](auto like, long q) {
                    return read<decltype(like)>(x + q);
                });
            const Real mean = Real(total / n);
            for (long r = 0; r < from.rows; ++r)
                squares += sum_over<Real>(from.run, [x = from.row(c, r), mean](auto like, long q) {
                    const auto centred = read<decltype(like)>(x + q) - mean;
                    return centred * centred;
                });
            const Real inverse = Real(1 / std::sqrt(squares / n + job.epsilons[i]));
            const Real factor = scale ? inverse * scale[c] : inverse, constant = shift ? shift[c] : Real(0);
            layer.mean[c] = mean;
            layer.deviation[c] = inverse;
            means[c] = Real((1 - momentum) * means[c] + momentum * mean);
            variances[c] = Real((1 - momentum) * variances[c] + momentum * squares / (n - 1));
            const bool before = layer.place == kBefore;
            for (long r = 0; r < from.rows; ++r)
                over<Real>(from.run, [=, x = from.row(c, r), f = to.row(c, r)](auto like, long q) {
                    const auto z = (read<decltype(like)>(x + q) - mean) * factor + constant;
                    const auto found = before ? relu(z) : z;
                    __builtin_memcpy(f + q, &found, sizeof found);
                });
        }
    }

    // --- backward --------------------------------------------------------------------------------------------

    // Of one sample, whose target is y.
    void slope_of_mse(long s, const Real* y) {
        const Planes<Real>& g = layers.back().g;
        const Real share = Real(1) / Real(job.batch);
        for (long c = 0; c < g.channels; ++c) g.row(c, 0)[s] = (output.row(c, 0)[s] - y[c]) * share;
    }

    void slope_of_cross_entropy(long s, const Real* y) {
        const Planes<Real>& g = layers.back().g;
        const Real share = Real(1) / Real(job.batch);
        Real most = output.row(0, 0)[s], weights = 0, total = 0;
        for (long c = 1; c < g.channels; ++c) most = std::max(most, output.row(c, 0)[s]);
        for (long c = 0; c < g.channels; ++c) {
            weights += y[c];
            total += g.row(c, 0)[s] = std::exp(output.row(c, 0)[s] - most);
        }
        for (long c = 0; c < g.channels; ++c) g.row(c, 0)[s] = (weights * (g.row(c, 0)[s] / total) - y[c]) * share;
    }

    void gradient_of_bias(const Planes<Real>& g, Real* down) {
        for (long c = 0; c < g.channels; ++c) {
            double total = 0;
            for (long r = 0; r < g.rows; ++r)
                total += sum_over<Real>(g.run, [x = g.row(c, r)](auto like, long q) {
                    return read<decltype(like)>(x + q);
                });
            down[c] = Real(total);
        }
    }

    void gradient_of_weight(long i, Real* found) {
        const Layer& layer = layers[i];
        if (!layer.linear) {
            Convolution s = layer.convolution;
            s.z = layer.g.strides;
            const Planes<Real>& f = layer.f;
            weight_gradient(s, f.p - job.paddings[i] * (f.strides.line + job.batch), layer.g.p, found, scratch);
            return;
        }
        transpose(layer.lines, lines, layer.inputs, lines, layer.turned, layer.inputs);
        const bool whole = layer.inputs == layer.taps && reinterpret_cast<uintptr_t>(found) % kVectorBytes == 0;
        Real* to = whole ? found : down;
        multiply(Product<Real>{job.batch, layer.g.p, lines, 1, layer.turned, layer.inputs, to, layer.inputs, 0},
                 layer.channels, layer.inputs);
        if (whole) return;
        for (long c = 0; c < layer.channels; ++c)
            std::copy_n(to + c * layer.inputs, layer.taps, found + c * layer.taps);
    }

    // Whether the layer's input is a relu's output, which then gates the gradient.
    bool gates(long i) const { return layers[i - 1].place != kAfter; }

    void through_linear(long i) {
        const Layer& layer = layers[i];
        const Real* weight = own(job.weights, i, layer.channels * layer.taps);
        multiply(Product<Real>{layer.channels, weight, 1, layer.taps, layer.g.p, lines, down, lines, 0}, layer.taps,
                 lines);
        const Planes<Real>&f = layer.f, &to = layers[i - 1].g;
        const bool gate = gates(i);
        const Real* from = down;
        for (long c = 0; c < f.channels; ++c)
            for (long r = 0; r < f.rows; ++r)
                for (long place = 0; place < f.run; place += job.batch, from += lines)
                    over<Real>(job.batch,
                               [=, x = f.row(c, r) + place, g = to.row(c, r) + place](auto like, long q) {
                                   using T = decltype(like);
                                   const T own = read<T>(from + q), found = gate ? gated(own, read<T>(x + q)) : own;
                                   __builtin_memcpy(g + q, &found, sizeof found);
                               });
    }

    void through_convolution(long i) {
        const Layer& layer = layers[i];
        const Planes<Real>&f = layer.f, &g = layer.g, &to = layers[i - 1].g;
        const Convolution& forth = layer.convolution;
        const long rows = forth.kernel_rows - 1 - job.paddings[i], columns = forth.kernel_columns - 1 - job.paddings[i];
        Convolution s = forth;
        std::swap(s.channels, s.below);
        s.rows = f.rows;
        s.columns = f.run / job.batch;
        s.x = g.strides;
        s.z = to.strides;
        s.row_from = rows;  // the first row of the gradient that is there
        s.row_to = rows + forth.rows;
        s.column_from = columns;
        s.column_to = columns + forth.columns;
        pack_turned(s, own(job.weights, i, forth.channels * forth.taps()), packed);
        const Real* from = g.p - rows * g.strides.line - columns * job.batch;
        if (gates(i))
            convolve(s, from, packed, static_cast<const Real*>(nullptr), to.p,
                     [&f](Vector<Real> z, long c, long row, long q, long count) {
                         constexpr long lanes = Lanes<Real>::count;
                         const Real* x = f.row(c, row) + q;
                         return gated(z, count == lanes ? anywhere(x) : some(x, count));
                     });
        else
            convolve(s, from, packed, static_cast<const Real*>(nullptr), to.p,
                     [](Vector<Real> z, long, long, long, long) { return z; });
    }

    // In place: from the gradient at what BatchNorm gives to that at W f + b.
    void through_norm(long i) {
        const Layer& layer = layers[i];
        const Planes<Real>&g = layer.g, &x = layer.r;
        Real *down_scale = own(job.down_scales, i, layer.channels), *down_shift = own(job.down_shifts, i, layer.channels);
        const Real* scale = own(job.scales, i, layer.channels);
        const bool after = layer.place == kAfter;
        for (long c = 0; c < layer.channels; ++c) {
            const Real mean = layer.mean[c], inverse = layer.deviation[c];
            double total = 0, along = 0;
            for (long r = 0; r < g.rows; ++r) {
                const Real *own = g.row(c, r), *from = x.row(c, r);
                total += sum_over<Real>(g.run, [=](auto like, long q) { return read<decltype(like)>(own + q); });
                along += sum_over<Real>(g.run, [=](auto like, long q) {
                    using T = decltype(like);
                    return read<T>(own + q) * (read<T>(from + q) - mean);
                });
            }
            along *= inverse;
            if (down_scale) down_scale[c] = Real(along);
            if (down_shift) down_shift[c] = Real(total);
            const Real factor = scale ? inverse * scale[c] : inverse, n = Real(g.values());
            const Real level = Real(total) / n, slope = Real(along) * inverse / n;
            for (long r = 0; r < g.rows; ++r)
                over<Real>(g.run, [=, own = g.row(c, r), from = x.row(c, r)](auto like, long q) {
                    using T = decltype(like);
                    const T value = read<T>(from + q);
                    const T z = (read<T>(own + q) - level - (value - mean) * slope) * factor;
                    const T found = after ? gated(z, value) : z;
                    __builtin_memcpy(own + q, &found, sizeof found);
                });
        }
    }
};

// What `call` gives of a net in the memory of a thread; -1 if there is no memory for its layers' table.
template <class Real, class Call>
int64_t with_net(const Job& job, int64_t thread, Call call) {
    try {
        Net<Real> net(job, thread);
        return call(net);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // namespace

// Of some members on one thread, one after another.
#define TSDYN_OF_MEMBERS(Real, name, call)                                                \
    int64_t name(const Job* job, int64_t thread, int64_t first, int64_t last) {           \
        return with_net<Real>(*job, thread, [&](Net<Real>& net) {                         \
            for (int64_t member = first; member < last; ++member) net.call(member);       \
            return int64_t(0);                                                            \
        });                                                                               \
    }

extern "C" {
int64_t numbers_float32(const Job* job) {
    return with_net<float>(*job, 0, [](auto& net) { return int64_t(net.numbers()); });
}
int64_t numbers_float64(const Job* job) {
    return with_net<double>(*job, 0, [](auto& net) { return int64_t(net.numbers()); });
}
TSDYN_OF_MEMBERS(float, step_float32, step)
TSDYN_OF_MEMBERS(double, step_float64, step)
TSDYN_OF_MEMBERS(float, forward_float32, forward_to_outputs)
TSDYN_OF_MEMBERS(double, forward_float64, forward_to_outputs)
TSDYN_OF_MEMBERS(float, backward_float32, backward_from_outputs)
TSDYN_OF_MEMBERS(double, backward_float64, backward_from_outputs)
}
