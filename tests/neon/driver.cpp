// Runs the updates that write_vectors.py wrote (its head describes the file) on every instruction
// set of this build and compares the results with the reference's, on bytes, for all sizes from 0
// to the record's, or for that one alone where it is large.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/floating_point.h"
#include "registry.h"

namespace {

using namespace flatstep;
using Bytes = std::vector<unsigned char>;

constexpr std::int64_t kLongest = 256;  // of the records of which every size is tried
constexpr std::int64_t kFrame = 64;     // elements of noise around an array

struct Record {
  std::string rule, type;
  std::uint32_t flags = 0;
  std::int64_t step = 0;
  double scale = 0;
  std::vector<double> hyper;
  std::uint64_t count = 0;
  std::vector<Bytes> before, after;  // p, g, the states in use
};

template <class T>
T read(std::istream& file) {
  T value;
  if (!file.read(reinterpret_cast<char*>(&value), sizeof value)) {
    throw std::runtime_error("the file of vectors is cut short");
  }
  return value;
}

std::string read_text(std::istream& file) {
  std::string text(read<std::uint32_t>(file), '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

int layout_of(const std::string& type) {
  int at = 0;
  for (const LayoutInfo& layout : layouts()) {
    if (name_of(layout.param) == type) return at;
    ++at;
  }
  throw std::runtime_error("this build has no layout of " + type);
}

Record read_record(std::istream& file) {
  Record record;
  record.rule = read_text(file);
  record.type = read_text(file);
  record.flags = read<std::uint32_t>(file);
  record.step = read<std::int64_t>(file);
  record.scale = read<double>(file);
  record.hyper.resize(read<std::uint32_t>(file));
  for (double& value : record.hyper) value = read<double>(file);
  record.count = read<std::uint64_t>(file);
  const auto arrays = read<std::uint32_t>(file);
  const int size = size_of(layouts()[static_cast<std::size_t>(layout_of(record.type))].param);
  for (std::vector<Bytes>* group : {&record.before, &record.after}) {
    for (std::uint32_t i = 0; i < arrays; ++i) {
      Bytes& array = group->emplace_back(record.count * static_cast<std::size_t>(size));
      if (!file.read(reinterpret_cast<char*>(array.data()),
                     static_cast<std::streamsize>(array.size()))) {
        throw std::runtime_error("the file of vectors is cut short");
      }
    }
  }
  return record;
}

// NaN equals NaN in 32 and 64 bits; 16 bits have one NaN, which is exact.
bool same_value(const unsigned char* a, const unsigned char* b, int size) {
  if (std::memcmp(a, b, static_cast<std::size_t>(size)) == 0) return true;
  if (size == 4) {
    float x, y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    return x != x && y != y;
  }
  if (size == 8) {
    double x, y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    return x != x && y != y;
  }
  return false;
}

std::string hexadecimal(const unsigned char* value, int size) {
  std::string text = "0x";
  for (int i = size - 1; i >= 0; --i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", value[i]);
    text += digits;
  }
  return text;
}

// An array between two frames of noise, starting at any element of aligned memory.
class Framed {
 public:
  Framed(const Bytes& values, std::int64_t count, int size, std::int64_t lead)
      : offset_((kFrame + lead) * size), expected_((2 * kFrame + lead + count) * size) {
    for (std::size_t i = 0; i < expected_.size(); ++i) {
      expected_[i] = static_cast<unsigned char>(37 * i + 11);
    }
    expect(values, count, size);
    memory_ = expected_;
  }

  void expect(const Bytes& values, std::int64_t count, int size) {
    if (count > 0) std::memcpy(expected_.data() + offset_, values.data(), count * size);
  }

  void* start() { return memory_.data() + offset_; }

  // The first element that differs, counted from the array's start; empty where none does.
  std::string difference(int size) const {
    for (std::size_t at = 0; at < memory_.size(); at += size) {
      const unsigned char *found = memory_.data() + at, *expected = expected_.data() + at;
      if (same_value(found, expected, size)) continue;
      const std::int64_t element = (static_cast<std::int64_t>(at) - offset_) / size;
      return "element " + std::to_string(element) + " is " + hexadecimal(found, size) +
             ", expected " + hexadecimal(expected, size);
    }
    return "";
  }

 private:
  std::int64_t offset_;
  Bytes memory_, expected_;
};

#if defined(__aarch64__)
std::uint64_t floating_point_mode() {
  std::uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_floating_point_mode(std::uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
constexpr std::uint64_t kHostileMode = 1U << 24 | 1U << 22;  // flush to zero, round upwards
#else
std::uint64_t floating_point_mode() { return _mm_getcsr(); }
void set_floating_point_mode(std::uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
constexpr std::uint64_t kHostileMode = 0x1f80 | 1U << 15 | 1U << 6 | 2U << 13;
#endif

// Empty where the update of the record's first count elements has the reference's bytes.
std::string fault(const Record& record, std::int64_t count) {
  const RuleInfo& rule = find_rule(record.rule);
  const int layout = layout_of(record.type);
  const int size = size_of(layouts()[static_cast<std::size_t>(layout)].param);
  if (record.flags >= rule.allowed.size() || !rule.allowed[record.flags] ||
      record.hyper.size() != rule.hyper.size()) {
    return "the rule is not the one that wrote the vectors";
  }
  std::vector<Framed> arrays;
  for (std::size_t i = 0; i < record.before.size(); ++i) {
    arrays.emplace_back(record.before[i], count, size, static_cast<std::int64_t>(2 * i + 1));
  }
  Arrays pointers{arrays[0].start(), arrays[1].start(), {}};
  std::size_t next = 2;
  for (int i = 0; i < kMaxStates; ++i) {
    if (rule.state_masks[record.flags] >> i & 1) pointers.state[i] = arrays.at(next++).start();
  }
  const Scalars scalars = rule.prepare(record.hyper.data(), record.step, record.scale);
  const Kernel kernel = find_kernel(rule, record.flags, layout);

  const std::uint64_t usual_mode = floating_point_mode();
  set_floating_point_mode(kHostileMode);
  {
    const IeeeMode ieee;
    kernel(pointers, 0, count, scalars.data());
  }
  const bool restored = floating_point_mode() == kHostileMode;
  set_floating_point_mode(usual_mode);
  if (!restored) return "the floating-point mode was not restored";

  for (std::size_t i = 0; i < arrays.size(); ++i) {
    arrays[i].expect(record.after[i], count, size);
    const std::string difference = arrays[i].difference(size);
    if (!difference.empty()) {
      return "array " + std::to_string(i) + " of (p, g, states), " + std::to_string(count) +
             " elements: " + difference;
    }
  }
  return "";
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: driver VECTORS\n");
    return 2;
  }
  try {
    std::ifstream file(arguments[1], std::ios::binary);
    std::string magic(8, '\0');
    if (!file.read(magic.data(), 8) || magic != "flatstep") {
      throw std::runtime_error("not a file of vectors");
    }
    long passed = 0, failed = 0;
    while (file.peek() != std::ifstream::traits_type::eof()) {
      const Record record = read_record(file);
      const auto longest = static_cast<std::int64_t>(record.count);
      for (const Isa* const* isa = kIsas; *isa; ++isa) {
        use_isa((*isa)->name);
        std::string message;
        for (std::int64_t n = longest > kLongest ? longest : 0; n <= longest; ++n) {
          message = fault(record, n);
          if (!message.empty()) break;
        }
        ++(message.empty() ? passed : failed);
        if (!message.empty()) {
          std::printf("%s, flags %u, %s, step %lld, scale %g, on %s: %s\n", record.rule.c_str(),
                      static_cast<unsigned>(record.flags), record.type.c_str(),
                      static_cast<long long>(record.step), record.scale, (*isa)->name,
                      message.c_str());
        }
      }
    }
    std::printf("%ld passed, %ld failed\n", passed, failed);
    return passed > 0 && failed == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
