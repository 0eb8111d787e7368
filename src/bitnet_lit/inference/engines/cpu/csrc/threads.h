// Work that several threads share, piece by piece.
//
// The calling thread, thread 0, never waits for a helper to come: it gives every thread a share of the pieces, and a
// helper that is awake finds its share and begins. Whoever has finished its own takes from others' shares, thread 0
// too. To take a piece is all there is to joining: the work is over when all pieces are taken and those who took some
// say that they are done. So a helper that got no processor, because others need it, costs nothing.
//
// What a phase of the work costs is how often a cache line goes from one core to another. Here a helper has one line of
// its own: thread 0 writes the share into it, the helper takes pieces there and then says there how many it has done.
//
// Helpers wait awake for a moment, because waking takes longer than a small model takes for a layer; then they sleep.
// One that was taken off its processor while it waited awake knows that others need it, and sleeps sooner for a while.
// Where one is taken off in the middle of a piece, thread 0 has to wait for it; where one is called several times and
// does not come, the calls cost something. After either thread 0 works alone for many times as long as it lost. So
// several threads on a machine that is busy are about as fast as one.
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
#include <utility>
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
        stopping = true;
        wakes++, wakes.notify_all();
        for (auto& helper : *helpers) helper.join();
    }
    Pool(const Pool&) = delete;

    // does(thread, next) on thread 0 and on helpers: next() is a piece from [0, pieces) that nobody else has, or -1
    // where all are taken. `does` is copied: what it refers to should be old. Returns when all are done. Throws what
    // thread 0 throws, and std::bad_alloc for what a helper throws.
    template <class Does>
    void divide(int pieces, const Does& does) {
        const int sharing = pieces < 2 || alone() || !start() ? 1 : count;
        if (sharing > 1) {
            // Copied, because each cache line of thread 0's stack would be fetched by each helper.
            static_assert(sizeof(Does) <= sizeof(work) && std::is_trivially_copyable_v<Does>);
            std::memcpy(work, &does, sizeof(Does));
            call = [](Pool& pool, Next& next) { (*reinterpret_cast<const Does*>(pool.work))(next.thread, next); };
        }
        if (failed) failed = false;  // thread 0 threw, too
        for (int i = sharing - 1; i >= 0; i--)
            shares[i].rest.store(
                Rest{uint32_t(int64_t(pieces) * i / sharing), uint32_t(int64_t(pieces) * (i + 1) / sharing)},
                std::memory_order_release);
        if (sharing > 1) wake();
        given += uint32_t(pieces);
        {
            const Closing closing{*this};
            Next next{*this, 0, -1};
            does(0, next);
        }
        if (failed) throw std::bad_alloc();
    }

    // In the child of a fork, where there are no helpers; between two calls of `divide`.
    void forget() {
        (void)helpers.release();  // whose destructor would end the process
        asleep = 0, crowded = false;
    }
    const int count;

   private:
    using Clock = std::chrono::steady_clock;
    struct Rest {
        uint32_t from, to;
    };  // pieces
    struct alignas(64) Share {
        std::atomic<Rest> rest{};
        std::atomic<uint32_t> done{0};  // pieces, since the pool was made
        uint32_t taken = 0;             // by this thread, from all shares
    };
    struct Next {
        Pool& pool;
        int thread, first;  // a piece that is taken already, or -1
        int operator()() { return first < 0 ? pool.take(thread) : std::exchange(first, -1); }
    };
    struct Closing {
        Pool& pool;
        ~Closing() { pool.close(); }
    };

    // A piece of the share of thread `of`, or -1. A thread takes from the front of its own share and from the back of
    // others'.
    int take(int thread, int of) {
        std::atomic<Rest>& rest = shares[of].rest;
        Rest seen = rest.load(std::memory_order_relaxed);
        while (seen.from < seen.to) {
            const Rest left = of == thread ? Rest{seen.from + 1, seen.to} : Rest{seen.from, seen.to - 1};
            if (!rest.compare_exchange_weak(seen, left, std::memory_order_acquire, std::memory_order_relaxed)) continue;
            shares[thread].taken++;
            return int(of == thread ? seen.from : left.to);
        }
        return -1;
    }

    // Its own share first, then the others': processors that share a machine are seldom equally fast.
    int take(int thread) {
        for (int i = 0; i < count; i++)
            if (const int piece = take(thread, (thread + i) % count); piece >= 0) return piece;
        return -1;
    }

    // At the first work, or the first after a fork. Fewer threads than asked for are no error. Returns whether there
    // are helpers.
    bool start() {
        if (helpers) return !helpers->empty();
        helpers = std::make_unique<std::vector<std::thread>>();
        helpers->reserve(size_t(count));
        sigset_t all, before;  // signals are the caller's
        sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 1; i < count; i++) helpers->emplace_back([this, i] { help(i); });
        } catch (const std::system_error&) {}
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return !helpers->empty();
    }

    // For RESTS times as long as helpers without a processor have cost.
    void work_alone(Clock::duration lost) {
        resting = true, unanswered = 0;
        rested = Clock::now() + std::min<Clock::duration>(RESTS * lost, LONGEST_REST);
    }
    bool alone() { return resting && (resting = Clock::now() < rested); }

    // A helper that falls asleep at this moment may miss the call: the next work calls it.
    void wake() {
        if (!asleep.load(std::memory_order_relaxed)) return;
        const auto now = Clock::now();
        if (now - woken < WAKING) return;  // a call to the system for every layer would cost more than helpers give
        woken = now;
        if (const uint32_t taken = given - shares[0].taken; taken != helped) helped = taken, unanswered = 0;
        if (++unanswered > CALLS) return work_alone(CALLS * WAKING);
        wakes++, wakes.notify_all();
    }

    bool all_done() const {
        uint32_t done = 0;
        for (int i = 0; i < count; i++) done += shares[i].done.load(std::memory_order_acquire);
        return done == given;
    }

    void close() {
        while (take(0) >= 0) {}  // where thread 0 threw, nobody begins anything more
        finish(0);
        if (all_done()) return;
        patience.begin();
        while (patience.lasts())
            if (all_done()) return;
        const auto begun = Clock::now();
        late.store(true, std::memory_order_relaxed);
        while (!all_done()) std::this_thread::sleep_for(LOOKING);
        late.store(false, std::memory_order_relaxed);
        if (crowded.load(std::memory_order_relaxed)) work_alone(Clock::now() - begun);
        crowded.store(false, std::memory_order_relaxed);
    }

    void finish(int thread) { shares[thread].done.store(shares[thread].taken, std::memory_order_release); }

    void help(int thread) {
        Patience patience{AWAKE};
        Loss loss;
        loss.begin();
        while (!stopping.load(std::memory_order_relaxed)) {
            if (Next next{*this, thread, take(thread, thread)}; next.first >= 0) {
                try {
                    call(*this, next);
                } catch (...) {
                    failed = true;
                }
                if (late.load(std::memory_order_relaxed)) {
                    if (loss.since_begin() > LOST) crowded = true;
                    loss.begin();
                }
                finish(thread);
                patience.begin();
            } else if (!patience.lasts()) {
                const uint32_t before = wakes;
                asleep++;
                if (!stopping) wakes.wait(before);
                asleep--;
                patience.begin(), loss.begin();
            }
        }
    }

    static constexpr std::chrono::microseconds AWAKE{1000}, WAITING{100}, LOOKING{20}, WAKING{100}, LOST{300};
    static constexpr int CALLS = 10, RESTS = 20;  // so helpers that never come cost a twentieth
    static constexpr std::chrono::seconds LONGEST_REST{5};
    const std::unique_ptr<Share[]> shares;
    std::unique_ptr<std::vector<std::thread>> helpers;
    // Thread 0's, in cache lines that helpers do not read.
    alignas(64) uint32_t given = 0;  // pieces, since the pool was made
    Patience patience{WAITING};
    Clock::time_point woken{}, rested{};
    uint32_t helped = 0;  // pieces that helpers had taken when one was called
    int unanswered = 0;   // calls since helpers took a piece
    bool resting = false;
    // What a helper reads once it has a piece.
    alignas(64) void (*call)(Pool&, Next&) = nullptr;
    unsigned char work[184];
    // Seldom written.
    alignas(64) std::atomic<uint32_t> wakes{0};
    std::atomic<int> asleep{0};
    std::atomic<bool> late{false}, failed{false}, crowded{false}, stopping{false};
};
