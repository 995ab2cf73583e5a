# SPDX-License-Identifier: Apache-2.0
"""``python -m sim.device``: build the simulated device and print its place as one line of JSON.

It has the options of ``python -m hw.build`` except ``--out`` and ``--top``.
"""

import json
import sys

from hw.spec.cli import run_cli
from sim.device.build import DeviceBuildError, build


def main(options: list[str]) -> int:
    """The command line; returns the exit code."""
    try:
        built = build(options)
    except DeviceBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"library": str(built.library), "manifest": str(built.manifest)}))
    return 0


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
