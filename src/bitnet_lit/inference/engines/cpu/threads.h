// Work that several threads share, piece by piece.
//
// The calling thread, thread 0, never waits for a helper to come: it opens some work, and whoever is awake takes pieces of
// it, thread 0 too. The work is over when all pieces are taken and all who took one are done; who comes later finds it
// closed. So a helper that got no processor, because others need it, costs nothing.
//
// Helpers wait awake for a moment, because waking takes longer than a small model takes for a layer; then they sleep. One
// that was taken off its processor while it waited awake knows that others need it, and sleeps sooner for a while. Where one
// is taken off in the middle of a piece, thread 0 has to wait for it: after that it works alone for a while, and for longer
// each time. So several threads on a machine that is busy are about as fast as one.
#pragma once

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
inline void relax() { asm volatile("yield"); }
#else
inline void relax() {}
#endif

// How long a thread goes on waiting awake.
class Patience {
   public:
    explicit Patience(std::chrono::microseconds whole) : whole(whole) {}
    void begin() {  // of a wait
        turns = 0, busy -= busy > 0;
    }
    bool lasts() {
        relax();
        if (++turns % TURNS) return true;
        const auto now = Clock::now();
        if (turns == TURNS) begun = now;
        else if (now - looked > LOST) busy = BUSY;  // for so few turns: others ran here meanwhile
        looked = now;
        return now - begun < (busy ? std::min(whole, BRIEF) : whole);
    }

   private:
    using Clock = std::chrono::steady_clock;
    static constexpr int TURNS = 16, BUSY = 100;  // looks at the clock; waits that are brief after a processor was lost
    static constexpr std::chrono::microseconds BRIEF{10}, LOST{200};
    std::chrono::microseconds whole;
    Clock::time_point begun, looked;
    int turns = 0, busy = 0;
};

// Time that a thread was awake and had no processor.
class Loss {
   public:
    void begin() { wall = Clock::now(), processor = used(); }
    std::chrono::nanoseconds since_begin() const { return Clock::now() - wall - (used() - processor); }

   private:
    using Clock = std::chrono::steady_clock;
    static std::chrono::nanoseconds used() {
        timespec time{};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
    }
    Clock::time_point wall;
    std::chrono::nanoseconds processor{};
};

class Pool {
   public:
    explicit Pool(int threads) : count(std::max(threads, 1)), shares(new Share[size_t(count)]) {}
    ~Pool() {
        if (!helpers) return;
        stopping.store(true, std::memory_order_relaxed);
        state.fetch_add(NEXT);
        state.notify_all();
        for (auto& helper : *helpers) helper.join();
    }
    Pool(const Pool&) = delete;

    // does(thread, next) on thread 0 and on helpers: next() is a piece from [0, pieces) that nobody else has, or -1 where all
    // are taken. `does` is copied: what it refers to should be old. Returns when all are done. Throws what thread 0 throws, and std::bad_alloc for what a helper throws.
    template <class Does>
    void divide(int pieces, const Does& does) {
        for (int i = 0; i < count; i++)
            shares[i].rest.store(Rest{uint32_t(int64_t(pieces) * i / count), uint32_t(int64_t(pieces) * (i + 1) / count)}, std::memory_order_relaxed);
        if (pieces < 2 || alone() || !start()) return does(0, Next{*this, 0});
        // Copied, because each cache line of thread 0's stack would be fetched by each helper.
        static_assert(sizeof(Does) <= sizeof(work) && std::is_trivially_copyable_v<Does>);
        std::memcpy(work, &does, sizeof(Does));
        call = [](Pool& pool, int thread) { (*reinterpret_cast<const Does*>(pool.work))(thread, Next{pool, thread}); };
        open();
        {
            const Closing closing{*this};
            does(0, Next{*this, 0});
        }
        if (failed.exchange(false)) throw std::bad_alloc();
    }

    // In the child of a fork, where there are no helpers; between two calls of `divide`.
    void forget() {
        (void)helpers.release();  // whose destructor would end the process
        state = 0, asleep = 0, failed = waiting = crowded = false;
    }
    const int count;

   private:
    struct Rest { uint32_t from, to; };  // pieces
    struct alignas(64) Share { std::atomic<Rest> rest; };
    struct Next {
        Pool& pool;
        int thread;
        int operator()() const { return pool.take(thread); }
    };
    struct Closing {
        Pool& pool;
        ~Closing() { pool.close(); }
    };
    // What `state` holds: how many helpers are at work, whether there is work, and a number of it.
    static constexpr uint32_t ACTIVE = (1 << 16) - 1, OPEN = 1 << 16, NEXT = 1 << 17;

    // A thread takes from the front of its own share, one piece after the other, and then from the back of others' shares:
    // processors that share a machine are seldom equally fast.
    int take(int thread) {
        for (int i = 0; i < count; i++) {
            std::atomic<Rest>& rest = shares[(thread + i) % count].rest;
            Rest seen = rest.load(std::memory_order_relaxed);
            while (seen.from < seen.to) {
                const Rest left = i ? Rest{seen.from, seen.to - 1} : Rest{seen.from + 1, seen.to};
                if (rest.compare_exchange_weak(seen, left, std::memory_order_relaxed)) return int(i ? left.to : seen.from);
            }
        }
        return -1;
    }

    // At the first work, or the first after a fork. Fewer threads than asked for are no error. Returns whether there are helpers.
    bool start() {
        if (helpers) return !helpers->empty();
        helpers = std::make_unique<std::vector<std::thread>>();
        helpers->reserve(size_t(count));
        sigset_t all, before;  // signals are the caller's
        sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 1; i < count; i++) helpers->emplace_back([this, i] { help(i); });
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return !helpers->empty();
    }

    // Whether thread 0 works without helpers now, after one of them had no processor.
    bool alone() {
        if (!crowded.load(std::memory_order_relaxed) && !resting) return false;
        const auto now = Clock::now();
        if (crowded.exchange(false)) {
            rest = now - rested < REMEMBERED ? std::min(2 * rest, LONGEST_REST) : SHORTEST_REST;
            rested = now + rest, resting = true;
        }
        return resting = now < rested;
    }

    void open() {
        // No helper is at work, and none begins while `state` is closed.
        state.store(state.load(std::memory_order_relaxed) + NEXT + OPEN, std::memory_order_release);
        if (!asleep.load(std::memory_order_relaxed)) return;
        const auto now = Clock::now();
        if (now - woken < WAKING) return;  // a call to the system for every layer would cost more than helpers give
        woken = now;
        state.notify_all();
    }

    void close() {
        patience.begin();
        while (true) {
            uint32_t now = state.load(std::memory_order_acquire);
            if (!(now & ACTIVE)) {
                if (state.compare_exchange_weak(now, now - OPEN, std::memory_order_acq_rel)) return;
            } else if (!patience.lasts()) {
                waiting.store(true);
                if ((now = state.load()) & ACTIVE) state.wait(now);
                waiting.store(false);
            }
        }
    }

    void help(int thread) {
        Patience patience{AWAKE};
        Loss loss;
        loss.begin();
        uint32_t done = 0;  // the work that this thread was at last
        while (true) {
            uint32_t now = state.load(std::memory_order_acquire);
            if (stopping.load(std::memory_order_relaxed)) return;
            if (now & OPEN && (now & ~ACTIVE) != done) {
                if (!state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
                done = now & ~ACTIVE;
                const auto begun = Clock::now();
                try {
                    call(*this, thread);
                } catch (...) {
                    failed = true;
                }
                if ((state.fetch_sub(1) & ACTIVE) == 1 && waiting.load()) state.notify_all();
                if (Clock::now() - begun > LOST) {  // or else no time can have been lost
                    if (loss.since_begin() > LOST) crowded = true;
                    loss.begin();
                }
                patience.begin();
            } else if (!patience.lasts()) {
                asleep++;
                state.wait(now);
                asleep--;
                patience.begin(), loss.begin();
            }
        }
    }

    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::microseconds AWAKE{1000}, WAITING{100}, WAKING{100}, LOST{300};
    static constexpr std::chrono::milliseconds SHORTEST_REST{10}, LONGEST_REST{500}, REMEMBERED{1000};
    std::unique_ptr<Share[]> shares;
    std::unique_ptr<std::vector<std::thread>> helpers;
    Patience patience{WAITING};  // of thread 0
    Clock::time_point woken{}, rested{};
    std::chrono::milliseconds rest{};
    bool resting = false;
    alignas(64) void (*call)(Pool&, int) = nullptr;
    alignas(16) unsigned char work[176];
    alignas(64) std::atomic<uint32_t> state{0};  // helpers look at it all the time
    alignas(64) std::atomic<int> asleep{0};
    std::atomic<bool> waiting{false}, failed{false}, crowded{false}, stopping{false};
};
