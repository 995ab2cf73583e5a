// SPDX-License-Identifier: Apache-2.0
// When a memory answers: the interface of the timing models, and the parts that they share.
//
// A timing model never sees data. In each fabric cycle it states which channels of each port can transfer (`offers`),
// is told which transfers happened, and steps to the next cycle. Offers depend only on earlier cycles. An offered read
// beat or acknowledgement stays offered until it is taken, as AXI requires of a valid signal.

#ifndef GRISTMILL_MEMORY_TIMING_H
#define GRISTMILL_MEMORY_TIMING_H

#include <cstdint>
#include <memory>

namespace gristmill {

constexpr uint32_t MAX_PORTS = 4;
constexpr uint32_t MAX_BURSTS = 64;  // outstanding, per port and direction; the user of a model ensures it

// A queue (first in, first out) that does not allocate. The user must not let it overflow.
template <typename T, uint32_t SIZE>
class Ring {
    static_assert((SIZE & (SIZE - 1)) == 0, "a ring's size is a power of two");

  public:
    bool empty() const { return head_ == tail_; }
    bool full() const { return tail_ - head_ == SIZE; }
    uint32_t size() const { return tail_ - head_; }
    T& front() { return items_[head_ & (SIZE - 1)]; }
    const T& front() const { return items_[head_ & (SIZE - 1)]; }
    T& operator[](uint32_t index) { return items_[(head_ + index) & (SIZE - 1)]; }
    void push(const T& item) { items_[tail_++ & (SIZE - 1)] = item; }
    void pop() { ++head_; }
    void clear() { head_ = tail_ = 0; }

  private:
    uint32_t head_ = 0, tail_ = 0;
    T items_[SIZE] = {};
};

// xorshift64*: one multiplication per number, and the same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed = 0) : state_(seed * 0x9E3779B97F4A7C15ULL + 0x2545F4914F6CDD1DULL) {
        if (!state_) state_ = 1;
        // The first numbers of neighbouring seeds are similar.
        for (int i = 0; i < 8; ++i) next();
    }
    uint32_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1DULL) >> 32);
    }
    uint32_t between(uint32_t low, uint32_t high) {  // both included
        return low + static_cast<uint32_t>((static_cast<uint64_t>(next()) * (high - low + 1)) >> 32);
    }

  private:
    uint64_t state_;
};

// The transfers that the memory offers in the current cycle. Only port 0 writes.
struct Offers {
    bool read_ready[MAX_PORTS] = {};  // ARREADY
    bool read_valid[MAX_PORTS] = {};  // RVALID
    bool write_ready = false;         // AWREADY
    bool data_ready = false;          // WREADY, for bursts whose address has been taken
    bool acknowledge_valid = false;   // BVALID
};

class Timing {
  public:
    virtual ~Timing() = default;

    // Returns to the state after construction. A seeded model then repeats the same behaviour.
    virtual void reset() = 0;

    // The transfers of the current cycle.
    virtual void read_burst(uint32_t port, uint64_t address, uint32_t beats) = 0;
    virtual void read_beat(uint32_t port) = 0;
    virtual void write_burst(uint64_t address, uint32_t beats) = 0;
    virtual void write_beat() = 0;
    virtual void acknowledge() = 0;

    // Steps to the next cycle.
    virtual void step() = 0;

    Offers offers;
    uint64_t refreshes = 0, row_misses = 0;  // 0 in models without refresh or rows
};

// The model of a preset, or null if there is no preset of that name.
std::unique_ptr<Timing> make_timing(const char* preset, uint32_t ports, uint32_t port_bytes, uint64_t seed);

// The models that make_timing chooses from (memory_simple.cpp and memory_dram.cpp).
std::unique_ptr<Timing> make_ideal_timing(uint32_t ports);
std::unique_ptr<Timing> make_hostile_timing(uint32_t ports, uint64_t seed);
std::unique_ptr<Timing> make_dram_timing(uint32_t ports, uint32_t port_bytes, uint32_t megatransfers);

}  // namespace gristmill

#endif
