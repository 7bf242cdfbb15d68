// Follows the kernels: what the tests call. `build` puts the list of kernels in place of instances.inc.

struct Instance {
    const char* name;
    void (*run)(void*);
};
static const Instance instances[] = {
#include "instances.inc"
};

extern "C" i64 call_size() { return sizeof(Call); }

extern "C" void name_array(void* begin, i64 bytes, char* written) {
    emulator::arrays.push_back({(char*)begin, (char*)begin + bytes, written});
}
extern "C" void forget_arrays() { emulator::arrays.clear(); }
extern "C" void traffic(i64* counts) {
    counts[0] = emulator::loaded;
    counts[1] = emulator::stored;
    counts[2] = emulator::wide;
    counts[3] = emulator::narrow_;
    emulator::loaded = emulator::stored = emulator::wide = emulator::narrow_ = 0;
}

// Returns what was wrong, or an empty string.
extern "C" const char* launch(const char* name, unsigned tiles, unsigned blocks, unsigned threads, void* call, u64 seed) {
    emulator::complaint.clear();
    const Instance* instance = nullptr;
    for (const Instance& each : instances)
        if (!strcmp(each.name, name)) instance = &each;
    if (!instance) return "no such kernel was compiled";
    const unsigned grid = tiles * blocks;
    if (!threads || !grid || threads > THREADS || blocks > 65535) return "a launch of a wrong size";
    blockDim.x = threads;
    gridDim = {tiles, blocks};
    emulator::entry = instance->run;
    emulator::argument = call;
    std::mt19937_64 random(seed);
    std::vector<unsigned> order(grid);
    for (unsigned k = 0; k < grid; ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned block : order) {
        blockIdx = {block % tiles, block / tiles};
        emulator::run_block(threads, random);
        if (!emulator::complaint.empty()) break;
    }
    return emulator::complaint.c_str();
}
