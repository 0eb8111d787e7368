// All engines of a process, and what a fork does to them.
//
// A fork copies memory and the one thread that calls it. In the child, a step of another thread would never end, and an
// engine would have no workers. So a fork waits until no step runs, and the child's engines start workers of their own.
#pragma once

#include <pthread.h>

#include "engine.h"

namespace {

class EngineRegistry {
   public:
    static EngineRegistry& instance() {
        static EngineRegistry& registry =
            *new EngineRegistry;  // never destroyed: threads may run until the process ends
        return registry;
    }
    Engine* add(std::unique_ptr<Engine> engine) {
        const std::lock_guard<std::mutex> lock(mutex);
        engines.push_back(engine.get());
        return engine.release();
    }
    void remove(Engine* engine) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            std::erase(engines, engine);
        }
        delete engine;
    }

   private:
    EngineRegistry() {
        pthread_atfork([] { instance().before_fork(); }, [] { instance().after_fork(false); },
                       [] { instance().after_fork(true); });
    }
    void before_fork() {
        mutex.lock();
        for (Engine* engine : engines) engine->step_mutex.lock();
    }
    void after_fork(bool child) {
        for (Engine* engine : engines) {
            if (child) engine->pool.forget_workers();
            engine->step_mutex.unlock();
        }
        mutex.unlock();
    }
    std::mutex mutex;
    std::vector<Engine*> engines;
};

}  // namespace
