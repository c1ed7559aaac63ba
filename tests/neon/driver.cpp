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
  std::string rule;
  Types types = {};
  std::uint32_t variant = 0;
  std::int64_t step = 0;
  double scale = 0;
  std::vector<double> hyper;
  double unscale = 1, average_decay = 0;
  std::uint64_t seed = 0;
  std::int64_t step_count = 1;
  std::uint32_t first = 0;
  std::uint64_t count = 0;
  std::vector<int> sizes;            // of an element of each array
  std::vector<Bytes> before, after;  // p, g, the states in use, master, average
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

Stored type_of(const std::string& name) {
  for (const Types& types : layouts()) {
    if (name_of(types.param) == name) return types.param;
  }
  throw std::runtime_error("this build has no type " + name);
}

Record read_record(std::istream& file) {
  Record record;
  record.rule = read_text(file);
  for (Stored* type : {&record.types.param, &record.types.grad, &record.types.state}) {
    *type = type_of(read_text(file));
  }
  record.variant = read<std::uint32_t>(file);
  record.step = read<std::int64_t>(file);
  record.scale = read<double>(file);
  record.hyper.resize(read<std::uint32_t>(file));
  for (double& value : record.hyper) value = read<double>(file);
  record.unscale = read<double>(file);
  record.average_decay = read<double>(file);
  record.seed = read<std::uint64_t>(file);
  record.step_count = read<std::int64_t>(file);
  record.first = read<std::uint32_t>(file);
  record.count = read<std::uint64_t>(file);
  record.sizes.resize(read<std::uint32_t>(file));
  for (int& size : record.sizes) size = static_cast<int>(read<std::uint32_t>(file));
  for (std::vector<Bytes>* group : {&record.before, &record.after}) {
    for (const int size : record.sizes) {
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
  const int layout = find_layout(record.types);
  if (!refusal(rule, record.variant, layout).empty() || record.hyper.size() != rule.hyper.size()) {
    return "the rule is not the one that wrote the vectors";
  }
  std::vector<Framed> arrays;
  for (std::size_t i = 0; i < record.before.size(); ++i) {
    arrays.emplace_back(record.before[i], count, record.sizes[i],
                        static_cast<std::int64_t>(2 * i + 1));
  }
  Arrays pointers{arrays[0].start(), arrays[1].start(), {}};
  std::size_t next = 2;
  for (int i = 0; i < kMaxStates; ++i) {
    if (rule.state_masks[record.variant & kFlagMask] >> i & 1) {
      pointers.state[i] = arrays.at(next++).start();
    }
  }
  const unsigned extras = record.variant & ~kFlagMask;
  void* const master = extras & kMaster ? arrays.at(next++).start() : nullptr;
  void* const average = extras & kAverage ? arrays.at(next++).start() : nullptr;
  const Scalars scalars = rule.prepare(record.hyper.data(), record.step, record.scale);
  const Work work = {
      pointers,
      scalars.data(),
      record.types,
      extras,
      master,
      average,
      record.first,
      prepare_extras(record.unscale, record.average_decay, record.seed, record.step_count)};
  const Kernel kernel = find_kernel(rule, record.variant, layout);

  const std::uint64_t usual_mode = floating_point_mode();
  set_floating_point_mode(kHostileMode);
  {
    const IeeeMode ieee;
    kernel(work, 0, count);
  }
  const bool restored = floating_point_mode() == kHostileMode;
  set_floating_point_mode(usual_mode);
  if (!restored) return "the floating-point mode was not restored";

  for (std::size_t i = 0; i < arrays.size(); ++i) {
    arrays[i].expect(record.after[i], count, record.sizes[i]);
    const std::string difference = arrays[i].difference(record.sizes[i]);
    if (!difference.empty()) {
      return "array " + std::to_string(i) + " of (p, g, states, ...), " + std::to_string(count) +
             " elements: " + difference;
    }
  }
  return "";
}

// Empty where the norm of the record's gradient is the reference's.
std::string norm_fault(const Record& record) {
  const auto count = static_cast<std::int64_t>(record.count);
  const std::int64_t tiles = (count + kNormTile - 1) / kNormTile;
  const bool largest = record.variant != 0;
  std::vector<double> norms(static_cast<std::size_t>(tiles));
  current_isa().tables->norms(record.before[0].data(), record.types.grad, count, 0, tiles, largest,
                              norms.data());
  double total = 0;
  for (const double norm : norms) total = largest ? maximum(total, norm) : total + norm;
  if (std::memcmp(&total, record.hyper.data(), sizeof total) == 0) return "";
  return "the norm is " + std::to_string(total) + ", expected " + std::to_string(record.hyper[0]);
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
        const bool is_norm = record.rule == "norm";
        if (is_norm) message = norm_fault(record);
        for (std::int64_t n = longest > kLongest ? longest : 0; n <= longest && !is_norm; ++n) {
          message = fault(record, n);
          if (!message.empty()) break;
        }
        ++(message.empty() ? passed : failed);
        if (!message.empty()) {
          std::printf("%s, variant %u, %s, step %lld, scale %g, on %s: %s\n", record.rule.c_str(),
                      static_cast<unsigned>(record.variant), name_of(record.types.param),
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
