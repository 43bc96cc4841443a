"""A chat loop over gRPC: each turn sends its own tokens and nothing else.

perennial serve &
python examples/chat_loop.py "Hello! My name is Anna." "What is my name?"
"""

import sys

import trio

from api.client import connect
from runtime.events import Token
from runtime.models import find_model
from runtime.text import Text


async def main(address: str, lines: list[str]) -> None:
    text = Text.load(find_model("seedling"))
    async with connect(address) as client, client.session(text.eos_token_ids, label="chat loop") as session:
        for number, line in enumerate(lines):
            first = text.render([{"role": "user", "content": line}])
            await session.append(text.render_next_turn(line, is_after_eos=True) if number else first)
            async with session.generate(max_tokens=60) as events:
                answer = [event.token_id async for event in events if isinstance(event, Token)]
            print(f"> {line}\n{text.decode(answer)}")


if __name__ == "__main__":
    trio.run(main, "127.0.0.1:50051", sys.argv[1:])
