// Sampled batch normalization: sums, normalize, repair, and a fused forward and backward, over raw memory.
//
//   sums_of_places  the sums over the places drawn                    reads the sample
//   sums            the sums over everything, dx = scale * g          reads x, dy     writes dx    (backward)
//   normalize       y = act(z)                                        reads x         writes y     (forward)
//   repair_places   dx at the places drawn                            reads, writes the sample
//   repair          dx everywhere: full batch normalization           reads x, dy     writes dx
//   forward         sums_of_places, then normalize, by a cluster of blocks for each group of channels
//   backward        sums, then repair_places, likewise
//
// z = (x - shift) * scale + offset (+ residual), shift being the mean rounded to the arithmetic's type. Sums
// are of g and g * (x - shift), in float32 (float64 for float64) within a block, in float64 over blocks;
// their order is fixed by the launch, and nothing is atomic. The state of a channel is float64.
//
// The pass over everything sees rows of columns: channels-first memory as (N, C * S), channels-last as
// (N * S, C), a column being V elements, one access of 16 bytes. A thread keeps to one column and takes
// UNROLL rows at a time, so that its coefficients stay in registers and as many loads are in flight: one set
// where the column lies in one channel (FIRST), two where it may straddle a seam (SEAMED), V in channels-last.

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

// ---- channels ------------------------------------------------------------------------------------------

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
    const i64 slots = call.from_places ? call.C : call.slots, folds = call.from_places ? 1 : call.fold;
    #pragma unroll 1
    for (i64 m = 0; m < folds; ++m) {
        i64 from = m * call.C + c, to = from;
        if (A::LAYOUT != LAST && !call.from_places) {
            to += (to * call.S + call.S - 1) / (call.span * call.vector);
            from += from * call.S / (call.span * call.vector);
        }
        #pragma unroll 4
        for (i64 b = helper; b < call.from_blocks; b += helpers)
            for (i64 slot = from; slot <= to; ++slot)
                for (int w = 0; w < 2; ++w) total[w] += (double)load(partial + (b * 2 + w) * slots + slot);
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

// ---- what becomes of a channel's sums ------------------------------------------------------------------

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

// ---- a thread's column ---------------------------------------------------------------------------------

template <class A> struct Lane {
    typename A::real value[COEFFICIENTS][A::K];
    int seam;  // the elements before it are of the first channel

    __device__ void take(const Shared<A>& shared, i64 local, i64 left, int count) {
        seam = left < A::V ? (int)left : A::V;
        for (int j = 0; j < count; ++j)
            for (int k = 0; k < A::K; ++k)
                value[j][k] = shared.table[j][A::LAYOUT == SEAMED && seam == A::V ? local : local + k];
    }
    __device__ typename A::real at(int coefficient, int i) const {
        if (A::LAYOUT == LAST) return value[coefficient][i % A::K];
        return A::LAYOUT == FIRST || i < seam ? value[coefficient][0] : value[coefficient][A::K - 1];
    }
    __device__ void add(typename A::real sums[], int i, typename A::real value) const {
        if (A::LAYOUT == LAST) sums[i % A::K] += value;
        else if (A::LAYOUT == FIRST || i < seam) sums[0] += value;
        else sums[A::K - 1] += value;
    }
};

template <class A, int M>
__device__ typename A::real gradient(const Lane<A>& lane, int i, typename A::real dy, typename A::real x, bool kept) {
    if (M == MOMENTS) return x - lane.at(SHIFT, i);
    if (M == RELU && fused(x - lane.at(SHIFT, i), lane.at(SCALE, i), lane.at(OFFSET, i)) <= 0) return 0;
    return M == MASKED && !kept ? 0 : dy;
}

// The mask holds a word for each column of UNROLL rows, a bit for each element.
template <int V> struct Bits { typedef typename Word<(UNROLL * V + 7) / 8>::type type; };

__device__ inline bool masked(const Call& call, i64 index) {
    const i64 V = call.vector, bytes = (UNROLL * V + 7) / 8;
    const i64 row = index / call.row, element = index - row * call.row;
    const i64 word = row / UNROLL * (call.row / V) + element / V, bit = row % UNROLL * V + element % V;
    return load(call.mask + word * bytes + bit / 8) >> bit % 8 & 1;
}

// ---- passes over everything ----------------------------------------------------------------------------

// Calls visit(column, first row of UNROLL, how many of them there are) for what is this thread's.
template <class A, class Enter, class Visit>
__device__ void everywhere(const Call& call, Share share, Enter enter, Visit visit) {
    const int tx = threadIdx.x % (int)call.tile, ty = threadIdx.x / (int)call.tile, TY = blockDim.x / (int)call.tile;
    const i64 quads = (call.rows + UNROLL - 1) / UNROLL;
    const i64 from = quads * share.block / share.blocks, to = quads * (share.block + 1) / share.blocks;
    for (i64 pass = 0; pass < call.passes; ++pass) {
        const i64 within = pass * call.tile + tx, column = share.tile * call.span + within;
        if (within >= call.span || column >= call.columns) continue;
        enter(column);
        for (i64 quad = from + ty; quad < to; quad += TY) {
            const i64 left = call.rows - quad * UNROLL;
            visit(column, quad, left < UNROLL ? (int)left : (int)UNROLL);
        }
    }
}

template <class A>
__device__ void enter_column(Lane<A>& lane, const Shared<A>& shared, const Call& call, i64 column, Channels channels,
                             int count) {
    const i64 element = column * A::V, channel = channel_at<A>(call, element);
    lane.take(shared, channel - channels.first, (channel + 1) * call.S - element, count);
}

// Adds g and g * (x - shift) to first and second; writes dx = scale * g (less p times what the statistics
// pass on, in a repair) and dresidual = g where wanted.
template <class A, int M, bool SUM, bool REPAIR>
__device__ void sweep(const Shared<A>& shared, const Call& call, Share share, typename A::real first[],
                      typename A::real second[]) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V, READS_X = SUM || REPAIR || M == RELU };
    const Channels channels = channels_of<A>(call, share.tile);
    const real p = (real)call.part[0].weight;
    Lane<A> lane;
    everywhere<A>(
        call, share,
        [&](i64 column) {
            enter_column(lane, shared, call, column, channels, REPAIR ? (int)COEFFICIENTS : M == MOMENTS ? 1 : 3);
        },
        [&](i64 column, i64 quad, int live) {
            const i64 begin = quad * UNROLL * call.row + column * V;
            Pack<T, V> x[UNROLL], dy[UNROLL];
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                if (u < live) {
                    if (READS_X) x[u] = load<T, V>(call.x, begin + u * call.row);
                    if (M != MOMENTS) dy[u] = load<T, V>(call.dy, begin + u * call.row);
                }
            real a[A::K] = {}, b[A::K] = {};  // few are added to few, and few such to many: rounding grows slowly
            u32 bits = 0;
            if (M == MASKED) bits = load((const typename Bits<V>::type*)call.mask + quad * call.columns + column);
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (u >= live) continue;
                Pack<T, V> dx, dresidual;
                #pragma unroll
                for (int i = 0; i < V; ++i) {
                    const real xi = READS_X ? widen(x[u].at[i]) : real(0), d = M == MOMENTS ? real(0) : widen(dy[u].at[i]);
                    const bool kept = bits >> (u * V + i) & 1;
                    const real g = gradient<A, M>(lane, i, d, xi, kept), deviation = xi - lane.at(SHIFT, i);
                    if (SUM) {
                        lane.add(a, i, g);
                        lane.add(b, i, g * deviation);
                    }
                    if (M == MOMENTS) continue;
                    real value = g * lane.at(SCALE, i);
                    if (REPAIR) value -= p * (lane.at(K0, i) + deviation * lane.at(K1, i));
                    narrow(dx.at[i], value);
                    narrow(dresidual.at[i], g);
                }
                if (M != MOMENTS && call.dx) store<T, V>(call.dx, begin + u * call.row, dx);
                if (M == MASKED && call.dresidual) store<T, V>(call.dresidual, begin + u * call.row, dresidual);
            }
            for (int k = 0; SUM && k < A::K; ++k) {
                first[k] += a[k];
                second[k] += b[k];
            }
        });
}

template <class A, bool ACTIVATE, bool RESIDUAL>
__device__ void normalize_everywhere(const Shared<A>& shared, const Call& call, Share share) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V };
    const Channels channels = channels_of<A>(call, share.tile);
    Lane<A> lane;
    everywhere<A>(
        call, share, [&](i64 column) { enter_column(lane, shared, call, column, channels, 3); },
        [&](i64 column, i64 quad, int live) {
            const i64 begin = quad * UNROLL * call.row + column * V;
            Pack<T, V> x[UNROLL], residual[UNROLL];
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                if (u < live) {
                    x[u] = load<T, V>(call.x, begin + u * call.row, true);
                    if (RESIDUAL) residual[u] = load<T, V>(call.residual, begin + u * call.row, true);
                }
            u32 bits = 0;
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (u >= live) continue;
                Pack<T, V> y;
                #pragma unroll
                for (int i = 0; i < V; ++i) {
                    real z = fused(widen(x[u].at[i]) - lane.at(SHIFT, i), lane.at(SCALE, i), lane.at(OFFSET, i));
                    if (RESIDUAL) z += widen(residual[u].at[i]);
                    if (ACTIVATE && z <= 0) z = 0;  // not of a NaN, which passes
                    else bits |= 1u << (u * V + i);
                    narrow(y.at[i], z);
                }
                store<T, V>(call.y, begin + u * call.row, y);
            }
            if (ACTIVATE && RESIDUAL && call.mask) {
                typedef typename Bits<V>::type bits_type;
                store((bits_type*)call.mask + quad * call.columns + column, (bits_type)bits);
            }
        });
}

// ---- passes over the places drawn ----------------------------------------------------------------------

// Calls visit(indices in memory, how many of them there are, the part) for what is this thread's: up to
// UNROLL places of one column, of V channels in channels-last memory and of one channel else.
template <class A, class Visit>
__device__ void at_places(const Call& call, Share share, i64 column, int ty, int TY, Visit visit) {
    for (int k = 0; k < call.parts; ++k) {
        const Part& part = call.part[k];
        const i64 places = part.groups * part.positions;
        const i64 from = places * share.block / share.blocks + ty, to = places * (share.block + 1) / share.blocks;
        if (from >= to) continue;
        Walk walk(call, part, from, TY);
        for (i64 r = from; r < to;) {
            i64 index[UNROLL];
            int live = 0;
            #pragma unroll 1
            for (; live < UNROLL && r < to; ++live, r += TY, walk.next(part)) {
                walk.find(call, part);
                const i64 found = index_of<A>(call, walk.n, walk.s, column * A::V);
                #pragma unroll
                for (int u = 0; u < UNROLL; ++u)
                    if (u == live) index[u] = found;  // an index known to the compiler keeps it in registers
            }
            visit(index, live, (typename A::real)part.weight);
        }
    }
}

template <class A, int M>
__device__ void sum_places(const Lane<A>& lane, const Call& call, Share share, i64 column, int ty, int TY,
                           typename A::real first[], typename A::real second[]) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V };
    at_places<A>(
        call, share, column, ty, TY, [&](const i64 index[], int live, real weight) {
            Pack<T, V> x[UNROLL], dy[UNROLL];
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                if (u < live) {
                    x[u] = load<T, V>(call.x, index[u]);
                    if (M != MOMENTS) dy[u] = load<T, V>(call.dy, index[u]);
                }
            real few[A::K] = {}, products[A::K] = {};
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                for (int i = 0; i < V; ++i) {
                    if (u >= live) continue;
                    const real xi = widen(x[u].at[i]), d = M == MOMENTS ? real(0) : widen(dy[u].at[i]);
                    const real g = gradient<A, M>(lane, i, d, xi, M == MASKED && masked(call, index[u] + i));
                    lane.add(few, i, g);
                    lane.add(products, i, g * (xi - lane.at(SHIFT, i)));
                }
            for (int k = 0; k < A::K; ++k) {
                first[k] += weight * few[k];
                second[k] += weight * products[k];
            }
        });
}

template <class A, int M>
__device__ void repair_at_places(const Lane<A>& lane, const Call& call, Share share, i64 column, int ty, int TY) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V };
    at_places<A>(
        call, share, column, ty, TY, [&](const i64 index[], int live, real p) {
            Pack<T, V> x[UNROLL], dy[UNROLL];
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                if (u < live) {
                    x[u] = load<T, V>(call.x, index[u], true);
                    dy[u] = load<T, V>(call.onto ? call.dx : call.dy, index[u], true);
                }
            #pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (u >= live) continue;
                Pack<T, V> dx;
                for (int i = 0; i < V; ++i) {
                    const real xi = widen(x[u].at[i]), d = widen(dy[u].at[i]);
                    real value = d;
                    if (!call.onto)
                        value = gradient<A, M>(lane, i, d, xi, M == MASKED && masked(call, index[u] + i)) * lane.at(SCALE, i);
                    narrow(dx.at[i], value - p * (lane.at(K0, i) + (xi - lane.at(SHIFT, i)) * lane.at(K1, i)));
                }
                store<T, V>(call.dx, index[u], dx);
            }
        });
}

// ---- from the threads' sums to the block's --------------------------------------------------------------

// Leaves in the first row of threads what its column's threads have summed.
template <class A>
__device__ void sum_rows(Shared<A>& shared, const typename A::real first[], const typename A::real second[], int TX) {
    const int t = threadIdx.x, threads = blockDim.x, ty = t / TX;
    for (int k = 0; k < A::K; ++k) {
        shared.sum[k * threads + t] = first[k];
        shared.sum[(A::K + k) * threads + t] = second[k];
    }
    block_barrier();
    for (int rows = threads / TX; rows > 1;) {
        const int half = (rows + 1) / 2;
        if (ty < rows - half)
            for (int j = 0; j < 2 * A::K; ++j) shared.sum[j * threads + t] += shared.sum[j * threads + t + half * TX];
        block_barrier();
        rows = half;
    }
}

// put(which sum, local channel, value) where each column holds K channels of its own.
template <class A, class Put>
__device__ void sums_by_column(Shared<A>& shared, const typename A::real first[], const typename A::real second[],
                               int TX, Put put) {
    sum_rows(shared, first, second, TX);
    for (int o = threadIdx.x; o < 2 * A::K * TX; o += blockDim.x)
        put(o / TX / A::K, (i64)(o % TX) * A::K + o / TX % A::K, shared.sum[o / TX * blockDim.x + o % TX]);
}

// The same in channels-first memory, where several columns share a channel.
template <class A, class Put>
__device__ void sums_by_channel(Shared<A>& shared, const Call& call, const typename A::real first[],
                                const typename A::real second[], Channels channels, Put put) {
    typedef typename A::real real;
    const int t = threadIdx.x, threads = blockDim.x, TX = (int)call.tile;
    const int helpers = threads < HELPERS ? 1 : HELPERS, groups = threads / helpers, helper = t % helpers;
    sum_rows(shared, first, second, TX);
    for (i64 base = 0; base < channels.count; base += groups) {
        const i64 local = base + t / helpers;
        const bool mine = t / helpers < groups && local < channels.count;
        double total[2] = {0, 0};
        if (mine) {
            i64 from = (channels.first + local) * call.S - channels.element;
            i64 to = (from + call.S - 1) / A::V;
            from = from < 0 ? 0 : from / A::V;
            if (to >= TX) to = TX - 1;
            for (i64 column = from + helper; column <= to; column += helpers) {
                const bool behind_seam = channel_at<A>(call, channels.element + column * A::V) != channels.first + local;
                for (int w = 0; w < 2; ++w)
                    total[w] += (double)shared.sum[(w * A::K + (behind_seam ? A::K - 1 : 0)) * threads + column];
            }
        }
        shared.help[0][t] = total[0];
        shared.help[1][t] = total[1];
        block_barrier();
        if (mine && helper == 0)
            for (int w = 0; w < 2; ++w) {
                for (int k = 1; k < helpers; ++k) total[w] += shared.help[w][t + k];
                put(w, local, (real)total[w]);
            }
        block_barrier();
    }
}

// ---- kernels -------------------------------------------------------------------------------------------

// Parallel: a block is a tile of columns times a share of the rows; see sbncore.cuda.geometry.
__device__ inline Share share_of(i64 tiles, i64 blocks) { return {blockIdx.x % tiles, blockIdx.x / tiles, blocks}; }

// A tile's columns owned by this block, of which it alone writes the state and the gradients.
template <class A> __device__ bool owns(const Call& call, Share share, Channels channels, i64 channel) {
    const bool begins_here = A::LAYOUT == LAST || channel * call.S >= channels.element;
    return share.block == 0 && channel < call.C && begins_here;
}

template <class A, class Prepare>
__device__ void prepare_tile(Shared<A>& shared, const Call& call, Share share, bool totals, Prepare prepare) {
    const Channels channels = channels_of<A>(call, share.tile);
    each_channel(
        shared, channels.count,
        [&](i64 local, int helper, int helpers, double total[2]) {
            if (totals) gather<A>(call, (channels.first + local) % call.C, helper, helpers, total);
        },
        [&](i64 local, double total[2]) {
            const i64 channel = channels.first + local;
            prepare(local, channel % call.C, owns<A>(call, share, channels, channel), total);
        });
}

__device__ inline void keep_step(const Call& call) {
    if (call.step && call.step_kept && blockIdx.x == 0 && threadIdx.x == 0) store(call.step_kept, load(call.step));
}

template <class T, int V, Layout L, Mode M, bool SUM> __global__ void __launch_bounds__(THREADS, 2) sums(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    prepare_tile(shared, call, share, false, [&](i64 local, i64 c, bool, double*) {
        if (M == MOMENTS) shared.table[SHIFT][local] = shift_of<A>(call, c);
        else set_table(shared, call, local, c);
    });
    real first[A::K] = {}, second[A::K] = {};
    sweep<A, M, SUM, false>(shared, call, share, first, second);
    if (!SUM) return;
    const Channels channels = channels_of<A>(call, share.tile);
    const auto put = [&](int w, i64 local, real value) {
        const i64 slot = channels.first + local + (L == LAST ? 0 : share.tile);
        if (local < channels.count) store((real*)call.partial + (share.block * 2 + w) * call.slots + slot, value);
    };
    if (L == LAST) sums_by_column(shared, first, second, (int)call.tile, put);
    else sums_by_channel(shared, call, first, second, channels, put);
}

template <class T, int V, Layout L, bool ACTIVATE, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, 2) normalize(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    keep_step(call);
    prepare_tile(shared, call, share, call.prior < 1, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_forward(shared, call, local, c, owner, total);
    });
    normalize_everywhere<A, ACTIVATE, RESIDUAL>(shared, call, share);
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 2) repair(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    prepare_tile(shared, call, share, true, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    sweep<A, M, false, true>(shared, call, share, 0, 0);
}

// The channels of a tile of the pass over places, and prepare(local, channel, owner, totals) for each.
template <class A, class Prepare>
__device__ void prepare_places(Shared<A>& shared, const Call& call, Share share, bool totals, Prepare prepare) {
    const i64 begin = share.tile * call.place_tile * A::V, left = call.C - begin;
    each_channel(
        shared, left < call.place_tile * A::V ? left : call.place_tile * A::V,
        [&](i64 local, int helper, int helpers, double total[2]) {
            if (totals) gather<A>(call, begin + local, helper, helpers, total);
        },
        [&](i64 local, double total[2]) { prepare(local, begin + local, share.block == 0, total); });
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 1) sums_of_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.place_tiles, call.place_blocks);
    prepare_places(shared, call, share, false, [&](i64 local, i64 c, bool, double*) {
        if (M == MOMENTS) shared.table[SHIFT][local] = shift_of<A>(call, c);
        else set_table(shared, call, local, c);
    });
    const int TX = (int)call.place_tile, tx = threadIdx.x % TX;
    const i64 column = share.tile * TX + tx;
    real first[A::K] = {}, second[A::K] = {};
    if (column * V < call.C) {
        Lane<A> lane;
        lane.take(shared, tx * V, V, M == MOMENTS ? 1 : 3);
        sum_places<A, M>(lane, call, share, column, threadIdx.x / TX, blockDim.x / TX, first, second);
    }
    sums_by_column(shared, first, second, TX, [&](int w, i64 local, real value) {
        const i64 c = share.tile * TX * V + local;
        if (c < call.C) store((real*)call.partial + (share.block * 2 + w) * call.C + c, value);
    });
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 1) repair_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.place_tiles, call.place_blocks);
    prepare_places(shared, call, share, true, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    const int TX = (int)call.place_tile, tx = threadIdx.x % TX;
    const i64 column = share.tile * TX + tx;
    if (column * V >= call.C) return;
    Lane<A> lane;
    lane.take(shared, tx * V, V, COEFFICIENTS);
    repair_at_places<A, M>(lane, call, share, column, threadIdx.x / TX, blockDim.x / TX);
}

// A cluster's share: its blocks take the rows, and the places, of one group of channels.
__device__ inline Share share_of_cluster() { return {blockIdx.x / BLOCKS, blockIdx.x % BLOCKS, BLOCKS}; }

// Every block adds up the sums of its cluster's blocks, then prepares all channels of the group.
template <class A, class Prepare>
__device__ void prepare_cluster(Shared<A>& shared, const Call& call, Share share, Prepare prepare) {
    const Channels channels = channels_of<A>(call, share.tile);
    cluster_barrier();
    each_channel(
        shared, channels.count,
        [&](i64 local, int helper, int helpers, double total[2]) {
            for (int rank = helper; rank < BLOCKS; rank += helpers)
                for (int w = 0; w < 2; ++w) total[w] += (double)of_rank(&shared.exchange[w][local], rank);
        },
        [&](i64 local, double total[2]) { prepare(local, channels.first + local, share.block == 0, total); });
    cluster_barrier();  // no block leaves, or writes its sums anew, while another reads them
}

template <class T, int V, Layout L, bool ACTIVATE, bool RESIDUAL>
__global__ void CLUSTER(BLOCKS) __launch_bounds__(THREADS, 2) forward(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef Access<T, 1, FIRST> Single;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of_cluster();
    const Channels channels = channels_of<A>(call, share.tile);
    keep_step(call);
    each_channel(shared, channels.count, [](i64, int, int, double*) {}, [&](i64 local, double*) {
        shared.table[SHIFT][local] = shift_of<A>(call, channels.first + local);
    });
    real first[A::K] = {}, second[A::K] = {};
    const auto put = [&](int w, i64 local, real value) { shared.exchange[w][local] = value; };
    if (call.parts) {
        const int TX = (int)channels.count, tx = threadIdx.x % TX, TY = blockDim.x / TX, ty = threadIdx.x / TX;
        Lane<Single> lane;
        lane.value[SHIFT][0] = shared.table[SHIFT][tx];
        if (ty < TY) sum_places<Single, MOMENTS>(lane, call, share, channels.first + tx, ty, TY, first, second);
        sum_rows(shared, first, second, TX);
        for (int o = threadIdx.x; o < 2 * TX; o += blockDim.x)
            put(o / TX, o % TX, shared.sum[o / TX * A::K * blockDim.x + o % TX]);
    } else {
        sweep<A, MOMENTS, true, false>(shared, call, share, first, second);
        sums_by_channel(shared, call, first, second, channels, put);
    }
    prepare_cluster(shared, call, share, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_forward(shared, call, local, c, owner, total);
    });
    normalize_everywhere<A, ACTIVATE, RESIDUAL>(shared, call, share);
}

template <class T, int V, Layout L, Mode M>
__global__ void CLUSTER(BLOCKS) __launch_bounds__(THREADS, 2) backward(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef Access<T, 1, FIRST> Single;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of_cluster();
    const Channels channels = channels_of<A>(call, share.tile);
    each_channel(shared, channels.count, [](i64, int, int, double*) {}, [&](i64 local, double*) {
        set_table(shared, call, local, channels.first + local);
    });
    real first[A::K] = {}, second[A::K] = {};
    sweep<A, M, true, false>(shared, call, share, first, second);
    sums_by_channel(shared, call, first, second, channels, [&](int w, i64 local, real value) {
        shared.exchange[w][local] = value;
    });
    prepare_cluster(shared, call, share, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    const int TX = (int)channels.count, tx = threadIdx.x % TX, TY = blockDim.x / TX, ty = threadIdx.x / TX;
    if (ty >= TY) return;
    Lane<Single> lane;
    for (int k = 0; k < COEFFICIENTS; ++k) lane.value[k][0] = shared.table[k][tx];
    repair_at_places<Single, M>(lane, call, share, channels.first + tx, ty, TY);
}
