// Loops over tasks on the threads that PyTorch computes with.
//
// PyTorch's own operations run on the threads of an OpenMP library, which wait for the next operation by spinning. A
// second set of threads would compete with them for the same cores. So the tasks run on the same OpenMP threads,
// through GOMP_parallel, which GCC's and LLVM's library both have. Python finds it in the process and hands it over.
//
// Each task writes its own results, and no result depends on the thread that ran a task. So any number of threads gives
// the same bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "amx.h"

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Threads {
    Fork fork;
    int count;
};

template <class Task>
void parallel_for(const Threads& threads, int64_t tasks, const Task& task) {
    struct Loop {
        const Task& task;
        int64_t tasks;
        std::atomic<int64_t> next{0};
    } loop{task, tasks};
    const auto run = [](void* data) {
        const TileRegisters registers;
        Loop& loop = *static_cast<Loop*>(data);
        for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) loop.task(i);
    };
    const unsigned count = unsigned(std::min<int64_t>(threads.count, tasks));
    if (count > 1) threads.fork(run, &loop, count, 0);
    else run(&loop);
}

// `size` rows in blocks of about `target`, of which each thread gets the same number.
struct Blocks {
    int size, rows, count;

    Blocks(int size, int target, int multiple, int threads) : size(size) {
        const int blocks = (size + target - 1) / target, even = (blocks + threads - 1) / threads * threads;
        rows = (size + even * multiple - 1) / (even * multiple) * multiple;
        count = (size + rows - 1) / rows;
    }
    int begin(int64_t block) const { return int(block) * rows; }
    int end(int64_t block) const { return std::min(begin(block) + rows, size); }
};

// Memory of this thread that stays for the next call. Each slot is a block of its own.
template <class T = float>
T* scratch(int slot, int64_t count) {
    static thread_local std::vector<char> blocks[24];
    std::vector<char>& block = blocks[slot];
    const size_t bytes = size_t(count) * sizeof(T) + 64;
    if (block.size() < bytes) std::vector<char>(bytes).swap(block);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block.data()) + 63) / 64 * 64);
}
