// A GPU whose memory is the host's: for tests of the way there. Built with FLATSTEP_CUDA=EMULATED.
#include "cuda/device.h"
#include "emulate.h"

namespace flatstep::cuda {

int device_count() { return 1; }
std::string absence() { return ""; }
int device_of_host() { return 0; }

Table::~Table() = default;

const Row* Table::upload(const std::vector<Row>& rows, void*) {
  written_ = rows;
  return written_.data();
}

void run(int, void*, int layout, int variant, Launch& launch, const std::vector<Row>& rows,
         Table& table) {
  if (rows.empty()) return;
  launch.row_count = static_cast<int>(rows.size());
  launch.total = end_of(rows.back());
  if (rows.size() > kInlineRows) {
    launch.rows = table.upload(rows, nullptr);
  } else {
    for (std::size_t i = 0; i < rows.size(); ++i) launch.inline_rows[i] = rows[i];
  }
  emulation::run(emulation::find(layout, variant, launch), launch, 2);
  if (rows.front().step) emulation::run(&count<>, launch, 1);
}

}  // namespace flatstep::cuda
