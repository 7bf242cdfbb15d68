// Passes over memory: a thread's column of everything, or its share of the places drawn.

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
