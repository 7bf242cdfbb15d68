// Channels: the coefficients that a block keeps of them, where they lie in memory, and what becomes of their sums.

enum Layout { FIRST, SEAMED, LAST };
enum Mode { MOMENTS, PLAIN, RELU, MASKED };  // what g is: x - shift, dy, dy where z > 0, dy where the mask says
enum Coefficient { SHIFT, SCALE, OFFSET, K0, K1, COEFFICIENTS };
enum State { MEAN, VAR, RSTD, STATE_SHIFT, STATE_SCALE, STATE_OFFSET, STATE };
// Vectors of a value for each channel, some of them in x's own type: bit k of call.elements. Shifts never are.
enum Vector { WEIGHT, BIAS, PRIOR_MEAN, PRIOR_VAR, RUNNING_MEAN, RUNNING_VAR, SHIFTS, VECTORS };
enum { THREADS = 256, UNROLL = 4, ACCESSES = 8, CHANNELS = 264, HELPERS = 16, FINISHED = 2 };
// Blocks that a multiprocessor shall hold, which bounds registers; rows of dy and x that are loaded at a time.
enum { STEPS = 2 };
#if __CUDA_ARCH__ >= 1000  // where the same code needs more registers
enum { NORMALIZE_BLOCKS = 3, SUMS_BLOCKS = 3 };
#else
enum { NORMALIZE_BLOCKS = 4, SUMS_BLOCKS = 4 };
#endif

// A column of V elements has K sets of coefficients and of sums: one where it lies in one channel. WIDTH: positions of a
// map in an access to places.
template <class T_, int V_, Layout L_> struct Access {
    typedef T_ T;
    typedef typename Compute<T>::type real;
    enum { V = V_, LAYOUT = L_, K = L_ == FIRST ? 1 : V_, WIDTH = L_ == LAST ? 1 : V_ };
};

template <class A> struct Shared {
    typename A::real table[COEFFICIENTS][CHANNELS];  // of the channels of this block
    typename A::real sum[2 * A::K * (THREADS + 1)];
    typename A::real help[2][THREADS];
};

// What a block works on: a tile of columns, and a share of the rows or places.
struct Share { i64 tile, block; };

__device__ inline Share share_of_block() { return {blockIdx.x, blockIdx.y}; }

// Channels as they lie in a row: with several samples (places) folded into one, c, C + c, 2C + c, ...
template <class A> __device__ i64 channel_at(const Call& call, i64 element) {
    return A::LAYOUT == LAST ? element : divide(element, call.S);
}

struct Channels {
    i64 first, count, element;  // of a tile; its first element in the row
};

template <class A> __device__ Channels channels_of(const Call& call, i64 tile) {
    Channels c;
    c.element = tile * call.tile * A::V;
    const i64 end = c.element + call.tile * A::V;
    c.first = channel_at<A>(call, c.element);
    c.count = channel_at<A>(call, (end < call.row ? end : call.row) - 1) - c.first + 1;
    return c;
}

__device__ inline i64 channel_of(const Call& call, Channels channels, int local) {
    const i64 channel = channels.first + local;
    return channel - divide(channel, call.C) * call.C;
}

template <class T> __device__ double parameter(const Call& call, const void* values, int k, i64 c, double absent) {
    if (!values) return absent;
    if (call.elements >> k & 1) return (double)widen(load((const T*)values + c));
    return (double)load((const typename Compute<T>::type*)values + c);
}

template <class T> __device__ void set_parameter(const Call& call, void* values, int k, i64 c, double value) {
    typedef typename Compute<T>::type real;
    T narrowed;
    narrow(narrowed, (real)value);
    if (call.elements >> k & 1) store((T*)values + c, narrowed);
    else store((real*)values + c, (real)value);
}

// Sets a row of the block's table, for each of its channels, to value(row, local channel).
template <class A, class Value> __device__ void fill_table(Shared<A>& shared, int rows, i64 count, Value value) {
    for (int i = threadIdx.x; i < rows * (int)count; i += blockDim.x) {
        const int k = i / (int)count, local = i - k * (int)count;
        shared.table[k][local] = value(k, local);
    }
    block_barrier();
}

template <class A, class Channel>
__device__ void load_table(Shared<A>& shared, const Call& call, i64 count, bool slopes, Channel channel) {
    typedef typename A::real real;
    fill_table(shared, slopes ? (int)COEFFICIENTS : (int)K0, count, [&](int k, int local) {
        const double* from = k < K0 ? call.state + (STATE_SHIFT + k) * call.C : call.slopes + (k - K0) * call.C;
        return (real)load(from + channel(local));
    });
}

template <class A> __device__ i64 index_of(const Call& call, i64 n, i64 s, i64 c) {
    return A::LAYOUT == LAST ? (n * call.S + s) * call.C + c : (n * call.C + c) * call.S + s;
}

// The first, the middle and the last of what is drawn, k = 0, 1, 2.
template <class A> __device__ typename A::real some_value(const Call& call, int k, i64 c) {
    Piece piece = {(call.N - 1) * k / 2, (int)(call.S / 2), 1, 0};
    if (call.parts) {
        const Part& part = call.part[0];
        const i64 pieces = part.groups * part.runs * part.pieces;
        piece = piece_of(call, part, key_of(call, part), (u32)((pieces - 1) * k / 2));
    }
    const int first = piece.first * A::WIDTH;
    piece.s += first < piece.count ? first : piece.count - 1;
    if (piece.s >= (int)call.S) piece.s -= (int)call.S;
    return widen(load((const typename A::T*)call.x + index_of<A>(call, piece.n, piece.s, c)));
}

// Rounds a shift to 12 bits of the spread of x, so that x - shift is exact. Else all x of one binade would err by the
// same amount, and their sum by as many times that.
__device__ inline double few_bits(double shift, double spread) {
    if (!(spread > 0) || spread - spread != 0) return shift;
    const int bits = 11 - ilogb(spread);
    return ldexp(rint(ldexp(shift, bits)), -bits);
}

// Shifts by the middle one of three values of the channel: no single outlier, and exactly the value of a constant.
// The block that owns a channel leaves its shift for `finish_forward`.
template <class A, class Channel, class Owner>
__device__ void set_shifts(Shared<A>& shared, const Call& call, i64 count, Channel channel, Owner owns) {
    typedef typename A::real real;
    fill_table(shared, 3, count, [&](int k, int local) { return some_value<A>(call, k, channel(local)); });
    for (int local = threadIdx.x; local < (int)count; local += blockDim.x) {
        const real a = shared.table[0][local], b = shared.table[1][local], c = shared.table[2][local];
        const real low = a < b ? a : b, high = a < b ? b : a, middle = c < low ? low : c > high ? high : c;
        const real below = middle - (c < low ? c : low), above = (c > high ? c : high) - middle;
        const real shift = (real)few_bits(middle, below < above ? below : above);
        shared.table[SHIFT][local] = shift;
        if (owns(local)) store((real*)call.shift + channel(local), shift);
    }
    block_barrier();
}

// Adds up a helper's share of what the blocks left of channel c.
template <class A> __device__ void gather(const Call& call, i64 c, int helper, int helpers, double total[2]) {
    typedef typename A::real real;
    const real* partial = (const real*)call.partial;
    const i64 slots = call.from_places ? call.C : call.slots, folds = call.from_places ? 1 : call.fold;
    for (i64 m = 0; m < folds; ++m) {
        i64 from = m * call.C + c, to = from;
        if (A::LAYOUT != LAST && !call.from_places) {
            to += divide(to * call.S + call.S - 1, call.tile * call.vector);
            from += divide(from * call.S, call.tile * call.vector);
        }
        // Slots and blocks in one loop: its loads are independent of each other.
        const int width = (int)(to - from + 1), all = width * (int)call.from_blocks;
        #pragma unroll 4
        for (int e = helper; e < all; e += helpers) {
            const int block = (u32)e / (u32)width;
            const real* const left = partial + from + (e - block * width) + (i64)block * 2 * slots;
            for (int w = 0; w < 2; ++w) total[w] += (double)load(left + w * slots);
        }
    }
}

// What a channel is finished with, beside its sums, in shared memory.
struct Given {
    const double* values;
    __device__ double operator[](int k) const { return values[k * FINISHED]; }
};

// finish(channel, totals of the two sums, given) by one thread for each of the FINISHED channels of a block. given[k] is
// give(k, channel), k < VECTORS: loaded by a thread each, before the sums, or one load would wait for another.
template <class A, class Give, class Finish>
__device__ void finish_channels(const Call& call, bool totals, Give give, Finish finish) {
    struct Help { double of[2][THREADS], given[VECTORS * FINISHED]; };
    SHARED(Help, help);
    const int t = threadIdx.x, helpers = THREADS / FINISHED;
    const i64 c = (i64)blockIdx.x * FINISHED + t % FINISHED;
    double total[2] = {0, 0};
    const int v = t - (THREADS - VECTORS * FINISHED);  // of the last warp, whose share of the sums is the least
    if (v >= 0 && c < call.C) help.given[v] = give(v / FINISHED, c);
    if (totals && c < call.C) gather<A>(call, c, t / FINISHED, helpers, total);
    for (int w = 0; w < 2; ++w) help.of[w][t] = total[w];
    block_barrier();
    for (int half = THREADS / 2; half >= FINISHED; half /= 2) {
        if (t < half)
            for (int w = 0; w < 2; ++w) help.of[w][t] += help.of[w][t + half];
        block_barrier();
    }
    if (t >= FINISHED || c >= call.C) return;
    for (int w = 0; w < 2; ++w) total[w] = help.of[w][t] * call.total_scale;
    finish(c, total, Given{help.given + t});
}
