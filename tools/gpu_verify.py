"""`flatstep verify --isa cuda` for a machine without the command line's libraries.

An interrupt leaves what was compared until then.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from flatstep.verify import runner
from flatstep.verify.cases import GPU, select

selection = select(quick=True, isas=[GPU], threads=[1])
report = runner.start(selection)
try:
    runner.compare(selection, report)
except KeyboardInterrupt:
    report.interrupted = True
Path(sys.argv[1]).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
print(f"{report.cases:,} of {report.planned:,} cases in {report.seconds:.0f} s")
for mismatch in report.mismatches[:20]:
    print(asdict(mismatch))
sys.exit(0 if report.ok and not report.interrupted else 1)
