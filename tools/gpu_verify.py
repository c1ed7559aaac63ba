"""`flatstep verify --isa cuda` for a machine without the command line's libraries."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from flatstep import verify
from flatstep.verify.cases import GPU

report = verify.run(quick=True, isas=[GPU], threads=[1], distances=False)
Path(sys.argv[1]).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
print(f"{report.cases:,} of {report.planned:,} cases in {report.seconds:.0f} s")
for mismatch in report.mismatches[:20]:
    print(asdict(mismatch))
sys.exit(0 if report.ok else 1)
