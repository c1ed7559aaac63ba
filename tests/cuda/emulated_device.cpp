// A GPU whose memory is the host's: for tests of the way there. Built with FLATSTEP_CUDA=EMULATED.
#include "cuda/device.h"
#include "cuda/form.h"
#include "emulate.h"

namespace flatstep::cuda {

int device_count() { return 1; }
std::string absence() { return ""; }
int device_of_host() { return 0; }

Table::~Table() = default;

const void* Table::upload(const void* rows, std::size_t bytes, void*) {
  written_.assign(static_cast<const char*>(rows), static_cast<const char*>(rows) + bytes);
  return written_.data();
}

void run(int, void*, int layout, int variant, Launch& launch, const std::vector<Row>& rows,
         Table& table) {
  if (rows.empty()) return;
  const Form form = chosen_form();
  if (form.in_bulk) launch.pipeline = form.pipeline;
  launch.row_count = static_cast<int>(rows.size());
  launch.total = end_of(rows.back());
  if (rows.size() > kInlineRows) {
    launch.rows = table.upload(rows, nullptr);
  } else {
    for (std::size_t i = 0; i < rows.size(); ++i) launch.inline_rows[i] = rows[i];
  }
  emulation::run_update(layout, variant, launch, 2);
  if (rows.front().step) emulation::run(&count<>, launch, 1);
}

void run_norm(int, void*, bool largest, const std::vector<NormRow>& rows, double* room, NormEnd end,
              Table& table) {
  end.row_count = static_cast<std::int64_t>(rows.size());
  if (!rows.empty()) {
    NormLaunch launch = {};
    launch.row_count = static_cast<int>(rows.size());
    launch.largest = largest;
    launch.end = end_of(rows.back());
    launch.of_tiles = room;
    launch.of_rows = room + launch.end;
    if (rows.size() > kInlineNormRows) {
      launch.rows = table.upload(rows, nullptr);
    } else {
      std::copy(rows.begin(), rows.end(), launch.inline_rows);
    }
    emulation::run(&norms_of_tiles<>, launch, 2);
    emulation::run(&norms_of_rows<>, launch, 2);
    end.of_rows = launch.of_rows;
  }
  end.largest = largest;
  end.adds = true;
  emulation::run(&end_norm<>, end, 1);
}

void finish_norm(int, void*, const NormEnd& end) { emulation::run(&end_norm<>, end, 1); }

}  // namespace flatstep::cuda
