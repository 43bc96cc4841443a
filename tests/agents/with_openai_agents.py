"""A program with openai's agents: a tool's turn and the next. `BASE_URL MODEL HOW` in, text out; HOW is one of `RUNS`."""

import asyncio
import subprocess
import sys
from typing import Any

from agents import Agent, Runner, function_tool, responses_websocket_session, set_tracing_disabled
from agents.models.openai_provider import OpenAIProvider
from agents.run import RunConfig

url, model, how = sys.argv[1:]
set_tracing_disabled(True)


@function_tool  # type: ignore[untyped-decorator] # Only the environment of this script has the package.
def shell(command: str) -> str:
    """Runs a command."""
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


agent = Agent(name="Helper", instructions="You are a helper.", model=model, tools=[shell])


async def resent_over_websocket() -> None:
    """The whole conversation each time."""
    async with responses_websocket_session(base_url=f"{url}/v1", api_key="any") as session:
        result: Any = await session.run(agent, "fetch the word")
        print(result.final_output)
        asked = [*result.to_input_list(), {"role": "user", "content": "say it again"}]
        print((await session.run(agent, asked)).final_output)


async def chained_over_websocket() -> None:
    """The new items alone, by the id of the response before."""
    async with responses_websocket_session(base_url=f"{url}/v1", api_key="any") as session:
        result: Any = await session.run(agent, "fetch the word", auto_previous_response_id=True)
        print(result.final_output)
        goes_on = {"previous_response_id": result.last_response_id}
        print((await session.run(agent, "say it again", **goes_on)).final_output)


async def streamed_over_http() -> None:
    """The new items alone, by the name of the conversation, with events."""
    config = RunConfig(model_provider=OpenAIProvider(base_url=f"{url}/v1", api_key="any", use_responses=True))
    for asked in ("fetch the word", "say it again"):
        result = Runner.run_streamed(agent, asked, conversation_id="conv_of_this_test", run_config=config)
        async for _ in result.stream_events():
            pass
        print(result.final_output)


RUNS = {run.__name__: run for run in (resent_over_websocket, chained_over_websocket, streamed_over_http)}
asyncio.run(RUNS[how]())
