// A pool of threads that run the same function together, with barriers inside it.
//
// Between tokens the threads spin for a moment, because a sleeping thread takes longer to wake than a small model takes
// for a token; when no work comes they sleep. The calling thread is thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
inline void relax() { asm volatile("yield"); }
#else
inline void relax() {}
#endif

class Pool {
   public:
    explicit Pool(int count) : count(count) {
        for (int i = 1; i < count; i++) workers.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        stopping = true;
        generation.fetch_add(1);
        generation.notify_all();
        for (auto& worker : workers) worker.join();
    }
    void run(const std::function<void(int)>& function) {
        task = &function;
        running.store(count, std::memory_order_relaxed);
        generation.fetch_add(1, std::memory_order_release);
        generation.notify_all();
        function(0);
        running.fetch_sub(1, std::memory_order_acq_rel);
        while (running.load(std::memory_order_acquire)) pause();
    }
    // Every thread of `run` calls it; nobody goes on before all have come.
    void barrier() {
        if (count == 1) return;
        const uint32_t phase = passed.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            passed.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; passed.load(std::memory_order_acquire) == phase; spins++) {
            relax();
            // More threads than free cores: let the others run.
            if (spins > SPINS) std::this_thread::yield();
        }
    }
    const int count;

   private:
    static constexpr int SPINS = 20000;
    void pause() {
        relax();
        if (++idle > SPINS) std::this_thread::yield(), idle = 0;
    }
    void work(int index) {
        uint32_t seen = 0;
        while (true) {
            int spins = 0;
            while (generation.load(std::memory_order_acquire) == seen) {
                relax();
                if (++spins > SPINS) generation.wait(seen, std::memory_order_acquire);
            }
            seen = generation.load(std::memory_order_acquire);
            if (stopping) return;
            (*task)(index);
            running.fetch_sub(1, std::memory_order_acq_rel);
        }
    }
    std::vector<std::thread> workers;
    const std::function<void(int)>* task = nullptr;
    alignas(64) std::atomic<uint32_t> generation{0};
    alignas(64) std::atomic<int> running{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> passed{0};
    std::atomic<bool> stopping{false};
    int idle = 0;
};
