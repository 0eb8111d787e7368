// The engines of a process, and what a fork does to them.
//
// A fork copies memory and the one thread that calls it. The copy of a step that another thread was at would never end,
// and there would be no helpers. So a fork waits until no step runs, and the engines of the child start helpers of
// their own.
#pragma once

#include <pthread.h>

#include "engine.h"

namespace {

class Engines {
   public:
    static Engines& all() {
        static Engines& engines = *new Engines;  // never destroyed: threads may run until the process ends
        return engines;
    }
    Engine* add(std::unique_ptr<Engine> engine) {
        const std::lock_guard<std::mutex> lock(turn);
        list.push_back(engine.get());
        return engine.release();
    }
    void remove(Engine* engine) {
        {
            const std::lock_guard<std::mutex> lock(turn);
            std::erase(list, engine);
        }
        delete engine;
    }

   private:
    Engines() {
        pthread_atfork([] { all().before(); }, [] { all().after(false); }, [] { all().after(true); });
    }
    void before() {
        turn.lock();
        for (Engine* engine : list) engine->turn.lock();
    }
    void after(bool child) {
        for (Engine* engine : list) {
            if (child) engine->pool.forget();
            engine->turn.unlock();
        }
        turn.unlock();
    }
    std::mutex turn;
    std::vector<Engine*> list;
};

}  // namespace
