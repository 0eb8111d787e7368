// PyTorch computes on threads of GNU's OpenMP library. At the end of each of its parallel loops a thread spins until
// the others are there, for 3 ms by default. Where other programs have the processors, the thread that it waits for may
// have none: four runs on two busy cores took 4 s a step, and 0.3 to 0.6 s where they do not spin.
//
// GOMP_SPINCOUNT, which every command of this package sets, shortens that. The library reads it when it is loaded,
// which is too late for a program that has imported PyTorch. But the library also spins for 100 rounds only while it
// has more threads than there are processors (libgomp's `gomp_managed_threads`). So one more thread gets a team of its
// own here, and sleeps for good. That acts on everything in the process that uses the library.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <system_error>
#include <thread>

#include "parallel.h"

inline void let_openmp_rest(Fork fork) {
    sigset_t all, before;  // signals belong to the caller's threads
    sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread([fork] {
            fork([](void*) {}, nullptr, 2, 0);
            for (;;) pause();
        }).detach();
    } catch (const std::system_error&) {}
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}
