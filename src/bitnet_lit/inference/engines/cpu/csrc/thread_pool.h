// A parallel loop over chunks of work, by work stealing, that does not wait for threads which the system does not run.
//
// The calling thread, thread 0, gives every thread a range of the chunks. A worker that is awake finds its range and
// begins. Whoever has finished its own range takes chunks from the ranges of others, thread 0 too. Taking a chunk is
// all there is to joining the loop: it ends when all chunks are taken and those who took some have said that they are
// done. So a worker that got no processor, because another program has it, costs nothing.
//
// What a loop costs is how often a cache line moves from one core to another. So each worker has one line of its own:
// thread 0 writes the range into it, and the worker takes chunks there and then says there how many it has done.
//
// Workers spin for a moment before they sleep, because waking one takes longer than a small model takes for a layer. On
// a busy machine, several threads should be about as fast as one: a worker that is preempted while it spins sleeps
// sooner; where one is preempted in the middle of a chunk, or is woken several times and does not come, thread 0 works
// alone for RESTS times as long as it lost.
#pragma once

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "spin_wait.h"

// One of `parts` nearly equal parts of `count` elements, of which units of `unit` stay together: [from, to).
inline std::pair<int, int> part_of(int part, int parts, int count, int unit) {
    const int64_t units = (count + unit - 1) / unit;
    const auto end = [&](int64_t part) { return int(std::min<int64_t>(count, units * part / parts * unit)); };
    return {end(part), end(part + 1)};
}

class ThreadPool {
   public:
    explicit ThreadPool(int threads) : count(std::max(threads, 1)), slots(new Slot[size_t(count)]) {}
    ~ThreadPool() {
        if (!workers) return;
        stopping = true;
        wake_ups++, wake_ups.notify_all();
        for (auto& worker : *workers) worker.join();
    }
    ThreadPool(const ThreadPool&) = delete;

    // Runs body(thread, next_chunk) on thread 0 and on the workers: next_chunk() is a chunk of [0, chunks) that nobody
    // else gets, or -1 when all are taken. Returns when all chunks are done. `body` is copied into the pool, because
    // each cache line of thread 0's stack would have to be fetched by each worker. Rethrows what any thread threw.
    template <class Body>
    void parallel_for(int chunks, const Body& body) {
        const int sharing = chunks < 2 || resting() || !start() ? 1 : count;
        if (sharing > 1) {
            static_assert(sizeof(Body) <= sizeof(body_copy) && std::is_trivially_copyable_v<Body>);
            std::memcpy(body_copy, &body, sizeof(Body));
            call = [](ThreadPool& pool, NextChunk& next) {
                (*reinterpret_cast<const Body*>(pool.body_copy))(next.thread, next);
            };
        }
        if (failed) failed = false;  // thread 0 threw as well
        for (int i = sharing - 1; i >= 0; i--)
            slots[i].range.store(
                Range{uint32_t(int64_t(chunks) * i / sharing), uint32_t(int64_t(chunks) * (i + 1) / sharing)},
                std::memory_order_release);
        if (sharing > 1) wake();
        issued += uint32_t(chunks);
        {
            const Join join{*this};
            NextChunk next{*this, 0, -1};
            body(0, next);
        }
        if (failed) std::rethrow_exception(error);
    }

    // In the child of a fork, which has no workers; between two loops.
    void forget_workers() {
        (void)workers.release();  // whose destructor would end the process
        sleeping = 0, oversubscribed = false;
    }
    const int count;

   private:
    using Clock = std::chrono::steady_clock;
    struct Range {
        uint32_t from, to;
    };
    struct alignas(64) Slot {  // of one thread
        std::atomic<Range> range{};
        std::atomic<uint32_t> done{0};  // chunks, since the pool was made
        uint32_t taken = 0;             // by this thread, from all ranges
    };
    struct NextChunk {
        ThreadPool& pool;
        int thread, first;  // a chunk that is taken already, or -1
        int operator()() { return first < 0 ? pool.take(thread) : std::exchange(first, -1); }
    };
    struct Join {
        ThreadPool& pool;
        ~Join() { pool.join(); }
    };

    // A chunk of the range of thread `of`, or -1. A thread takes from the front of its own range and from the back of
    // others'.
    int take(int thread, int of) {
        std::atomic<Range>& range = slots[of].range;
        Range seen = range.load(std::memory_order_relaxed);
        while (seen.from < seen.to) {
            const Range left = of == thread ? Range{seen.from + 1, seen.to} : Range{seen.from, seen.to - 1};
            if (!range.compare_exchange_weak(seen, left, std::memory_order_acquire, std::memory_order_relaxed))
                continue;
            slots[thread].taken++;
            return int(of == thread ? seen.from : left.to);
        }
        return -1;
    }

    // Its own range first, then the others'.
    int take(int thread) {
        for (int i = 0; i < count; i++)
            if (const int chunk = take(thread, (thread + i) % count); chunk >= 0) return chunk;
        return -1;
    }

    // Starts the workers: at the first loop, or the first after a fork. Fewer than asked for are no error. Returns
    // whether there are any.
    bool start() {
        if (workers) return !workers->empty();
        workers = std::make_unique<std::vector<std::thread>>();
        workers->reserve(size_t(count));
        sigset_t all, before;  // workers block all signals: those belong to the caller's threads
        sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 1; i < count; i++) workers->emplace_back([this, i] { work(i); });
        } catch (const std::system_error&) {}
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return !workers->empty();
    }

    // Thread 0 works alone for RESTS times as long as workers without a processor have cost.
    void rest(Clock::duration lost) {
        is_resting = true, unanswered = 0;
        rests_until = Clock::now() + std::min<Clock::duration>(RESTS * lost, LONGEST_REST);
    }
    bool resting() { return is_resting && (is_resting = Clock::now() < rests_until); }

    // Wakes sleeping workers, at most once in WAKE_INTERVAL: a system call for each loop would cost more than the
    // workers give. A worker that falls asleep at this moment may miss the call; the next loop wakes it.
    void wake() {
        if (!sleeping.load(std::memory_order_relaxed)) return;
        const auto now = Clock::now();
        if (now - last_wake < WAKE_INTERVAL) return;
        last_wake = now;
        if (const uint32_t taken = issued - slots[0].taken; taken != taken_at_wake)
            taken_at_wake = taken, unanswered = 0;
        if (++unanswered > WAKE_ATTEMPTS) return rest(WAKE_ATTEMPTS * WAKE_INTERVAL);
        wake_ups++, wake_ups.notify_all();
    }

    bool all_done() const {
        uint32_t done = 0;
        for (int i = 0; i < count; i++) done += slots[i].done.load(std::memory_order_acquire);
        return done == issued;
    }

    // Thread 0 at the end of a loop: waits for the chunks that workers have taken.
    void join() {
        while (take(0) >= 0) {}  // only where thread 0 threw: nobody shall begin another chunk
        finish(0);
        if (all_done()) return;
        spin_wait.start();
        while (spin_wait.spin())
            if (all_done()) return;
        const auto begun = Clock::now();
        late.store(true, std::memory_order_relaxed);
        while (!all_done()) std::this_thread::sleep_for(POLL_INTERVAL);
        late.store(false, std::memory_order_relaxed);
        if (oversubscribed.load(std::memory_order_relaxed)) rest(Clock::now() - begun);
        oversubscribed.store(false, std::memory_order_relaxed);
    }

    void finish(int thread) { slots[thread].done.store(slots[thread].taken, std::memory_order_release); }

    // A worker's life.
    void work(int thread) {
        SpinWait waiting{WORKER_SPIN};
        PreemptedTime preempted;
        preempted.start();
        while (!stopping.load(std::memory_order_relaxed)) {
            if (NextChunk next{*this, thread, take(thread, thread)}; next.first >= 0) {
                try {
                    call(*this, next);
                } catch (...) {
                    if (!failed.exchange(true)) error = std::current_exception();
                }
                if (late.load(std::memory_order_relaxed)) {
                    if (preempted.since_start() > PREEMPTED) oversubscribed = true;
                    preempted.start();
                }
                finish(thread);
                waiting.start();
            } else if (!waiting.spin()) {
                const uint32_t before = wake_ups;
                sleeping++;
                if (!stopping) wake_ups.wait(before);
                sleeping--;
                waiting.start(), preempted.start();
            }
        }
    }

    static constexpr std::chrono::microseconds WORKER_SPIN{1000}, JOIN_SPIN{100}, POLL_INTERVAL{20};
    static constexpr std::chrono::microseconds WAKE_INTERVAL{100}, PREEMPTED{300};
    static constexpr int WAKE_ATTEMPTS = 10, RESTS = 20;  // workers that never come cost a twentieth of the time
    static constexpr std::chrono::seconds LONGEST_REST{5};
    const std::unique_ptr<Slot[]> slots;
    std::unique_ptr<std::vector<std::thread>> workers;
    // Thread 0's own, in cache lines that workers do not read.
    alignas(64) uint32_t issued = 0;  // chunks, since the pool was made
    SpinWait spin_wait{JOIN_SPIN};
    Clock::time_point last_wake{}, rests_until{};
    uint32_t taken_at_wake = 0;  // chunks that workers had taken at the last call that they answered
    int unanswered = 0;          // calls since workers took a chunk
    bool is_resting = false;
    // What a worker reads once it has a chunk.
    alignas(64) void (*call)(ThreadPool&, NextChunk&) = nullptr;
    unsigned char body_copy[184];
    // Seldom written.
    alignas(64) std::atomic<uint32_t> wake_ups{0};
    std::atomic<int> sleeping{0};
    std::atomic<bool> late{false}, failed{false}, oversubscribed{false}, stopping{false};
    std::exception_ptr error;  // of the worker that set `failed`
};
