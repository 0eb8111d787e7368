// Memory for weights, activations and the key/value cache: zeroed and aligned to cache lines (64 bytes).
//
// Large buffers are mapped with huge pages where the system has them. A decode step walks through all of the weights
// once, and with 4 KiB pages it would look up a new page in the TLB every 4 KiB.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
inline int padded(int inputs) { return round_up(inputs, 64); }  // whole vectors, whatever the processor's vector width

template <class T>
struct Buffer {
    T* data = nullptr;
    size_t bytes = 0;
    explicit Buffer(size_t count = 0) { reset(count); }
    ~Buffer() { reset(0); }
    Buffer(const Buffer&) = delete;

    // Memory for `count` elements, all zero; what the buffer held before is freed. Throws std::bad_alloc.
    void reset(size_t count) {
        if (data && bytes >= MAPPED) munmap((void*)data, bytes);
        else std::free(data);
        data = nullptr, bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes >= MAPPED) {
            void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
            madvise(memory, bytes, MADV_HUGEPAGE);
#endif
            data = (T*)memory;
        } else if (bytes) {
            data = (T*)std::aligned_alloc(64, bytes);
            if (!data) throw std::bad_alloc();
            std::memset((void*)data, 0, bytes);
        }
    }
    operator T*() const { return data; }

   private:
    static constexpr size_t MAPPED = 1 << 21;  // bytes of a huge page
};
