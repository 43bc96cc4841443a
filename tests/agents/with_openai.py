"""A program with openai's client: a tool's turn over a WebSocket, the next over another. `BASE_URL MODEL` in, text out."""

import subprocess
import sys
from typing import Any

from openai import OpenAI

url, model = sys.argv[1:]
SHELL: Any = {
    "type": "function",
    "name": "shell",
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}
client = OpenAI(base_url=f"{url}/v1", api_key="any")


def answered(connection: Any, **asked: Any) -> Any:
    """The response to what is asked on a lane of its own."""
    connection.response.create(model=model, tools=[SHELL], **asked)
    for event in connection:
        assert getattr(event, "stream_id", None) == asked.get("stream_id"), event
        if event.type == "response.completed":
            return event.response
        assert event.type not in ("error", "response.failed"), event
    raise AssertionError("the server has closed the socket")


with client.responses.connect() as connection:
    ahead = answered(connection, input="fetch the word", generate=False)
    turn = answered(connection, input=[], previous_response_id=ahead.id)
    (call,) = [item for item in turn.output if item.type == "function_call"]
    said = subprocess.run(["echo", "per42ennial"], capture_output=True, text=True, check=True).stdout
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": said}
    turn = answered(connection, input=[output], previous_response_id=turn.id, stream_id="one")
    print(turn.output_text)
with client.responses.connect() as connection:
    turn = answered(connection, input="say it again", previous_response_id=turn.id)
    print(turn.output_text)
print("stored", client.responses.retrieve(turn.id).output_text)
