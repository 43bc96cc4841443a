"""A session that outlives its server: run it, kill the server with any signal, start that again, and run it again.

perennial serve --state_dir ~/.perennial &
python examples/survives_a_restart.py session.txt
"""

import sys
from pathlib import Path

from api.client_sync import connect_sync
from runtime.errors import SessionNotFound
from runtime.events import Token
from runtime.models import find_model
from runtime.text import Text


def main(address: str, note: Path) -> None:
    text = Text.load(find_model("seedling"))
    with connect_sync(address) as client:
        try:
            session = client.find_session(note.read_text())
            length = session.info().history_length
            session.append(text.render_next_turn("What is my name?", is_after_eos=True), length)
        except (FileNotFoundError, SessionNotFound):
            session = client.create_session(text.eos_token_ids, label="survivor")
            note.write_text(session.id)
            session.append(text.render([{"role": "user", "content": "Hello! My name is Anna."}]))
        with session.generate(max_tokens=60) as events:
            print(text.decode([event.token_id for event in events if isinstance(event, Token)]))


if __name__ == "__main__":
    main("127.0.0.1:50051", Path(sys.argv[1]))
