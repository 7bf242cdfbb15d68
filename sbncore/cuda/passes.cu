// Passes over memory: a thread's column of everything, or its share of the places drawn.

template <class A> struct Lane {
    typename A::real value[COEFFICIENTS][A::K];

    // Takes the coefficients of a column that begins with so many elements of `local`'s channel.
    __device__ void take(const Shared<A>& shared, i64 local, i64 left, int count) {
        for (int k = 0; k < A::K; ++k) {
            for (int j = 0; j < count; ++j) value[j][k] = shared.table[j][local];
            if (A::LAYOUT == LAST || k + 1 == left) ++local;
        }
    }
    __device__ typename A::real at(int coefficient, int i) const { return value[coefficient][i % A::K]; }
};

template <class A, int M>
__device__ typename A::real gradient(const Lane<A>& lane, int i, typename A::real dy, typename A::real x, bool kept) {
    if (M == MOMENTS) return x - lane.at(SHIFT, i);
    if (M == RELU && fused(x - lane.at(SHIFT, i), lane.at(SCALE, i), lane.at(OFFSET, i)) <= 0) return 0;
    return M == MASKED && !kept ? 0 : dy;
}

// The mask holds a word for each column of UNROLL rows, a bit for each element.
template <int V> struct Bits { typedef typename Word<(UNROLL * V + 7) / 8>::type type; };

// The mask's bits of an element and of those behind it in an access to places, which lie in one byte.
__device__ inline u32 kept(const Call& call, i64 index) {
    const i64 V = call.vector, bytes = (UNROLL * V + 7) / 8;
    const i64 row = divide(index, call.row), element = index - row * call.row, column = divide(element, V);
    const i64 word = row / UNROLL * call.columns + column, bit = row % UNROLL * V + element - column * V;
    return load(call.mask + word * bytes + bit / 8) >> bit % 8;
}

// STEP rows of a thread's column, of x and of another array.
template <class A, int STEP_, bool X, bool OTHER> struct Rows {
    enum { STEP = STEP_ };
    Raw<typename A::T, A::V> x[STEP], other[STEP];
    const void* others;
    bool last;  // whether x is used for the last time

    __device__ void fetch(const Call& call, i64 begin, int from, i64 live) {
        #pragma unroll
        for (int u = 0; u < STEP; ++u)
            if (from + u < live) {
                if (X) x[u] = load_raw<typename A::T, A::V>(call.x, begin + (from + u) * call.row, last);
                if (OTHER) other[u] = load_raw<typename A::T, A::V>(others, begin + (from + u) * call.row, true);
            }
    }
};

// Calls visit(index of its first element, word of the mask, how many of UNROLL rows there are) for what is this
// thread's of so many times UNROLL rows: a column, whose coefficients are taken once. The first rows have been fetched
// by then, and are on their way while prepare() fills the block's table.
template <class A, class Rows, class Prepare, class Visit>
__device__ void everywhere(const Shared<A>& shared, const Call& call, Share share, i64 quads, Channels channels,
                           int count, Lane<A>& lane, Rows& rows, Prepare prepare, Visit visit) {
    const int TX = (int)call.tile, ty = threadIdx.x / TX, tx = threadIdx.x - ty * TX, TY = blockDim.x / TX;
    const i64 column = share.tile * TX + tx, element = column * A::V, from = share.block * quads + ty;
    i64 begin = from * UNROLL * call.row + element, word = from * call.columns + column;
    i64 live = column < call.columns && ty < TY ? call.rows - from * UNROLL : 0;
    rows.fetch(call, begin, 0, live);
    prepare();
    if (live <= 0) return;
    const i64 channel = channel_at<A>(call, element);
    lane.take(shared, channel - channels.first, (channel + 1) * call.S - element, count);
    for (i64 quad = ty;;) {
        visit(begin, word, live < UNROLL ? (int)live : (int)UNROLL);
        quad += TY;
        live -= TY * UNROLL;
        if (quad >= quads || live <= 0) return;
        begin += TY * UNROLL * call.row;
        word += TY * call.columns;
        rows.fetch(call, begin, 0, live);
    }
}

// Adds g and g * (x - shift) to first and second; writes dx = scale * g (less p times what the statistics
// pass on, in a repair) and dresidual = g where wanted.
template <class A, int M, bool SUM, bool REPAIR, class Prepare>
__device__ void sweep(const Shared<A>& shared, const Call& call, Share share, Channels channels, Prepare prepare,
                      typename A::real first[], typename A::real second[]) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V, READS_X = SUM || REPAIR || M == RELU, STEP = M == MOMENTS || A::K > 1 ? (int)UNROLL : (int)STEPS };
    const real p = (real)call.part[0].weight;
    void *const dx_to = REPAIR || call.writes ? call.dx : 0, *const dresidual_to = REPAIR || call.writes ? call.dresidual : 0;
    Lane<A> lane;
    Rows<A, STEP, READS_X, M != MOMENTS> rows;
    rows.others = call.dy;
    rows.last = M != MOMENTS;
    everywhere<A>(
        shared, call, share, REPAIR ? call.share : call.summing, channels, REPAIR ? (int)COEFFICIENTS : M == MOMENTS ? 1 : 3, lane,
        rows, prepare, [&](i64 begin, i64 word, int live) {
            u32 bits = 0;
            if (M == MASKED) bits = load((const typename Bits<V>::type*)call.mask + word);
            // In one channel few are added to few, and few such to many: rounding grows slowly.
            real few[A::K] = {}, products[A::K] = {}, *a = A::K > 1 ? first : few, *b = A::K > 1 ? second : products;
            #pragma unroll
            for (int h = 0; h < UNROLL; h += STEP) {
                #pragma unroll
                for (int u = 0; u < STEP; ++u) {
                    if (h + u >= live) continue;
                    const Pack<T, V> x = rows.x[u].unpacked(), dy = rows.other[u].unpacked();
                    Pack<T, V> dx, dresidual;
                    #pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const real xi = READS_X ? widen(x.at[i]) : real(0);
                        const real d = M == MOMENTS ? real(0) : widen(dy.at[i]);
                        const bool kept = bits >> ((h + u) * V + i) & 1;
                        const real g = gradient<A, M>(lane, i, d, xi, kept), deviation = xi - lane.at(SHIFT, i);
                        if (SUM) {
                            a[i % A::K] += g;
                            b[i % A::K] += g * deviation;
                        }
                        if (M == MOMENTS) continue;
                        real value = g * lane.at(SCALE, i);
                        if (REPAIR) value -= p * (lane.at(K0, i) + deviation * lane.at(K1, i));
                        narrow(dx.at[i], value);
                        narrow(dresidual.at[i], g);
                    }
                    if (M != MOMENTS && dx_to) store<T, V>(dx_to, begin + (h + u) * call.row, dx);
                    if (M >= RELU && dresidual_to) store<T, V>(dresidual_to, begin + (h + u) * call.row, dresidual);
                }
                if (h + STEP < UNROLL) rows.fetch(call, begin, h + STEP, live);
            }
            if (SUM && A::K == 1) {
                first[0] += few[0];
                second[0] += products[0];
            }
        });
}

template <class A, bool ACTIVATE, bool RESIDUAL, class Prepare>
__device__ void normalize_everywhere(const Shared<A>& shared, const Call& call, Share share, Channels channels, Prepare prepare) {
    typedef typename A::T T;
    typedef typename A::real real;
    enum { V = A::V, STEP = RESIDUAL ? (int)STEPS : (int)UNROLL };
    Lane<A> lane;
    Rows<A, STEP, true, RESIDUAL> rows;
    rows.others = call.residual;
    rows.last = true;
    everywhere<A>(
        shared, call, share, call.share, channels, 3, lane, rows, prepare, [&](i64 begin, i64 word, int live) {
            u32 bits = 0;
            #pragma unroll
            for (int h = 0; h < UNROLL; h += STEP) {
                #pragma unroll
                for (int u = 0; u < STEP; ++u) {
                    if (h + u >= live) continue;
                    const Pack<T, V> x = rows.x[u].unpacked(), residual = rows.other[u].unpacked();
                    Pack<T, V> y;
                    #pragma unroll
                    for (int i = 0; i < V; ++i) {
                        real z = fused(widen(x.at[i]) - lane.at(SHIFT, i), lane.at(SCALE, i), lane.at(OFFSET, i));
                        if (RESIDUAL) z += widen(residual.at[i]);
                        if (ACTIVATE && z <= 0) z = 0;  // not of a NaN, which passes
                        else bits |= 1u << ((h + u) * V + i);
                        narrow(y.at[i], z);
                    }
                    store<T, V>(call.y, begin + (h + u) * call.row, y);
                }
                if (h + STEP < UNROLL) rows.fetch(call, begin, h + STEP, live);
            }
            if (ACTIVATE && RESIDUAL && call.mask) {
                typedef typename Bits<V>::type bits_type;
                store((bits_type*)call.mask + word, (bits_type)bits);
            }
        });
}

// What a thread takes of a run at a time: up to ACCESSES words of WIDTH positions of one channel, each at a multiple of
// WIDTH in memory, so that runs of any place and length are read 16 bytes at a time (channels-last: a position, V
// channels wide). A run may begin and end within a word; one that wraps round its map goes on at the map's first word.
template <class A> struct Accesses {
    enum { WIDTH = A::WIDTH, ALL = (1 << WIDTH) - 1 };
    i64 base;  // first element of the map's first word
    int pitch;
    int before, start, end, tail;  // positions behind base: where the map begins, the run, where it ends or wraps, and ends then
    int first, heads, words;  // the run's first word, its words up to the map's end, and all
    int at, step;  // words of this thread

    __device__ Accesses() : words(0), at(0), step(0) {}
    __device__ void begin(const Call& call, const Part& part, const Piece& piece, i64 column, int lane) {
        const i64 map = A::LAYOUT == LAST ? piece.n * call.S * call.C + column * A::V : (piece.n * call.C + column) * call.S;
        before = A::LAYOUT == LAST ? 0 : (int)map & (WIDTH - 1);
        base = map - before;
        pitch = A::LAYOUT == LAST ? (int)call.C : (int)WIDTH;
        const int left = (int)call.S - piece.s, head = piece.count < left ? piece.count : left;
        start = before + piece.s;
        end = start + head;
        tail = before + piece.count - head;
        first = (u32)start / WIDTH;
        heads = (u32)(end - 1) / WIDTH - first + 1;
        words = heads + (tail > before ? (u32)(tail - 1) / WIDTH + 1 : 0);
        at = piece.first + lane;
        step = (int)part.lanes;
    }

    __device__ int word(int u) const {
        const int i = at + u * step;
        return i < heads ? first + i : i - heads;
    }
    __device__ i64 index(int u) const { return base + (i64)word(u) * pitch; }

    __device__ bool live(int u) const { return at + u * step < words; }

    // A bit for each position of a word that lies in the run.
    __device__ u32 inside(int u) const {
        if (WIDTH == 1) return 1;
        const bool head = at + u * step < heads;
        const int left = word(u) * WIDTH, from = (head ? start : before) - left, to = (head ? end : tail) - left;
        return ALL << (from > 0 ? from : 0) & (1 << (to < WIDTH ? to : (int)WIDTH)) - 1;
    }
};

// The columns of a tile of the pass over places: channels, or V of them in channels-last memory.
template <class A> struct Columns {
    i64 begin, count, column;  // its first channel, its channels, this thread's column
    int TX, TY, tx, ty;
    bool mine;

    __device__ Columns(const Call& call, Share share) {
        TX = (int)call.place_tile;
        TY = blockDim.x / TX;
        ty = threadIdx.x / TX;
        tx = threadIdx.x - ty * TX;
        begin = share.tile * TX * A::K;
        count = call.C - begin < TX * A::K ? call.C - begin : TX * A::K;
        column = share.tile * TX + tx;
        mine = column * A::K < call.C;
    }
};

// What a thread has read of a run: STEP words, and the mask there.
template <class A, int M, int STEP_> struct Taken {
    enum { V = A::V, STEP = STEP_ };
    Raw<typename A::T, V> x[STEP], dy[STEP];
    u32 kept[STEP];

    __device__ void take(const Call& call, const Accesses<A>& accesses, int from, const void* dys) {
        #pragma unroll
        for (int u = 0; u < STEP; ++u) {
            if (!accesses.live(from + u)) continue;
            x[u] = load_raw<typename A::T, V>(call.x, accesses.index(from + u));
            if (M != MOMENTS) dy[u] = load_raw<typename A::T, V>(dys, accesses.index(from + u));
            kept[u] = M == MASKED ? ::kept(call, accesses.index(from + u)) : 0;
        }
    }
};

// Calls use(what the thread has read, accesses, the first of them that it is) for all of a part; prepare() when the
// first is on its way. One hash gives up to ACCESSES words, STEP of them at a time.
template <class A, int M, int STEP, class Prepare, class Use>
__device__ void at_places(const Call& call, const Part& part, Share share, const Columns<A>& columns, const void* dys,
                          Prepare prepare, Use use) {
    const u64 key = key_of(call, part);
    const u32 lanes = (u32)part.lanes;  // unsigned: shorter divisions
    const int together = (u32)columns.TY / lanes, group = (u32)columns.ty / lanes;
    const i64 pieces = part.groups * part.runs * part.pieces, from = share.block * part.share;
    const i64 to = from + part.share < pieces ? from + part.share : pieces;
    i64 round = from;
    do {  // once, too, where the block has no share: its threads wait for each other in prepare()
        const bool mine = columns.mine && group < together && round + group < to;
        Accesses<A> accesses;
        if (mine) accesses.begin(call, part, piece_of(call, part, key, (u32)(round + group)), columns.column, columns.ty - group * (int)lanes);
        #pragma unroll
        for (int h = 0; h < ACCESSES; h += STEP) {
            Taken<A, M, STEP> taken;
            taken.take(call, accesses, h, dys);
            if (h == 0 && round == from) prepare();
            use(taken, accesses, h);
        }
    } while ((round += together) < to);
}

template <class A, int M, int STEP>
__device__ void add_places(const Lane<A>& lane, const Taken<A, M, STEP>& taken, const Accesses<A>& accesses, int from,
                           typename A::real first[], typename A::real second[]) {
    typedef typename A::real real;
    real few[A::K] = {}, products[A::K] = {}, *a = A::K > 1 ? first : few, *b = A::K > 1 ? second : products;
    #pragma unroll
    for (int u = 0; u < STEP; ++u) {
        if (!accesses.live(from + u)) continue;
        const u32 inside = accesses.inside(from + u);
        const Pack<typename A::T, A::V> x = taken.x[u].unpacked(), dy = taken.dy[u].unpacked();
        #pragma unroll
        for (int i = 0; i < A::V; ++i) {
            const bool in = A::WIDTH == 1 || inside >> i & 1;  // what is outside adds 0, whatever it is
            const real xi = in ? widen(x.at[i]) : lane.at(SHIFT, i);
            const real d = M == MOMENTS || !in ? real(0) : widen(dy.at[i]);
            const real g = gradient<A, M>(lane, i, d, xi, taken.kept[u] >> i & 1);
            a[i % A::K] += g;
            b[i % A::K] += g * (xi - lane.at(SHIFT, i));
        }
    }
    if (A::K == 1) {
        first[0] += few[0];
        second[0] += products[0];
    }
}

// Stores the elements of a word that lie in the run: others belong to other threads.
template <class A, class T, int V>
__device__ void store_inside(void* memory, i64 index, const Pack<T, V>& values, u32 inside) {
    if (inside == Accesses<A>::ALL) return store<T, V>(memory, index, values);
    #pragma unroll
    for (int i = 0; i + 1 < V; i += 2) {
        if ((inside >> i & 3) == 3) {
            store<T, 2>(memory, index + i, Pack<T, 2>{{values.at[i], values.at[i + 1]}});
            continue;
        }
        if (inside >> i & 1) store<T, 1>(memory, index + i, Pack<T, 1>{{values.at[i]}});
        if (inside >> i & 2) store<T, 1>(memory, index + i + 1, Pack<T, 1>{{values.at[i + 1]}});
    }
}

template <class A, int M, int STEP>
__device__ void repair_taken(const Lane<A>& lane, const Call& call, typename A::real p, const Taken<A, M, STEP>& taken,
                              const Accesses<A>& accesses, int from) {
    typedef typename A::T T;
    typedef typename A::real real;
    #pragma unroll
    for (int u = 0; u < STEP; ++u) {
        if (!accesses.live(from + u)) continue;
        const Pack<T, A::V> x = taken.x[u].unpacked(), dy = taken.dy[u].unpacked();
        Pack<T, A::V> dx;
        #pragma unroll
        for (int i = 0; i < A::V; ++i) {
            const real xi = widen(x.at[i]), d = widen(dy.at[i]);
            real value = d;
            if (!call.onto) value = gradient<A, M>(lane, i, d, xi, taken.kept[u] >> i & 1) * lane.at(SCALE, i);
            narrow(dx.at[i], value - p * (lane.at(K0, i) + (xi - lane.at(SHIFT, i)) * lane.at(K1, i)));
        }
        store_inside<A>(call.dx, accesses.index(from + u), dx, accesses.inside(from + u));
    }
}
