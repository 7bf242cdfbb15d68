// A call's arguments, and the places its plan drew: sbncore.hashing and sbncore.plans, bit for bit.

enum Kind { STRIDED, DISTINCT, MAP, SCATTERED };

// A part of a plan: `groups` groups (samples, or single places) of `positions` places each.
struct Part {
    u64 key;         // final; or, where the step is read from the device, of (seed, layer)
    u64 stream;      // number of the part, absorbed behind such a step
    double weight;   // p of each place
    i64 kind, first, rows, groups, positions, length, stride, align, common;
    const int* table;  // values drawn by `draw`, where they are few
};

enum { PARTS = 8, SORTED = 4096, ROUNDS = 8 };

// One layout of bytes for every kernel: sbncore.cuda.call packs it. Pointers that are 0 are absent.
struct Call {
    // outputs
    void *y, *dx, *dresidual;
    u8* mask;             // see masked()
    void *dweight, *dbias, *running_mean, *running_var;
    double* state;        // (6, C): mean, var, rstd, shift, scale, offset
    i64* step_kept;
    void* partial;        // (blocks, 2, slots)
    // inputs
    const void *x, *dy, *residual, *weight, *bias, *prior_mean, *prior_var;
    const i64* step;      // absent where keys are final
    // numbers
    double prior, eps, momentum, unbiased;
    double total_scale;   // of the sums: makes the weights sum to 1, or estimates the sums over all places
    i64 skip_nonfinite;
    i64 elements;         // bits of what is in x's own type and not in the arithmetic's: see Own
    i64 from_places, from_blocks;  // who left the sums that are read
    i64 onto;             // repair what an overlapping part has repaired
    // the pass over everything: rows of `row` elements, each of `fold` samples (places, in channels-last),
    // in columns of `vector`; a tile is `span` columns, taken `tile` at a time; a block leaves `slots` sums
    i64 N, C, S, rows, row, vector, fold, columns, tiles, span, tile, passes, blocks, slots;
    // the pass over places: `place_tiles` tiles of `place_tile` columns
    i64 place_tile, place_tiles, place_blocks;
    i64 parts;
    Part part[PARTS];
};

__device__ inline u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ inline u64 absorb(u64 key, u64 word) { return mix((key ^ word) + 0x9E3779B97F4A7C15ull); }

__device__ inline i64 bounded(u64 word, i64 size) { return (i64)(((word >> 32) * (u64)size) >> 32); }

__device__ inline i64 permute(u64 key, u64 value, u64 size) {
    int bits = 0;
    while (bits < 64 && ((size - 1) >> bits)) ++bits;
    const int low = bits / 2;
    const u64 low_mask = (1ull << low) - 1, high_mask = (1ull << (bits - low)) - 1;
    do {
        u64 a = value >> low, b = value & low_mask;
        for (int r = 0; r < ROUNDS; ++r) {
            const u64 k = absorb(key, r);
            if (r % 2 == 0) b ^= (absorb(k, a) >> 32) & low_mask;
            else a ^= (absorb(k, b) >> 32) & high_mask;
        }
        value = (a << low) | b;
    } while (value >= size);
    return (i64)value;
}

__device__ inline u64 key_of(const Call& call, const Part& part) {
    return call.step ? absorb(absorb(part.key, (u64)load(call.step)), part.stream) : part.key;
}

__device__ inline i64 range_of(const Call& call, const Part& part) {
    return part.kind == SCATTERED ? part.rows * call.S : part.rows;
}

// Where the j-th group begins: n * S + s.
__device__ inline i64 origin(const Call& call, const Part& part, u64 key, i64 j) {
    if (part.kind == MAP) {
        const i64 n = part.first + j;
        return n * call.S + part.align * bounded(absorb(key, part.common ? 0 : n), call.S / part.align);
    }
    if (part.kind == STRIDED)
        return (part.first + (bounded(absorb(key, 0), part.rows) + part.stride * j) % part.rows) * call.S;
    const i64 drawn = part.table ? (i64)load(part.table + j) : permute(key, j, range_of(call, part));
    return part.kind == SCATTERED ? part.first * call.S + drawn : (part.first + drawn) * call.S;
}

// Walks the places (n, s) of a part from one to the next, `step` apart; runs wrap round the map.
struct Walk {
    i64 n, s, j, q, group, start, further_j, further_q;
    u64 key;

    __device__ Walk(const Call& call, const Part& part, i64 from, i64 step) {
        key = key_of(call, part);
        j = from / part.positions;
        q = from - j * part.positions;
        further_j = step / part.positions;
        further_q = step - further_j * part.positions;
        group = -1;
    }
    __device__ void find(const Call& call, const Part& part) {
        if (j != group) {
            group = j;
            const i64 begin = origin(call, part, key, j);
            n = begin / call.S;
            start = begin - n * call.S;
        }
        s = start + (q < part.length ? q : q / part.length * part.stride + q % part.length);
        if (s >= call.S) s -= call.S;
    }
    __device__ void next(const Part& part) {
        j += further_j;
        q += further_q;
        if (q >= part.positions) {
            q -= part.positions;
            ++j;
        }
    }
};

// table[rank of hash(i) among all] = i, of the first ranks: `distinct` for few values.
// Parallel: a thread ranks one value; every block hashes them all (32 KB of shared memory).
struct Hashes { u64 of[SORTED]; };

__global__ void draw(const __grid_constant__ Call call) {
    SHARED(Hashes, hashes);
    for (int k = 0; k < call.parts; ++k) {
        const Part& part = call.part[k];
        const int size = (int)range_of(call, part);
        if (!part.table) continue;
        const u64 key = key_of(call, part);
        for (int i = threadIdx.x; i < size; i += blockDim.x) hashes.of[i] = absorb(key, i);
        block_barrier();
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size) {
            const u64 mine = hashes.of[i];
            int rank = 0;
            for (int other = 0; other < size; ++other)
                rank += hashes.of[other] < mine || (hashes.of[other] == mine && other < i);
            if (rank < part.groups) store((int*)part.table + rank, i);
        }
        block_barrier();
    }
}
