// A pool of threads that run the same function together, with barriers inside it.
//
// Between tokens the threads spin for a moment, because a sleeping thread takes longer to wake than a small model takes
// for a token; when no work comes they sleep. The calling thread is thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
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

// Phases of a step, each a number of pieces of work that are alike. A thread takes from the front of its own share, one piece
// after the other, and then from the back of others' shares: processors that share a machine are seldom equally fast.
class Phases {
   public:
    Phases(int phases, int threads) : threads(threads), shares(new Share[size_t(phases) * threads]) {}
    // Before the threads begin.
    void set(int phase, int pieces) {
        for (int i = 0; i < threads; i++)
            share(phase, i).rest = Rest{uint32_t(pieces * i / threads), uint32_t(pieces * (i + 1) / threads)};
    }
    // A piece for `thread`; -1 where all are taken.
    int take(int phase, int thread) {
        for (int i = 0; i < threads; i++) {
            std::atomic<Rest>& rest = share(phase, (thread + i) % threads).rest;
            Rest seen = rest.load(std::memory_order_relaxed);
            while (seen.from < seen.to) {
                const Rest left = i ? Rest{seen.from, seen.to - 1} : Rest{seen.from + 1, seen.to};
                if (rest.compare_exchange_weak(seen, left, std::memory_order_relaxed)) return int(i ? left.to : seen.from);
            }
        }
        return -1;
    }

   private:
    struct Rest { uint32_t from, to; };  // pieces
    struct alignas(64) Share { std::atomic<Rest> rest; };
    Share& share(int phase, int thread) { return shares[size_t(phase) * threads + thread]; }
    int threads;
    std::unique_ptr<Share[]> shares;
};
