// Waiting in a loop, and noticing that the operating system gave the processor to somebody else meanwhile.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
inline void cpu_relax() { _mm_pause(); }
#elif defined(__aarch64__)
inline void cpu_relax() { asm volatile("yield"); }
#else
inline void cpu_relax() {}
#endif

// How long a thread spins before it goes to sleep. A thread that was preempted while it spun knows that others need the
// processor, and its next waits are short.
class SpinWait {
   public:
    explicit SpinWait(std::chrono::microseconds limit) : limit(limit) {}

    // Begins a wait.
    void start() { polls = 0, short_waits -= short_waits > 0; }

    // Spins once; returns whether the wait may go on.
    bool spin() {
        cpu_relax();
        if (++polls % POLLS_PER_CLOCK) return true;
        const auto now = Clock::now();
        if (polls == POLLS_PER_CLOCK) begun = now;
        else if (now - last > PREEMPTED) short_waits = SHORT_WAITS;
        last = now;
        return now - begun < (short_waits ? std::min(limit, SHORT_LIMIT) : limit);
    }

   private:
    using Clock = std::chrono::steady_clock;
    static constexpr int POLLS_PER_CLOCK = 16;  // reading the clock takes longer than a poll
    static constexpr int SHORT_WAITS = 100;     // waits after a preemption that are short
    static constexpr std::chrono::microseconds SHORT_LIMIT{10};
    static constexpr std::chrono::microseconds PREEMPTED{200};  // so few polls take this long only without a processor
    std::chrono::microseconds limit;
    Clock::time_point begun, last;
    int polls = 0, short_waits = 0;
};

// Time in which a thread was ready to run and had no processor: wall time less its own processor time.
class PreemptedTime {
   public:
    void start() { wall = Clock::now(), processor = processor_time(); }
    std::chrono::nanoseconds since_start() const { return Clock::now() - wall - (processor_time() - processor); }

   private:
    using Clock = std::chrono::steady_clock;
    static std::chrono::nanoseconds processor_time() {
        timespec time{};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
    }
    Clock::time_point wall;
    std::chrono::nanoseconds processor{};
};
