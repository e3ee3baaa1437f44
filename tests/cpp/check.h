// The whole test framework: CHECK prints and counts what does not hold, report() is main's result.
#pragma once
#include <cstdint>
#include <cstdio>

namespace tq4::test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline long& checks() {
  static long count = 0;
  return count;
}

inline int report(const char* name) {
  std::printf("%s: %ld checks, %d failures\n", name, checks(), failures());
  return failures() == 0 && checks() > 0 ? 0 : 1;
}

// A small generator, the same on every platform (Steele et al., splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  // Uniform in [low, high].
  int range(int low, int high) {
    return low + static_cast<int>(next() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  uint64_t state_;
};

}  // namespace tq4::test

// The first failures are printed, all are counted.
#define CHECK(condition)                                                            \
  do {                                                                              \
    ++tq4::test::checks();                                                          \
    if (!(condition) && ++tq4::test::failures() <= 20) {                            \
      std::printf("%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);    \
    }                                                                               \
  } while (false)
