"""How long `import lora_lightning` takes, as a part of what `import lightning` takes.

    python -m benchmarks.import_time [--check]

Each round is a fresh process that imports lightning, then lora_lightning. With --check the exit code is
1 when the median ratio is 0.2 or more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROUND = """
import time
start = time.perf_counter()
import lightning.pytorch
middle = time.perf_counter()
import lora_lightning
print((time.perf_counter() - middle) / (middle - start))
"""
LIMIT = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"fail when the ratio is {LIMIT} or more")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    ratios = [
        float(
            subprocess.run([sys.executable, "-c", ROUND], capture_output=True, check=True, text=True).stdout
        )
        for _ in range(options.rounds + 1)
    ][1:]  # the first fills the disk cache
    median = statistics.median(ratios)
    print(f"lora_lightning / lightning: {median:.4f} (from {min(ratios):.4f} to {max(ratios):.4f})")
    result = {"ratio": median, "min": min(ratios), "max": max(ratios), "machine": platform.machine()}
    path = Path(__file__).parent / "results" / "import_time.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return int(options.check and median >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
