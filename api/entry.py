"""Where the command `perennial` begins."""

from __future__ import annotations

import sys

from api.installation import intruders


def main() -> int:
    """Runs the command; where it cannot be loaded because something stands in the place of ours, that is named."""
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
