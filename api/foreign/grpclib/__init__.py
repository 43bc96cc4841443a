"""grpclib's server and client, with bounds on what one peer can make them hold, run and log.

| what grpclib does | what it does here |
| --- | --- |
| raises in `data_received` at an unknown event, and at every error of h2's | ignores the event; the error ends its connection |
| waits for a message of whatever length its prefix says | refuses it at the prefix; messages on their way share a room |
| fails at an empty DATA frame, and queues them without end | takes them as what they are |
| keeps a stream for ever that is reset before its task has begun | lets go of it when its task ends, however it ends |
| opens and resets streams, pings and settings without end | ends with ENHANCE_YOUR_CALM who sends too many |
| waits for ever for a peer that takes nothing | for `reader_timeout_s`, then the call is cancelled |
| never closes a silent connection | pings it; closes it when it stays silent, or has no call for `idle_connection_s` |
| waits for ever to close a connection whose peer reads nothing | for `_CLOSING_S` |
| logs a traceback where a cancelled call comes to its end just then | says nothing |
| knows no compression | takes gzip, and says so |
| fails under trio from Python 3.12 on if it was imported before trio-asyncio | works in either order |
"""

from __future__ import annotations

from api.foreign import require
from api.foreign.grpclib.client import ForgetfulChannel
from api.foreign.grpclib.limits import Limits
from api.foreign.grpclib.server import GuardedServer
from api.foreign.grpclib.tasks import use_asyncios_current_task
from api.foreign.h2 import require_tested_h2

__all__ = ["ForgetfulChannel", "GuardedServer", "Limits", "require_tested_grpclib", "use_asyncios_current_task"]


def require_tested_grpclib() -> None:
    """Raises UntestedLibrary."""
    require("grpclib", "0.4.9", "0.4.10")
    require_tested_h2()
