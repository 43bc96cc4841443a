"""The entry point of the command `perennial`."""

from __future__ import annotations

import sys

from api.installation import intruders


def main() -> int:
    """Runs the command. If it cannot be imported because other files have taken the place of ours, it names them."""
    try:
        from api import cli

        return cli.main()
    except ImportError as error:
        found = intruders()
        if not found:
            raise
        for intruder in found:
            print(f"perennial: {intruder}", file=sys.stderr)
        print(f"perennial: what failed: {error}", file=sys.stderr)
        return 1
