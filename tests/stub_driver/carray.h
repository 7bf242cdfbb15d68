// Stands in for CuPy's headers where an elementwise kernel of CuPy's is compiled for the host.
//
// The structs are arguments: their fields are those of cupy/carray.cuh.
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define CUPY_FOR(i, n) for (ptrdiff_t i = 0; i < (n); ++i)

typedef _Float16 float16;

template <class T, int NDIM, bool CONTIGUOUS, bool INDEX32>
struct CArray {
    T* data;
    ptrdiff_t size, shape[NDIM], strides[NDIM];

    T& operator[](ptrdiff_t i) const {
        if (CONTIGUOUS) return data[i];
        char* at = (char*)data;
        for (int axis = NDIM; --axis >= 0; i /= shape[axis]) at += strides[axis] * (i % shape[axis]);
        return *(T*)at;
    }
};

template <int NDIM, bool INDEX32>
struct CIndexer {
    ptrdiff_t count, shape[NDIM], index[NDIM];
    inline static ptrdiff_t now;

    ptrdiff_t size() const { return count; }
    void set(ptrdiff_t i) { now = i; }
    ptrdiff_t get() const { return now; }
};

typedef void Written(void* begin, size_t bytes);

// Tells of every element of an array that a kernel may have written, of neighbours together.
template <class A> void tell(const A& array, Written* written) {
    char *begin = nullptr, *end = nullptr;
    for (ptrdiff_t i = 0; i < array.size; ++i) {
        char* at = (char*)&array[i];
        if (at != end) {
            if (end) written(begin, end - begin);
            begin = at;
        }
        end = at + sizeof array[i];
    }
    if (end) written(begin, end - begin);
}
