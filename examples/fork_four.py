"""An agent that reads one prompt once and tries four continuations of it, side by side.

perennial serve --capacity 8 &
python examples/fork_four.py
"""

import trio

from api.client import ClientSession, connect
from runtime.events import Token
from runtime.models import find_model
from runtime.text import Text

PROMPT = [{"role": "user", "content": "Tell me a story."}]


async def try_one(session: ClientSession, text: Text, seed: int, answers: dict[int, str]) -> None:
    async with session.generate(max_tokens=60, temperature=1.0, seed=seed) as events:
        answers[seed] = text.decode([event.token_id async for event in events if isinstance(event, Token)])
    await session.close()


async def main(address: str) -> None:
    text = Text.load(find_model("seedling"))
    answers: dict[int, str] = {}
    async with connect(address) as client, client.session(text.eos_token_ids, label="fork four") as session:
        await session.append(text.render(PROMPT))
        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(try_one, await session.fork(), text, seed, answers)
    for seed in sorted(answers):
        print(f"{seed}: {answers[seed]}")


if __name__ == "__main__":
    trio.run(main, "127.0.0.1:50051")
