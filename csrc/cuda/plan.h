// The plan of a step, made on the device: where each row's tiles begin (work.h). One block makes it, once a step.
#pragma once

#include "work.h"

namespace adrenaline::cuda {

constexpr int kPlanThreads = 128;
constexpr int kPlanShared = kPlanThreads * int{sizeof(int32_t)};

// Each thread adds up neighbouring rows, and begins where the sums of the threads before it end.
ADRENALINE_DEVICE void make_plan(const Batch& batch, int32_t* first_tile) {
  const int thread = device::thread_index(), each = (batch.rows + kPlanThreads - 1) / kPlanThreads;
  const int begin = thread * each < batch.rows ? thread * each : batch.rows;
  const int end = begin + each < batch.rows ? begin + each : batch.rows;
  int32_t sum = 0;
  for (int row = begin; row < end; ++row) sum += tiles_of(batch, row);
  device::shared_store(thread * uint32_t{sizeof sum}, sum);
  device::barrier();
  int32_t at = 0;
  for (int before = 0; before < thread; ++before) at += device::shared_load<int32_t>(before * uint32_t{sizeof at});
  for (int row = begin; row < end; ++row) {
    device::store(first_tile + row, at);
    at += tiles_of(batch, row);
  }
  if (thread == kPlanThreads - 1) device::store(first_tile + batch.rows, at);
}

}  // namespace adrenaline::cuda
