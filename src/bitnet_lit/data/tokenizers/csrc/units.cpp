// The inner loop of fast_encoder.py: finds the units of a text, and their token ids in a table.
//
// A unit is what stands between two spaces; further spaces of a run belong to the unit behind them, or are dropped.
// Where lines are cut, a line break begins a unit too, one that is *glued* to the text before it. fast_encoder.py says
// why the ids of a text are those of its units. The table is filled by Python, with what SentencePiece gives for a
// unit. Several texts come with a NUL between them, which is written as the token that begins a text.
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

// Eight bytes of a unit and eight of its ids lie in the entry itself: that is all for most words.
struct Entry {
    uint64_t head = 0, ids = 0;
    uint32_t hash = 0, more = 0;  // `more`: where the rest of the unit, or of the ids, lies in `bytes`
    uint16_t size = 0, id_bytes = 0;
    bool is_glued = false, is_used = false;
};

struct Table {
    std::vector<Entry> entries = std::vector<Entry>(1 << 12);  // a power of two, at most half of them used
    std::string bytes;
    size_t count = 0;
};

uint64_t load(const char* from) {
    uint64_t word;
    std::memcpy(&word, from, 8);
    return word;
}

// The first `size` bytes of a word, in memory's order on a little-endian machine.
uint64_t first(uint64_t word, int64_t size) { return size >= 8 ? word : word & ((uint64_t(1) << (8 * size)) - 1); }

// Marks the bytes of a word that equal `byte`; those behind the first mark may be wrong.
uint64_t equal(uint64_t word, uint64_t byte) {
    const uint64_t ones = 0x0101010101010101, difference = word ^ (ones * byte);
    return (difference - ones) & ~difference & (ones << 7);
}

uint32_t hash_of(const char* unit, int64_t size, bool is_glued) {
    uint64_t hash = is_glued ? 0x9E3779B97F4A7C15 : 0;
    for (int64_t at = 0; at < size; at += 8) {
        hash = (hash ^ first(load(unit + at), size - at)) * 0xFF51AFD7ED558CCD;
        hash ^= hash >> 32;
    }
    return uint32_t(hash ^ (hash >> 29));
}

Entry& place_of(Table& table, const char* unit, int64_t size, bool is_glued, uint32_t hash) {
    const size_t mask = table.entries.size() - 1;
    const uint64_t head = first(load(unit), size);
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
        Entry& entry = table.entries[at];
        if (!entry.is_used) return entry;
        if (entry.hash != hash || entry.head != head || entry.size != size || entry.is_glued != is_glued) continue;
        if (size <= 8 || std::memcmp(table.bytes.data() + entry.more, unit + 8, size - 8) == 0) return entry;
    }
}

}  // namespace

extern "C" {

// Where the work on a text stands. `start` and `end` name the unit that was looked for last.
struct State {
    const char* text;  // eight bytes behind `size` may be read
    char* out;         // with room for all ids and eight bytes more
    int64_t size, position, written, start, end;
    int32_t cuts_lines, drops_spaces, is_glued;
    int32_t bos_bytes;
    uint64_t bos;
};

Table* units_new() { return new Table; }

void units_free(Table* table) { delete table; }

int64_t units_count(const Table* table) { return int64_t(table->count); }

void units_clear(Table* table) { *table = Table(); }

// Note the ids of a unit. Eight bytes behind the unit may be read.
void units_add(Table* table, const char* unit, int64_t size, int32_t is_glued, const char* ids, int64_t id_bytes) {
    if (2 * (table->count + 1) > table->entries.size()) {
        std::vector<Entry> before(2 * table->entries.size());
        before.swap(table->entries);
        const size_t mask = table->entries.size() - 1;
        for (const Entry& entry : before) {
            if (!entry.is_used) continue;
            size_t at = entry.hash & mask;
            while (table->entries[at].is_used) at = (at + 1) & mask;
            table->entries[at] = entry;
        }
    }
    const uint32_t hash = hash_of(unit, size, is_glued != 0);
    Entry& entry = place_of(*table, unit, size, is_glued != 0, hash);
    if (entry.is_used) return;
    entry.head = first(load(unit), size);
    entry.hash = hash;
    entry.more = uint32_t(table->bytes.size());
    entry.size = uint16_t(size);
    entry.id_bytes = uint16_t(id_bytes);
    entry.is_glued = is_glued != 0;
    entry.is_used = true;
    if (size > 8) table->bytes.append(unit + 8, size - 8);
    if (id_bytes > 8) {
        table->bytes.append(ids, id_bytes);
    } else {
        std::memcpy(&entry.ids, ids, id_bytes);
    }
    ++table->count;
}

// Write the ids of the units from `position` on. Returns 0 at the end of the text, and 1 at a unit that is not in the
// table: the caller writes its ids, and goes on.
int32_t units_encode(Table* table, State* state) {
    const char* const text = state->text;
    const bool cuts_lines = state->cuts_lines, drops_spaces = state->drops_spaces;
    int64_t at = state->position;
    char* out = state->out + state->written;
    while (at < state->size) {
        if (text[at] == 0) {
            std::memcpy(out, &state->bos, 8);
            out += state->bos_bytes;
            ++at;
            continue;
        }
        const int64_t start = at;
        while (text[at] == ' ') ++at;  // of a run; the text does not end with a space
        const bool is_glued = cuts_lines && text[at] == '\n' && at == start;
        at += is_glued;
        for (;;) {
            const uint64_t word = load(text + at);
            const uint64_t found = equal(word, ' ') | equal(word, 0) | (cuts_lines ? equal(word, '\n') : 0);
            if (found) {
                at += std::countr_zero(found) / 8;
                break;
            }
            at += 8;
            if (at >= state->size) break;
        }
        at = at < state->size ? at : state->size;
        const int64_t size = at - start;
        int64_t next = at + (at < state->size && text[at] == ' ');
        while (drops_spaces && next < state->size && text[next] == ' ') ++next;
        const Entry* entry = nullptr;
        if (size < UINT16_MAX) {
            entry = &place_of(*table, text + start, size, is_glued, hash_of(text + start, size, is_glued));
        }
        if (entry == nullptr || !entry->is_used) {
            state->start = start;
            state->end = at;
            state->is_glued = is_glued;
            state->position = next;
            state->written = out - state->out;
            return 1;
        }
        std::memcpy(out, &entry->ids, 8);
        if (entry->id_bytes > 8) {
            const int64_t behind = entry->more + (size > 8 ? size - 8 : 0);
            std::memcpy(out, table->bytes.data() + behind, entry->id_bytes);
        }
        out += entry->id_bytes;
        at = next;
    }
    state->position = at;
    state->written = out - state->out;
    return 0;
}
}
