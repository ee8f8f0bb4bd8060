// Errors of set-up: thrown with the place they come from. Nothing on the per-layer path throws.
#pragma once

#include <stdexcept>
#include <string>

namespace adrenaline {

[[noreturn]] inline void fail(const char* what, const char* file, int line) {
  throw std::runtime_error(std::string(what) + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace adrenaline

// A macro only for the sake of file and line: C++17 has no std::source_location.
#define ADRENALINE_CHECK(condition, what) \
  ((condition) ? void(0) : ::adrenaline::fail((what), __FILE__, __LINE__))
