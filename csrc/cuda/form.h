// Which form of the update a build with both runs, and in what shape: what measurements choose, by
// FLATSTEP_CUDA_FORM.
#pragma once

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace flatstep::cuda {

inline constexpr const char* kFormVariable = "FLATSTEP_CUDA_FORM";

struct Form {
  bool in_bulk = false;
  int blocks = 0;  // of a processor, at most; 0: as many as it runs at once
  Pipeline pipeline = {3, 4096};

  friend bool operator==(const Form&, const Form&) = default;
};

// Of a text like "vector,blocks=2" or "bulk,stages=4,tile=8192".
inline Form form_of(const std::string& text) {
  Form form;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const int number = equals == word.npos ? 0 : std::atoi(word.c_str() + equals + 1);
    if (word == "bulk" || word == "vector") {
      form.in_bulk = word == "bulk";
    } else if (name == "blocks" && number > 0) {
      form.blocks = number;
    } else if (name == "stages" && number >= 2 && number <= kMostStages) {
      form.pipeline.stages = number;
    } else if (name == "tile" && number > 0 && number % kTileMultiple == 0) {
      form.pipeline.tile = number;
    } else {
      throw std::invalid_argument(std::string(kFormVariable) + ": '" + word +
                                  "' is none of vector, bulk, blocks=N, stages=N from 2 to " +
                                  std::to_string(kMostStages) + ", tile=N, a multiple of " +
                                  std::to_string(kTileMultiple));
    }
  }
  return form;
}

inline Form chosen_form() {
  const char* const text = std::getenv(kFormVariable);
  return text ? form_of(text) : Form{};
}

}  // namespace flatstep::cuda
