// Channels: what a block keeps of its own, where they lie, and what becomes of the sums of each.

enum Layout { FIRST, SEAMED, LAST };
enum Mode { MOMENTS, PLAIN, RELU, MASKED };  // what g is: x - shift, dy, dy where z > 0, dy where the mask says
enum Coefficient { SHIFT, SCALE, OFFSET, K0, K1, COEFFICIENTS };
enum State { MEAN, VAR, RSTD, STATE_SHIFT, STATE_SCALE, STATE_OFFSET };
enum Own { WEIGHT = 1, BIAS = 2, PRIOR_MEAN = 4, PRIOR_VAR = 8, RUNNING_MEAN = 16, RUNNING_VAR = 32 };
enum { THREADS = 256, UNROLL = 4, CHANNELS = 264, GROUP = 32, HELPERS = 16, BLOCKS = 8 };

template <class T_, int V_, Layout L_> struct Access {
    typedef T_ T;
    typedef typename Compute<T>::type real;
    enum { V = V_, LAYOUT = L_, K = L_ == LAST ? V_ : L_ == SEAMED ? 2 : 1 };
};

template <class A> struct Shared {
    typename A::real table[COEFFICIENTS][CHANNELS];  // of the channels of this block
    typename A::real sum[2 * A::K * THREADS];
    double help[2][THREADS];
    typename A::real exchange[2][GROUP];  // the block's sums, for its cluster
};

// What a block works on: a tile of columns, and one of `blocks` shares of the rows or places.
struct Share {
    i64 tile, block, blocks;
};

// Channels as they lie in a row: with several samples (places) folded into one, c, C + c, 2C + c, ...
template <class A> __device__ i64 channel_at(const Call& call, i64 element) {
    return A::LAYOUT == LAST ? element : element / call.S;
}

struct Channels {
    i64 first, count, element;  // of a tile; its first element in the row
};

template <class A> __device__ Channels channels_of(const Call& call, i64 tile) {
    Channels c;
    c.element = tile * call.span * A::V;
    const i64 end = c.element + call.span * A::V;
    c.first = channel_at<A>(call, c.element);
    c.count = channel_at<A>(call, (end < call.row ? end : call.row) - 1) - c.first + 1;
    return c;
}

template <class T> __device__ double parameter(const Call& call, const void* values, int own, i64 c, double absent) {
    if (!values) return absent;
    if (call.elements & own) return (double)widen(load((const T*)values + c));
    return (double)load((const typename Compute<T>::type*)values + c);
}

template <class T> __device__ void set_parameter(const Call& call, void* values, int own, i64 c, double value) {
    typedef typename Compute<T>::type real;
    T narrowed;
    narrow(narrowed, (real)value);
    if (call.elements & own) store((T*)values + c, narrowed);
    else store((real*)values + c, (real)value);
}

template <class A> __device__ i64 index_of(const Call& call, i64 n, i64 s, i64 c) {
    return A::LAYOUT == LAST ? (n * call.S + s) * call.C + c : (n * call.C + c) * call.S + s;
}

// The middle one of three values of the channel: no single outlier, and exactly the value of a constant.
template <class A> __device__ typename A::real shift_of(const Call& call, i64 c) {
    typename A::real v[3];
    #pragma unroll 1  // code, and registers, that many kernels would carry three times
    for (int k = 0; k < 3; ++k) {
        i64 n = (call.N - 1) * k / 2, s = call.S / 2;
        if (call.parts) {
            const Part& part = call.part[0];
            Walk walk(call, part, (part.groups - 1) * k / 2 * part.positions + part.positions / 2, 1);
            walk.find(call, part);
            n = walk.n;
            s = walk.s;
        }
        const typename A::real value = widen(load((const typename A::T*)call.x + index_of<A>(call, n, s, c)));
        (k == 0 ? v[0] : k == 1 ? v[1] : v[2]) = value;
    }
    const typename A::real low = v[0] < v[1] ? v[0] : v[1], high = v[0] < v[1] ? v[1] : v[0];
    return v[2] < low ? low : v[2] > high ? high : v[2];
}

// Adds up a helper's share of what the blocks left of channel c.
template <class A> __device__ void gather(const Call& call, i64 c, int helper, int helpers, double total[2]) {
    typedef typename A::real real;
    const real* partial = (const real*)call.partial;
    const int blocks = (int)call.from_blocks;
    const i64 slots = call.from_places ? call.C : call.slots, folds = call.from_places ? 1 : call.fold;
    #pragma unroll 1
    for (i64 m = 0; m < folds; ++m) {
        i64 from = m * call.C + c, to = from;
        if (A::LAYOUT != LAST && !call.from_places) {
            to += (to * call.S + call.S - 1) / (call.span * call.vector);
            from += from * call.S / (call.span * call.vector);
        }
        #pragma unroll 1
        for (i64 slot = from; slot <= to; ++slot) {
            #pragma unroll 4
            for (int b = helper; b < blocks; b += helpers)
                for (int w = 0; w < 2; ++w) total[w] += (double)load(partial + slot + (b * 2 + w) * slots);
        }
    }
}

// For each channel of the block, by several threads: totals of the sums, then finish(local channel, totals).
template <class A, class Totals, class Finish>
__device__ void each_channel(Shared<A>& shared, i64 count, Totals totals, Finish finish) {
    const int t = threadIdx.x, threads = blockDim.x;
    int helpers = 1;
    while (helpers < 32 && 2 * helpers * count <= threads) helpers *= 2;
    const int groups = threads / helpers;
    for (i64 base = 0; base < count; base += groups) {
        const i64 c = base + t / helpers;
        const bool mine = t / helpers < groups && c < count;
        double total[2] = {0, 0};
        if (mine) totals(c, t % helpers, helpers, total);
        shared.help[0][t] = total[0];
        shared.help[1][t] = total[1];
        block_barrier();
        if (mine && t % helpers == 0) {
            for (int k = 1; k < helpers; ++k)
                for (int w = 0; w < 2; ++w) total[w] += shared.help[w][t + k];
            finish(c, total);
        }
        block_barrier();
    }
}

template <class A> __device__ void set_table(Shared<A>& shared, const Call& call, i64 local, i64 c) {
    typedef typename A::real real;
    for (int k = 0; k < 3; ++k) shared.table[k][local] = (real)load(call.state + (STATE_SHIFT + k) * call.C + c);
}

template <class A>
__device__ void finish_forward(Shared<A>& shared, const Call& call, i64 local, i64 c, bool owner, double total[2]) {
    typedef typename A::T T;
    typedef typename A::real real;
    const double given_mean = parameter<T>(call, call.prior_mean, PRIOR_MEAN, c, 0);
    const double given_var = parameter<T>(call, call.prior_var, PRIOR_VAR, c, 0);
    double mean = given_mean, var = given_var;
    if (call.prior < 1) {
        const double first = total[0] * call.total_scale, second = total[1] * call.total_scale;
        mean = (double)shift_of<A>(call, c) + first;
        var = second - first * first;
        var = var < 0 ? 0 : var;
        if (call.prior > 0) {
            const double own = 1 - call.prior, mixed = own * mean + call.prior * given_mean;
            var = own * (var + (mean - mixed) * (mean - mixed)) +
                  call.prior * (given_var + (given_mean - mixed) * (given_mean - mixed));
            mean = mixed;
        }
    }
    const double rstd = 1 / sqrt(var + call.eps);
    const double scale = parameter<T>(call, call.weight, WEIGHT, c, 1) * rstd;
    const real shift = (real)mean;
    const double offset = ((double)shift - mean) * scale + parameter<T>(call, call.bias, BIAS, c, 0);
    shared.table[SHIFT][local] = shift;
    shared.table[SCALE][local] = (real)scale;
    shared.table[OFFSET][local] = (real)offset;
    if (!owner) return;
    const double state[] = {mean, var, rstd, (double)shift, scale, offset};
    for (int k = 0; k < 6; ++k) store(call.state + k * call.C + c, state[k]);
    const bool finite = mean - mean == 0 && var - var == 0;
    if (call.running_mean && (finite || !call.skip_nonfinite)) {
        const double m = parameter<T>(call, call.running_mean, RUNNING_MEAN, c, 0);
        const double v = parameter<T>(call, call.running_var, RUNNING_VAR, c, 0);
        set_parameter<T>(call, call.running_mean, RUNNING_MEAN, c, m + call.momentum * (mean - m));
        set_parameter<T>(call, call.running_var, RUNNING_VAR, c, v + call.momentum * (var * call.unbiased - v));
    }
}

template <class A>
__device__ void finish_backward(Shared<A>& shared, const Call& call, i64 local, i64 c, bool owner, double total[2]) {
    typedef typename A::T T;
    typedef typename A::real real;
    set_table(shared, call, local, c);
    const double rounding = load(call.state + MEAN * call.C + c) - load(call.state + STATE_SHIFT * call.C + c);
    const double rstd = load(call.state + RSTD * call.C + c), scale = load(call.state + STATE_SCALE * call.C + c);
    const double dbias = total[0] * call.total_scale, second = total[1] * call.total_scale;
    const double dweight = (second - rounding * dbias) * rstd, k1 = scale * rstd * dweight;
    shared.table[K0][local] = (real)(scale * dbias - k1 * rounding);
    shared.table[K1][local] = (real)k1;
    if (owner && call.dweight) set_parameter<T>(call, call.dweight, WEIGHT, c, dweight);
    if (owner && call.dbias) set_parameter<T>(call, call.dbias, BIAS, c, dbias);
}
