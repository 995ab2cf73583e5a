// SPDX-License-Identifier: Apache-2.0
// Memories that do not model a mechanism: an ideal memory, and a hostile one that uses all the freedom that AXI allows.

#include "memory_timing.h"

namespace gristmill {
namespace {

// Each port has one of each kind of read channel.
enum Channel { READ_ADDRESS, READ_DATA = MAX_PORTS, WRITE_ADDRESS = 2 * MAX_PORTS, WRITE_DATA, ACKNOWLEDGE, CHANNELS };

// A burst waits for its latency, then delivers one beat per cycle. The bursts of a port are in order. The behaviour
// chooses the latencies and may stall any channel in any cycle:
//   void reset()
//   uint32_t read_latency(), write_latency()  cycles from AR to the first R, from the last W to B
//   bool holds_back(channel)                  called once per channel and cycle
template <typename Behaviour>
class QueuedTiming final : public Timing {
  public:
    QueuedTiming(uint32_t ports, const Behaviour& behaviour) : ports_(ports), behaviour_(behaviour) { reset(); }

    void reset() override {
        now_ = 0;
        offers = Offers();
        for (auto& port : reads_) port.clear();
        incoming_.clear();
        acknowledgements_.clear();
        behaviour_.reset();
        offer();
    }
    void read_burst(uint32_t port, uint64_t, uint32_t beats) override {
        reads_[port].push({now_ + behaviour_.read_latency(), beats});
    }
    void read_beat(uint32_t port) override {
        offers.read_valid[port] = false;
        if (!--reads_[port].front().beats) reads_[port].pop();
    }
    void write_burst(uint64_t, uint32_t beats) override { incoming_.push({0, beats}); }
    void write_beat() override {
        if (--incoming_.front().beats) return;
        incoming_.pop();
        acknowledgements_.push({now_ + behaviour_.write_latency(), 0});
    }
    void acknowledge() override {
        offers.acknowledge_valid = false;
        acknowledgements_.pop();
    }
    void step() override {
        ++now_;
        offer();
    }

  private:
    struct Burst {
        uint64_t due;  // cycle
        uint32_t beats;
    };
    using Queue = Ring<Burst, MAX_BURSTS>;

    bool due(const Queue& queue) const { return !queue.empty() && queue.front().due <= now_; }

    void offer() {
        for (uint32_t port = 0; port < ports_; ++port) {
            offers.read_ready[port] = !behaviour_.holds_back(READ_ADDRESS + port);
            // A beat that is still offered has not been taken, and stays offered.
            offers.read_valid[port] |= !behaviour_.holds_back(READ_DATA + port) && due(reads_[port]);
        }
        offers.write_ready = !behaviour_.holds_back(WRITE_ADDRESS);
        offers.data_ready = !behaviour_.holds_back(WRITE_DATA);
        offers.acknowledge_valid |= !behaviour_.holds_back(ACKNOWLEDGE) && due(acknowledgements_);
    }

    uint32_t ports_;
    uint64_t now_ = 0;
    Behaviour behaviour_;
    Queue reads_[MAX_PORTS], incoming_, acknowledgements_;
};

// A memory that does not limit the ports.
struct Ideal {
    void reset() {}
    uint32_t read_latency() { return GM_IDEAL_READ_LATENCY; }
    uint32_t write_latency() { return GM_IDEAL_WRITE_LATENCY; }
    bool holds_back(uint32_t) { return false; }
};

// How often a channel stalls. For some hundred cycles the rate is constant (never, rarely, half the time, or nearly
// always), then it changes; sometimes the channel stalls for 2,000 cycles. With one constant rate, queues would not run
// both full and empty.
class Temper {
  public:
    explicit Temper(uint64_t seed = 0) : random_(seed) {}
    bool stalls() {
        if (!left_) change();
        --left_;
        if (!rate_) return false;
        return (random_.next() & 15) < rate_;
    }

  private:
    void change() {
        constexpr uint32_t RATES[] = {0, 1, 8, 15};  // stalls in 16 cycles
        const uint32_t mood = random_.between(0, 31);
        left_ = mood ? random_.between(50, 1000) : 2000;
        rate_ = mood ? RATES[mood & 3] : 16;
    }

    Random random_;
    uint32_t left_ = 0, rate_ = 0;
};

class Hostile {
  public:
    explicit Hostile(uint64_t seed) : seed_(seed) {}
    void reset() {
        // Each channel has its own seed. With equal stalls, no port would ever overtake another.
        uint64_t seed = seed_ * CHANNELS;
        for (auto& temper : tempers_) temper = Temper(seed++);
        latencies_ = Random(~seed_);
    }
    uint32_t read_latency() { return latencies_.between(1, 300); }
    uint32_t write_latency() { return latencies_.between(1, 300); }
    bool holds_back(uint32_t channel) { return tempers_[channel].stalls(); }

  private:
    uint64_t seed_;
    Temper tempers_[CHANNELS];
    Random latencies_;
};

}  // namespace

std::unique_ptr<Timing> make_ideal_timing(uint32_t ports) {
    return std::make_unique<QueuedTiming<Ideal>>(ports, Ideal());
}

std::unique_ptr<Timing> make_hostile_timing(uint32_t ports, uint64_t seed) {
    return std::make_unique<QueuedTiming<Hostile>>(ports, Hostile(seed));
}

}  // namespace gristmill
