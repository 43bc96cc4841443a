"""`perennial` and `api.http:app` with more patience than a slow machine uses up, for tests of what else they do.

python -m tests.contract.patient serve
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

LAST_WORDS_S = 10.0

if __name__ == "__main__":
    # Threads that libraries start at their import are to inherit this, as they do where `perennial serve` imports them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

# A drain has to end before Hypercorn's own `shutdown_timeout` of 60 s.
vars(import_module("api.server")).update(DRAIN_S=45.0, LAST_WORDS_S=LAST_WORDS_S)
vars(import_module("api.hosting"))["LAST_WORDS_S"] = LAST_WORDS_S
vars(import_module("api.foreign.hypercorn"))["_EARLY_S"] = 5.0
vars(import_module("api.reader"))["_LIMIT_S"] = 600.0
vars(import_module("api.accepting"))["_SAID_ONCE_IN_S"] = 3600.0
import_module("runtime.durable.directory").DirectoryStore.leaving_s = 60.0

if __name__ == "__main__":
    sys.exit(import_module("api.cli").main())

app = import_module("api.http").app
